"""Calls of the ops that reach every kernel: small shapes, each chosen for what it stresses.

The functions import the ops and the comparisons of tests/kernels when they are called, in a process without Triton's
interpreter.
"""

import dataclasses
from collections.abc import Callable


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison of an op's kernels, forward and backward, with the reference in float64."""

    name: str
    arch: int
    run: Callable[[], None]
    long: bool = False


def _memory(
    sizes: tuple[int, int, int, int], dtypes: str = "fp32", k: int = 5, **options: object
) -> Callable[[], None]:
    """Compare the memory op of B, L, N, D."""

    def run() -> None:
        from memory_cases import compare, draw, draw_mask, gap

        from simsid.kernels.memory.variants import PAIRS

        noisy = bool(options.get("noisy"))
        threshold, similarity = options.get("threshold", "inclusive"), options.get("similarity", "dot")
        z, memory, g, noise = draw(*sizes, *PAIRS[dtypes], noisy=noisy, shared=bool(options.get("shared")))
        mask = draw_mask(memory, 0) if options.get("masked") else None
        if gap(z, memory, k, noise, 1.0, threshold == "exclusive", similarity, mask) < 2e-5:
            raise ValueError("the inputs have a tie: take others")
        compare(z, memory, g, k, noise, threshold, 1.0, similarity, mask)

    return run


def _weights() -> None:
    """Compare the indices and weights of the memory op without a gradient."""
    import torch
    from memory_cases import draw

    from simsid.kernels import space_aware_memory

    z, memory, _, _ = draw(3, 2, 20, 40)
    got, index, weight = space_aware_memory(z, memory, 4, return_weights=True, backend="triton")
    want, want_index, want_weight = space_aware_memory(z, memory, 4, return_weights=True, backend="torch")
    assert torch.equal(index, want_index)
    torch.testing.assert_close(weight, want_weight, rtol=2e-6, atol=0)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def _attention(
    grid: tuple[int, int],
    features: int,
    heads: int,
    dtype: str = "float32",
    pads: bool = True,
    masked: bool = False,
    **window: object,
) -> Callable[[], None]:
    def run() -> None:
        import attention_cases
        import torch

        tensors = attention_cases.inputs(2, grid, features, pads=pads, dtype=getattr(torch, dtype))
        mask = attention_cases.draw(2, grid[0] * grid[1]) > 0 if masked else None
        attention_cases.assert_fused_is_right(tensors, grid, heads, mask, **window)

    return run


def _layer_norm(rows: int, features: int, dtype: str = "float32") -> Callable[[], None]:
    def run() -> None:
        import norm_cases
        import torch

        norm_cases.assert_fused_is_right(norm_cases.inputs((rows, features), getattr(torch, dtype)))

    return run


def _invariant(batches: tuple[int, ...], dtypes: str, similarity: str = "dot") -> Callable[[], None]:
    """Compare, bit for bit, the output of the memory op for the same queries in batches of several sizes."""

    def run() -> None:
        import torch
        from memory_cases import draw

        from simsid.kernels import space_aware_memory
        from simsid.kernels.memory.variants import PAIRS

        z, memory, _, _ = draw(max(batches), 1, 37, 144, *PAIRS[dtypes])
        options = {"similarity": similarity, "backend": "triton"}
        outputs = {B: space_aware_memory(z[:B], memory, 5, **options) for B in batches}
        for B, output in outputs.items():
            assert torch.equal(output, outputs[max(batches)][:B]), f"the bits in a batch of {B} differ"

    return run


def _invariant_rows(batches: tuple[int, ...], dtype: str) -> Callable[[], None]:
    """Compare, bit for bit, outputs and gradients of attention and layer norm in batches of several sizes."""

    def run() -> None:
        import attention_cases as attention
        import norm_cases as norm
        import torch

        total, kind = max(batches), getattr(torch, dtype)
        images, g = attention.inputs(total, (2, 2), 16, dtype=kind), attention.draw(total, 4, 16, dtype=kind, seed=9)
        rows, h = norm.inputs((total, 40), kind), norm.draw(total, 40, dtype=kind, seed=9)

        def results(batch: int) -> dict[str, torch.Tensor]:
            first = {name: x[:batch] if x.dim() == 3 else x for name, x in images.items()}
            some = {name: x[:batch] if x.dim() == 2 else x for name, x in rows.items()}
            attended = attention.run(first, (2, 2), 2, g[:batch])
            normed = norm.run(some, h[:batch])
            return {name: attended[name] for name in ("out", "query", "key", "value")} | {
                f"norm {name}": normed[name] for name in ("out", "x", "residual")
            }

        whole = results(total)
        for batch in batches:
            for name, result in results(batch).items():
                assert torch.equal(result, whole[name][:batch]), f"the bits of {name} in a batch of {batch} differ"

    return run


