"""What can be read from a program without running it: the order that `wgmma` and its operands need, on every path."""

import functools
from collections.abc import Callable

from ptx.instructions import Instruction, Program

_OPEN = 0  # age of a product that is not committed yet; one more for each later commit
_OLDEST = 16  # ages above count as this one, so that the analysis of a loop ends


def count(program: Program, prefix: str) -> int:
    """Return how many instructions start with `prefix`."""
    return sum(instruction.opcode.startswith(prefix) for instruction in program.instructions)


def faults(program: Program) -> list[str]:
    """Name every missing order: fences before products, the wait before their results."""
    if not count(program, "wgmma.mma_async"):
        return []
    return [*unfenced(program), *unordered_registers(program), *early_reads(program)]


def _walk(program: Program, first: object, join: Callable, step: Callable) -> list[str]:
    """Carry a state along every path until it no longer changes; return what `step` reports.

    `step` takes the state before an instruction and the instruction, and returns the state after it and a message or
    None; states are immutable and comparable. `join` merges the states of two paths.
    """
    before: dict[int, object] = {0: first}
    waiting = [0]
    messages: dict[str, None] = {}
    while waiting:
        i_block = waiting.pop()
        state = before[i_block]
        for instruction in program.blocks[i_block]:
            state, message = step(state, instruction)
            if message:
                messages[f"{program.name}: {message} [{instruction.text[:100]}]"] = None
        for following in program.successors(i_block):
            joined = join(before[following], state) if following in before else state
            if before.get(following) != joined or following not in before:
                before[following] = joined
                waiting.append(following)
    return list(messages)


def unfenced(program: Program) -> list[str]:
    """Report products that a path reaches from the wait for a copy without `fence.proxy.async` after the wait.

    The interpreter checks every write to shared memory by its address; this holds for paths that no test runs.
    """

    def step(dirty: bool, instruction: Instruction) -> tuple[bool, str | None]:
        opcode = instruction.opcode
        if opcode.startswith("fence.proxy.async"):
            return False, None
        if opcode.startswith("cp.async.wait"):
            return True, None
        if dirty and opcode.startswith("wgmma.mma_async"):
            return dirty, "no fence.proxy.async between the wait for a copy and a product"
        return dirty, None

    return _walk(program, False, bool.__or__, step)


@functools.lru_cache(maxsize=1 << 14)
def _registers(operand: object) -> frozenset[str]:
    texts = operand if isinstance(operand, tuple) else (getattr(operand, "base", operand),)
    return frozenset(text for text in texts if text.startswith("%"))


def unordered_registers(program: Program) -> list[str]:
    """Report products of registers that were written without `wgmma.fence` after it."""

    def step(written: frozenset, instruction: Instruction) -> tuple[frozenset, str | None]:
        opcode = instruction.opcode
        if opcode.startswith("wgmma.fence"):
            return frozenset(), None
        if opcode.startswith("wgmma.mma_async"):
            used = _registers(instruction.operands[0])
            if isinstance(instruction.operands[1], tuple):
                used |= _registers(instruction.operands[1])
            return written, "no wgmma.fence between a write to a register and its product" if used & written else None
        if opcode.startswith(("st.", "bra", "ret", "bar", "cp.", "wgmma", "fence")) or not instruction.operands:
            return written, None
        return written | _registers(instruction.operands[0]), None

    return _walk(program, frozenset(), frozenset.__or__, step)


def early_reads(program: Program) -> list[str]:
    """Report accumulators that are read or written before `wgmma.wait_group` has ended their product.

    Operands in registers may be overwritten: ptxas gives the new value another register, or waits.
    """

    def step(flying: frozenset, instruction: Instruction) -> tuple[frozenset, str | None]:
        opcode = instruction.opcode
        if not flying and not opcode.startswith("wgmma.mma_async"):
            return flying, None
        ages = dict(flying)
        if opcode.startswith("wgmma.mma_async"):
            ages.update(dict.fromkeys(_registers(instruction.operands[0]), _OPEN))
            return frozenset(ages.items()), None
        if opcode.startswith("wgmma.commit_group"):
            return frozenset((name, min(age + 1, _OLDEST)) for name, age in ages.items()), None
        if opcode.startswith("wgmma.wait_group"):
            pending = int(instruction.operands[0])
            return frozenset((name, age) for name, age in ages.items() if age in range(pending + 1)), None
        used = set().union(*map(_registers, instruction.operands)) if instruction.operands else set()
        return flying, "an accumulator is used before the wait for its product" if used & ages.keys() else None

    def join(a: frozenset, b: frozenset) -> frozenset:
        ages = dict(a)
        for name, age in b:
            ages[name] = min(age, ages.get(name, age))
        return frozenset(ages.items())

    return _walk(program, frozenset(), join, step)
