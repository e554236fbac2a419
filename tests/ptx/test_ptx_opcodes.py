"""Every opcode of the PTX interpreter alone: a program of one instruction against what the PTX manual says."""

import numpy as np
import pytest
from ptx.checks import (
    AsyncCopyRace,
    Divergence,
    MissingFence,
    Misaligned,
    OutOfBounds,
    Race,
    Uninitialized,
    Unsupported,
)
from ptx.global_memory import GlobalMemory
from ptx.instructions import parse
from ptx.machine import Machine, run
from ptx.shared_memory import SharedMemory
from ptx.tensorcore import ROUNDING, multiply, toward_zero
from ptx.translate import translate

INF, NAN, TINY = float("inf"), float("nan"), 1e-40
PROGRAM = """.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1)
{{ {body} ret; }}"""
REGISTER = {"16": "rs", "32": "r", "64": "rd"}


def execute(body, *buffers, threads=32, blocks=1, shared=4096, granule=None, rounding=None):
    """Run a program on arrays, whose addresses are its parameters, and return their contents afterwards."""
    kernel = translate(parse(PROGRAM.format(body=body)))
    storages = [np.ascontiguousarray(buffer).view(np.uint8).reshape(-1) for buffer in buffers]
    memory = GlobalMemory(storages)
    machine = Machine(kernel, np.arange(blocks), (blocks, 1, 1), threads)
    machine.parameters = {f"kernel_param_{i}": np.array([a], np.uint64) for i, a in enumerate(memory.addresses)}
    machine.global_memory, machine.rounding = memory, rounding
    machine.shared = SharedMemory(shared, granule or kernel.granule, blocks, threads)
    run(kernel, machine)
    return [memory.contents(i).view(buffer.dtype).reshape(buffer.shape) for i, buffer in enumerate(buffers)]


def bits_of(value, kind):
    """Return a number as the register bits of a PTX type."""
    if kind == "pred":
        return np.bool_(value)
    if kind == "f32":
        return np.float32(value).view(np.uint32)
    if kind == "f16":
        return np.float16(value).view(np.uint16)
    if kind == "bf16":
        return np.uint16(np.float32(value).view(np.uint32) >> 16)
    width = 32 if kind in ("tf32", "bf16x2", "f16x2", "s16x2", "u16x2") else int(kind.lstrip("busf"))
    return np.dtype(f"u{width // 8}").type(int(value) % (1 << width))


def calculate(opcode, kinds, operands, result):
    """Run one arithmetic instruction and return the bits it leaves."""
    from ptx.arithmetic import operation

    kernel = translate(parse(PROGRAM.format(body=f"{opcode} %d, {', '.join(f'%a{i}' for i in range(len(operands)))};")))
    assert operation(opcode)[1:] == (kinds, result)
    machine = Machine(kernel, np.arange(1), (1, 1, 1), 32)
    slots = {f"%a{i}": value for i, value in enumerate(operands)}
    names = _slots(opcode, len(operands))
    for name, value in slots.items():
        machine.registers[names[name]] = np.full(32, bits_of(value, kinds[int(name[2:])]))
    run(kernel, machine)
    got = np.unique(machine.everywhere(machine.registers[names["%d"]]))
    assert got.size == 1
    return got[0]


def _slots(opcode, count):
    """Return the slots that the translation of `calculate`'s program gives: operands after the result."""
    return {"%d": 0, **{f"%a{i}": i + 1 for i in range(count)}}


