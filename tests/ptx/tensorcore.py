"""Products of the tensor cores: fragments in registers, operands in shared memory, and how the sums are rounded.

The rounding is the published model of Khattak and Mikaitis, "Accurate Models of NVIDIA Tensor Cores" (arXiv
2512.07004): products are exact; a block of them and the accumulator are aligned to the largest exponent and cut off a
few bits below float32's last; their sum is cut off to float32. `mma.sync` of sm_80 follows the A100, `wgmma` the H100.
"""

import dataclasses
import functools

import numpy as np
from ptx.arithmetic import from_bf16
from ptx.checks import Misaligned, Unsupported

ROW, COLUMN = np.arange(32) // 4, np.arange(32) % 4  # of a thread's elements in a fragment
LEAST_EXPONENT = -133  # to which a sum is aligned where all its terms are tiny


@dataclasses.dataclass(frozen=True)
class Rounding:
    """How one architecture adds products."""

    block: dict[str, int]  # products added at once, by the type of the operands
    extra_bits: int  # kept below the last bit of the largest term


ROUNDING = {
    80: Rounding({"tf32": 4, "bf16": 8, "f16": 8}, 1),
    90: Rounding({"tf32": 8, "bf16": 16, "f16": 16}, 2),
}


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return operands as float64: 16-bit elements, or 32-bit ones of which TF32 ignores the low 13 bits."""
    if kind == "tf32":
        return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)
    return (from_bf16(bits) if kind == "bf16" else bits.view(np.float16)).astype(np.float64)


def _halves(register: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    low = numbers(register.astype(np.uint16), kind)
    return low, numbers((register >> np.uint32(16)).astype(np.uint16), kind)


def fragment(registers: list[np.ndarray], rows: int, kind: str) -> np.ndarray:
    """Return an operand that lies in registers `[warps, 32]`, as `[warps, rows, k]`.

    A has 16 rows; B has 8, and its rows are the columns of the product.
    """
    halves = rows // 8
    steps = len(registers) // halves  # each is 4 TF32 numbers or 8 of 16 bits in a row
    width = 4 if kind == "tf32" else 8
    result = np.empty((registers[0].shape[0], rows, steps * width))
    for i, register in enumerate(registers):
        i_step, half = divmod(i, halves)
        if kind == "tf32":
            result[:, ROW + 8 * half, COLUMN + 4 * i_step] = numbers(register, kind)
            continue
        low, high = _halves(register, kind)
        result[:, ROW + 8 * half, 2 * COLUMN + 8 * i_step] = low
        result[:, ROW + 8 * half, 2 * COLUMN + 8 * i_step + 1] = high
    return result


@functools.cache
def _accumulator_index(i: int) -> tuple[np.ndarray, np.ndarray]:
    i_tile, part = divmod(i, 4)
    return ROW + 8 * (part >> 1), 8 * i_tile + 2 * COLUMN + (part & 1)


def accumulator(registers: list[np.ndarray]) -> np.ndarray:
    """Return the accumulator that lies in registers `[warps, 32]`, as float32 `[warps, 16, columns]`."""
    result = np.empty((registers[0].shape[0], 16, 2 * len(registers)), np.float32)
    for i, register in enumerate(registers):
        row, column = _accumulator_index(i)
        result[:, row, column] = register.view(np.float32)
    return result


def accumulator_registers(c: np.ndarray) -> list[np.ndarray]:
    """Return the registers `[warps, 32]` of an accumulator."""
    places = map(_accumulator_index, range(c.shape[2] // 2))
    return [np.ascontiguousarray(c[:, row, column]).view(np.uint32) for row, column in places]


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, kind: str, rounding: Rounding | None) -> np.ndarray:
    """Return a @ b^T + c in float32.

    Args:
        a: `[..., M, K]`, float64.
        b: `[..., N, K]`, float64.
        c: `[..., M, N]`, float32.
        kind: of the operands, `"tf32"`, `"bf16"` or `"f16"`.
        rounding: the architecture's, or None for one rounding of the exact sum to the nearest.
    """
    if rounding is None:
        return (a @ b.swapaxes(-1, -2) + c).astype(np.float32)
    width = rounding.block[kind]
    for start in range(0, a.shape[-1], width):
        c = _add_block(a[..., start : start + width], b[..., start : start + width], c, rounding.extra_bits)
    return c


def _add_block(a: np.ndarray, b: np.ndarray, c: np.ndarray, extra_bits: int) -> np.ndarray:
    exponent_a, exponent_b, exponent_c = (_exponent(x) for x in (a, b, c))
    largest = (exponent_a[..., :, None, :] + exponent_b[..., None, :, :]).max(-1)
    largest = np.maximum(np.maximum(largest, exponent_c), LEAST_EXPONENT)
    unit = np.ldexp(1.0, largest - 23 - extra_bits)
    scale = 1 / unit
    products = a[..., :, None, :] * b[..., None, :, :]
    products *= scale[..., None]
    total = (np.trunc(products, out=products).sum(-1) + np.trunc(c * scale)) * unit
    result = toward_zero(total)
    if not (np.isfinite(a).all() and np.isfinite(b).all() and np.isfinite(c).all()):
        plain = (a @ b.swapaxes(-1, -2) + c).astype(np.float32)
        result = np.where(np.isfinite(plain), result, plain)
    return result


def _exponent(x: np.ndarray) -> np.ndarray:
    """Return the exponent of each number as a power of two at most it; far below all others for 0."""
    return np.where((x == 0) | ~np.isfinite(x), -1000, np.frexp(x)[1] - 1)


def toward_zero(x: np.ndarray) -> np.ndarray:
    """Round float64 to float32 toward zero."""
    nearest = x.astype(np.float32)
    return np.where((np.abs(nearest) > np.abs(x)) & np.isfinite(nearest), np.nextafter(nearest, np.float32(0)), nearest)


@functools.cache
def _pattern(
    rows: int, k: int, element: int, transposed: bool, swizzle: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return for each element the bytes within a swizzle atom, and how many leading and stride offsets lie before it.

    `rows` are those of A, or the columns of B. Untransposed, the k elements of a row are adjacent and every eighth row
    starts a new atom. Transposed, the rows of one k are adjacent as far as the swizzle is wide; then the leading
    offset, and every eighth k the stride offset.
    """
    row, column = np.arange(rows)[:, None], np.arange(k)[None, :]
    if not transposed:
        within = row % 8 * swizzle + column * element
        return within, np.zeros_like(within), row // 8 + 0 * column
    wide = swizzle // element
    return row % wide * element + column % 8 * swizzle, row // wide + 0 * column, column // 8 + 0 * row


