"""Instructions to Python functions that carry them out for every thread of some blocks at once."""

import dataclasses
import functools
import re
from collections.abc import Callable

import numpy as np
from ptx import warp
from ptx.arithmetic import immediate, operation, selected, storage
from ptx.checks import Unsupported
from ptx.instructions import Address, Instruction, Program
from ptx.machine import Machine

Step = Callable[[Machine], None]
SPECIAL = ("tid", "ntid", "ctaid", "nctaid")
# Nothing to do where all threads run in step: no memory is touched. (`wgmma.fence` orders registers.)
NOTHING = ("bar.warp.arrive", "membar", "fence.acq_rel", "fence.sc", "wgmma.fence", "griddepcontrol", "pragma")


@dataclasses.dataclass(frozen=True)
class Block:
    """A basic block: its steps, and the branch after them."""

    steps: tuple[tuple[Step, Instruction], ...]
    target: int | None = None  # block to branch to; the next one without
    predicate: int | None = None  # slot of the branch's condition; always without
    negated: bool = False


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A translated program."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]
    slots: int
    constants: dict[int, np.ndarray]
    special: dict[int, str]  # slot -> special register
    granule: int  # bytes of the smallest access to shared memory


def translate(program: Program) -> Kernel:
    """Translate a program.

    Raises:
        Unsupported: an instruction has no model.
    """
    translator = _Translator(program)
    blocks = tuple(translator.block(block) for block in program.blocks)
    return Kernel(
        program.name,
        program.parameters,
        blocks,
        len(translator.slots),
        translator.constants,
        translator.special,
        translator.granule,
    )


def access(opcode: str) -> tuple[str, type, int]:
    """Return the memory of a load or store, `"global"` or `"shared"`, the dtype and the number of its elements."""
    parts = opcode.split(".")
    vector = [int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)]
    return parts[1].removesuffix("::cta"), storage(parts[-1]), (vector or [1])[0]


