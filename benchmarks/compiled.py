"""Compile the kernels ahead of time and report what the compiler made of them; no GPU is needed.

    python benchmarks/compiled.py --op memory --arch 90

Each op's `variants.py` has `cases()`: names, host calls, and the architectures they are for. The calls run on meta
tensors with launching switched off. What they would have launched is compiled with the specializations that Triton's
launcher would choose.
"""

import argparse
import ast
import dataclasses
import functools
import hashlib
import importlib
import importlib.metadata
import inspect
import json
import pathlib
import re
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from simsid.kernels.backend import interpreter_on
from simsid.kernels.launch import ARCHITECTURES, Launch, record_launches

OPS = ("memory", "attention", "layer_norm", "sums")  # folders of kernels/
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes of shared memory one program may ask for
# Register spills that are allowed, by Triton's version and architecture: bytes of stack, and instructions that use it.
# ptxas spills a few values around the loop to fit one more program on a multiprocessor, even where it then uses only 72
# registers; with a limit of 224 registers it spills none and fits one program less. A version that is not listed has
# the limits of the last.
SPILL_LIMIT = {
    "3.6": {80: (8, 2), 90: (8, 2), 100: (8, 3)},
    "3.7": {80: (8, 2), 90: (0, 0), 100: (24, 12)},
    "3.8": {80: (8, 5), 90: (16, 8), 100: (16, 9)},
    "3.9": {80: (8, 4), 90: (0, 0), 100: (16, 9)},
}


_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclasses.dataclass(frozen=True)
class Variant:
    """A kernel with everything that decides its machine code."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    architectures: tuple[int, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Everything that decides the machine code: two variants of one key compile to the same."""
        return (
            self.kernel.__name__,
            *self.signature.items(),
            *((name, repr(value)) for name, value in self.constexprs.items()),
            self.divisible,
            self.num_warps,
            self.num_stages,
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What the compiler made of one variant for one architecture; sizes in bytes, the rest counts of instructions."""

    name: str
    arch: int
    registers: int
    stack: int
    shared: int
    spills: int  # LDL and STL
    atomics: int  # on global memory, or on numbers in shared memory
    hgmma: int  # warp-group MMA of sm_90
    hmma: int  # warp MMA
    utcmma: int  # tensor-core MMA of sm_100 out of tensor memory
    wide: int  # global loads, stores and asynchronous copies of 16 bytes
    narrow: int  # global accesses of 4 bytes and less
    barriers: int
    fences: int  # between writes to shared memory and tensor cores that read it (`fence.proxy.async` of the PTX)
    instructions: int


def specialize(name: str, launched: Launch, architectures: tuple[int, ...]) -> Variant:
    """Specialize as Triton's launcher does: 1 and None become constants, multiples of 16 are marked."""
    signature: dict[str, str] = {}
    constexprs: dict[str, Any] = {}
    divisible: list[str] = []
    for parameter in launched.kernel.params:
        argument, value = parameter.name, launched.arguments[parameter.name]
        plain = parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not plain):
            signature[argument], constexprs[argument] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[argument] = "*" + _TYPES[value.dtype]
            if value.storage_offset() * value.element_size() % 16 == 0:
                divisible.append(argument)
        elif isinstance(value, float):
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not plain:
                divisible.append(argument)
    return Variant(
        name,
        launched.kernel,
        signature,
        constexprs,
        tuple(divisible),
        launched.num_warps,
        launched.num_stages,
        architectures,
    )


