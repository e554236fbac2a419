"""Opcodes of the PTX interpreter that move data, branch or order accesses, each alone, and the faults they report."""

import numpy as np
import pytest
from ptx.checks import (
    AsyncCopyRace,
    Divergence,
    Misaligned,
    MissingFence,
    OutOfBounds,
    Race,
    Uninitialized,
    Unsupported,
)
from ptx.global_memory import GlobalMemory
from ptx.instructions import parse
from ptx.machine import Machine, run
from ptx.programs import EACH, LOAD, PROGRAM, descriptor, execute, registers
from ptx.shared_memory import SharedMemory
from ptx.translate import translate


def test_ld_param_extends_the_sign():
    body = "ld.param.b64 %rd1, [kernel_param_0]; ld.param.s32 %rd5, [kernel_param_2]; st.global.b64 [%rd1], %rd5;"
    program = PROGRAM.format(body=body).replace("kernel_param_1)", "kernel_param_1, .param .u32 kernel_param_2)")
    kernel, memory = translate(parse(program)), GlobalMemory([np.zeros(8, np.uint8)])
    machine = Machine(kernel, np.arange(1), (1, 1, 1), 32)
    machine.parameters = {"kernel_param_0": np.uint64(memory.addresses), "kernel_param_2": np.uint32([0xFFFFFFFE])}
    machine.global_memory, machine.shared = memory, SharedMemory(16, 16, 1, 32)
    run(kernel, machine)
    assert memory.contents(0).view(np.int64)[0] == -2


@pytest.mark.parametrize(
    ("suffix", "dtype", "register"), [("b16", np.uint16, "rs"), ("b32", np.uint32, "r"), ("b64", np.uint64, "rd")]
)
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
    body = (
        LOAD
        + """mul.wide.u32 %rd2, %r1, 4; add.s64 %rd3, %rd1, %rd2; cvt.u16.u32 %rs1, %r1; st.shared.b8 [%r1], %rs1;
        ld.shared.b8 %rs2, [%r1]; cvt.u32.u16 %r3, %rs2; st.global.b32 [%rd3], %r3;"""
    )
    assert (execute(body, np.zeros(32, np.uint32))[0] == np.arange(32)).all()