class _Translator:
    def __init__(self, program: Program):
        self.program = program
        self.slots: dict[object, int] = {}
        self.constants: dict[int, np.ndarray] = {}
        self.special: dict[int, str] = {}
        self.granule = 16

    def block(self, instructions: tuple[Instruction, ...]) -> Block:
        steps = []
        for instruction in instructions:
            name = instruction.opcode.split(".")[0]
            if name in ("bra", "ret"):
                end = len(self.program.blocks)
                target = end if name == "ret" else self.program.labels[instruction.operands[0]]
                predicate = None if instruction.predicate is None else self.slot(instruction.predicate, "pred")
                return Block(tuple(steps), target, predicate, instruction.negated)
            step = self._step(instruction)
            if step is not None:
                steps.append((step, instruction))
        return Block(tuple(steps))

    # Operands

    def slot(self, text: str, kind: str) -> int:
        """Return the slot of a register, a special register, a symbol or an immediate."""
        known = self.slots.get(text)  # only of registers
        if known is not None:
            return known
        if text.startswith("%") and text[1:].split(".")[0] not in SPECIAL:
            if not re.fullmatch(r"%\w+", text):
                raise Unsupported(f"the operand {text}")
            self.slots[text] = len(self.slots)
            return self.slots[text]
        key = (text, storage(kind))
        if key not in self.slots:
            self.slots[key] = len(self.slots)
            if text.startswith("%"):
                self.special[self.slots[key]] = text[1:]
            else:
                self.constants[self.slots[key]] = immediate(text, kind)
        return self.slots[key]

    def vector(self, operand: object, kind: str) -> list[int]:
        return [self.slot(text, kind) for text in (operand if isinstance(operand, tuple) else (operand,))]

    def _active(self, instruction: Instruction) -> tuple[int | None, bool]:
        slot = None if instruction.predicate is None else self.slot(instruction.predicate, "pred")
        return slot, instruction.negated

    def _address(self, address: Address, memory: str) -> tuple[int, np.generic]:
        wide = memory == "global"
        kind = np.uint64 if wide or self._is_wide(address.base) else np.uint32
        return self.slot(address.base, "u64" if kind is np.uint64 else "u32"), kind(
            address.offset % (1 << 8 * kind().itemsize)
        )

    @staticmethod
    def _is_wide(base: str) -> bool:
        return base.startswith("%rd")

    # Instructions

    def _step(self, instruction: Instruction) -> Step | None:
        if instruction.opcode.startswith(NOTHING):
            return None
        return _builder(instruction.opcode)(self, instruction)

    def _arithmetic(self, instruction: Instruction) -> Step:
        target, *operands = instruction.operands
        if instruction.opcode.startswith("mov") and (isinstance(target, tuple) or isinstance(operands[0], tuple)):
            return self._pack(instruction)
        if instruction.opcode.startswith("setp") and "|" in target:
            return self._compare_halves(instruction)
        function, kinds, result = operation(instruction.opcode)
        if len(operands) != len(kinds):
            raise Unsupported(instruction.text)
        if instruction.opcode == "prmt.b32":
            operands = selected(*operands)
        return self._assign(
            instruction, self.slot(target, result), [self.slot(o, k) for o, k in zip(operands, kinds)], function
        )

    def _assign(self, instruction: Instruction, target: int, sources: list[int], function: Callable) -> Step:
        active, negated = self._active(instruction)
        if active is not None:

            def guarded(m: Machine) -> None:
                m.assign(target, function(*(m.registers[s] for s in sources)), m.active(active, negated))

            return guarded
        if len(sources) == 1:
            (a,) = sources

            def unary(m: Machine) -> None:
                m.registers[target] = function(m.registers[a])

            return unary
        if len(sources) == 2:
            a, b = sources

            def binary(m: Machine) -> None:
                m.registers[target] = function(m.registers[a], m.registers[b])

            return binary

        def several(m: Machine) -> None:
            m.registers[target] = function(*(m.registers[s] for s in sources))

        return several

    def _compare_halves(self, instruction: Instruction) -> Step:
        """Translate `setp` of pairs of 16-bit numbers: the first predicate is that of the low halves."""
        opcode, kind = instruction.opcode.removesuffix("x2"), instruction.opcode.split(".")[-1]
        if not kind.endswith("x2") or instruction.predicate:
            raise Unsupported(instruction.text)
        targets = [self.slot(text, "pred") for text in instruction.operands[0].split("|")]
        a, b = (self.slot(text, kind) for text in instruction.operands[1:])
        function = operation(opcode)[0]

        def compare(m: Machine) -> None:
            for target, shift in zip(targets, (np.uint32(0), np.uint32(16))):
                m.set(target, function(*((m.registers[slot] >> shift).astype(np.uint16) for slot in (a, b))))

        return compare

    def _pack(self, instruction: Instruction) -> Step:
        """Translate `mov` between a register and two of half its size."""
        target, source = instruction.operands
        bits = int(instruction.opcode.split(".")[1][1:])
        whole, half = storage(f"b{bits}"), storage(f"b{bits // 2}")
        shift = whole(bits // 2)
        if isinstance(source, tuple):
            halves, result = self.vector(source, f"b{bits // 2}"), self.slot(target, f"b{bits}")
            if instruction.predicate:
                raise Unsupported(instruction.text)

            def pack(m: Machine) -> None:
                # LLVM packs registers that it never writes where nobody uses that half.
                low, high = (m.before(register, np.dtype(half)).astype(whole) for register in halves)
                m.registers[result] = low | (high << shift)

            return pack
        if instruction.predicate:
            raise Unsupported(instruction.text)
        register = self.slot(source, f"b{bits}")
        parts = [(i, self.slot(text, f"b{bits // 2}")) for i, text in enumerate(target) if text != "_"]

        def unpack(m: Machine) -> None:
            value = m.registers[register]
            for i, part in parts:
                m.registers[part] = (value >> shift if i else value).astype(half)

        return unpack

    def _parameter(self, instruction: Instruction) -> Step:
        target, address = instruction.operands
        kind = instruction.opcode.split(".")[-1]
        slot, width = self.slot(target, kind), storage("b64" if target.startswith("%rd") else kind)
        if address.offset:
            raise Unsupported(instruction.text)

        def load(m: Machine) -> None:
            value = m.parameters[address.base].view(storage(kind))
            signed = value.view(f"i{value.dtype.itemsize}") if kind.startswith("s") else value
            m.registers[slot] = (
                signed.astype(f"i{np.dtype(width).itemsize}").view(width) if kind[0] == "s" else signed.astype(width)
            )

        return load

    def _load(self, instruction: Instruction) -> Step:
        memory, dtype, count = access(instruction.opcode)
        kind = instruction.opcode.split(".")[-1]
        targets = self.vector(instruction.operands[0], kind)
        base, offset = self._address(instruction.operands[1], memory)
        active, negated = self._active(instruction)
        if memory == "shared":
            self.granule = min(self.granule, np.dtype(dtype).itemsize * count)
        registers = np.uint16 if dtype is np.uint8 else dtype

        def load(m: Machine) -> None:
            lanes = m.lanes(active, negated)
            values = m.load(memory, m.registers[base] + offset, dtype, count, lanes)
            for i, target in enumerate(targets):
                m.scatter(target, values[:, i].astype(registers), lanes)

        return load

    def _store(self, instruction: Instruction) -> Step:
        memory, dtype, count = access(instruction.opcode)
        kind = instruction.opcode.split(".")[-1]
        base, offset = self._address(instruction.operands[0], memory)
        sources = self.vector(instruction.operands[1], "b16" if dtype is np.uint8 else kind)
        active, negated = self._active(instruction)
        if memory == "shared":
            self.granule = min(self.granule, np.dtype(dtype).itemsize * count)

        def store(m: Machine) -> None:
            lanes = m.lanes(active, negated)
            columns = [m.everywhere(m.registers[source]) for source in sources]
            values = np.stack(columns, 1).astype(dtype)
            m.store(memory, m.registers[base] + offset, values if lanes is None else values[lanes], lanes)

        return store

    def _copy(self, instruction: Instruction) -> Step | None:
        opcode = instruction.opcode
        if opcode == "cp.async.commit_group":
            return lambda m: m.shared.commit_copies()
        if opcode in ("cp.async.wait_group", "cp.async.wait_all"):
            pending = int(instruction.operands[0]) if opcode.endswith("group") else 0
            return lambda m: m.shared.wait_for_copies(pending)
        if not opcode.startswith(("cp.async.ca.shared", "cp.async.cg.shared")):
            raise Unsupported(instruction.text)
        to, start = self._address(instruction.operands[0], "shared")
        source, offset = self._address(instruction.operands[1], "global")
        size = int(instruction.operands[2], 0)
        actual = self.slot(instruction.operands[3], "u32") if len(instruction.operands) > 3 else None
        active, negated = self._active(instruction)
        self.granule = min(self.granule, size)

        def copy(m: Machine) -> None:
            sizes = np.full(1, size, np.uint32) if actual is None else m.registers[actual]
            m.copy(m.registers[to] + start, m.registers[source] + offset, size, sizes, m.lanes(active, negated))

        return copy

    def _barrier(self, instruction: Instruction) -> Step:
        if instruction.predicate:
            raise Unsupported(instruction.text)
        if instruction.opcode.startswith("bar.warp.sync"):
            return lambda m: m.shared.warp_barrier()
        if instruction.operands[0] != "0" or len(instruction.operands) > 1:
            raise Unsupported(f"{instruction.text}: a barrier of some warps")
        return lambda m: m.shared.block_barrier()

    def _matrix(self, instruction: Instruction) -> Step:
        """Translate `ldmatrix` and `stmatrix`."""
        opcode = instruction.opcode
        if not opcode.endswith(".shared.b16") or ".m8n8." not in opcode or instruction.predicate:
            raise Unsupported(instruction.text)
        loads = opcode.startswith("ld")
        matrices, address = instruction.operands if loads else instruction.operands[::-1]
        registers = self.vector(matrices, "b32")
        base, offset = self._address(address, "shared")
        move = warp.load_matrices if loads else warp.store_matrices
        transposed = ".trans." in opcode
        return lambda m: move(m, registers, m.registers[base] + offset, transposed)

    def _exchange(self, instruction: Instruction) -> Step:
        target, source, *rest = instruction.operands
        if instruction.predicate or "|" in target:
            raise Unsupported(instruction.text)
        parts = instruction.opcode.split(".")
        slot, value = self.slot(target, "b32"), self.slot(source, "b32")
        if parts[0] == "redux":
            function = warp.reduction(parts[2], parts[3])
            return lambda m: m.set(slot, function(m.everywhere(m.registers[value])))
        lane, bounds = (self.slot(text, "b32") for text in rest[:2])
        mode = parts[2]

        def shuffle(m: Machine) -> None:
            m.set(slot, warp.shuffle(mode, *(m.everywhere(m.registers[s]) for s in (value, lane, bounds))))

        return shuffle

    def _multiply(self, instruction: Instruction) -> Step:
        parts = instruction.opcode.split(".")
        if not parts[3].startswith("m16n8") or parts[4:6] != ["row", "col"] or parts[6] != "f32" or parts[9] != "f32":
            raise Unsupported(instruction.text)
        d, a, b, c = (self.vector(operand, "b32") for operand in instruction.operands)
        kind = parts[7]
        return lambda m: warp.multiply(m, d, a, b, c, kind)

    def _multiply_group(self, instruction: Instruction) -> Step:
        opcode = instruction.opcode
        if opcode.startswith("wgmma.commit_group"):
            return lambda m: m.shared.commit_products()
        if opcode.startswith("wgmma.wait_group"):
            pending = int(instruction.operands[0])
            return lambda m: m.shared.wait_for_products(pending)
        parts = opcode.split(".")
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", parts[4])
        if shape is None or parts[5] != "f32":
            raise Unsupported(instruction.text)
        d, a, b, scale, negate_a, negate_b, *transposed = instruction.operands
        if (negate_a, negate_b) != ("1", "1"):
            raise Unsupported(instruction.text)
        from_registers = isinstance(a, tuple)
        flags = [text == "1" for text in transposed]
        self.granule = min(self.granule, 4 if parts[6] == "tf32" else 2)
        return warp.GroupProduct(
            result=self.vector(d, "b32"),
            a=self.vector(a, "b32") if from_registers else self.slot(a, "b64"),
            b=self.slot(b, "b64"),
            accumulate=self.slot(scale, "pred"),
            columns=int(shape[1]),
            k=int(shape[2]),
            kind=parts[6],
            transposed=(False if from_registers else any(flags[:1]), any(flags[-1:])),
        )


_BUILDERS: dict[str, Callable[[_Translator, Instruction], Step | None]] = {
    "ld.param": _Translator._parameter,
    "ld.global": _Translator._load,
    "ld.shared": _Translator._load,
    "st.global": _Translator._store,
    "st.shared": _Translator._store,
    "cp.async": _Translator._copy,
    "bar": _Translator._barrier,
    "fence.proxy.async": lambda self, instruction: lambda m: m.shared.fence(),
    "ldmatrix": _Translator._matrix,
    "stmatrix": _Translator._matrix,
    "shfl.sync": _Translator._exchange,
    "redux.sync": _Translator._exchange,
    "mma.sync": _Translator._multiply,
    "wgmma": _Translator._multiply_group,
}


@functools.cache
def _builder(opcode: str) -> Callable[[_Translator, Instruction], Step | None]:
    found = (build for prefix, build in _BUILDERS.items() if opcode.startswith(prefix))
    return next(found, _Translator._arithmetic)
