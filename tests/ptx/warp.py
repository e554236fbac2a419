"""Instructions of whole warps and warp groups: exchange, reduction, matrix fragments, products."""

import dataclasses
from collections.abc import Callable

import numpy as np
from ptx import tensorcore
from ptx.checks import Uninitialized, Unsupported
from ptx.machine import UNWRITTEN, Machine

WARP = 32
LANE = np.arange(WARP)


def shuffle(mode: str, value: np.ndarray, lane: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Return the value of another lane of the warp (`shfl.sync`), or the own one where that is out of bounds."""
    value, lane, bounds = (x.reshape(-1, WARP) for x in (value, lane & np.uint32(31), bounds))
    lane = lane.astype(np.int64)
    segment, clamp = (bounds >> np.uint32(8)).astype(np.int64) & 31, bounds.astype(np.int64) & 31
    least, most = LANE & segment, (LANE & segment) | (clamp & ~segment)
    if mode == "bfly":
        source, inside = LANE ^ lane, (LANE ^ lane) <= most
    elif mode == "idx":
        source, inside = least | (lane & ~segment), (least | (lane & ~segment)) <= most
    elif mode == "up":
        source, inside = LANE - lane, LANE - lane >= most
    elif mode == "down":
        source, inside = LANE + lane, LANE + lane <= most
    else:
        raise Unsupported(f"shfl.sync.{mode}")
    return np.take_along_axis(value, np.where(inside, source, LANE), 1).reshape(-1)


def reduction(how: str, kind: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function of `redux.sync` over whole warps."""
    functions = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if how not in functions or kind not in ("s32", "u32", "b32"):
        raise Unsupported(f"redux.sync.{how}.{kind}")
    dtype = np.int32 if kind == "s32" else np.uint32

    def reduce(x: np.ndarray) -> np.ndarray:
        result = functions[how].reduce(x.view(dtype).reshape(-1, WARP), axis=1, dtype=dtype)
        return np.repeat(result, WARP).view(np.uint32)

    return reduce


def load_matrices(m: Machine, targets: list[int], addresses: np.ndarray, transposed: bool) -> None:
    """Load 8x8 matrices of 16-bit elements: lane 8 i + r of a warp has the address of row r of matrix i."""
    addresses = m.everywhere(addresses)
    for i, target in enumerate(targets):
        lanes = np.flatnonzero(m.threads % WARP // 8 == i)
        rows = m.load("shared", addresses, np.uint16, 8, lanes).reshape(-1, 8, 8)
        matrix = rows.swapaxes(1, 2) if transposed else rows
        low, high = (matrix[:, LANE // 4, 2 * (LANE % 4) + part].astype(np.uint32) for part in (0, 1))
        m.set(target, (low | high << np.uint32(16)).reshape(-1))


def store_matrices(m: Machine, sources: list[int], addresses: np.ndarray, transposed: bool) -> None:
    """Store 8x8 matrices of 16-bit elements, as `load_matrices` loads them."""
    addresses = m.everywhere(addresses)
    for i, source in enumerate(sources):
        register = m.everywhere(m.registers[source]).reshape(-1, WARP)
        matrix = np.empty((len(register), 8, 8), np.uint16)
        matrix[:, LANE // 4, 2 * (LANE % 4)] = register.astype(np.uint16)
        matrix[:, LANE // 4, 2 * (LANE % 4) + 1] = (register >> np.uint32(16)).astype(np.uint16)
        rows = matrix.swapaxes(1, 2) if transposed else matrix
        lanes = np.flatnonzero(m.threads % WARP // 8 == i)
        m.store("shared", addresses, np.ascontiguousarray(rows).reshape(-1, 8), lanes)


def _of_warps(m: Machine, slots: list[int]) -> list[np.ndarray]:
    return [m.everywhere(m.registers[slot]).reshape(-1, WARP) for slot in slots]


def multiply(m: Machine, d: list[int], a: list[int], b: list[int], c: list[int], kind: str) -> None:
    """Multiply the fragments of a warp (`mma.sync.m16n8`)."""
    left = tensorcore.fragment(_of_warps(m, a), 16, kind)
    right = tensorcore.fragment(_of_warps(m, b), 8, kind)
    result = tensorcore.multiply(left, right, tensorcore.accumulator(_of_warps(m, c)), kind, m.rounding)
    for slot, register in zip(d, tensorcore.accumulator_registers(result)):
        m.set(slot, register.reshape(-1))


@dataclasses.dataclass(frozen=True)
class GroupProduct:
    """A product of four warps (`wgmma.mma_async.m64`): A in registers or shared memory, B in shared memory."""

    result: list[int]
    a: list[int] | int
    b: int
    accumulate: int  # slot of the predicate without which the accumulator counts as 0
    columns: int
    k: int
    kind: str
    transposed: tuple[bool, bool]

    def __call__(self, m: Machine) -> None:
        groups = m.threads.size // (4 * WARP)
        if isinstance(self.a, int):
            left = self._operand(m, self.a, 64, self.transposed[0]).reshape(4 * groups, 16, self.k)
        else:
            left = tensorcore.fragment(_of_warps(m, self.a), 16, self.kind)
        right = np.repeat(self._operand(m, self.b, self.columns, self.transposed[1]), 4, axis=0)
        keep = m.everywhere(m.registers[self.accumulate]).reshape(-1, WARP)
        if any(m.registers[slot] is UNWRITTEN for slot in self.result):
            if keep.any():
                raise Uninitialized("an accumulator that nothing has written")
            before = np.zeros((4 * groups, 16, self.columns), np.float32)
        else:
            registers = [np.where(keep, register, np.uint32(0)) for register in _of_warps(m, self.result)]
            before = tensorcore.accumulator(registers)
        product = tensorcore.multiply(left, right, before, self.kind, m.rounding)
        for slot, register in zip(self.result, tensorcore.accumulator_registers(product)):
            m.set(slot, register.reshape(-1))

    def _operand(self, m: Machine, slot: int, rows: int, transposed: bool) -> np.ndarray:
        descriptors = m.everywhere(m.registers[slot]).reshape(-1, 4 * WARP)
        if (descriptors != descriptors[:, :1]).any():
            raise Unsupported("descriptors that differ within a warp group")
        element = 4 if self.kind == "tf32" else 2
        addresses = tensorcore.operand_addresses(descriptors[:, 0], rows, self.k, element, transposed)
        first = slice(None, None, 4 * WARP)
        dtype = np.uint32 if element == 4 else np.uint16
        bits = m.shared.read_operand(addresses, dtype, m.blocks[first], m.threads[first] // WARP)
        return tensorcore.numbers(bits, self.kind)
