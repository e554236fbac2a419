"""Small PTX programs for the tests of single instructions."""

import numpy as np
from ptx.global_memory import GlobalMemory
from ptx.instructions import parse
from ptx.machine import Machine, run
from ptx.shared_memory import SharedMemory
from ptx.translate import translate

PROGRAM = """.visible .entry kernel(.param .u64 .ptr .global .align 1 kernel_param_0, .param .u64 kernel_param_1)
{{ {body} ret; }}"""


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


LOAD = "ld.param.b64 %rd1, [kernel_param_0]; mov.u32 %r1, %tid.x;"
EACH = LOAD + " mul.wide.u32 %rd2, %r1, {size}; add.s64 %rd3, %rd1, %rd2;"


def registers(first, count):
    """Return a vector of 32-bit registers."""
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def descriptor(start, leading, stride, swizzle):
    """Return the descriptor of an operand of wgmma; all but the swizzle's width in bytes."""
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | {128: 1, 64: 2, 32: 3}[swizzle] << 62
