"""What the tests of both kernels share: where to run, how close is close, and the compiler's reports."""

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
# What the compiler made of every variant. After a change of a kernel that is meant:
# python -m simsid.kernels.inspect --update tests/kernels/compiled.json
BASELINE = pathlib.Path(__file__).with_name("compiled.json")

# The in-painting block of the default model, by the name that each op's inspection cases give it.
MAIN_CASE = {
    "memory": "[A fp32]",
    "attention": "4x4 D=512 float32 pads",
    "layer_norm": "D=512 float32",
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


def inspect(*arguments):
    """Run `python -m simsid.kernels.inspect --json` on compiled Triton and return its reports and Triton's version."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "simsid.kernels.inspect", "--json", *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    return list(result["reports"].values()), result["triton"]


def inspect_every_variant(op):
    """Return the reports of all variants of `op`: stored ones where nothing changed, the rest compiled now.

    Another version of Triton than the baseline's changes everything, so that only the main case is compiled.
    """
    if json.loads(BASELINE.read_text())["triton"] == importlib.metadata.version("triton"):
        return inspect("--op", op, "--known", str(BASELINE))[0]
    return inspect("--op", op, "--match", MAIN_CASE[op], "--arch", "90")[0]


def assert_no_growth(reports, room=1.05):
    """Assert that no variant exceeds its baseline but for `room`, and that none without a stack gets one."""
    baseline = json.loads(BASELINE.read_text())
    installed = importlib.metadata.version("triton")
    if baseline["triton"] != installed:
        pytest.skip(f"the baseline is of Triton {baseline['triton']}, this is {installed}")
    stored = {(report["name"], report["arch"]): report for report in baseline["reports"].values()}
    for report in reports:
        key = report["name"], report["arch"]
        assert key in stored, (
            f"{key} is not in {BASELINE.name}: run python -m simsid.kernels.inspect --update {BASELINE}"
        )
        known = stored[key]
        for count in ("instructions", "registers", "shared", "stack", "spills"):
            assert report[count] <= room * known[count], (
                f"{key}: {report[count]} {count}, the baseline has {known[count]}"
            )