def compile_variant(variant: Variant, arch: int) -> Any:
    """Compile `variant` for compute capability `arch` (80, 90, 100)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = variant.kernel.arg_names
    source = ASTSource(
        variant.kernel,
        signature=variant.signature,
        constexprs=variant.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def dump(cubin: bytes, what: str) -> str:
    """Return what `cuobjdump` prints of a compiled kernel."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, what, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def loops(sass: str) -> list[int]:
    """Return how many instructions each loop has, from a branch back to its target."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+([^;]+);", sass, re.M)
    code = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    jumps = [(address, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) for address, text in code]
    spans = [(int(jump[1], 16), address) for address, jump in jumps if jump]
    return [sum(start <= address <= end for address, _ in code) for start, end in spans if start < end]


def compile_ahead(variant: Variant, arch: int) -> Report:
    """Compile `variant` for compute capability `arch` (80, 90, 100) and read the result."""
    compiled = compile_variant(variant, arch)
    usage, sass = dump(compiled.asm["cubin"], "-res-usage"), dump(compiled.asm["cubin"], "-sass")
    code = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.M)

    def used(resource: str) -> int:
        return int(re.findall(rf"{resource}:(\d+)", usage)[0])

    def count(pattern: str) -> int:
        return sum(re.match(pattern, instruction) is not None for instruction in code)

    return Report(
        name=variant.name,
        arch=arch,
        registers=used("REG"),
        stack=used("STACK"),
        shared=compiled.metadata.shared,
        spills=count(r"LDL|STL"),
        # sm_100 allocates its tensor memory with ATOMS.OR and .AND, which are not arithmetic.
        atomics=count(r"(ATOM|ATOMG|RED|REDG)(\.|$)|ATOMS(?!\.(OR|AND))"),
        hgmma=count(r"HGMMA"),
        hmma=count(r"HMMA"),
        utcmma=count(r"UTC\w*MMA"),
        wide=count(r"(LDG|STG|LDGSTS).*\.128"),
        narrow=count(r"(LDG|STG|LDGSTS)(?!.*\.(64|128))"),
        barriers=count(r"BAR"),
        fences=compiled.asm["ptx"].count("fence.proxy.async"),
        instructions=sum(instruction != "NOP" for instruction in code),
    )


def variants(op: str) -> list[Variant]:
    """Return every distinct variant of the kernels of `op` that its cases would launch, named by its first case."""
    variants: dict[tuple[Any, ...], Variant] = {}
    for case, call, architectures in importlib.import_module(f"simsid.kernels.{op}.variants").cases():
        with record_launches(run=False) as launches:
            call()
        for launched in launches:
            if not launched.kernel.fn.__module__.startswith(f"simsid.kernels.{op}."):
                continue
            variant = specialize(f"{launched.kernel.__name__} [{case}]", launched, architectures)
            first = variants.get(variant.key, variant)
            variants[variant.key] = dataclasses.replace(
                first, architectures=tuple(sorted({*first.architectures, *architectures}))
            )
    return list(variants.values())


@functools.cache
def code_of(function: Any) -> str:
    """Return the source of a function without comments, docstring and layout, which do not change machine code."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    assert isinstance(tree, ast.FunctionDef)
    if ast.get_docstring(tree) is not None:
        del tree.body[0]
    return ast.unparse(tree)


