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
from unittest import mock

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
    """One way to break a program: `pattern` replaced, at every match together or at each alone.

    Alone, for what each kernel needs one by one. Together, where Triton emits more than it takes (a fence after a wait
    that ordered the same), or where a single match need not matter (the mask of a load whose value another mask drops).
    """

    name: str
    pattern: str
    replacement: str | Callable[[re.Match], str] = ""
    alone: bool = False


_DESCRIPTOR = r"or\.b64\s+(%rd\d+), %rd\d+, 4611686293305294848;"
MUTATIONS = (
    Mutation("block barrier removed", r"bar\.sync\s+0;", alone=True),
    Mutation("warp barrier removed", r"bar\.warp\.sync\s+[^;]*;", alone=True),
    Mutation("wait for copies removed", r"cp\.async\.wait_group\s+\d+;", alone=True),
    Mutation("wait for copies too weak", r"(cp\.async\.wait_group)\s+(\d+);", lambda m: f"{m[1]} {int(m[2]) + 2};"),
    Mutation("proxy fences removed", r"fence\.proxy\.async[^;]*;"),
    Mutation("register fences removed", r"wgmma\.fence[^;]*;"),
    Mutation("waits for products removed", r"wgmma\.wait_group[^;]*;"),
    Mutation("products not committed", r"wgmma\.commit_group[^;]*;"),
    Mutation("masks of copies ignored", r"(cp\.async\.c[ag]\.shared\.global [^;]*, (0x\w+)), %r\d+;", r"\1, \2;"),
    Mutation("masks of loads ignored", r"@%p\d+ (ld\.global)", r"\1"),
    Mutation("masks of stores ignored", r"@%p\d+ (st\.global)", r"\1"),
    Mutation("loads shifted", r"(ld\.global\.[^;]*\[\s*%rd\d+) \+ 0", r"\1 + 2"),
    Mutation("stores shifted", r"(st\.global\.[^;]*\[\s*%rd\d+) \+ 0", r"\1 + 2"),
    Mutation("copies from shifted addresses", r"(cp\.async\.c[ag]\.[^;]*\[ %rd\d+) \+ 0", r"\1 + 2"),
    Mutation("descriptors' start shifted", _DESCRIPTOR, r"\g<0> xor.b64 \1, \1, 2;"),
    Mutation("descriptors' stride halved", _DESCRIPTOR, r"\g<0> xor.b64 \1, \1, 412316860416;"),
    Mutation("descriptors' swizzle changed", _DESCRIPTOR, r"\g<0> xor.b64 \1, \1, 13835058055282163712;"),
    Mutation("stores to shared memory removed", r"(st\.shared|stmatrix)\.[^;]*;"),
    Mutation("shuffles from other lanes", r"(shfl\.sync\.bfly\.b32\s+%r\d+, %r\d+), (16|8|4|2|1),", r"\1, 3,"),
    Mutation("products of swapped fragments", r"(mma\.sync\.[^{]*\{[^}]*\}, \{ *)(%r\d+), *(%r\d+)", r"\1\3, \2"),
)


# Removals that change nothing in one machine code of a kernel, at most once in each: something else orders the same.
EQUIVALENT = {
    # The barrier and the wait after the loop: its last copies, all zeros, go to buffers that are not used again.
    ("memory_scores_kernel", "block barrier removed"),
    ("memory_joint_gradient_kernel", "block barrier removed"),
    ("memory_joint_gradient_kernel", "wait for copies removed"),
    ("memory_query_gradient_kernel", "block barrier removed"),
    # What is read past the end of ds is w, which follows it in one tensor, and then meets items that are masked.
    ("memory_query_gradient_kernel", "masks of copies ignored"),
}
QUICK = 2  # matches tried alone in the short version


