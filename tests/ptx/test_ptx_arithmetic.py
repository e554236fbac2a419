"""Every arithmetic opcode of the PTX interpreter alone, against what the PTX manual says."""

import numpy as np
import pytest
from ptx.arithmetic import operation
from ptx.instructions import parse
from ptx.machine import Machine, run
from ptx.programs import EACH, LOAD, PROGRAM, execute
from ptx.translate import translate

INF, NAN, TINY = float("inf"), float("nan"), 1e-40


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
    ("add.s16", (0xFFFF, 1), 0),
    ("sub.s16", (0, 1), 0xFFFF),
    ("mul.lo.s16", (0x100, 0x101), 0x100),
    ("mad.lo.s16", (3, -5, 7), -8),
    ("mul.wide.u16", (0xFFFF, 2), 0x1FFFE),
    ("mad.wide.u16", (0xFFFF, 2, 1), 0x1FFFF),
    ("shl.b16", (1, 16), 0),
    ("shr.u16", (0x8000, 15), 1),
    ("or.b16", (1, 2), 3),
    ("rem.s64", (-(1 << 40) - 1, 1 << 40), -1),
    ("rem.u32", (0xFFFFFFFF, 16), 15),
    ("setp.eq.b16", (1, 1), True),
    ("setp.lt.u16", (1, 0xFFFF), True),
    ("setp.ne.b64", (1 << 40, 0), True),
    ("setp.le.s64", (-1, -1), True),
    ("setp.lt.u64", (-1, 0), False),
    ("setp.le.f16", (-1.5, 1.0), True),
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
    ("setp.leu.f32", (NAN, 1.0), True),
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
    ("cvt.s32.s8", (0xFE,), -2),
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
    _, kinds, result = operation(opcode)
    got = calculate(opcode, kinds, operands, result)
    kind = "f32" if result == "tf32" else result
    if isinstance(want, float) and np.isnan(want):
        assert np.isnan(got.view(np.float32))
    else:
        assert got == bits_of(want, kind), (hex(int(got)), hex(int(bits_of(want, kind))))


def test_packed_comparison_sets_a_predicate_for_each_half():
    halves = np.float32([1, 2, 3, 0]).view(np.uint32) >> 16
    body = f"""{LOAD} mov.b32 %r2, {halves[0] | halves[1] << 16}; mov.b32 %r3, {halves[2] | halves[3] << 16};
        setp.le.bf16x2 %p1|%p2, %r2, %r3; selp.b32 %r4, 1, 0, %p1; selp.b32 %r5, 1, 0, %p2;
        st.global.v2.b32 [%rd1], {{%r4, %r5}};"""
    assert execute(body, np.zeros(2, np.uint32), threads=1 * 32)[0].tolist() == [1, 0]


def test_conversion_takes_the_low_bits_of_a_wider_register():
    body = LOAD + "mov.b32 %r2, 0x1FE; cvt.s32.s8 %r3, %r2; st.global.b32 [%rd1], %r3;"
    assert execute(body, np.zeros(1, np.int32))[0].tolist() == [-2]


@pytest.mark.parametrize(("first", "second", "selector"), [("%r2", "%r9", "0x103U"), ("%r9", "%r2", "0x4547")])
def test_permutation_ignores_an_unwritten_register_of_which_it_takes_no_byte(first, second, selector):
    body = LOAD + f"mov.b32 %r2, 0x11223344; prmt.b32 %r3, {first}, {second}, {selector}; st.global.b32 [%rd1], %r3;"
    assert execute(body, np.zeros(1, np.uint32))[0].tolist() == [0x44334411]


def test_mov_packs_and_unpacks_halves():
    body = f"""{LOAD} mov.b32 %r2, 0x00020001; mov.b32 {{%rs1, %rs2}}, %r2; mov.b32 %r3, {{%rs2, %rs1}};
        mov.b64 %rd4, {{%r2, %r3}}; mov.b64 {{_, %r5}}, %rd4; st.global.v2.b32 [%rd1], {{%r3, %r5}};"""
    assert execute(body, np.zeros(2, np.uint32))[0].tolist() == [0x00010002, 0x00010002]


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


@pytest.mark.parametrize(
    ("opcode", "want"), [("max.s32", 15), ("max.u32", 0xFFFFFFFF), ("min.s32", -16), ("add.u32", -16), ("or.b32", -1)]
)
def test_redux_combines_a_warp(opcode, want):
    body = EACH.format(size=4) + f"sub.s32 %r2, %r1, 16; redux.sync.{opcode} %r3, %r2, -1; st.global.b32 [%rd3], %r3;"
    assert set(execute(body, np.zeros(32, np.uint32))[0].tolist()) == {want % 2**32}