# opcode, operands, result; the types come from the opcode.
ARITHMETIC = [
    ("mov.b32", (0xFFFFFFFF,), 0xFFFFFFFF),
    ("mov.u32", (7,), 7),
    ("mov.u16", (7,), 7),
    ("mov.b16", (0xFFFF,), 0xFFFF),
    ("mov.b64", (1 << 63,), 1 << 63),
    ("mov.pred", (True,), True),
    ("add.f32", (1.0, 2.0**-24), 1.0),  # ties to even
    ("add.f32", (1.0, 3 * 2.0**-24), 1.0 + 2.0**-22),
    ("add.s32", (0x7FFFFFFF, 1), 0x80000000),
    ("add.s64", (-1, 1), 0),
    ("add.s16x2", (0x0001FFFF, 0x00010001), 0x00020000),  # no carry from half to half
    ("sub.f32", (INF, INF), NAN),
    ("sub.s32", (0, 1), 0xFFFFFFFF),
    ("sub.s64", (0, 1), -1),
    ("mul.f32", (3.0, 0.1), np.float32(3) * np.float32(0.1)),
    ("mul.lo.s32", (0x10000, 0x10001), 0x10000),
    ("mul.lo.s64", (1 << 40, 1 << 30), 0),
    ("mul.hi.u16", (0xFFFF, 0x0100), 0x00FF),
    ("mul.hi.s32", (-1, 1), -1),
    ("mul.wide.s32", (-3, 5), -15),
    ("mul.wide.u32", (0xFFFFFFFF, 2), 0x1FFFFFFFE),
    ("mad.lo.s32", (3, -5, 7), -8),
    ("mad.lo.s64", (3, 1 << 40, 7), 3 * (1 << 40) + 7),
    ("mad.wide.s32", (-3, 5, 20), 5),
    ("mad.wide.u32", (0xFFFFFFFF, 2, 1), 0x1FFFFFFFF),
    ("div.s32", (-7, 2), -3),  # toward zero
    ("rem.s32", (-7, 2), -1),
    ("div.f32", (1.0, 3.0), np.float32(1) / np.float32(3)),
    ("div.rn.f32", (1.0, 0.0), INF),
    ("div.full.f32", (1.0, 3.0), np.float32(1) / np.float32(3)),
    ("div.approx.f32", (1.0, 4.0), 0.25),
    # The exact result is below half-way by less than float64 holds: rounding twice would give 1 + 2^-23.
    ("fma.rn.f32", (1.0 + 2.0**-12, 1.0 + 2.0**-12, 0.0), 1.0 + 2.0**-11 + 2.0**-23 - 2.0**-23),
    ("fma.rn.f32", (2.0**-24, 1.0 - 2.0**-24, 1.0), 1.0),
    ("fma.rn.f32", (2.0**-24, 1.0 + 2.0**-23, 1.0), 1.0 + 2.0**-23),
    ("fma.rn.f32", (INF, 0.0, 1.0), NAN),
    ("max.f32", (NAN, 1.0), 1.0),
    ("min.f32", (1.0, NAN), 1.0),
    ("max.s32", (-1, 1), 1),
    ("max.s64", (-(1 << 63), 1), 1),
    ("min.s64", (-(1 << 63), 1), -(1 << 63)),
    ("max.u32", (0xFFFFFFFF, 1), 0xFFFFFFFF),
    ("min.s32", (-1, 1), -1),
    ("neg.f32", (0.0,), -0.0),
    ("neg.s32", (1,), -1),
    ("abs.f32", (-1.5,), 1.5),
    ("abs.s32", (-5,), 5),
    ("sqrt.rn.f32", (2.0,), np.sqrt(np.float32(2))),
    ("sqrt.approx.f32", (4.0,), 2.0),
    ("sqrt.approx.ftz.f32", (TINY,), 0.0),
    ("rsqrt.approx.f32", (4.0,), 0.5),
    ("rcp.rn.f32", (3.0,), np.float32(1 / 3)),
    ("ex2.approx.f32", (-3.0,), 0.125),
    ("ex2.approx.ftz.f32", (-140.0,), 0.0),
    ("lg2.approx.f32", (8.0,), 3.0),
    ("and.b32", (0xF0F0, 0xFF00), 0xF000),
    ("and.b64", (-1, 5), 5),
    ("and.b16", (3, 6), 2),
    ("and.pred", (True, False), False),
    ("or.b32", (1, 2), 3),
    ("or.b64", (1 << 40, 1), (1 << 40) + 1),
    ("or.pred", (True, False), True),
    ("xor.b32", (3, 6), 5),
    ("xor.b64", (3, 6), 5),
    ("xor.pred", (True, True), False),
    ("not.b32", (0,), -1),
    ("not.b64", (0,), -1),
    ("not.pred", (True,), False),
    ("shl.b32", (1, 31), 1 << 31),
    ("shl.b32", (1, 32), 0),  # counts are clamped, not wrapped
    ("shl.b64", (1, 63), 1 << 63),
    ("shr.u32", (1 << 31, 31), 1),
    ("shr.u32", (1 << 31, 32), 0),
    ("shr.s32", (-8, 1), -4),
    ("shr.s32", (-8, 40), -1),
    ("shr.u64", (1 << 63, 60), 8),
    ("shr.s64", (-8, 1), -4),
    ("bfe.u32", (0xABCD, 4, 8), 0xBC),
    ("bfe.s32", (0x80, 4, 4), -8),
    ("bfe.s32", (0x80, 0, 0), 0),
    ("prmt.b32", (0x33221100, 0x77665544, 0x5410), 0x55441100),
    ("prmt.b32", (0x33228000, 0, 0x9999), 0xFFFFFFFF),  # the sign of a byte
    ("selp.b16", (1, 2, True), 1),
    ("selp.b32", (1, 2, False), 2),
    ("selp.b64", (1, 2, True), 1),
    ("selp.f32", (1.0, 2.0, False), 2.0),
    ("setp.eq.b32", (1, 1), True),
    ("setp.eq.b64", (1, 2), False),
    ("setp.ne.b32", (1, 1), False),
    ("setp.ne.b16", (1, 0), True),
    ("setp.lt.s32", (-1, 0), True),
    ("setp.lt.u32", (-1, 0), False),
    ("setp.le.s32", (0, 0), True),
    ("setp.gt.s32", (0, -1), True),
    ("setp.ge.s32", (0, 0), True),
    ("setp.gt.u32", (-1, 0), True),
    ("setp.lt.s64", (-1, 0), True),
    ("setp.gt.s64", (-1, 0), False),
    ("setp.gt.u64", (-1, 0), True),
    ("setp.lt.f32", (NAN, 1.0), False),
    ("setp.ltu.f32", (NAN, 1.0), True),
    ("setp.gt.f32", (2.0, 1.0), True),
    ("setp.eq.f32", (0.0, -0.0), True),
    ("setp.ne.f32", (NAN, 1.0), False),
    ("setp.neu.f32", (NAN, 1.0), True),
    ("setp.le.f32", (1.0, 1.0), True),
    ("setp.ge.f32", (1.0, 2.0), False),
    ("setp.nan.f32", (NAN, 1.0), True),
    ("setp.num.f32", (NAN, 1.0), False),
    ("setp.le.bf16", (1.0, 1.0), True),
    ("cvt.s64.s32", (-1,), -1),
    ("cvt.u64.u32", (-1,), 0xFFFFFFFF),
    ("cvt.u32.u64", ((1 << 40) + 7,), 7),
    ("cvt.u32.u16", (0xFFFF,), 0xFFFF),
    ("cvt.s32.s16", (0xFFFF,), -1),
    ("cvt.u16.u32", (0x12345,), 0x2345),
    ("cvt.rn.f32.s32", (-3,), -3.0),
    ("cvt.rn.f32.u32", (0xFFFFFFFF,), 2.0**32),
    ("cvt.rzi.s32.f32", (-2.7,), -2),
    ("cvt.rzi.s32.f32", (1e20,), 0x7FFFFFFF),  # saturates
    ("cvt.rzi.s32.f32", (NAN,), 0),
    ("cvt.f32.f16", (1.5,), 1.5),
    ("cvt.f32.bf16", (1.5,), 1.5),
    ("cvt.rn.f16.f32", (1.0 + 2.0**-11,), 1.0),  # ties to even
    ("cvt.rn.f16.f32", (1e6,), INF),
    ("cvt.rn.bf16.f32", (1.0 + 3 * 2.0**-8,), 1.0 + 2.0**-6),
    ("cvt.rn.bf16x2.f32", (1.0, 2.0), 0x3F804000),  # the first operand is the upper half
    ("cvt.rn.f16x2.f32", (1.0, 2.0), 0x3C004000),
    ("cvt.rna.tf32.f32", (1.0 + 2.0**-11,), 1.0 + 2.0**-10),  # ties away from zero
    ("cvt.rna.tf32.f32", (-INF,), -INF),
]


