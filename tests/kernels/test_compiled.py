"""The compile gate: every variant of every kernel, compiled for three architectures, against stored reports."""

import sys

import pytest
from harness import MAIN_CASE, ROOT, assert_no_growth, compile_ahead, compile_every_variant, needs_compiler

sys.path.insert(0, str(ROOT / "benchmarks"))

from compiled import OPS, Report, code_of, problems


@needs_compiler
@pytest.mark.parametrize("op", OPS)
class TestVariants:
    def test_no_variant_spills_uses_atomics_or_exceeds_shared_memory(self, op):
        reports = compile_every_variant(op)
        assert len(reports) >= 2
        faults = {f"{report['name']} sm_{report['arch']}": problems(Report(**report)) for report in reports}
        assert not any(faults.values()), faults

    def test_no_variant_exceeds_its_baseline(self, op):
        assert_no_growth(compile_every_variant(op))

    def test_new_compilation_does_not_exceed_stored_reports(self, op):
        reports = compile_ahead("--op", op, "--match", MAIN_CASE[op], "--arch", "90")
        assert len(reports) >= 2, "forward and backward"
        assert_no_growth(reports, room=1.0)


def test_code_ignores_comments_and_docstrings_but_not_statements():
    def first(x):
        """Double."""
        return 2 * x  # twice

    def second(x):
        return 2 * x

    def third(x):
        return 3 * x

    codes = [code_of(function).partition(":")[2] for function in (first, second, third)]
    assert codes[0] == codes[1] != codes[2]
