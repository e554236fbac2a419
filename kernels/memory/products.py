"""Products of tiles for the kernels of the space-aware memory."""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def multiply(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """Add a @ b to the accumulator."""
    if _INTERPRETED:
        # The interpreter multiplies bf16 as raw bits; products of float32 copies are what the tensor cores compute.
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    return tl.dot(b_a, b_b, b_acc, input_precision=PRECISION)


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr):
    """Add a @ b to the accumulator, nearly as exactly as float32 does where a is float32 and b has 16 bits."""
    if b_a.dtype == b_b.dtype:
        return multiply(b_a, b_b, b_acc, PRECISION)
    if b_b.dtype == tl.bfloat16:
        b_high = b_a.to(tl.bfloat16)
        b_low = (b_a - b_high.to(tl.float32)).to(tl.bfloat16)
        return multiply(b_high, b_b, multiply(b_low, b_b, b_acc, PRECISION), PRECISION)
    # A float16 pair would lose the low half of small numbers to underflow; TF32 holds every float16.
    return multiply(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, PRECISION)