def operand_addresses(descriptors: np.ndarray, rows: int, k: int, element: int, transposed: bool) -> np.ndarray:
    """Return the shared-memory addresses of the elements `[descriptors, rows, k]` of wgmma operands.

    Raises:
        Unsupported: the operand is not swizzled, or does not start at a multiple of the swizzle's pattern.
    """

    def field(start: int, bits: int) -> np.ndarray:
        return ((descriptors >> np.uint64(start)) & np.uint64((1 << bits) - 1)).astype(np.int64)

    modes = set(field(62, 2).tolist())
    if len(modes) != 1 or modes == {0} or field(49, 3).any():
        raise Unsupported(f"a descriptor of swizzle mode {sorted(modes)}, base offset {field(49, 3).max()}")
    mode = modes.pop()
    swizzle = {1: 128, 2: 64, 3: 32}[mode]
    if not transposed and k * element > swizzle:
        raise Misaligned(f"a row of {k} elements in a swizzle of {swizzle} bytes")
    within, leading, stride = _pattern(rows, k, element, transposed, swizzle)
    start, leading_bytes, stride_bytes = (16 * field(bit, 14)[:, None, None] for bit in (0, 16, 32))
    addresses = start + within + leading * leading_bytes + stride * stride_bytes
    return addresses ^ ((addresses >> 7) & (swizzle // 16 - 1)) << 4