@pytest.mark.parametrize(("opcode", "operands", "want"), ARITHMETIC, ids=[f"{o} {x}" for o, x, _ in ARITHMETIC])
def test_arithmetic_gives_the_result_of_the_manual(opcode, operands, want):
    from ptx.arithmetic import operation

    _, kinds, result = operation(opcode)
    got = calculate(opcode, kinds, operands, result)
    kind = "f32" if result == "tf32" else result
    if isinstance(want, float) and np.isnan(want):
        assert np.isnan(got.view(np.float32))
    else:
        assert got == bits_of(want, kind), (hex(int(got)), hex(int(bits_of(want, kind))))


LOAD = "ld.param.b64 %rd1, [kernel_param_0]; mov.u32 %r1, %tid.x;"
EACH = LOAD + " mul.wide.u32 %rd2, %r1, {size}; add.s64 %rd3, %rd1, %rd2;"


def test_packed_comparison_sets_a_predicate_for_each_half():
    halves = np.float32([1, 2, 3, 0]).view(np.uint32) >> 16
    body = f"""{LOAD} mov.b32 %r2, {halves[0] | halves[1] << 16}; mov.b32 %r3, {halves[2] | halves[3] << 16};
        setp.le.bf16x2 %p1|%p2, %r2, %r3; selp.b32 %r4, 1, 0, %p1; selp.b32 %r5, 1, 0, %p2;
        st.global.v2.b32 [%rd1], {{%r4, %r5}};"""
    assert execute(body, np.zeros(2, np.uint32), threads=1 * 32)[0].tolist() == [1, 0]


