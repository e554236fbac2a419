"""One benchmark per op, shape, dtype and pass: every variant agrees with the reference, then all are timed in turn."""

import functools

import measure
import pytest
import torch
from measure import Times
from ops import FUSED, OPS, PASSES, REFERENCE, least_cost, why_skipped
from shapes import CPU, GPU

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPES = GPU if DEVICE.type == "cuda" else CPU
DTYPES = (torch.float32, torch.bfloat16) if DEVICE.type == "cuda" else (torch.float32,)
CPU_SECONDS = 0.3  # of timing per group; a GPU takes a fixed number of rounds

# Relative to the norm of the reference: sums in another order, and in bf16 also the roundings in between.
AGREEMENT = {torch.float32: 1e-4, torch.bfloat16: 3e-2}

CASES = [
    pytest.param(op, shape, dtype, which, id=f"{op}-{shape}-{str(dtype)[6:]}-{which}")
    for op in OPS
    for dtype in DTYPES
    for shape in SHAPES
    for which in PASSES
]


def prepare(call, which, inputs, cotangent):
    """Return what is timed, on copies of the inputs and the cotangent: one pass, without arguments.

    The backward pass alone runs on the tensors that its forward pass saved, again and again.
    """
    inputs = tuple(x.detach().clone().requires_grad_(which != "forward") for x in inputs)
    if which == "forward":
        call = torch.no_grad()(call)
        return lambda: call(*inputs)
    cotangent = cotangent.clone()
    if which == "both":
        return lambda: torch.autograd.grad(call(*inputs), inputs, cotangent)
    out = call(*inputs)
    return lambda: torch.autograd.grad(out, inputs, cotangent, retain_graph=True)


def assert_agreement(variant, got, want, tolerance):
    got, want = (x if isinstance(x, tuple) else (x,) for x in (got, want))
    for number, (mine, reference) in enumerate(zip(got, want, strict=True)):
        error = (mine.float() - reference.float()).norm() / reference.float().norm()
        assert error <= tolerance, f"{variant}: result {number} is {error:.2g} off, {tolerance:.2g} is allowed"


@functools.lru_cache(maxsize=1)
def built(op, shape):
    """Return the call of every variant, cached for the passes of a shape, so that each is compiled once."""
    measure.forget_compiled()
    return {
        name: variant.build(SHAPES[shape], DEVICE)
        for name, variant in OPS[op].variants.items()
        if why_skipped(variant, DEVICE) is None
    }


def measurements(prepared, bytes_read):
    """Return what is measured of a variant: name to a function that measures once and returns seconds."""
    work = prepared()
    functions = {"wall": lambda: measure.wall_seconds(work)}
    if DEVICE.type == "cuda":
        replays = measure.device_replays(prepared, bytes_read)
        functions |= {name: graph.seconds for name, graph in replays.items()}
    return functions


def row_of(seconds, cost):
    """Return the columns of a variant from its measurements, by name."""
    times = {name: Times.of(values) for name, values in seconds.items()}
    row = {f"{name}_us": 1e6 * value.median for name, value in times.items()}
    row["spread"] = times.get("device", times["wall"]).spread
    if cost is not None:
        judged = times.get("cold", times["wall"]).median
        row["gb_per_s"] = cost.bytes / judged / 1e9
        if DEVICE.type == "cuda":
            row["percent_of_copy"] = 100 * cost.bytes / judged / measure.copy_bytes_per_second()
    return row


def agreeing(calls, which, inputs, cotangent, tolerance):
    """Return a maker of timed calls for each variant that agrees with the reference, and what the others got wrong."""
    want, makers, wrong = prepare(calls[REFERENCE], which, inputs, cotangent)(), {}, []
    for name, call in calls.items():
        maker = functools.partial(prepare, call, which, inputs, cotangent)
        try:
            assert_agreement(name, maker()(), want, tolerance)
        except AssertionError as error:
            wrong.append(str(error))
        else:
            makers[name] = maker
    return makers, wrong


def time_group(makers, bytes_read, run_rounds):
    """Time all variants in turn, then the fused one (or the reference) alone; returns seconds by variant and kind.

    Where the last row differs from its interleaved one, the others may be off by as much.
    """
    calls = {name: measurements(maker, bytes_read) for name, maker in makers.items()}
    last = FUSED if FUSED in calls else REFERENCE
    warm_up, seconds = ({name: {} for name in (*calls, f"{last}, again")} for _ in range(2))

    def one_round(into):
        for name, measured in calls.items():
            measure.interleaved(measured, into[name])

    one_round(warm_up)
    round_seconds = sum(sum(values) for measured in warm_up.values() for values in measured.values())
    run_rounds(lambda: one_round(seconds), round_seconds)
    for _ in seconds[last]["wall"]:
        measure.interleaved(calls[last], seconds[f"{last}, again"])
    return seconds


@pytest.mark.parametrize(("op", "shape", "dtype", "which"), CASES)
def test_op(benchmark, add_rows, skipped, wanted, op, shape, dtype, which):
    sizes = SHAPES[shape]
    for name, variant in OPS[op].variants.items():
        if wanted(name) and (reason := why_skipped(variant, DEVICE)) is not None:
            skipped(name, reason)
    calls = {name: call for name, call in built(op, shape).items() if wanted(name) or name == REFERENCE}

    def run_rounds(one_round, round_seconds):
        rounds = measure.ROUNDS if DEVICE.type == "cuda" else max(5, min(200, int(CPU_SECONDS / round_seconds)))
        benchmark.pedantic(one_round, rounds=rounds, iterations=1)

    with measure.on_stream():
        inputs = OPS[op].inputs(sizes, dtype, DEVICE)
        cotangent = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(9)).to(inputs[0])
        makers, wrong = agreeing(calls, which, inputs, cotangent, AGREEMENT[dtype])
        bytes_read = sum(x.numel() * x.element_size() for x in (*inputs, cotangent))
        seconds = time_group(makers, bytes_read, run_rounds)
        peaks = {name: measure.peak_bytes(maker()) / 1e6 for name, maker in makers.items() if DEVICE.type == "cuda"}
    cost = least_cost(OPS[op], sizes, inputs[0].element_size(), which)
    about = {"op": op, "shape": shape, "sizes": list(sizes), "dtype": str(dtype)[6:], "pass": which}
    rows = [about | {"variant": name} | row_of(measured, cost) for name, measured in seconds.items()]
    add_rows([row | ({"peak_mb": peaks[row["variant"]]} if row["variant"] in peaks else {}) for row in rows])
    assert not wrong
