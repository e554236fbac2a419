"""Kernels broken on purpose: each edit of a kernel's PTX must be noticed, or the checks are worth nothing.

    python tests/ptx/mutations.py --json

A mutation is noticed where the run or the reading of the program reports a fault, or where the results differ.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import pathlib
import re
import sys
from collections.abc import Callable, Iterator

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from ptx import analysis  # noqa: E402
from ptx.bridge import Interpreter, Prepared  # noqa: E402
from ptx.checks import Fault  # noqa: E402
from ptx.instructions import parse  # noqa: E402
from ptx.tensorcore import ROUNDING  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One way to break a program: `pattern` replaced by `replacement`, at one match after the other."""

    name: str
    pattern: str
    replacement: str | Callable[[re.Match], str]
    most: int = 1000  # matches that are tried, spread over the program


MUTATIONS = (
    Mutation("block barrier removed", r"bar\.sync\s+0;", ""),
    Mutation("warp barrier removed", r"bar\.warp\.sync\s+[^;]*;", ""),
    Mutation("wait for copies removed", r"cp\.async\.wait_group\s+\d+;", ""),
    Mutation("wait for copies too weak", r"cp\.async\.wait_group\s+(\d+);", lambda m: f"cp.async.wait_group {int(m[1]) + 2};"),
    Mutation("proxy fence removed", r"fence\.proxy\.async[^;]*;", ""),
    Mutation("register fence removed", r"wgmma\.fence[^;]*;", ""),
    Mutation("wait for products removed", r"wgmma\.wait_group[^;]*;", ""),
    Mutation("product not committed", r"wgmma\.commit_group[^;]*;", ""),
    Mutation("mask of a copy ignored", r"(cp\.async\.c[ag]\.shared\.global [^;]*, (0x\w+)), %r\d+;", r"\1, \2;", 4),
    Mutation("mask of a load ignored", r"@%p\d+ (ld\.global)", r"\1", 4),
    Mutation("mask of a store ignored", r"@%p\d+ (st\.global)", r"\1", 4),
    Mutation("global load shifted", r"(ld\.global\.[^;]*\[\s*%rd\d+) \+ 0", r"\1 + 2", 2),
    Mutation("global store shifted", r"(st\.global\.[^;]*\[\s*%rd\d+) \+ 0", r"\1 + 2", 2),
    Mutation("copy from a shifted address", r"(cp\.async\.c[ag]\.[^;]*\[ %rd\d+) \+ 0", r"\1 + 2", 2),
    Mutation("descriptor's start shifted", r"(or\.b64\s+%rd\d+, %rd\d+), 4611686293305294848;", r"\1, 4611686293305294850;", 3),
    Mutation("descriptor's stride halved", r"(or\.b64\s+%rd\d+, %rd\d+), 4611686293305294848;", r"\1, 4611686155866341376;", 3),
    Mutation("descriptor's swizzle changed", r"(or\.b64\s+%rd\d+, %rd\d+), 4611686293305294848;", r"\1, 9223372311732682752;", 3),
    Mutation("shared store removed", r"(st\.shared|stmatrix)\.[^;]*;", "", 3),
    Mutation("shuffle from another lane", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), (16|8|4|2|1),", lambda m: f"{m[1]}, {int(m[2]) % 16 + 1},", 2),
    Mutation("product reads another fragment", r"(mma\.sync\.[^{]*\{[^}]*\}, \{ *)(%r\d+), *(%r\d+)", r"\1\3, \2", 2),
)

# What a removal does not change, because something else orders the same accesses. Each was read in the PTX.
EQUIVALENT: dict[tuple[str, str, str], str] = {}


def edits(ptx: str, mutation: Mutation) -> Iterator[tuple[int, str]]:
    """Yield the program with one match replaced, for some matches."""
    found = list(re.finditer(mutation.pattern, ptx))
    chosen = range(len(found)) if len(found) <= mutation.most else range(0, len(found), -(-len(found) // mutation.most))
    for i in chosen:
        new = mutation.replacement(found[i]) if callable(mutation.replacement) else found[i].expand(mutation.replacement)
        yield i, ptx[: found[i].start()] + new + ptx[found[i].end() :]


def outcome(launch: Prepared, arch: int) -> list[bytes] | str:
    """Return the memory after a launch, or the kind of its fault."""
    try:
        if analysis.faults(parse(launch.ptx)):
            return "read in the program"
        memory, _ = launch.run(ROUNDING[arch])
    except Fault as fault:
        return type(fault).__name__
    return [memory.contents(i).tobytes() for i in range(len(launch.storages))]


def verdicts(launch: Prepared, arch: int) -> Iterator[dict[str, object]]:
    """Break a launch in every way and yield how each was noticed; `"missed"` where it was not."""
    whole = outcome(launch, arch)
    if isinstance(whole, str):
        raise ValueError(f"{launch.kernel}: {whole} without a mutation")
    for mutation in MUTATIONS:
        for i, ptx in edits(launch.ptx, mutation):
            got = outcome(dataclasses.replace(launch, ptx=ptx), arch)
            how = got if isinstance(got, str) else "another result" if got != whole else "missed"
            yield {"arch": arch, "kernel": launch.kernel, "mutation": mutation.name, "match": i, "how": how}


def launches(arch: int) -> list[Prepared]:
    """Return one launch of each kernel, and for sm_90 the ways operands reach the tensor cores."""
    from memory_cases import draw

    from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory
    from simsid.kernels.memory.variants import PAIRS

    interpreter = Interpreter(arch)
    normal = torch.Generator().manual_seed(0)

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=normal).requires_grad_()

    def memory(sizes: tuple[int, ...], dtypes: str) -> None:
        z, items, g, _ = draw(*sizes, *PAIRS[dtypes])
        space_aware_memory(z.requires_grad_(), items.requires_grad_(), 5, backend="triton").backward(g)

    with interpreter.installed():
        memory((3, 1, 37, 264), "fp32")
        memory((33, 1, 20, 264), "bf16 memory too")
        x = leaf(3, 512)
        residual_layer_norm(x, x, leaf(512), leaf(512), backend="triton").sum().backward()
        # Images and head rows that are no multiple of a vector, so that masks matter.
        q, k, v = (leaf(1, 15, 70) for _ in range(3))
        neighbor_attention(q, k, v, grid=(3, 5), heads=2, pad_key=leaf(70), pad_value=leaf(70), backend="triton").sum().backward()
    first = {}
    for launch in interpreter.launches:
        first.setdefault(launch.ptx, launch)
    return list(first.values())


def main(arguments: list[str] | None = None) -> int:
    """Print every verdict; return 1 if a mutation was missed."""
    parser = argparse.ArgumentParser(prog="tests/ptx/mutations.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", type=int, choices=(80, 90), help="both by default")
    parser.add_argument("--match", default="", help="only the kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = []
    for arch in chosen.arch or (80, 90):
        for launch in launches(arch):
            if chosen.match in launch.kernel:
                for verdict in verdicts(launch, arch):
                    found.append(verdict)
                    if not chosen.json:
                        print(*verdict.values(), flush=True)
    if chosen.json:
        print(json.dumps({"triton": importlib.metadata.version("triton"), "verdicts": found}))
    return int(any(verdict["how"] == "missed" for verdict in found))


if __name__ == "__main__":
    sys.exit(main())
