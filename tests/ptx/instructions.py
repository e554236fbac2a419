"""PTX text to instructions: what Triton emits is one kernel a module, without calls."""

import dataclasses
import functools
import re

from ptx.checks import Unsupported


@dataclasses.dataclass(frozen=True)
class Address:
    """A memory operand `[base + offset]`."""

    base: str
    offset: int


Operand = str | tuple[str, ...] | Address


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction; `predicate` is the register of `@%p`, inverted by `negated`."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None
    negated: bool
    text: str


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel as basic blocks: only the last instruction of a block branches."""

    name: str
    parameters: tuple[tuple[str, str], ...]  # type without the dot, name
    blocks: tuple[tuple[Instruction, ...], ...]
    labels: dict[str, int]  # the block that starts at each label

    @property
    def instructions(self) -> list[Instruction]:
        return [instruction for block in self.blocks for instruction in block]

    def successors(self, i_block: int) -> list[int]:
        """Return the blocks that may run after a block; none after the last."""
        last = self.blocks[i_block][-1] if self.blocks[i_block] else None
        after = [i_block + 1] if i_block + 1 < len(self.blocks) else []
        if last is None or not last.opcode.startswith(("bra", "ret")):
            return after
        target = [] if last.opcode == "ret" else [self.labels[last.operands[0]]]
        return target + (after if last.predicate else [])


@functools.lru_cache(maxsize=256)
def parse(text: str) -> Program:
    """Parse the one kernel of a PTX module.

    Args:
        text: the module.

    Returns:
        The kernel.

    Raises:
        Unsupported: there is not exactly one entry, or it does not look as LLVM writes it.
    """
    text = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.DOTALL)
    entries = re.findall(r"\.entry\s+(\w+)\s*\(([^)]*)\)", text)
    if len(entries) != 1 or re.search(r"\.func\b", text):
        raise Unsupported(f"a module with {len(entries)} entries, or with functions")
    name, head = entries[0]
    parameters = tuple(re.findall(r"\.param\s+\.(\w+)[^,]*?(\w+)\s*(?:,|$)", head.strip()))
    blocks: list[list[Instruction]] = [[]]
    labels: dict[str, int] = {}
    for statement in _statements(_body(text[text.index(".entry") :])):
        while label := re.match(r"(\$?\w+):(?!:)\s*", statement):
            if blocks[-1]:
                blocks.append([])
            labels[label[1]] = len(blocks) - 1
            statement = statement[label.end() :]
        if not statement or statement.startswith("."):
            continue
        blocks[-1].append(_instruction(statement))
        if blocks[-1][-1].opcode.split(".")[0] in ("bra", "ret"):
            blocks.append([])
    return Program(name, parameters, tuple(map(tuple, blocks)), labels)


def _body(text: str) -> str:
    """Return what stands between the braces of the kernel."""
    start = text.index("{", text.index(")"))
    depth = 0
    for found in re.finditer(r"[{}]", text[start:]):
        depth += 1 if found[0] == "{" else -1
        if not depth:
            return text[start + 1 : start + found.start()]
    raise Unsupported("a kernel without its closing brace")


def _statements(body: str) -> list[str]:
    """Split at semicolons, without line information and the braces around inline assembly."""
    body = re.sub(r"^\s*\.(loc|file)\b[^\n]*", "", body, flags=re.MULTILINE)
    statements = []
    for statement in body.split(";"):
        statement = re.sub(r"^[\s{}]+", "", statement).strip()
        if statement.count("}") > statement.count("{"):
            statement = statement.rpartition("}")[0].strip()
        statements.append(re.sub(r"\s+", " ", statement))
    return statements


@functools.lru_cache(maxsize=1 << 16)  # programs that differ in one statement are parsed by the hundred
def _instruction(statement: str) -> Instruction:
    guard = re.match(r"@(!?)(%?\w+)\s+", statement)
    rest = statement[guard.end() :] if guard else statement
    opcode, _, operands = rest.partition(" ")
    parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,{}\[\]\s][^,{}\[\]]*", operands)
    return Instruction(
        opcode, tuple(map(_operand, parts)), guard[2] if guard else None, bool(guard and guard[1]), statement
    )


def _operand(text: str) -> Operand:
    text = text.strip()
    if text.startswith("{"):
        return tuple(part.strip() for part in text[1:-1].split(","))
    if text.startswith("["):
        address = re.fullmatch(r"\[\s*(%?\w+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
        if address is None:
            raise Unsupported(f"the address {text}")
        return Address(address[1], int(address[2] or "0", 0))
    return text
