"""The variants of the space-aware memory's kernels that the compile gate covers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from simsid.kernels.memory.launchers import Target, memory_backward, memory_forward

float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
PAIRS = {  # dtypes of query and memory
    "fp32": (float32, float32),
    "bf16": (bfloat16, float32),
    "fp16": (float16, float32),
    "bf16 memory too": (bfloat16, bfloat16),
    "fp16 memory too": (float16, float16),
}
# B, L, N, D: in-painting memory, decoder memory, a large batch, SQUID
A, B, C, S = (16, 16, 100, 512), (16, 16, 100, 8192), (256, 16, 500, 2048), (16, 4, 200, 2048)


def cases() -> Iterator[tuple[str, Callable[[], object], tuple[int, ...]]]:
    """Yield names, host calls on meta tensors and the architectures that launch them: presets and limits."""
    for warp_groups, architectures in ((True, (90, 100)), (False, (80,))):
        for name, call in _cases(warp_groups):
            yield name, call, architectures


def _cases(warp_groups: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield names and calls for one kind of GPU."""

    def case(sizes: tuple[int, int, int, int], dtypes: str = "fp32", **options: Any) -> Callable[[], object]:
        return lambda: _call(sizes, dtypes, warp_groups, **options)

    every = ("query and memory", "query", "memory")  # the gradients asked for together
    for dtypes in PAIRS:
        yield f"A {dtypes}", case(A, dtypes, needs=every)
        yield f"A {dtypes} batch 32", case((32, *A[1:]), dtypes, needs=every)
        yield f"A {dtypes} batch 64", case((64, *A[1:]), dtypes)
    for dtypes in ("fp32", "bf16"):
        yield f"B {dtypes}", case(B, dtypes)
        yield f"C {dtypes}", case(C, dtypes)
        yield f"S {dtypes}", case(S, dtypes)
    yield "A fp32 tf32", case(A, precision="tf32")
    yield "A fp32 tf32 batch 64", case((64, *A[1:]), precision="tf32")
    yield "A fp32 exclusive", case(A, exclusive=True)
    yield "A fp32 noise", case(A, noise=True)
    yield "A fp32 inference", case(A, needs=())
    yield "A fp32 weights", case(A, needs=(), weights=True)
    for batch in (16, 64):  # gradients together, and apart
        yield f"A fp32 cosine batch {batch}", case((batch, *A[1:]), cosine=True)
        yield f"A fp32 masked batch {batch}", case((batch, *A[1:]), masked=True)
        yield f"A bf16 cosine batch {batch}", case((batch, *A[1:]), "bf16", cosine=True)
    yield "A fp32 k=1", case(A, topk=1)
    yield "A fp32 k=64", case(A, topk=64)
    yield "N=4096 fp32", case((16, 16, 4096, 512), topk=16)
    yield "N=8192 fp32", case((16, 16, 8192, 512))
    yield "odd fp32", case((3, 5, 37, 203), needs=every)  # no size that a vector or a tile divides
    yield "odd bf16", case((3, 5, 37, 203), "bf16")
    yield "tiny fp32", case((2, 3, 4, 3), topk=1)


def _call(
    sizes: tuple[int, int, int, int],
    dtypes: str,
    warp_groups: bool,
    *,
    topk: int = 5,
    exclusive: bool = False,
    noise: bool = False,
    cosine: bool = False,
    masked: bool = False,
    needs: tuple[str, ...] = ("query and memory",),
    precision: str = "tf32x3",
    weights: bool = False,
) -> None:
    """Launch the forward, and the backward once for each entry of `needs`."""
    batch, locations, items, features = sizes
    query_dtype, memory_dtype = PAIRS[dtypes]
    target = Target(precision, warp_groups)
    query = torch.empty(batch, locations, features, dtype=query_dtype, device="meta")
    memory = torch.empty(locations, items, features, dtype=memory_dtype, device="meta")
    gumbel = query.new_empty(batch, locations, items) if noise else None
    mask = query.new_empty(locations, items, dtype=torch.bool) if masked else None
    options = (topk, exclusive, cosine, 1.0, bool(needs), weights)
    _, *saved = memory_forward(query, memory, mask, gumbel, *options, target=target)
    for need in needs:
        memory_backward(query, query, memory, mask, saved, 1.0, "query" in need, "memory" in need, target)
