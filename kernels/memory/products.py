"""Products of tiles for the kernels of the space-aware memory.

A tensor core multiplies TF32 numbers, of 11 significant bits. `"tf32x3"` takes a float32 number apart into the nearest
TF32 number and the rest, and adds three of the four products, the small ones first, in an accumulator of its own: a
tensor core cuts bits off a long sum. Triton's own `"tf32x3"` also replaces every NaN of the small products, which
infinite numbers cause, by 0; that and its rounding are a third of the instructions of a loop. Here a number that is not
finite gives NaN.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _multiply(b_a, b_b, b_acc):
    """Add a @ b to the accumulator, in one product of the tensor cores."""
    if _INTERPRETED:
        # The interpreter multiplies bf16 as raw bits; products of float32 copies are what the tensor cores compute.
        return tl.dot(b_a.to(tl.float32), b_b.to(tl.float32), b_acc, input_precision="ieee")
    return tl.dot(b_a, b_b, b_acc, input_precision="tf32")


@triton.jit
def _split(b_x):
    """Return the TF32 number nearest to a float32 number, and the rest."""
    # Adding half of the last bit that stays rounds the magnitude. A NaN may become anything, but its rest is NaN.
    b_bits = (b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000
    b_high = b_bits.to(tl.float32, bitcast=True)
    return b_high, b_x - b_high


@triton.jit
def dot(b_a, b_b, b_acc, PRECISION: tl.constexpr, WIDE: tl.constexpr = False):
    """Add a @ b to the accumulator, nearly as exactly as float32 does where a is float32 and b has 16 bits.

    WIDE multiplies numbers of 16 bits as TF32, which holds them all, and for which operands go through registers.
    """
    if not WIDE:
        if b_a.dtype == b_b.dtype and b_a.dtype != tl.float32:
            return _multiply(b_a, b_b, b_acc)
        if b_b.dtype == tl.bfloat16:
            b_high = b_a.to(tl.bfloat16)
            b_low = (b_a - b_high.to(tl.float32)).to(tl.bfloat16)
            return _multiply(b_high, b_b, _multiply(b_low, b_b, b_acc))
    b_first, b_second = b_a.to(tl.float32), b_b.to(tl.float32)
    if _INTERPRETED or PRECISION == "tf32" or b_a.dtype != tl.float32:
        return _multiply(b_first, b_second, b_acc)
    b_high, b_low = _split(b_first)
    b_sum = tl.zeros(b_acc.shape, tl.float32)
    if b_b.dtype != tl.float32:  # a float16 pair would lose small rests to underflow, so both float16 and WIDE end here
        b_sum = _multiply(b_low, b_second, b_sum)
        return b_acc + _multiply(b_high, b_second, b_sum)
    b_second_high, b_second_low = _split(b_second)
    b_sum = _multiply(b_low, b_second_high, b_sum)
    b_sum = _multiply(b_high, b_second_low, b_sum)
    return b_acc + _multiply(b_high, b_second_high, b_sum)