def test_mov_packs_and_unpacks_halves():
    body = f"""{LOAD} mov.b32 %r2, 0x00020001; mov.b32 {{%rs1, %rs2}}, %r2; mov.b32 %r3, {{%rs2, %rs1}};
        mov.b64 %rd4, {{%r2, %r3}}; mov.b64 {{_, %r5}}, %rd4; st.global.v2.b32 [%rd1], {{%r3, %r5}};"""
    assert execute(body, np.zeros(2, np.uint32))[0].tolist() == [0x00010002, 0x00010002]


def test_ld_param_extends_the_sign():
    body = "ld.param.b64 %rd1, [kernel_param_0]; ld.param.s32 %rd5, [kernel_param_2]; st.global.b64 [%rd1], %rd5;"
    program = PROGRAM.format(body=body).replace("kernel_param_1)", "kernel_param_1, .param .u32 kernel_param_2)")
    kernel, memory = translate(parse(program)), GlobalMemory([np.zeros(8, np.uint8)])
    machine = Machine(kernel, np.arange(1), (1, 1, 1), 32)
    machine.parameters = {"kernel_param_0": np.uint64(memory.addresses), "kernel_param_2": np.uint32([0xFFFFFFFE])}
    machine.global_memory, machine.shared = memory, SharedMemory(16, 16, 1, 32)
    run(kernel, machine)
    assert memory.contents(0).view(np.int64)[0] == -2


@pytest.mark.parametrize(("suffix", "dtype", "register"), [("b16", np.uint16, "rs"), ("b32", np.uint32, "r"), ("b64", np.uint64, "rd")])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_loads_and_stores_move_every_element(suffix, dtype, register, count, space):
    size = np.dtype(dtype).itemsize * count
    if size > 16:
        pytest.skip("PTX has no access of more than 16 bytes")
    regs = "{" + ", ".join(f"%{register}{i + 10}" for i in range(count)) + "}"
    vector = f"v{count}." if count > 1 else ""
    body = EACH.format(size=size) + f"ld.global.{vector}{suffix} {regs}, [%rd3];"
    if space == "shared":
        body += f"""mul.lo.s32 %r2, %r1, {size}; st.shared.{vector}{suffix} [%r2+32], {regs}; bar.sync 0;
            xor.b32 %r3, %r2, {size * 16}; ld.shared.{vector}{suffix} {regs}, [%r3+32];"""
    body += f"ld.param.b64 %rd4, [kernel_param_1]; add.s64 %rd5, %rd4, %rd2; st.global.{vector}{suffix} [%rd5], {regs};"
    data = np.arange(64 * count, dtype=dtype) + dtype(60000)
    got = execute(body, data, np.zeros_like(data), threads=64, shared=2048)[1]
    order = np.arange(64) if space == "global" else np.arange(64) ^ 16
    assert (got.reshape(64, count) == data.reshape(64, count)[order]).all()


