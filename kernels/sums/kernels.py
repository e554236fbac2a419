"""The sum of partial gradients, which programs of another kernel wrote each for itself: one launch, no atomics.

The order of the sum follows from the number of parts alone. PyTorch's `sum` would need a launch too, then two views,
and for 16-bit parameters two casts.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=("parts",))
def sum_parts_kernel(
    # Pointers
    parts_ptr,  # (parts, 2, D), contiguous, float32
    first_ptr,  # (D), contiguous: the sum of the parts' first rows
    second_ptr,  # (D), contiguous: of their second rows; the same as first_ptr where that is (2 D)
    # Sizes
    parts,
    D,
    # Constants
    BEHIND: tl.constexpr,  # D where the second sum lies behind the first, else 0
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Add up the parts of two gradients.

    Grid: (blocks of D, 2). A program owns BLOCK_D features of one of the two, and takes BLOCK_P parts at a time.
    """
    o_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, parts, BLOCK_P):
        o_p = (start + tl.arange(0, BLOCK_P)).to(tl.int64)
        p_part = parts_ptr + (2 * o_p[:, None] + tl.program_id(1)) * D + o_d[None, :]
        b_sum += tl.sum(tl.load(p_part, mask=(o_p < parts)[:, None] & m_d[None, :], other=0.0), 0)
    if tl.program_id(1) == 0:
        tl.store(first_ptr + o_d, b_sum.to(first_ptr.dtype.element_ty), mask=m_d)
    else:
        tl.store(second_ptr + BEHIND + o_d, b_sum.to(second_ptr.dtype.element_ty), mask=m_d)
