"""Shared by the tests of the kernels: where to run, tolerances, and the compiler's reports."""

import functools
import importlib.metadata
import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from simsid.kernels.backend import TRITON_INSTALLED, why_not_triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ROOT = pathlib.Path(__file__).parents[2]
# What the compiler made of every variant. After an intended change of a kernel:
# python benchmarks/compiled.py --update tests/kernels/compiled.json
BASELINE = pathlib.Path(__file__).with_name("compiled.json")

# How the variants of the default model's in-painting block are called, of every op.
MAIN_CASES = ("[A fp32]", "ward 4x4 D=512 float32 pads]", "ward D=512 float32]", "[D=512 float32")

# How the names of an op's kernels begin.
KERNELS = {
    "memory": "memory_",
    "attention": "neighbor_attention_",
    "layer_norm": "residual_layer_norm_",
    "sums": "sum_parts_",
}

needs_kernels = pytest.mark.skipif(why_not_triton(DEVICE) is not None, reason=str(why_not_triton(DEVICE)))
needs_compiler = pytest.mark.skipif(not TRITON_INSTALLED, reason="Triton is not installed")


def assert_as_close_as_torch(name, fused, same_dtype, exact, slack=4.0, scale=0.0):
    """Assert |fused - exact| <= 2 |same_dtype - exact| + eps elementwise.

    `exact` is the reference in float64, `same_dtype` the reference on the very inputs of the fused op. eps is `slack`
    float32 roundings of the tensor's largest value, or of `scale` where the exact result is that of a cancellation; to
    a half-precision output it adds that output's own rounding.
    """
    assert fused.shape == same_dtype.shape and fused.dtype == same_dtype.dtype, f"{name}: {fused.shape} {fused.dtype}"
    fused, same_dtype, exact = (tensor.detach().cpu() for tensor in (fused, same_dtype, exact))
    assert torch.isfinite(exact).all(), f"{name}: the reference is not finite"
    if not exact.numel():
        return
    eps = slack * 2.0**-24 * max(exact.abs().amax().item(), scale)
    if fused.dtype != torch.float32:
        limits = torch.finfo(fused.dtype)
        # Half a unit in the last place.
        eps = eps + 0.505 * limits.eps * exact.abs().clamp(min=limits.smallest_normal)
    error, allowed = (fused.double() - exact).abs(), 2 * (same_dtype.double() - exact).abs() + eps
    bad = ~(error <= allowed)
    assert not bad.any(), (
        f"{name}: {int(bad.sum())} of {bad.numel()} elements off, error up to {error[bad].max():.3g} "
        f"where {allowed[bad].min():.3g} is allowed, first at {bad.nonzero()[0].tolist()}"
    )


def terms(p, dw):
    """Return the size of the terms of p (dw - sum p dw), the gradient of a softmax over the last dimension.

    Where one probability is nearly 1 the gradient is far smaller than its terms, whose rounding it keeps.
    """
    return p * (dw.abs() + (p * dw).sum(-1, keepdim=True).abs())


def compile_ahead(*arguments):
    """Run `benchmarks/compiled.py --json` on compiled Triton and return the reports."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    # A script's folder replaces the current one on the path, where a checkout that is not installed is found.
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [environment.get("PYTHONPATH"), str(ROOT)]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "compiled.py"), "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    return list(json.loads(done.stdout)["reports"].values())


def baseline_fits():
    """Return whether the baseline is of the installed version of Triton; another version changes every variant."""
    return json.loads(BASELINE.read_text())["triton"] == importlib.metadata.version("triton")


@functools.cache
def compile_every_variant(op):
    """Return the reports of all variants of `op`: the stored report where nothing changed, the rest compiled now.

    Where the baseline is of another version of Triton, only the main case is compiled.
    """
    if baseline_fits():
        return [report for report in _compile_all() if report["name"].startswith(KERNELS[op])]
    return [report for report in compile_main_cases() if report["name"].startswith(KERNELS[op])]


@functools.cache
def compile_main_cases():
    """Return the reports of the main case of every op, compiled now in one process for sm_90."""
    return compile_ahead("--arch", "90", *(f"--match={case}" for case in MAIN_CASES))


@functools.cache
def _compile_all():
    """Report on all ops in one process: where nothing changed, its imports take longer than the rest."""
    return compile_ahead("--known", str(BASELINE))


def reports_of(op, match, architectures):
    """Return the reports of the variants whose name contains `match`, for some architectures."""
    if not baseline_fits():
        return compile_ahead("--op", op, "--match", match, *(f"--arch={arch}" for arch in architectures))
    reports = compile_every_variant(op)
    return [report for report in reports if match in report["name"] and report["arch"] in architectures]


def assert_no_growth(reports, room=1.05):
    """Assert that no variant exceeds `room` times its baseline, and that none without a stack gets one."""
    baseline = json.loads(BASELINE.read_text())
    installed = importlib.metadata.version("triton")
    if baseline["triton"] != installed:
        pytest.skip(f"the baseline is of Triton {baseline['triton']}, this is {installed}")
    stored = {(report["name"], report["arch"]): report for report in baseline["reports"].values()}
    for report in reports:
        key = report["name"], report["arch"]
        assert key in stored, f"{key} is not in {BASELINE.name}: run python benchmarks/compiled.py --update {BASELINE}"
        known = stored[key]
        for count in ("instructions", "registers", "shared", "stack", "spills"):
            assert report[count] <= room * known[count], (
                f"{key}: {report[count]} {count}, the baseline has {known[count]}"
            )