def test_bytes_in_shared_memory_keep_their_low_bits():
    body = LOAD + """mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; cvt.u16.u32 %rs1, %r1; st.shared.b8 [%r1], %rs1;
        ld.shared.b8 %rs2, [%r1]; cvt.u32.u16 %r3, %rs2; st.global.b32 [%rd3], %r3;"""
    assert (execute(body, np.zeros(32, np.uint32))[0] == np.arange(32)).all()


def test_predicated_instructions_change_only_their_threads():
    body = EACH.format(size=4) + """setp.lt.u32 %p1, %r1, 8; mov.b32 %r2, 1; @%p1 mov.b32 %r2, 2;
        @!%p1 ld.global.b32 {%r2}, [%rd3]; @%p1 st.global.b32 [%rd3], %r2;"""
    got = execute(body, np.full(32, 9, np.uint32))[0]
    assert got.tolist() == [2] * 8 + [9] * 24


@pytest.mark.parametrize(
    ("mode", "argument", "bounds", "want"),
    [
        ("bfly", 5, 31, np.arange(32) ^ 5),
        ("idx", 3, 31, np.full(32, 3)),
        ("up", 1, 0, np.maximum(np.arange(32) - 1, 0)),
        ("down", 2, 31, np.where(np.arange(32) < 30, np.arange(32) + 2, np.arange(32))),
        # Segments of 8 lanes: only lanes beyond the segment are out of bounds, not those before it.
        ("bfly", 8, 0x1807, np.arange(32) & ~8),
    ],
)
def test_shuffle_takes_the_value_of_the_lane(mode, argument, bounds, want):
    body = EACH.format(size=4) + f"shfl.sync.{mode}.b32 %r2, %r1, {argument}, {bounds}, -1; st.global.b32 [%rd3], %r2;"
    assert (execute(body, np.zeros(32, np.uint32))[0] == want).all()


