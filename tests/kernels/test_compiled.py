"""The compile gate: every variant of every kernel, compiled for three architectures, against stored reports."""

import dataclasses
import sys

import pytest
from harness import (
    KERNELS,
    ROOT,
    assert_no_growth,
    compile_every_variant,
    compile_main_cases,
    needs_compiler,
    reports_of,
)

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
        reports = [report for report in compile_main_cases() if report["name"].startswith(KERNELS[op])]
        assert len(reports) >= 2, "forward and backward"
        assert_no_growth(reports, room=1.0)


@needs_compiler
def test_16_bit_warp_group_products_are_fenced():
    """Triton 3.6 leaves the fence out where the loop is pipelined."""
    products = [report for report in reports_of("memory", "[A bf16 memory too", (90,)) if report["hgmma"]]
    assert len(products) >= 2 and all(report["fences"] > 0 for report in products)


def test_unfenced_product_is_a_problem():
    counts = dict.fromkeys((field.name for field in dataclasses.fields(Report)), 0)
    report = Report(**{**counts, "name": "", "arch": 90, "hgmma": 1})
    assert problems(report) == ["no fence.proxy.async before its products"]
    assert not problems(dataclasses.replace(report, fences=1))


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
