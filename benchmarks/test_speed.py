"""One benchmark for each op, shape, dtype, pass and way to compute it, timed once it agrees with the reference."""

import statistics
import time

import measure
import pytest
import torch
from ops import OPS, REFERENCE, left_out
from shapes import CPU, GPU

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = GPU if DEVICE.type == "cuda" else CPU
DTYPES = (torch.float32, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32,)
SECONDS = 1.0 if DEVICE.type == "cuda" else 0.3  # of wall-clock timing a benchmark

# Relative to the norm of the reference's result: sums in another order, and in bf16 also roundings along the way.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

CASES = [
    pytest.param(op, shape, dtype, backward, variant, id=f"{op}-{shape}-{str(dtype)[6:]}-{name}-{variant}")
    for op in OPS
    for shape in SHAPES
    for dtype in DTYPES
    for backward, name in ((False, "forward"), (True, "forward + backward"))
    for variant in OPS[op].variants
]


def runner(call, backward, cotangent):
    """Return the function that is timed: the call, or the call and the gradient of all its inputs."""
    if not backward:
        return torch.no_grad()(call)
    return lambda *inputs: torch.autograd.grad(call(*inputs), inputs, cotangent)


def replayed(run, inputs):
    """Return a function that replays `run` on `inputs` from a CUDA graph and gives its result."""
    kept = []
    graph = measure.capture(lambda *tensors: kept.append(run(*tensors)), [inputs])

    def call(*_):
        graph.replay()
        return kept[-1]

    return call


def assert_agreement(got, want, tolerance):
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for number, (mine, reference) in enumerate(zip(got, want)):
        error = (mine.float() - reference.float()).norm() / reference.float().norm()
        assert error <= tolerance, f"result {number} is {error:.2g} off the reference, {tolerance:.2g} is allowed"


@pytest.mark.parametrize(("op", "shape", "dtype", "backward", "variant"), CASES)
def test_speed(benchmark, rows, leave_out, op, shape, dtype, backward, variant):
    chosen, sizes = OPS[op].variants[variant], SHAPES[shape]
    reason = left_out(chosen, DEVICE, backward)
    if reason is not None:
        leave_out(variant, reason)
    torch._dynamo.reset()
    inputs = tuple(x.requires_grad_(backward) for x in OPS[op].inputs(sizes, dtype, DEVICE))
    cotangent = torch.randn_like(inputs[0]) if backward else None
    run = runner(chosen.build(sizes, DEVICE), backward, cotangent)
    want = runner(OPS[op].variants[REFERENCE].build(sizes, DEVICE), backward, cotangent)(*inputs)
    timed = replayed(run, inputs) if chosen.graph else run
    assert_agreement(timed(*inputs), want, AGREEMENT[dtype])
    del want

    def synchronized():
        timed(*inputs)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    first = min(_seconds(synchronized) for _ in range(3))
    rounds = max(5, min(200, int(SECONDS / first)))
    benchmark.group = f"{op} {shape} {str(dtype)[6:]} {'forward + backward' if backward else 'forward'}"
    benchmark.pedantic(synchronized, rounds=rounds, iterations=1, warmup_rounds=3)

    row = {
        "op": op,
        "shape": shape,
        "sizes": list(sizes),
        "dtype": str(dtype)[6:],
        "pass": "forward + backward" if backward else "forward",
        "variant": variant,
    }
    seconds = wall = statistics.median(benchmark.stats.stats.data)
    if DEVICE.type == "cuda":
        device = measure.device_seconds(run, inputs)
        seconds = device["cold"]
        row |= {"device_us": 1e6 * device["warm"], "device_cold_us": 1e6 * device["cold"]}
        row |= {"peak_mb": measure.peak_bytes(run, inputs) / 1e6}
    cost = OPS[op].cost(sizes, inputs[0].element_size(), backward)
    if cost is not None:
        row["gb_per_s"] = cost.bytes / seconds / 1e9
        if DEVICE.type == "cuda":
            row["percent_of_copy"] = 100 * cost.bytes / seconds / measure.copy_bytes_per_second()
    benchmark.extra_info.update(row)
    rows.append(row | {"wall_us": 1e6 * wall})


def _seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