def test_predicated_instructions_change_only_their_threads():
    body = (
        EACH.format(size=4)
        + """setp.lt.u32 %p1, %r1, 8; mov.b32 %r2, 1; @%p1 mov.b32 %r2, 2;
        @!%p1 ld.global.b32 {%r2}, [%rd3]; @%p1 st.global.b32 [%rd3], %r2;"""
    )
    got = execute(body, np.full(32, 9, np.uint32))[0]
    assert got.tolist() == [2] * 8 + [9] * 24


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix_hold_pairs_of_a_row(count, transposed):
    regs = "{" + ", ".join(f"%r{i + 10}" for i in range(count)) + "}"
    trans = ".trans" if transposed else ""
    body = (
        LOAD
        + f"""mul.wide.u32 %rd2, %r1, 16; add.s64 %rd3, %rd1, %rd2; ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd3];
        shl.b32 %r6, %r1, 4; st.shared.v4.b32 [%r6], {{%r2, %r3, %r4, %r5}}; bar.warp.sync -1;
        ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {regs}, [%r6];
        ld.param.b64 %rd4, [kernel_param_1]; mul.wide.u32 %rd5, %r1, {4 * count}; add.s64 %rd6, %rd4, %rd5;
        st.global.{f"v{count}." if count > 1 else ""}b32 [%rd6], {regs}; bar.warp.sync -1;
        stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r6+1024], {regs}; bar.warp.sync -1;
        ld.shared.v4.b32 {{%r2, %r3, %r4, %r5}}, [%r6+1024];
        setp.lt.u32 %p1, %r1, {8 * count}; @%p1 st.global.v4.b32 [%rd3], {{%r2, %r3, %r4, %r5}};"""
    )
    body = body.replace("ld.shared.v4.b32", "@%p1 ld.shared.v4.b32").replace(
        "bar.warp.sync -1;\n        @%p1", f"bar.warp.sync -1; setp.lt.u32 %p1, %r1, {8 * count};\n        @%p1"
    )
    data = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    back, fragments = execute(body, data, np.zeros((32, count, 2), np.uint16), shared=2048)
    lane = np.arange(32)
    for i in range(count):
        matrix = data[i].T if transposed else data[i]
        assert (fragments[:, i, 0] == matrix[lane // 4, 2 * (lane % 4)]).all()
        assert (fragments[:, i, 1] == matrix[lane // 4, 2 * (lane % 4) + 1]).all()
    assert (back == data).all()


@pytest.mark.parametrize("size", [4, 8, 16])
def test_cp_async_copies_or_writes_zeros(size):
    body = (
        EACH.format(size=size)
        + f"""mul.lo.s32 %r2, %r1, {size}; setp.lt.u32 %p1, %r1, 20; selp.b32 %r3, {size}, 0, %p1;
        cp.async.ca.shared.global [ %r2 + 0 ], [ %rd3 + 0 ], {size}, %r3; cp.async.commit_group;
        cp.async.wait_group 0;"""
    )
    body += f"ld.shared.{'v4.' if size == 16 else 'v2.' if size == 8 else ''}b32 {registers(10, size // 4)}, [%r2];"
    body += f"st.global.{'v4.' if size == 16 else 'v2.' if size == 8 else ''}b32 [%rd3], {registers(10, size // 4)};"
    data = np.arange(1, 1 + 8 * size, dtype=np.uint32).reshape(32, -1)
    assert (execute(body, data)[0] == np.where(np.arange(32)[:, None] < 20, data, 0)).all()


def test_blocks_that_part_at_a_branch_both_finish():
    body = (
        LOAD
        + """mov.u32 %r2, %ctaid.x; mov.u32 %r3, %nctaid.x; setp.lt.u32 %p1, %r2, 2; mov.b32 %r4, 5;
        shl.b32 %r9, %r1, 2; st.shared.b32 [%r9], %r2; @%p1 bra $L_end; mov.b32 %r4, 6; $L_end:
        ld.shared.b32 %r5, [%r9]; mad.lo.s32 %r6, %r4, 10, %r5; mad.lo.s32 %r7, %r2, 32, %r1; mul.wide.u32 %rd2, %r7, 4;
        add.s64 %rd3, %rd1, %rd2; st.global.b32 [%rd3], %r6;"""
    )
    got = execute(body, np.zeros((4, 32), np.uint32), blocks=4)[0]
    assert got[:, 0].tolist() == [50, 51, 62, 63] and (got == got[:, :1]).all()


def test_loop_ends_when_its_condition_fails():
    body = (
        LOAD
        + """mov.b32 %r2, 0; $L_loop: add.s32 %r2, %r2, 3; setp.lt.s32 %p1, %r2, 10; @%p1 bra $L_loop; bra.uni $L_end;
        mov.b32 %r2, 99; $L_end: st.global.b32 [%rd1], %r2;"""
    )
    assert execute(body, np.zeros(1, np.uint32))[0][0] == 12


STORE_AND_READ = (
    LOAD
    + "shl.b32 %r2, %r1, 2; st.shared.b32 [%r2], %r1; {between} xor.b32 %r3, %r2, {other}; ld.shared.b32 %r4, [%r3];"
)
COPY = LOAD + "shl.b32 %r2, %r1, 4; cp.async.cg.shared.global [ %r2 + 0 ], [ %rd1 + 0 ], 16; cp.async.commit_group;"
WGMMA = """mov.pred %p1, 0; mov.b64 %rd9, {desc}; wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16
    {regs}, %rd9, %rd9, %p1, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"""
PRODUCT = WGMMA.format(desc=descriptor(0, 16, 1024, 128), regs=registers(50, 8))
FILL = (
    LOAD
    + "shl.b32 %r6, %r1, 4;"
    + "".join(f"st.shared.v4.b32 [%r6+{i}], {{%r1, %r1, %r1, %r1}};" for i in range(0, 8192, 2048))
)
FAULTS = [
    ("load past the end", EACH.format(size=4) + "ld.global.b32 %r2, [%rd3+4];", OutOfBounds),
    ("load before the start", EACH.format(size=4) + "ld.global.b32 %r2, [%rd3+-4];", OutOfBounds),
    ("store past the end", EACH.format(size=4) + "st.global.b32 [%rd3+4], %r1;", OutOfBounds),
    ("null pointer", "mov.b64 %rd1, 0; ld.global.b32 %r2, [%rd1];", OutOfBounds),
    ("global load of 8 bytes at 4", LOAD + "ld.global.v2.b32 {%r2, %r3}, [%rd1+4];", Misaligned),
    ("shared load of 8 bytes at 4", LOAD + "ld.shared.v2.b32 {%r2, %r3}, [%r1+4];", Misaligned),
    (
        "shared memory past the end",
        LOAD + "st.shared.b32 [4096], %r1;".replace("[4096]", "[%r9+4096]").replace("st.", "mov.b32 %r9, 0; st."),
        OutOfBounds,
    ),
    ("shared memory before a write", LOAD + "shl.b32 %r2, %r1, 2; ld.shared.b32 %r3, [%r2];", Uninitialized),
    ("register before a write", "add.s32 %r2, %r3, 1;", Uninitialized),
    ("read of another warp's write", STORE_AND_READ.format(between="", other=128), Race),
    (
        "read of another warp's write after a warp barrier",
        STORE_AND_READ.format(between="bar.warp.sync -1;", other=128),
        Race,
    ),
    ("read of another lane's write", STORE_AND_READ.format(between="", other=4), Race),
    (
        "write after another warp's read",
        STORE_AND_READ.format(between="bar.sync 0;", other=128) + "st.shared.b32 [%r2], %r4;",
        Race,
    ),
    (
        "write after another lane's read",
        STORE_AND_READ.format(between="bar.sync 0;", other=4) + "st.shared.b32 [%r2], %r4;",
        Race,
    ),
    (
        "two warps write to one word",
        LOAD + "and.b32 %r2, %r1, 31; shl.b32 %r2, %r2, 2; st.shared.b32 [%r2], %r1;",
        Race,
    ),
    ("two threads write to one global word", LOAD + "st.global.b32 [%rd1], %r1;", Race),
    (
        "two blocks write to one global word",
        LOAD
        + "mov.u32 %r2, %ctaid.x; st.global.b32 [%rd1], 7;".replace("7", "%r3").replace("st.", "mov.b32 %r3, 7; st."),
        Race,
    ),
    ("read before the wait for a copy", COPY + "ld.shared.v4.b32 {%r3, %r4, %r5, %r7}, [%r2];", Uninitialized),
    (
        "second read before the wait for a copy",
        COPY + "cp.async.wait_group 0;" + COPY + "ld.shared.v4.b32 {%r3, %r4, %r5, %r7}, [%r2];",
        AsyncCopyRace,
    ),
    ("write before the wait for a copy", COPY + "st.shared.b32 [%r2], %r1;", AsyncCopyRace),
    (
        "another warp's copy without a barrier",
        COPY + "cp.async.wait_group 0; xor.b32 %r3, %r2, 512; ld.shared.b32 %r4, [%r3];",
        Race,
    ),
    ("product without a fence", FILL + "bar.sync 0;" + PRODUCT, MissingFence),
    ("product without a barrier", FILL + "fence.proxy.async.shared::cta;" + PRODUCT, Race),
    ("product of unwritten memory", "fence.proxy.async.shared::cta; bar.sync 0;" + PRODUCT, Uninitialized),
    (
        "write before the wait for a product",
        FILL + "fence.proxy.async.shared::cta; bar.sync 0;" + PRODUCT + "bar.sync 0; st.shared.b32 [%r6], %r1;",
        AsyncCopyRace,
    ),
    (
        "threads of one block part",
        LOAD + "setp.lt.u32 %p1, %r1, 3; @%p1 bra $L_end; mov.b32 %r2, 1; $L_end: ",
        Divergence,
    ),
    ("opcode without a model", "vadd.s32.s32.s32 %r1, %r2, %r3;", Unsupported),
    ("barrier of some warps", "bar.sync 1, 64;", Unsupported),
    ("atomic", LOAD + "atom.global.add.u32 %r2, [%rd1], %r1;", Unsupported),
]


@pytest.mark.parametrize(("body", "fault"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_fault_is_reported_by_its_name(body, fault):
    with pytest.raises(fault) as caught:
        execute(
            body,
            np.zeros(128, np.uint32),
            threads=128,
            shared=8192 if "wgmma" in body else 4096,
            blocks=2 if "ctaid" in body else 1,
        )
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
