"""Run the kernels as PTX on the CPU and report faults and wrong results; no GPU, no ptxas.

    python tests/ptx/run.py                     the cases of the test suite
    python tests/ptx/run.py --long              every case, and every variant of the compile gate read for fences
    python tests/ptx/run.py --match "sm_90 memory"

With another version of Triton first on PYTHONPATH, that version's PTX is run.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pathlib
import sys
import time
import traceback

ROOT = pathlib.Path(__file__).parents[2]
# This script's folder would hide other modules behind its own.
sys.path[:1] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "kernels"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from ptx import analysis  # noqa: E402
from ptx.cases import CASES, Case  # noqa: E402
from ptx.instructions import parse  # noqa: E402


def run_case(case: Case) -> dict[str, object]:
    """Run a case and return what happened: `fault` is None where nothing did."""
    from ptx.bridge import Interpreter

    interpreter, fault, start = Interpreter(case.arch), None, time.perf_counter()
    with interpreter.installed():
        try:
            case.run()
        except Exception as error:  # a fault of one case must not hide the others
            fault = f"{type(error).__name__}: {error}"
            if type(error).__module__ not in ("ptx.checks", "builtins"):
                fault += "\n" + traceback.format_exc()
    programs = {launch.kernel: parse(launch.ptx) for launch in interpreter.launches}
    return {
        "name": case.name,
        "fault": fault,
        "kernels": sorted(programs),
        "ambiguous": {name: count for name, count in interpreter.ambiguous.items() if count},
        "order": [message for program in programs.values() for message in analysis.faults(program)],
        "opcodes": sorted({one.opcode for program in programs.values() for one in program.instructions}),
        "products": sum(analysis.count(program, "wgmma.mma_async") for program in programs.values()),
        "fences": sum(analysis.count(program, "fence.proxy.async") for program in programs.values()),
        "seconds": round(time.perf_counter() - start, 2),
    }


def read_variants(match: str) -> list[dict[str, object]]:
    """Compile every variant of the compile gate for sm_80 and sm_90, and read its PTX for opcodes and fences."""
    import compiled
    from ptx.bridge import compile_ptx
    from ptx.checks import Fault
    from ptx.translate import translate

    results = []
    for op in compiled.OPS:
        for variant in compiled.variants(op):
            for arch in {80, 90} & set(variant.architectures):
                name, fault = f"sm_{arch} variant {variant.name}", None
                if match not in name:
                    continue
                program = parse(compile_ptx(variant, arch).ptx)
                try:
                    translate(program)
                except Fault as error:
                    fault = f"{type(error).__name__}: {error}"
                fences, products = (
                    analysis.count(program, prefix) for prefix in ("fence.proxy.async", "wgmma.mma_async")
                )
                order = analysis.faults(program)
                results.append({"name": name, "fault": fault, "order": order, "fences": fences, "products": products})
    return results


def main(arguments: list[str] | None = None) -> int:
    """Print a line for each case, or JSON; return 1 if one has a fault."""
    parser = argparse.ArgumentParser(prog="tests/ptx/run.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--long", action="store_true", help="every case and every variant of the compile gate")
    parser.add_argument("--match", default="", help="only the cases whose name contains this")
    parser.add_argument("--json", action="store_true", help="print JSON")
    chosen = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialized tensors with NaN
    results = []
    for case in CASES:
        if chosen.match in case.name and (chosen.long or not case.long):
            results.append(run_case(case))
            if not chosen.json:
                _print(results[-1])
    if chosen.long:
        for result in read_variants(chosen.match):
            results.append(result)
            if not chosen.json:
                _print(result)
    if chosen.json:
        print(json.dumps({"triton": importlib.metadata.version("triton"), "cases": results}))
    return int(any(result["fault"] or result["order"] for result in results))


def _print(result: dict[str, object]) -> None:
    problems = [result["fault"]] if result["fault"] else []
    notes = [f"{count} ambiguous in {name}" for name, count in result.get("ambiguous", {}).items()]
    seconds = f"{result['seconds']:7.2f} s  " if "seconds" in result else ""
    verdict = "; ".join([*problems, *result["order"]]) or "ok"
    print(f"{seconds}{result['name']}: {verdict}{'  (' + ', '.join(notes) + ')' if notes else ''}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
