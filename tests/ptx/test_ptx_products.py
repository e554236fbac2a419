"""Tensor-core products of the PTX interpreter: fragments, operands in shared memory, and rounding."""

import numpy as np
import pytest
from ptx.programs import LOAD, descriptor, execute, registers
from ptx.tensorcore import ROUNDING, multiply, numbers, toward_zero

INF, NAN = float("inf"), float("nan")


def exact_numbers(kind, *shape, seed=0):
    """Return small integers, whose products and sums every format holds, and their bits."""
    numbers = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    if kind == "tf32":
        return numbers, numbers.view(np.uint32)
    return numbers, (
        numbers.astype(np.float16).view(np.uint16)
        if kind == "f16"
        else (numbers.view(np.uint32) >> 16).astype(np.uint16)
    )


def a_fragment(bits, kind, warps=1):
    """Return the registers `[threads, count]` that hold A `[16 * warps, k]`."""
    lane = np.arange(32)
    step = 4 if kind == "tf32" else 8
    columns = []
    for block in range(bits.shape[1] // step):
        for half in (0, 8):
            rows = (16 * np.arange(warps)[:, None] + lane // 4 + half).reshape(-1)
            if kind == "tf32":
                columns.append(bits[rows, np.tile(lane % 4 + 4 * block, warps)])
            else:
                first = np.tile(2 * (lane % 4) + 8 * block, warps)
                columns.append(bits[rows, first].astype(np.uint32) | bits[rows, first + 1].astype(np.uint32) << 16)
    return np.stack(columns, 1).astype(np.uint32)


def c_matrix(registers, warps=1):
    """Return the accumulator `[16 * warps, n]` that registers `[threads, n / 2]` hold."""
    lane = np.arange(32)
    result = np.empty((16 * warps, 2 * registers.shape[1]), np.float32)
    values = registers.view(np.float32).reshape(warps, 32, -1)
    for warp in range(warps):
        for i in range(registers.shape[1]):
            result[16 * warp + lane // 4 + 8 * (i % 4 // 2), 8 * (i // 4) + 2 * (lane % 4) + i % 2] = values[warp, :, i]
    return result


def read_all(parameter, first, count):
    """Return code that loads registers from a row of a parameter for each thread."""
    loads = "".join(f"ld.global.b32 %r{first + i}, [%rd{parameter}3+{4 * i}];" for i in range(count))
    return f"""ld.param.b64 %rd{parameter}1, [kernel_param_{parameter}]; mul.wide.u32 %rd{parameter}2, %r1, {4 * count};
        add.s64 %rd{parameter}3, %rd{parameter}1, %rd{parameter}2; {loads}"""


@pytest.mark.parametrize(("kind", "k"), [("tf32", 8), ("tf32", 4), ("bf16", 16), ("f16", 16), ("bf16", 8)])
def test_mma_multiplies_fragments(kind, k):
    (a, a_bits), (b, b_bits) = exact_numbers(kind, 16, k), exact_numbers(kind, 8, k, seed=1)
    c = exact_numbers("tf32", 16, 8, seed=2)[0]
    lane = np.arange(32)
    b_registers = a_fragment(np.concatenate([b_bits, b_bits]), kind)[:, ::2]
    c_registers = np.stack([c[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] for i in range(4)], 1)
    a_registers = a_fragment(a_bits, kind)
    na, nb = a_registers.shape[1], b_registers.shape[1]
    table = np.concatenate([a_registers, b_registers, c_registers.view(np.uint32)], 1)
    body = LOAD + read_all(0, 100, na + nb + 4)
    body += f"""mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32 {registers(10, 4)}, {registers(100, na)},
        {registers(100 + na, nb)}, {registers(100 + na + nb, 4)};"""
    body += "".join(f"st.global.b32 [%rd03+{4 * i}], %r{10 + i};" for i in range(4))
    for rounding in (None, ROUNDING[80]):
        got = execute(body, table, rounding=rounding)[0][:, :4]
        assert (c_matrix(np.ascontiguousarray(got)) == a @ b.T + c).all()


def tile(bits, transposed, swizzle):
    """Return the bytes of an operand `[rows, k]` as wgmma reads it, with its leading and stride offsets in bytes."""
    rows, k = bits.shape
    element = bits.dtype.itemsize
    row, column = np.meshgrid(np.arange(rows), np.arange(k), indexing="ij")
    if transposed:
        wide = swizzle // element
        stride, leading = 8 * swizzle, 8 * swizzle * (k // 8)
        address = row % wide * element + row // wide * leading + column % 8 * swizzle + column // 8 * stride
        size = max(1, rows // wide) * leading
    else:
        stride, leading = 8 * swizzle, 16
        address = row % 8 * swizzle + row // 8 * stride + column * element
        size = rows // 8 * stride
    # 16-byte chunks are permuted by the number of their row of 128 bytes.
    address ^= ((address >> 7) & (swizzle // 16 - 1)) << 4
    out = np.zeros(-(-size // 1024) * 1024, np.uint8)
    for i in range(element):
        out[address + i] = bits.view(np.uint8).reshape(rows, k, element)[..., i]
    return out, leading, stride


def fill_shared(size):
    """Return code by which 128 threads copy parameter 0 to shared memory, with the fence and the barrier."""
    code = LOAD
    for start in range(0, size, 2048):
        code += f"""mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2;
            ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd3+{start}];
            shl.b32 %r6, %r1, 4; st.shared.v4.b32 [%r6+{start}], {{%r2, %r3, %r4, %r5}};"""
    return code + "fence.proxy.async.shared::cta; bar.sync 0; wgmma.fence.sync.aligned;"


@pytest.mark.parametrize("swizzle", [128, 64, 32])
@pytest.mark.parametrize("n", [16, 64])
@pytest.mark.parametrize(
    ("kind", "from_shared", "transposed_a", "transposed_b"),
    [
        ("tf32", False, False, False),
        ("tf32", True, False, False),
        ("bf16", False, False, False),
        ("bf16", False, False, True),
        ("bf16", True, False, True),
        ("f16", True, True, False),
        ("f16", True, True, True),
    ],
)
def test_wgmma_multiplies_operands_in_registers_and_shared_memory(
    kind, n, from_shared, transposed_a, transposed_b, swizzle
):
    k = 8 if kind == "tf32" else 16
    (a, a_bits), (b, b_bits) = exact_numbers(kind, 64, k), exact_numbers(kind, n, k, seed=1)
    a_tile, *a_offsets = tile(a_bits, transposed_a, swizzle)
    b_tile, *b_offsets = tile(b_bits, transposed_b, swizzle)
    data = np.concatenate([a_tile, b_tile])
    data = np.pad(data, (0, -len(data) % 2048))
    a_registers = a_fragment(a_bits, kind, warps=4)
    table = np.zeros((128, max(a_registers.shape[1], n // 2)), np.uint32)
    table[:, : a_registers.shape[1]] = a_registers
    body = fill_shared(len(data)) + read_all(1, 100, table.shape[1]) + "wgmma.fence.sync.aligned; mov.pred %p1, 0;"
    body += f"mov.b64 %rd20, {descriptor(0, *a_offsets, swizzle)};"
    body += f"mov.b64 %rd21, {descriptor(len(a_tile), *b_offsets, swizzle)};"
    left = "%rd20" if from_shared else registers(100, a_registers.shape[1])
    transposed = [transposed_a, transposed_b] if from_shared else [transposed_b]
    flags = "" if kind == "tf32" else "".join(f", {int(flag)}" for flag in transposed)
    product = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {registers(200, n // 2)}, "
    product += f"{left}, %rd21, %p1, 1, 1{flags};"
    body += product + "mov.pred %p1, -1;" + product  # without the accumulator, then on top of it
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    body += "".join(f"st.global.b32 [%rd13+{4 * i}], %r{200 + i};" for i in range(n // 2))
    for rounding in (None, ROUNDING[90]):
        got = execute(body, data, table, threads=128, shared=len(data), rounding=rounding)[1][:, : n // 2]
        assert (c_matrix(np.ascontiguousarray(got), warps=4) == 2 * (a @ b.T)).all()


class TestRounding:
    def test_float64_is_cut_off_toward_zero(self):
        x = np.array([1 + 2.0**-24, -1 - 2.0**-24, 1 - 2.0**-25, INF, 0.1])
        want = np.array([1, -1, 1 - 2.0**-24, INF, np.nextafter(np.float32(0.1), np.float32(0))], np.float32)
        assert (toward_zero(x) == want).all()

    @pytest.mark.parametrize(("arch", "kept"), [(80, 1), (90, 2)])
    def test_small_products_keep_the_extra_bits_of_the_architecture(self, arch, kept):
        """Eight products of 2^-(23 + n) beside 1: cut off one by one where n is above the extra bits."""
        for n in (kept, kept + 1):
            a, b = np.full((1, 8), 2.0 ** -(23 + n)), np.ones((1, 8))
            got = multiply(a, b, np.ones((1, 1), np.float32), "bf16", ROUNDING[arch])[0, 0]
            assert got == (1 + np.floor(8 * 2.0**-n) * 2.0**-23 if n == kept else 1)

    def test_blocks_of_products_are_added_one_after_the_other(self):
        """1 - 1 + 2^-30 keeps the last term only if the cancellation is over before it comes."""
        a = np.array([[1.0, -1.0] + [0.0] * 6 + [2.0**-30] + [0.0] * 7])
        ones, zero = np.ones((1, 16)), np.zeros((1, 1), np.float32)
        assert multiply(a, ones, zero, "bf16", ROUNDING[80])[0, 0] == 2.0**-30  # two blocks of 8
        assert multiply(a, ones, zero, "bf16", ROUNDING[90])[0, 0] == 0  # one block of 16

    def test_tf32_ignores_the_low_bits_of_operands(self):
        assert numbers(np.float32([1 + 2.0**-11]).view(np.uint32), "tf32")[0] == 1

    @pytest.mark.parametrize("bad", [INF, -INF, NAN])
    def test_nonfinite_operand_reaches_only_its_row(self, bad):
        a = np.array([[1.0, 2.0], [bad, 1.0]])
        got = multiply(a, np.ones((1, 2)), np.zeros((2, 1), np.float32), "tf32", ROUNDING[90])
        assert got[0, 0] == 3 and (np.isnan(got[1, 0]) if np.isnan(bad) else got[1, 0] == bad)