def edits(ptx: str, mutation: Mutation, quick: bool) -> Iterator[str]:
    """Yield the program with every match replaced, or with one after the other."""
    found = list(re.finditer(mutation.pattern, ptx))
    if not mutation.alone:
        if found:
            yield re.sub(mutation.pattern, mutation.replacement, ptx)
        return
    for match in found[:: -(-len(found) // QUICK)] if quick and found else found:
        before, after = ptx[: match.start()], ptx[match.end() :]
        # Triton puts a barrier before the first use of shared memory; there is nothing yet that it could order.
        if "barrier" not in mutation.name or re.search(
            r"\.shared[^{;]*[\[{]|ldmatrix|stmatrix|\$L__BB", before.partition("{")[2]
        ):
            yield before + match.expand(mutation.replacement) + after


def outcome(launch: Prepared, arch: int) -> list[bytes] | str:
    """Return the memory after a launch, or the kind of its fault."""
    try:
        if analysis.faults(parse(launch.ptx)):
            return "read in the program"
        memory, _ = launch.run(ROUNDING[arch])
    except Fault as fault:
        return type(fault).__name__
    return [memory.contents(i).tobytes() for i in range(len(launch.storages))]


def verdicts(alike: list[Prepared], arch: int, quick: bool) -> Iterator[dict[str, object]]:
    """Break a kernel in every way and yield how each was noticed in one of its launches; `"missed"` in none."""
    whole = [outcome(launch, arch) for launch in alike]
    for launch, result in zip(alike, whole):
        if isinstance(result, str):
            raise ValueError(f"{launch.kernel}: {result} without a mutation")
    for mutation in MUTATIONS:
        for i, ptx in enumerate(edits(alike[0].ptx, mutation, quick)):
            how = "missed"
            for launch, right in zip(alike, whole):
                got = outcome(dataclasses.replace(launch, ptx=ptx), arch)
                how = got if isinstance(got, str) else "another result" if got != right else "missed"
                if how != "missed":
                    break
            yield {"arch": arch, "kernel": alike[0].kernel, "mutation": mutation.name, "match": i, "how": how}


def launches(arch: int, quick: bool) -> list[list[Prepared]]:
    """Return launches of every kernel, those of one machine code together."""
    from memory_cases import draw

    from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory
    from simsid.kernels.memory import launchers
    from simsid.kernels.memory.variants import PAIRS

    interpreter = Interpreter(arch)
    normal = torch.Generator().manual_seed(0)
    plan = launchers.plan_scores

    def leaf(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=normal).requires_grad_()

    def memory(sizes: tuple[int, ...], dtypes: str, chunk: int) -> None:
        z, items, g, _ = draw(*sizes, *PAIRS[dtypes])
        # The number of steps decides which of three buffers the last copies go to, and so which barrier they need.
        shape = {"chunk": chunk, "splits": -(-sizes[3] // chunk)}
        with mock.patch.object(launchers, "plan_scores", lambda *a: dataclasses.replace(plan(*a), **shape)):
            space_aware_memory(z.requires_grad_(), items.requires_grad_(), 5, backend="triton").backward(g)

    with interpreter.installed():
        if quick:
            memory((33, 1, 37, 144), "bf16 memory too" if arch == 90 else "fp32", 128)
            memory((13, 1, 37, 144), "fp32", 128)
        for dtypes in () if quick else ("fp32", "bf16 memory too"):
            for batch, items, chunk in ((13, 37, 192), (13, 70, 128), (13, 37, 256), (70, 37, 128), (37, 100, 128)):
                memory((batch, 1, items, 200), dtypes, chunk)
        if quick and arch == 90:
            # Those that differ from sm_80's: products of warp groups.
            first = {launch.ptx: launch for launch in reversed(interpreter.launches)}
            return [[launch] for ptx, launch in first.items() if "wgmma" in ptx]
        x, residual = leaf(130, 500), leaf(130, 500)  # two rows a program
        with torch.no_grad():
            x[3] *= 1e25  # squares that overflow: the row is scaled and normalized again, behind barriers of its own
        residual_layer_norm(x, residual, leaf(500), leaf(500), backend="triton").sum().backward()
        q, k, v, g = (leaf(1, 15, 70) for _ in range(4))  # no size that a vector or a tile divides
        out = neighbor_attention(q, k, v, grid=(3, 5), heads=2, pad_key=leaf(70), pad_value=leaf(70), backend="triton")
        out.backward(g)
    alike: dict[str, list[Prepared]] = {}
    for launch in interpreter.launches:
        alike.setdefault(launch.ptx, []).append(launch)
    return list(alike.values())


def missed(found: list[dict[str, object]]) -> list[dict[str, object]]:
    """Return the verdicts of mutations that were not noticed, beyond those that change nothing."""
    unnoticed = [verdict for verdict in found if verdict["how"] == "missed"]
    return [verdict for verdict in unnoticed if (verdict["kernel"], verdict["mutation"]) not in EQUIVALENT]


def main(arguments: list[str] | None = None) -> int:
    """Print every verdict; return 1 if a mutation was missed."""
    parser = argparse.ArgumentParser(prog="tests/ptx/mutations.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", action="append", type=int, choices=(80, 90), help="both by default")
    parser.add_argument("--match", default="", help="only the kernels whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--quick", action="store_true", help="fewer launches, and a few matches of each pattern")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    found = []
    for arch in chosen.arch or (80, 90):
        for alike in launches(arch, chosen.quick):
            if chosen.match in alike[0].kernel:
                for verdict in verdicts(alike, arch, chosen.quick):
                    found.append(verdict)
                    if not chosen.json:
                        print(*verdict.values(), flush=True)
    if chosen.json:
        print(json.dumps({"triton": importlib.metadata.version("triton"), "verdicts": found, "missed": missed(found)}))
    return int(bool(missed(found)))


if __name__ == "__main__":
    sys.exit(main())