def digest(variant: Variant, arch: int) -> str:
    """Return a hash of all that decides the machine code: Triton, the kernel's source, its helpers, the variant."""
    import triton

    module = sys.modules[variant.kernel.fn.__module__]
    helpers = {
        sys.modules[value.fn.__module__]
        for value in vars(module).values()
        if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ != module.__name__
    }
    parts = [triton.__version__, str(arch), repr(variant.key)]
    for source in (module, *sorted(helpers, key=lambda each: each.__name__)):
        for name, value in sorted(vars(source).items()):
            if isinstance(value, triton.runtime.JITFunction):
                if value is variant.kernel or not name.endswith("_kernel"):
                    parts.append(code_of(value.fn))
            elif isinstance(value, triton.language.constexpr):
                parts.append(f"{name} = {value.value}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def report_all(chosen: Iterable[tuple[Variant, int]], known: dict[str, Report]) -> dict[str, Report]:
    """Return reports by digest; compile the variants that `known` does not hold."""
    reports = {}
    for variant, arch in chosen:
        key = digest(variant, arch)
        reports[key] = (
            dataclasses.replace(known[key], name=variant.name) if key in known else compile_ahead(variant, arch)
        )
    return reports


def as_json(reports: dict[str, Report]) -> str:
    """Write reports by digest and Triton's version as JSON, a line each."""
    import triton

    reports = dict(sorted(reports.items(), key=lambda item: (item[1].name, item[1].arch)))
    lines = (f"  {json.dumps(key)}: {json.dumps(dataclasses.asdict(report))}" for key, report in reports.items())
    return f'{{\n "triton": "{triton.__version__}",\n "reports": {{\n' + ",\n".join(lines) + "\n }\n}\n"


def load(path: str) -> dict[str, Report]:
    """Read what `as_json` wrote, without reports of an older form, which lack a count."""
    names = {field.name for field in dataclasses.fields(Report)}
    stored = json.loads(pathlib.Path(path).read_text())["reports"]
    return {key: Report(**fields) for key, fields in stored.items() if fields.keys() == names}


def problems(report: Report) -> list[str]:
    """Name what no kernel may have: spills above the limit, atomics, too much shared memory, unfenced products."""
    version = ".".join(importlib.metadata.version("triton").split(".")[:2])
    stack, spills = SPILL_LIMIT.get(version, SPILL_LIMIT["3.9"])[report.arch]
    limits = {"stack": stack, "spills": spills, "atomics": 0, "shared": SHARED_LIMIT[report.arch]}
    found = [
        f"{name} {getattr(report, name)} > {most}" for name, most in limits.items() if getattr(report, name) > most
    ]
    unfenced = (report.hgmma or report.utcmma) and not report.fences
    return [*found, "no fence.proxy.async before its products"] if unfenced else found


def table(reports: Iterable[Report]) -> str:
    """Render reports for people."""
    fields = [field.name for field in dataclasses.fields(Report)]
    rows = [fields, *([str(getattr(report, field)) for field in fields] for report in reports)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(fields))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    )


def main(arguments: list[str] | None = None) -> int:
    """Print the table of compiled variants, or JSON; return 1 if a kernel has a problem."""
    parser = argparse.ArgumentParser(prog="benchmarks/compiled.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--op", action="append", choices=OPS, help="all by default")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHITECTURES, help="all by default")
    parser.add_argument("--match", action="append", help="only variants whose name contains this or another")
    parser.add_argument("--known", metavar="FILE", help="take the reports of unchanged variants from this JSON")
    parser.add_argument("--update", metavar="FILE", help="like --known, and write the reports back to it")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--loops", action="store_true", help="print the instructions of each loop instead, and stop")
    chosen = parser.parse_args(arguments)
    if interpreter_on():
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    wanted = [
        (variant, arch)
        for op in chosen.op or OPS
        for variant in variants(op)
        if any(part in variant.name for part in chosen.match or [""])
        for arch in chosen.arch or ARCHITECTURES
        if arch in variant.architectures
    ]
    if chosen.loops:
        for variant, arch in wanted:
            print(f"{variant.name} sm_{arch}:", *loops(dump(compile_variant(variant, arch).asm["cubin"], "-sass")))
        return 0
    file = chosen.known or chosen.update
    known = load(file) if file and pathlib.Path(file).exists() else {}
    reports = report_all(wanted, known)
    if chosen.update:
        fresh = {(report.name, report.arch) for report in reports.values()}
        narrowed = chosen.op or chosen.match or chosen.arch
        kept = {key: r for key, r in known.items() if narrowed and (r.name, r.arch) not in fresh}
        pathlib.Path(chosen.update).write_text(as_json(kept | reports))
    if chosen.json:
        print(as_json(reports), end="")
    else:
        print(table(reports.values()))
    faults = [f"{report.name} sm_{report.arch}: {fault}" for report in reports.values() for fault in problems(report)]
    print(*faults, sep="\n", end="\n" if faults else "", file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