@pytest.mark.parametrize(("opcode", "want"), [("max.s32", 15), ("max.u32", 0xFFFFFFFF), ("min.s32", -16), ("add.u32", -16), ("or.b32", -1)])
def test_redux_combines_a_warp(opcode, want):
    body = EACH.format(size=4) + f"sub.s32 %r2, %r1, 16; redux.sync.{opcode} %r3, %r2, -1; st.global.b32 [%rd3], %r3;"
    assert set(execute(body, np.zeros(32, np.uint32))[0].tolist()) == {want % 2**32}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix_hold_pairs_of_a_row(count, transposed):
    regs = "{" + ", ".join(f"%r{i + 10}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    body = LOAD + f"""mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2; ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd3];
        shl.b32 %r6, %r1, 4; st.shared.v4.b32 [%r6], {{%r2, %r3, %r4, %r5}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {regs}, [%r6];
        ld.param.b64 %rd4, [kernel_param_1]; mul.wide.u32 %rd5, %r1, {4 * count}; add.s64 %rd6, %rd4, %rd5;
        st.global.{f"v{count}." if count > 1 else ""}b32 [%rd6], {regs}; bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r6+1024], {regs}; bar.warp.sync -1;
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r6+1024];
        setp.lt.u32 %p1, %r1, {8 * count}; @%p1 st.global.v4.b32 [%rd3], {{%r2, %r3, %r4, %r5}};"""
    body = body.replace("ld.shared.v4.b32", "@%p1 ld.shared.v4.b32").replace("bar.warp.sync -1;\n        @%p1", f"bar.warp.sync -1; setp.lt.u32 %p1, %r1, {8 * count};\n        @%p1")
    data = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    back, fragments = execute(body, data, np.zeros((32, count, 2), np.uint16), shared=2048)
    lane = np.arange(32)
    for i in range(count):
        matrix = data[i].T if transposed else data[i]
        assert (fragments[:, i, 0] == matrix[lane // 4, 2 * (lane % 4)]).all()
        assert (fragments[:, i, 1] == matrix[lane // 4, 2 * (lane % 4) + 1]).all()
    assert (back == data).all()


def exact_numbers(kind, *shape, seed=0):
    """Return small integers, whose products and sums every format holds, and their bits."""
    numbers = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    if kind == "tf32":
        return numbers, numbers.view(np.uint32)
    return numbers, (numbers.astype(np.float16).view(np.uint16) if kind == "f16" else (numbers.view(np.uint32) >> 16).astype(np.uint16))


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


def registers(first, count):
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


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


def descriptor(start, leading, stride, swizzle):
    mode = {128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | mode << 62


def fill_shared(size):
    """Return code by which 128 threads copy parameter 0 to shared memory, with the fence and the barrier."""
    code = LOAD
    for start in range(0, size, 2048):
        code += f"""mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2; ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd3+{start}];
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
def test_wgmma_multiplies_operands_in_registers_and_shared_memory(kind, n, from_shared, transposed_a, transposed_b, swizzle):
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
    body += f"mov.b64 %rd20, {descriptor(0, *a_offsets, swizzle)}; mov.b64 %rd21, {descriptor(len(a_tile), *b_offsets, swizzle)};"
    left = "%rd20" if from_shared else registers(100, a_registers.shape[1])
    flags = "" if kind == "tf32" else f", {int(transposed_a)}, {int(transposed_b)}" if from_shared else f", {int(transposed_b)}"
    product = f"wgmma.mma_async.sync.aligned.m64n{n}k{k}.f32.{kind}.{kind} {registers(200, n // 2)}, {left}, %rd21, %p1, 1, 1{flags};"
    body += product + "mov.pred %p1, -1;" + product  # without the accumulator, then on top of it
    body += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;"
    body += "".join(f"st.global.b32 [%rd13+{4 * i}], %r{200 + i};" for i in range(n // 2))
    for rounding in (None, ROUNDING[90]):
        got = execute(body, data, table, threads=128, shared=len(data), rounding=rounding)[1][:, : n // 2]
        assert (c_matrix(np.ascontiguousarray(got), warps=4) == 2 * (a @ b.T)).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_copies_or_writes_zeros(size):
    body = EACH.format(size=size) + f"""mul.lo.s32 %r2, %r1, {size}; setp.lt.u32 %p1, %r1, 20; selp.b32 %r3, {size}, 0, %p1;
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], {size}, %r3; cp.async.commit_group; cp.async.wait_group 0;"""
    body += f"ld.shared.{'v4.' if size == 16 else 'v2.' if size == 8 else ''}b32 {registers(10, size // 4)}, [%r2];"
    body += f"st.global.{'v4.' if size == 16 else 'v2.' if size == 8 else ''}b32 [%rd3], {registers(10, size // 4)};"
    data = np.arange(1, 1 + 8 * size, dtype=np.uint32).reshape(32, -1)
    assert (execute(body, data)[0] == np.where(np.arange(32)[:, None] < 20, data, 0)).all()


def test_blocks_that_part_at_a_branch_both_finish():
    body = LOAD + """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; setp.lt.u32 %p1, %r2, 2; mov.b32 %r4, 5;
        shl.b32 %r9, %r1, 2; st.shared.b32 [%r9], %r2; @%p1 bra $L_end; mov.b32 %r4, 6; $L_end:
        ld.shared.b32 %r5, [%r9]; mad.lo.s32 %r6, %r4, 10, %r5; mad.lo.s32 %r7, %r2, 32, %r1; mul.wide.u32 %rd2, %r7, 4;
        add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r6;"""
    got = execute(body, np.zeros((4, 32), np.uint32), blocks=4)[0]
    assert got[:, 0].tolist() == [50, 51, 62, 63] and (got == got[:, :1]).all()


def test_loop_ends_when_its_condition_fails():
    body = LOAD + """mov.b32 %r2, 0; $L_loop: add.s32 %r2, %r2, 3; setp.lt.s32 %p1, %r2, 10; @%p1 bra $L_loop; bra.uni $L_end;
        mov.b32 %r2, 99; $L_end: st.global.b32 [%rd1], %r2;"""
    assert execute(body, np.zeros(1, np.uint32))[0][0] == 12


STORE_AND_READ = LOAD + "shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1; {between} xor.b32 %r3, %r2, {other}; ld.shared.b32 %r4, [%r3];"
COPY = LOAD + "shl.b32 %r2, %r1, 4; cp.async.cg.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 16; cp.async.commit_group;"
WGMMA = """mov.pred %p1, 0; mov.b64 %rd9, {desc}; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16
    {regs}, %rd9, %rd9, %p1, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"""
PRODUCT = WGMMA.format(desc=descriptor(0, 16, 1024, 128), regs=registers(50, 8))
FILL = LOAD + "shl.b32 %r6, %r1, 4;" + "".join(f"st.shared.v4.b32 [%r6+{i}], {{%r1, %r1, %r1, %r1}};" for i in range(0, 8192, 2048))
FAULTS = [
    ("load past the end", EACH.format(size=4) + "ld.global.b32 %r2, [%rd3+4];", OutOfBounds),
    ("load before the start", EACH.format(size=4) + "ld.global.b32 %r2, [%rd3+-4];", OutOfBounds),
    ("store past the end", EACH.format(size=4) + "st.global.b32 [%rd3+4], %r1;", OutOfBounds),
    ("null pointer", "mov.b64 %rd1, 0; ld.global.b32 %r2, [%rd1];", OutOfBounds),
    ("global load of 8 bytes at 4", LOAD + "ld.global.v2.b32 {%r2, %r3}, [%rd1+4];", Misaligned),
    ("shared load of 8 bytes at 4", LOAD + "ld.shared.v2.b32 {%r2, %r3}, [%r1+4];", Misaligned),
    ("shared memory past the end", LOAD + "st.shared.b32 [4096], %r1;".replace("[4096]", "[%r9+4096]").replace("st.", "mov.b32 %r9, 0; st."), OutOfBounds),
    ("shared memory before a write", LOAD + "shl.b32 %r2, %r1, 2; ld.shared.b32 %r3, [%r2];", Uninitialized),
    ("register before a write", "add.s32 %r2, %r3, 1;", Uninitialized),
    ("read of another warp's write", STORE_AND_READ.format(between="", other=128), Race),
    ("read of another warp's write after a warp barrier", STORE_AND_READ.format(between="bar.warp.sync -1;", other=128), Race),
    ("read of another lane's write", STORE_AND_READ.format(between="", other=4), Race),
    ("write after another warp's read", STORE_AND_READ.format(between="bar.sync 0;", other=128) + "st.shared.b32 [%r2], %r4;", Race),
    ("write after another lane's read", STORE_AND_READ.format(between="bar.sync 0;", other=4) + "st.shared.b32 [%r2], %r4;", Race),
    ("two warps write to one word", LOAD + "and.b32 %r2, %r1, 31; shl.b32 %r2, %r2, 2; st.shared.b32 [%r2], %r1;", Race),
    ("two threads write to one global word", LOAD + "st.global.b32 [%rd1], %r1;", Race),
    ("two blocks write to one global word", LOAD + "mov.u32 %r2, %ctaid.x; st.global.b32 [%rd1], 7;".replace("7", "%r3").replace("st.", "mov.b32 %r3, 7; st."), Race),
    ("read before the wait for a copy", COPY + "ld.shared.v4.b32 {%r3, %r4, %r5, %r7}, [%r2];", Uninitialized),
    ("second read before the wait for a copy", COPY + "cp.async.wait_group 0;" + COPY + "ld.shared.v4.b32 {%r3, %r4, %r5, %r7}, [%r2];", AsyncCopyRace),
    ("write before the wait for a copy", COPY + "st.shared.b32 [%r2], %r1;", AsyncCopyRace),
    ("another warp's copy without a barrier", COPY + "cp.async.wait_group 0; xor.b32 %r3, %r2, 512; ld.shared.b32 %r4, [%r3];", Race),
    ("product without a fence", FILL + "bar.sync 0;" + PRODUCT, MissingFence),
    ("product without a barrier", FILL + "fence.proxy.async.shared::cta;" + PRODUCT, Race),
    ("product of unwritten memory", "fence.proxy.async.shared::cta; bar.sync 0;" + PRODUCT, Uninitialized),
    ("write before the wait for a product", FILL + "fence.proxy.async.shared::cta; bar.sync 0;" + PRODUCT + "bar.sync 0; st.shared.b32 [%r6], %r1;", AsyncCopyRace),
    ("threads of one block part", LOAD + "setp.lt.u32 %p1, %r1, 3; @%p1 bra $L_end; mov.b32 %r2, 1; $L_end: ", Divergence),
    ("opcode without a model", "vadd.s32.s32.s32 %r1, %r2, %r3;", Unsupported),
    ("barrier of some warps", "bar.sync 1, 64;", Unsupported),
    ("atomic", LOAD + "atom.global.add.u32 %r2, [%rd1], %r1;", Unsupported),
]


@pytest.mark.parametrize(("body", "fault"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_fault_is_reported_by_its_name(body, fault):
    with pytest.raises(fault) as caught:
        execute(body, np.zeros(128, np.uint32), threads=128, shared=8192 if "wgmma" in body else 4096, blocks=2 if "ctaid" in body else 1)
    assert type(caught.value) is fault


def test_ordered_accesses_have_no_fault():
    body = STORE_AND_READ.format(between="bar.sync 0;", other=128) + "bar.sync 0; st.shared.b32 [%r2], %r4;"
    execute(body, np.zeros(1, np.uint32), threads=128)
    execute(STORE_AND_READ.format(between="bar.warp.sync -1;", other=4), np.zeros(1, np.uint32), threads=128)
    fenced = FILL + "fence.proxy.async.shared::cta; bar.sync 0;" + PRODUCT
    after = "wgmma.wait_group.sync.aligned 0; bar.sync 0; st.shared.b32 [%r6], %r1;"
    execute(fenced + after, np.zeros(1, np.uint32), threads=128, shared=8192)


def test_values_of_one_warp_to_one_address_are_counted():
    kernel = translate(parse(PROGRAM.format(body=LOAD + "mov.b32 %r2, 0; st.shared.b32 [%r2], %r1;")))
    machine = Machine(kernel, np.arange(1), (1, 1, 1), 32)
    machine.parameters = {"kernel_param_0": np.zeros(1, np.uint64)}
    machine.shared = SharedMemory(64, 4, 1, 32)
    run(kernel, machine)
    assert machine.shared.ambiguous == [1]


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
        a = np.array([[1.0, -1.0] + [0.0] * 6 + [2.0**-30]  + [0.0] * 7])
        ones, zero = np.ones((1, 16)), np.zeros((1, 1), np.float32)
        assert multiply(a, ones, zero, "bf16", ROUNDING[80])[0, 0] == 2.0**-30  # two blocks of 8
        assert multiply(a, ones, zero, "bf16", ROUNDING[90])[0, 0] == 0  # one block of 16

    def test_tf32_ignores_the_low_bits_of_operands(self):
        from ptx.tensorcore import numbers

        assert numbers(np.float32([1 + 2.0**-11]).view(np.uint32), "tf32")[0] == 1

    @pytest.mark.parametrize("bad", [INF, -INF, NAN])
    def test_nonfinite_operand_reaches_only_its_row(self, bad):
        a = np.array([[1.0, 2.0], [bad, 1.0]])
        got = multiply(a, np.ones((1, 2)), np.zeros((2, 1), np.float32), "tf32", ROUNDING[90])
        assert got[0, 0] == 3 and (np.isnan(got[1, 0]) if np.isnan(bad) else got[1, 0] == bad)