def _cases() -> list[Case]:
    cases = []
    for arch in (80, 90):
        add = lambda name, run, long=False: cases.append(Case(f"sm_{arch} {name}", arch, run, long))  # noqa: B023, E731
        # Few machine codes, because compiling is half of the time: the same sizes wherever nothing is to be stressed.
        one, two = (3, 1, 37, 144), (33, 1, 37, 144)  # one tile of queries, gradients together; two, gradients apart
        add("memory fp32", _memory(one))
        add("memory fp32 batch 33", _memory(two))
        # A feature axis that no vector divides.
        add("memory fp32 odd", _memory((2, 1, 20, 35), k=3, noisy=True, threshold="exclusive"), arch == 80)
        add("memory bf16", _memory(one, "bf16"))
        add("memory bf16 batch 33", _memory(two, "bf16"), arch == 80)
        add("memory bf16 too", _memory(one, "bf16 memory too"))
        add("memory bf16 too batch 33", _memory(two, "bf16 memory too"), arch == 80)
        add("memory fp16", _memory(one, "fp16"), arch == 80)
        add("memory fp16 too", _memory(one, "fp16 memory too"), arch == 80)
        add("memory fp16 batch 33", _memory(two, "fp16"), True)
        add("memory fp16 too batch 33", _memory(two, "fp16 memory too"), True)
        add("memory fp32 two locations", _memory((3, 2, 37, 64)), True)
        add("memory fp32 batch 17", _memory((17, 1, 20, 80)), True)
        add("memory bf16 batch 17", _memory((17, 1, 20, 80), "bf16"), True)
        add("memory fp32 shared items", _memory((2, 3, 20, 40), shared=True), True)
        add("memory fp32 four splits", _memory((3, 2, 100, 512)), True)
        add("memory fp32 two row tiles", _memory((2, 1, 4100, 16)), True)
        add("memory fp32 k=64", _memory((2, 1, 70, 40), k=64), True)
        for suffix, sizes in (("", one), (" batch 33", two)):
            add(f"memory fp32 cosine masked{suffix}", _memory(sizes, similarity="cosine", masked=True), bool(suffix))
            for dtypes in ("bf16", "bf16 memory too", "fp16", "fp16 memory too"):
                long = (dtypes, suffix, arch) != ("bf16", "", 90)
                add(f"memory {dtypes} cosine{suffix}", _memory(sizes, dtypes, similarity="cosine"), long)
            add(f"memory bf16 masked{suffix}", _memory(sizes, "bf16", masked=True), True)
        add("memory weights", _weights, arch == 80)
        add("attention 4x4 pads", _attention((4, 4), 64, 2), arch == 90)
        add("attention 4x4 pads bf16", _attention((4, 4), 64, 2, "bfloat16"), arch == 80)
        add("attention 4x4 center mask", _attention((4, 4), 64, 2, masked=True, include_center=True), arch == 80)
        add("attention 5x4 dilation", _attention((5, 4), 64, 2, "float16", kernel_size=(5, 1), dilation=2), True)
        add("attention 3x5 bf16", _attention((3, 5), 35, 5, "bfloat16", pads=False), True)
        add("attention 4x4 D=512", _attention((4, 4), 512, 8), True)
        add("attention 2x2 D=2048 bf16", _attention((2, 2), 2048, 8, "bfloat16"), True)
        add("attention 8x8 fp16", _attention((8, 8), 64, 2, "float16"), True)
        add("attention 16x16", _attention((16, 16), 64, 2), True)
        add("layer_norm D=512", _layer_norm(3, 512), arch == 90)
        add("layer_norm D=35 bf16", _layer_norm(130, 35, "bfloat16"), arch == 80)
        add("layer_norm D=8192", _layer_norm(2, 8192), True)
        add("layer_norm D=1000 fp16", _layer_norm(5, 1000, "float16"), True)
        add("invariance 1 16 33", _invariant((1, 16, 33), "fp32"))
        add("invariance of rows", _invariant_rows((1, 16, 17, 32, 33, 64, 256), "float32"), True)
        add("invariance of rows bf16", _invariant_rows((1, 16, 17, 32, 33, 64, 256), "bfloat16"), True)
        for dtypes in ("fp32", "bf16", "fp16", "bf16 memory too", "fp16 memory too"):
            every = (1, 16, 17, 32, 33, 64, 256)
            add(f"invariance {dtypes}", _invariant(every, dtypes), True)
            add(f"invariance {dtypes} cosine", _invariant(every, dtypes, "cosine"), True)
    return cases


CASES = _cases()
