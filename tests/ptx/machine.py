"""The state of some blocks of a launch, and the loop that runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from ptx.checks import Divergence, Fault, Uninitialized, Unsupported
from ptx.global_memory import GlobalMemory
from ptx.shared_memory import SharedMemory
from ptx.tensorcore import Rounding

if TYPE_CHECKING:
    from ptx.translate import Kernel

np.seterr(all="ignore")  # overflow and NaN are results here
MAX_STEPS = 1_000_000  # basic blocks of one launch: a loop that does not end is a fault


class _Unwritten:
    """What a register holds before the first write: no function accepts it."""

    size = 0

    def __array__(self, *arguments: object, **options: object) -> np.ndarray:
        raise Uninitialized("a register that nothing has written")

    def __getattr__(self, name: str) -> object:
        raise Uninitialized("a register that nothing has written")


UNWRITTEN = _Unwritten()


class Machine:
    """Registers and memories of `numbers`, blocks of a launch that run in step.

    A register is an array of one element for all threads, or of one for each thread, blocks first.
    """

    def __init__(self, kernel: Kernel, numbers: np.ndarray, grid: tuple[int, int, int], threads: int):
        self.registers: list[np.ndarray] = [UNWRITTEN] * kernel.slots
        self.parameters: dict[str, np.ndarray] = {}
        self.global_memory: GlobalMemory = None
        self.shared: SharedMemory = None
        self.rounding: Rounding | None = None
        self.block_size = threads
        self.numbers = numbers
        self._index()
        x, y, z = numbers % grid[0], numbers // grid[0] % grid[1], numbers // (grid[0] * grid[1])
        values = {"tid.x": self.threads, "ntid.x": np.array([threads])}
        for axis, index, extent in zip("xyz", (x, y, z), grid):
            values[f"ctaid.{axis}"] = np.repeat(index, threads)
            values[f"nctaid.{axis}"] = np.array([extent])
        for slot, name in kernel.special.items():
            if name not in values:
                raise Unsupported(f"the special register {name}")
            self.registers[slot] = values[name].astype(np.uint32)
        for slot, value in kernel.constants.items():
            self.registers[slot] = value

    def _index(self) -> None:
        self.threads = np.tile(np.arange(self.block_size, dtype=np.int64), len(self.numbers))  # within their block
        self.blocks = np.repeat(np.arange(len(self.numbers)), self.block_size)  # within this machine
        self.block_numbers = np.repeat(self.numbers, self.block_size)  # within the launch

    # Registers

    def everywhere(self, x: np.ndarray) -> np.ndarray:
        """Return a register with one element for each thread."""
        return x if x.size == self.threads.size and x.size > 1 else np.broadcast_to(x, self.threads.shape)

    def set(self, slot: int, value: np.ndarray) -> None:
        self.registers[slot] = value

    def active(self, predicate: int, negated: bool) -> np.ndarray:
        value = self.everywhere(self.registers[predicate])
        return ~value if negated else value

    def lanes(self, predicate: int | None, negated: bool) -> np.ndarray | None:
        """Return the threads for which a predicate holds, None for all of them."""
        if predicate is None:
            return None
        active = self.active(predicate, negated)
        return None if active.all() else np.flatnonzero(active)

    def assign(self, slot: int, value: np.ndarray, active: np.ndarray) -> None:
        """Write a register where a predicate holds."""
        self.registers[slot] = np.where(active, value, self.before(slot, value.dtype))

    def scatter(self, slot: int, values: np.ndarray, lanes: np.ndarray | None) -> None:
        """Write a register of some threads."""
        if lanes is None:
            self.registers[slot] = values
            return
        register = np.array(np.broadcast_to(self.before(slot, values.dtype), self.threads.shape))
        register[lanes] = values
        self.registers[slot] = register

    def before(self, slot: int, dtype: np.dtype) -> np.ndarray:
        """Return a register, or a pattern that shows in results where nothing was written to it."""
        before = self.registers[slot]
        if before is UNWRITTEN:
            before = np.frombuffer(b"\xcd" * dtype.itemsize, dtype) if dtype.kind != "b" else np.zeros(1, bool)
        return before

    # Memories

    def _who(self, addresses: np.ndarray, lanes: np.ndarray | None) -> tuple[np.ndarray, ...]:
        chosen = slice(None) if lanes is None else lanes
        return self.everywhere(addresses)[chosen], self.blocks[chosen], self.threads[chosen], self.block_numbers[chosen]

    def load(self, memory: str, addresses: np.ndarray, dtype: type, count: int, lanes: np.ndarray | None) -> np.ndarray:
        where, blocks, threads, numbers = self._who(addresses, lanes)
        if memory == "global":
            return self.global_memory.load(where, dtype, count, numbers)
        return self.shared.load(where, dtype, count, blocks, threads)

    def store(self, memory: str, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray | None) -> None:
        where, blocks, threads, numbers = self._who(addresses, lanes)
        if memory == "global":
            self.global_memory.store(where, values, numbers)
        else:
            self.shared.store(where, values, blocks, threads)

    def copy(self, to: np.ndarray, source: np.ndarray, size: int, sizes: np.ndarray, lanes: np.ndarray | None) -> None:
        """Start an asynchronous copy of `sizes` bytes, the rest of `size` bytes zeros."""
        where, blocks, threads, numbers = self._who(to, lanes)
        chosen = slice(None) if lanes is None else lanes
        sizes, source = self.everywhere(sizes)[chosen], self.everywhere(source)[chosen]
        if ((sizes != 0) & (sizes != size)).any():
            raise Unsupported("an asynchronous copy of a part of its size")
        data = np.zeros((len(where), size), np.uint8)
        full = sizes == size
        data[full] = self.global_memory.load(source[full], np.uint8, size, numbers[full])
        self.shared.copy(where, data, blocks, threads)

    # Control

    def part(self, chosen: np.ndarray) -> Machine:
        """Return some of the blocks as a machine of their own."""
        part = Machine.__new__(Machine)
        part.__dict__.update(self.__dict__)
        size = self.threads.size
        threads = (chosen[:, None] * self.block_size + np.arange(self.block_size)).reshape(-1)
        part.numbers = self.numbers[chosen]
        part._index()
        part.registers = [
            register[threads] if register.size == size and size > 1 else register for register in self.registers
        ]
        part.shared = self.shared.select(chosen)
        return part

    def way(self, predicate: int, negated: bool) -> np.ndarray:
        """Return for each block whether its threads branch.

        Raises:
            Divergence: threads of one block do not agree.
        """
        active = self.active(predicate, negated).reshape(-1, self.block_size)
        if (active != active[:, :1]).any():
            raise Divergence("threads of one block take different ways")
        return active[:, 0]


def run(kernel: Kernel, machine: Machine) -> None:
    """Run the blocks of a machine to their end.

    Blocks that part at a branch go on as machines of their own.

    Raises:
        Fault: what a kernel must not do, with the instruction.
    """
    waiting = [(0, machine)]
    steps = 0
    while waiting:
        i_block, m = waiting.pop()
        while i_block < len(kernel.blocks):
            steps += 1
            if steps > MAX_STEPS:
                raise Fault(f"{kernel.name}: no end after {MAX_STEPS} basic blocks")
            block = kernel.blocks[i_block]
            _run_steps(kernel, block, m)
            if block.target is None:
                i_block += 1
            elif block.predicate is None:
                i_block = block.target
            else:
                branches = m.way(block.predicate, block.negated)
                if not branches.all() and branches.any():
                    waiting.append((block.target, m.part(np.flatnonzero(branches))))
                    m = m.part(np.flatnonzero(~branches))
                i_block = block.target if branches.all() else i_block + 1


def _run_steps(kernel: Kernel, block: object, m: Machine) -> None:
    done = 0
    try:
        for step, _ in block.steps:
            step(m)
            done += 1
    except Fault as fault:
        raise type(fault)(f"{kernel.name}: {fault} [{block.steps[done][1].text}]") from fault
