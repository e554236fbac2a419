"""What the compiler makes of every variant of every kernel, for three architectures, and that it does not get worse."""

import functools

import pytest
from harness import MAIN_CASE, assert_no_growth, inspect, inspect_every_variant, needs_compiler

from simsid.kernels.inspect import OPS, Report, problems

pytestmark = [needs_compiler, pytest.mark.parametrize("op", OPS)]
every_variant = functools.cache(inspect_every_variant)


def test_no_variant_has_a_stack_spills_atomics_or_too_much_shared_memory(op):
    reports = every_variant(op)
    assert len(reports) >= 2
    faults = {f"{report['name']} sm_{report['arch']}": problems(Report(**report)) for report in reports}
    assert not any(faults.values()), faults


def test_no_variant_grew(op):
    assert_no_growth(every_variant(op))


def test_the_stored_reports_are_what_compiles(op):
    fresh, _ = inspect("--op", op, "--match", MAIN_CASE[op], "--arch", "90")
    assert len(fresh) >= 2, "forward and backward"
    assert_no_growth(fresh, room=1.0)
