"""All that a GPU has to tell, in a few calls that each keep within a time: is it right, is it fast, does it learn.

    python benchmarks/on_gpu.py correct --output gpu
    python benchmarks/on_gpu.py fast --output gpu
    python benchmarks/on_gpu.py train --output gpu --data chest_xray --runs /tmp/runs
    python benchmarks/on_gpu.py study --output gpu --data chest_xray --runs /tmp/runs
    python benchmarks/on_gpu.py report --output gpu

A call starts nothing that would not fit into `--seconds`, says what it left out, and the next one goes on from the
records in the folder. Every part runs in a process of its own (`gpu_parts.py`, pytest). `--dry-run` runs all of it tiny
and on the CPU: its records say so, and no report mixes them with a GPU's.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import datetime
import glob
import importlib.util
import json
import math
import os
import pathlib
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from xml.etree import ElementTree

import report

ROOT = pathlib.Path(__file__).resolve().parents[1]
PARTS = ROOT / "benchmarks" / "gpu_parts.py"
RESULT = "RESULT "
STAGES = ("correct", "fast", "train", "study")
ABLATIONS = (
    "no_space_aware",
    "no_inpainting",
    "no_hierarchical_memory",
    "no_distillation",
    "no_stop_gradient",
    "no_skip",
    "no_shrinkage",
    "memory_queue",
    "conv_inpainting",
    "pixel_inpainting",
    "no_masked_shortcut",
)
NEEDED = ("torch", "triton", "numpy", "PIL", "sklearn", "joblib", "safetensors", "matplotlib", "nvtx", "tqdm", "tyro")
NEEDED += ("filelock", "pydicom", "pytest", "pytest_benchmark", "hypothesis")
PACKAGE = {"PIL": "pillow", "sklearn": "scikit-learn", "pytest_benchmark": "pytest-benchmark"}
HELPFUL = {"xdist": "pytest-xdist (the test suite in parallel)", "pylibjpeg": "pylibjpeg and the other DICOM decoders"}

DRY = "**DRY RUN ON A CPU, TINY SIZES: NO FIGURE HERE SAYS ANYTHING ABOUT A GPU.**"
FINISHED = ("passed", "failed", "measured")
MARGIN = 20.0  # seconds of a call that are kept for writing, drawing and stopping

Result = dict[str, object]


class Refused(SystemExit):
    """What cannot be done, in one sentence."""

    def __init__(self, message: str) -> None:
        print(f"on_gpu: {message}", file=sys.stderr)
        super().__init__(2)


@dataclasses.dataclass(frozen=True)
class Item:
    """A piece of work: what it is called, the seconds it may need, and what does it within the seconds left."""

    name: str
    seconds: float | Callable[[], float]
    run: Callable[[float], Result]


@dataclasses.dataclass(frozen=True)
class Headline:
    """A figure against its target; `met` is None where there is no target or no figure."""

    name: str
    value: str
    target: str
    met: bool | None
    hint: str = ""


class Clock:
    """The seconds that a call has left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds left for work."""
        return self.end - time.monotonic() - MARGIN


class Records:
    """The records of one stage in a folder: one JSON file, written whole after every item.

    Raises:
        Refused: records of another device, or dry ones where these are not, or the other way round.
    """

    def __init__(self, folder: pathlib.Path, stage: str, about: Result, source: str = "unknown") -> None:
        for other in load(folder).values():
            for name in ("dry_run", "device", "torch", "triton"):
                if other["about"][name] != about[name]:
                    raise Refused(
                        f"{folder} holds records with {name} {other['about'][name]!r}, this is {about[name]!r}: "
                        f"choose another --output"
                    )
        self.path, self.source = folder / f"{stage}.json", source
        self.content = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {"items": {}}
        self.content |= {"stage": stage, "about": about}

    @property
    def items(self) -> dict[str, Result]:
        """The results by name."""
        return self.content["items"]

    def put(self, name: str, result: Result) -> None:
        """Keep a result."""
        self.items[name] = result
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".tmp")
        fresh.write_text(json.dumps(self.content, indent=1), "utf-8")
        fresh.replace(self.path)


def load(folder: pathlib.Path) -> dict[str, Result]:
    """Return the records in a folder by stage.

    Raises:
        Refused: dry ones beside a GPU's, or those of several devices.
    """
    found = {
        stage: json.loads((folder / f"{stage}.json").read_text("utf-8"))
        for stage in STAGES
        if (folder / f"{stage}.json").exists()
    }
    if len({record["about"]["dry_run"] for record in found.values()}) > 1:
        raise Refused(f"{folder} holds records of a dry run beside those of a GPU: they cannot be reported together")
    devices = {record["about"]["device"] for record in found.values()}
    if len(devices) > 1:
        raise Refused(f"{folder} holds records of several devices: {', '.join(sorted(devices))}")
    return found


def perform(items: Iterable[Item], records: Records, clock: Clock, again: bool = False) -> list[str]:
    """Do what is not done yet and fits; returns what was left out, with the reason."""
    left_out = []
    for item in items:
        earlier = records.items.get(item.name, {}).get("status")
        if earlier in FINISHED and not (again and earlier == "failed"):
            continue
        left, needed = clock.left(), item.seconds() if callable(item.seconds) else item.seconds
        if needed > left:
            left_out.append(f"{item.name}: may need {needed:.0f} s, {max(left, 0):.0f} s are left")
            continue
        began = time.monotonic()
        print(f"{item.name} …", flush=True)
        # A test that hangs must not take the whole call; a training takes all there is.
        result = item.run(left if callable(item.seconds) else min(left, 3 * needed))
        took = round(time.monotonic() - began, 1)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        records.put(item.name, result | {"took": took, "when": now, "commit": records.source, "command": sys.argv})
        print(f"{item.name}: {result['status']}, {took} s{_because(result)}", flush=True)
        if result["status"] not in FINISHED:
            left_out.append(f"{item.name}: {result.get('reason', result['status'])}")
    return left_out


def _because(result: Result) -> str:
    return f" ({result['reason']})" if result.get("reason") else ""


def commit() -> str:
    """Return the commit of the source, or "unknown" where there is no git."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    return "unknown"


# Processes ---------------------------------------------------------------------------------------------------------


def environment(dry_run: bool, **more: str) -> dict[str, str]:
    """Return the environment of a part: the source tree importable, the interpreter off on a GPU."""
    paths = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    found = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    found.pop("TRITON_INTERPRET", None)
    if dry_run:
        found |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return found | more


def child(command: list[str], seconds: float, env: dict[str, str]) -> tuple[int | None, str]:
    """Run a command; returns its exit status, None where the time ended it, and what it said."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command, stdout=said, stderr=subprocess.STDOUT, env=env, cwd=ROOT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = None
        said.seek(0)
        return status, said.read().decode("utf-8", "replace")


def part(name: str, options: Result, seconds: float, env: dict[str, str] | None = None, prefix: Iterable[str] = ()):
    """Run a part of `gpu_parts.py`; returns its record, or one that says why there is none."""
    command = [*prefix, sys.executable, str(PARTS), name, json.dumps(options)]
    status, said = child(command, seconds, env or environment(options["dry_run"]))
    lines = [line for line in said.splitlines() if line.startswith(RESULT)]
    if status is None:
        return {"status": "cut off", "reason": f"stopped after {seconds:.0f} s", "said": said[-2000:]}
    if not lines:
        return {"status": "failed", "reason": f"ended with status {status}", "said": said[-4000:]}
    result = json.loads(lines[-1][len(RESULT) :])
    status_text = "passed" if result.pop("passed", True) and status == 0 else "failed"
    return {"status": status_text, "said": said[-4000:] if status else ""} | result


def pytest_run(arguments: list[str], seconds: float, env: dict[str, str]) -> Result:
    """Run tests; returns counts, every failure and why tests were skipped."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "tests.xml")
        command = [sys.executable, "-m", "pytest", *arguments, f"--junitxml={path}", "-p", "no:cacheprovider"]
        status, said = child(command, seconds, env)
        if status is None:
            return {"status": "cut off", "reason": f"stopped after {seconds:.0f} s", "said": said[-2000:]}
        if not path.exists():
            return {"status": "failed", "reason": f"pytest ended with status {status}", "said": said[-4000:]}
        found = read_junit(path)
    # 5: nothing was collected, which a wrong file name would hide.
    good = status == 0 and not found["failures"] and found["tests"] > found["skipped"]
    said = "" if good else said[-6000:]
    return {"status": "passed" if good else "failed", "pytest": shlex.join(command[1:]), "said": said} | found


def read_junit(path: pathlib.Path) -> Result:
    """Return what a JUnit file says: counts, failures with their messages, reasons of skipped tests, the slowest."""
    failures, skipped, seconds, count = [], Counter(), {}, 0
    for case in ElementTree.parse(path).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        count += 1
        seconds[name] = float(case.get("time", 0))
        for kind in ("failure", "error"):
            failures += [{"test": name, "message": f"{entry.get('message')}"[:1500]} for entry in case.findall(kind)]
        skipped.update(str(entry.get("message")) for entry in case.findall("skipped"))
    slowest = sorted(seconds, key=seconds.get)[:-6:-1]
    return {
        "tests": count,
        "failures": failures,
        "skipped": sum(skipped.values()),
        "skipped_because": dict(skipped),
        "slowest": {name: seconds[name] for name in slowest},
    }


# What there is to do -----------------------------------------------------------------------------------------------


def correct_items(options: argparse.Namespace) -> list[Item]:
    """Return the checks, those that tell most for their time first."""
    dry = {"dry_run": options.dry_run}
    env = environment(options.dry_run)
    parallel = [] if not importlib.util.find_spec("xdist") else ["-n", str(max(1, min(8, (os.cpu_count() or 1) // 2)))]

    def tests(*arguments: str, by_file: bool = False) -> Callable[[float], Result]:
        more = ["--dist", "loadfile"] if by_file and parallel else []
        return lambda left: pytest_run([*arguments, *parallel, *more], left, env)

    def golden(left: float) -> Result:
        found = pytest_run(["tests/test_golden.py", "-k", "fused"], left, env)
        if found["status"] == "failed" and not found.get("failures") and found.get("skipped"):
            return found | {"status": "left out", "reason": "; ".join(found["skipped_because"])}
        return found

    def sanitized(tool: str) -> Callable[[float], Result]:
        return lambda left: sanitize(tool, options.dry_run, left)

    def run(name: str, seconds: float, **more: object) -> Item:
        return Item(LABELS[name], seconds, lambda left: part(name, dry | more, left, env_of(name)))

    def env_of(name: str) -> dict[str, str]:
        # Without a fixed workspace cuBLAS may sum in another order.
        return {**env, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"} if name in ("repeat", "graph") else env

    if options.dry_run:
        suite = [Item("tests: a few", 20, lambda left: pytest_run(["tests/test_patches.py"], left, env))]
    else:
        apart = ["tests/kernels", "tests/test_step.py", "tests/test_inference.py", "tests/data/test_images.py"]
        apart += ["tests/data/test_augmentation.py", "tests/test_golden.py"]
        suite = [
            Item("tests: step, inference, images", 60, tests(*apart[1:])),
            Item("tests: kernels", 150, tests(apart[0])),
            # By file: what a module's tests share is made once.
            Item("tests: the rest", 180, tests("tests", *(f"--ignore={path}" for path in apart), by_file=True)),
        ]
    return [
        Item("kernels, twice, bit for bit", 100, lambda left: kernels(options.dry_run, left)),
        run("graph", 45),
        run("repeat", 45),
        Item("golden case, fused", 20, golden),
        *suite[:2],
        run("parity", 60),
        Item("sanitizer: memcheck", 60 if options.dry_run else 90, sanitized("memcheck")),
        Item("sanitizer: racecheck", 60 if options.dry_run else 90, sanitized("racecheck")),
        *suite[2:],
    ]


LABELS = {
    "graph": "CUDA-graph step against the eager one",
    "repeat": "training twice, bit for bit",
    "parity": "200 steps, fused against reference",
}


def kernels(dry_run: bool, left: float) -> Result:
    """Run every kernel family twice, in several processes: most of the time goes into compiling them."""
    count = 1 if dry_run else max(1, min(8, (os.cpu_count() or 1) // 2))
    wanted = [{"dry_run": dry_run, "times": 2, "start": start, "of": count} for start in range(count)]
    with concurrent.futures.ThreadPoolExecutor(count) as pool:
        parts = list(pool.map(lambda options: part("kernels", options, left), wanted))
    broken = [found for found in parts if "cases" not in found]
    if broken:
        return broken[0]
    merged = {name: sorted({entry for found in parts for entry in found[name]}) for name in parts[0] if name in LISTS}
    never = sorted(set(merged["expected"]) - set(merged["kernels"]))
    passed = not never and all(found["status"] == "passed" for found in parts)
    total = sum(found["cases"] for found in parts)
    return {"status": "passed" if passed else "failed", "cases": total, **merged, "never_run": never}


LISTS = ("unequal", "not_finite", "kernels", "expected")
CLEAN = {"memcheck": "ERROR SUMMARY: 0 errors", "racecheck": "RACECHECK SUMMARY: 0 hazards"}


def sanitize(tool: str, dry_run: bool, left: float) -> Result:
    """Run every kernel family under compute-sanitizer."""
    places = [shutil.which("compute-sanitizer"), *glob.glob("/usr/local/cuda*/bin/compute-sanitizer")]
    places += glob.glob("/opt/nvidia/**/compute-sanitizer", recursive=True)
    path = next((place for place in places if place and os.access(place, os.X_OK) and os.path.isfile(place)), None)
    prefix = [path, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"] if path else []
    if dry_run:
        prefix = []
    elif path is None:
        return {"status": "left out", "reason": "compute-sanitizer is not installed"}
    # Otherwise PyTorch's allocator keeps one block for many tensors, whose ends no tool can see.
    env = environment(dry_run, PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    wanted = {"dry_run": dry_run, "times": 1, "start": 0, "of": 1}
    command = [*prefix, sys.executable, str(PARTS), "kernels", json.dumps(wanted)]
    status, said = child(command, left, env)
    if status is None:
        return {"status": "cut off", "reason": f"stopped after {left:.0f} s", "said": said[-2000:]}
    ran = any(line.startswith(RESULT) for line in said.splitlines())
    clean = status == 0 and ran and (dry_run or CLEAN[tool] in said)
    summary = ["no sanitizer in a dry run"] if dry_run else re.findall(r"=+ (.*SUMMARY.*)", said)
    result = {"status": "passed" if clean else "failed", "summary": summary}
    return result | ({} if clean else {"said": said[:4000] + "\n…\n" + said[-4000:]})


FAST = (
    # What the targets need, dearest first; then the rest.
    ("memory B float32", "space_aware_memory-B-float32", 60),
    ("memory A float32", "space_aware_memory-A-float32", 60),
    ("training step", "train_step and not compile", 120),
    ("memory C float32", "space_aware_memory-C-float32", 60),
    ("memory S float32", "space_aware_memory-S-float32", 60),
    ("memory Q float32", "space_aware_memory-Q-float32", 60),
    ("attention layer A float32", "neighbor_attention_layer-A-float32", 60),
    ("inference", "test_inference and not compile", 120),
    ("epoch", "test_epoch", 90),
    ("attention A float32", "neighbor_attention-A-float32", 70),
    ("norm A", "residual_layer_norm-A", 60),
    ("memory A and B bfloat16", "space_aware_memory and bfloat16 and (-A- or -B-)", 100),
    ("memory C, S and Q bfloat16", "space_aware_memory and bfloat16 and (-C- or -S- or -Q-)", 140),
    ("attention layer A bfloat16", "neighbor_attention_layer-A-bfloat16", 60),
    ("training step, torch.compile", "train_step and (compile or baseline)", 300),
    ("folder of films", "score_folder and not compile", 150),
    ("attention, other shapes", "neighbor_attention- and not -A-", 400),
    ("attention layer, other shapes", "neighbor_attention_layer and not -A-", 300),
    ("norm, other shapes", "residual_layer_norm and not -A-", 250),
    ("attention A bfloat16", "neighbor_attention-A-bfloat16", 70),
    ("inference, torch.compile", "test_inference and (compile or baseline)", 300),
)
FAST_DRY = (
    ("norm Q", "residual_layer_norm-Q", 60),
    ("training step", "train_step and (simsid or baseline)", 90),
)


def fast_items(options: argparse.Namespace) -> list[Item]:
    """Return the groups of benchmarks."""
    env = environment(options.dry_run)
    more = ["--width=1", "--benchmark-max-time=0.1", "--benchmark-min-rounds=1"] if options.dry_run else []
    if options.data:
        more.append(f"--data={options.data}")

    def group(chosen: str) -> Callable[[float], Result]:
        def run(left: float) -> Result:
            with tempfile.TemporaryDirectory() as folder:
                path = pathlib.Path(folder, "speed.json")
                flags = ["--benchmark", f"--benchmark-json={path}", "-k", chosen, *more]
                found = pytest_run(["benchmarks/", *flags], left, env)
                rows = report.rows_of(json.loads(path.read_text("utf-8"))) if path.exists() else []
            # What agreed is worth keeping where one variant did not.
            status = "measured" if found["status"] == "passed" else found["status"]
            return found | {"status": status, "rows": rows}

        return run

    return [Item(name, seconds, group(chosen)) for name, chosen, seconds in (FAST_DRY if options.dry_run else FAST)]


def training_items(
    options: argparse.Namespace, names: Iterable[str], seeds: Iterable[int], records: Records
) -> list[Item]:
    """Return one item a model and seed; how long it takes is learned from those that are done."""
    runs = options.runs or options.output / "runs"

    def item(name: str, seed: int) -> Item:
        def run(left: float) -> Result:
            wanted = {
                "dry_run": options.dry_run,
                "name": name,
                "seed": seed,
                "epochs": options.epochs,
                "precision": options.precision,
                "data": options.data and str(options.data),
                "runs": str(runs),
                "seconds": left - 25,  # of which the state takes some to be written
            }
            found = part("train", wanted, left)
            if not found.pop("finished", True):
                done = len(found["epochs"])
                return found | {"status": "cut off", "reason": f"{done} of {options.epochs} epochs are done"}
            return found | {"status": "measured"} if found["status"] == "passed" else found

        title = f"{name}, {options.precision}, {options.epochs} epochs, seed {seed}"
        return Item(title, lambda: _needed(name, options, records), run)

    return [item(name, seed) for seed in seeds for name in names]


def _needed(name: str, options: argparse.Namespace, records: Records) -> float:
    """Return the least seconds to begin a training with: a whole one's, where one has been measured."""
    items = [*load(options.output).get("train", {}).get("items", {}).values(), *records.items.values()]
    done = [entry for entry in items if entry.get("status") == "measured" and "seconds_an_epoch" in entry]
    done = [entry for entry in done if entry["name"] == name] or done
    if options.dry_run or not done:
        return 15.0 if options.dry_run else 60.0
    # What does not fit into one call at all is interrupted and goes on in the next.
    whole = 40 + 1.1 * options.epochs * max(entry["seconds_an_epoch"] for entry in done)
    return min(whole, options.seconds - MARGIN - 20)


def train_items(options: argparse.Namespace, records: Records) -> list[Item]:
    """Return the plain baselines and every seed of SimSID and SQUID, SimSID's first."""
    given = {"dry_run": options.dry_run, "data": options.data and str(options.data)}

    def plain(left: float) -> Result:
        found = part("baselines", given, left)
        return found | {"status": "measured"} if found["status"] == "passed" else found

    seeds = range(options.seeds)
    trainings = [training_items(options, [name], seeds, records) for name in ("simsid", "squid")]
    return [Item("baselines", 20, plain), *trainings[0], *trainings[1]]


def study_items(options: argparse.Namespace, records: Records) -> list[Item]:
    """Return the component study: SimSID and every ablation, seed by seed."""
    names = ABLATIONS[:2] if options.dry_run else ABLATIONS
    return training_items(options, names, range(options.seeds), records)


# Tables ------------------------------------------------------------------------------------------------------------


def headlines(records: dict[str, Result]) -> list[Headline]:
    """Return every target with its figure, where it has been measured."""
    checks = records.get("correct", {}).get("items", {})
    found = [
        Headline(name, _told(entry), "passes", entry["status"] == "passed" if entry["status"] in FINISHED else None)
        for name, entry in checks.items()
    ]
    rows = [row for entry in records.get("fast", {}).get("items", {}).values() for row in entry.get("rows", [])]
    dry = any(record["about"]["dry_run"] for record in records.values())
    return found + ([] if dry or not rows else [*kernel_headlines(rows), *model_headlines(rows)])


def _told(entry: Result) -> str:
    if entry["status"] not in FINISHED:
        return f"{entry['status']}: {entry.get('reason', '')}"
    if "tests" in entry:
        ran = entry["tests"] - entry["skipped"]
        return f"{ran - len(entry['failures'])} of {ran} tests, {entry['skipped']} skipped"
    if "cases" in entry:
        return f"{entry['cases']} cases, {len(entry['kernels'])} kernels, {len(entry['unequal'])} unequal"
    if "runs" in entry:
        parts = (f"{name}: {run['different']} of {run['tensors']} differ" for name, run in entry["runs"].items())
        return "; ".join([*parts, *filter(None, [entry.get("note")])])
    if "distance" in entry:
        return "; ".join(f"{name} {value:.2g}" for name, value in entry["distance"].items())
    return "; ".join(entry.get("summary", [])) or entry["status"]


def kernel_headlines(rows: list[Result]) -> list[Headline]:
    """Return the kernels' targets: device time of forward and backward in CUDA graphs, float32."""
    times = {
        (row["op"], row["shape"], row["pass"], row["variant"]): row
        for row in rows
        if row.get("dtype") == "float32" and "device_us" in row
    }
    both = "forward + backward"

    def time_of(op: str, shape: str, variant: str, which: str = both, key: str = "device_us") -> float | None:
        row = times.get((op, shape, which, variant))
        return None if row is None else row[key]

    def ratio(op: str, shape: str, against: str, least: float) -> Headline:
        fused, other = time_of(op, shape, "fused"), time_of(op, shape, against)
        name = f"{op} {shape}, {against}"
        value = None if fused is None or other is None else other / fused
        text = "" if value is None else f"{value:.2f}x ({other:.1f} µs against {fused:.1f} µs)"
        return _against(name, value, text, least, f"at least {least:g}x", _ncu(op, shape))

    memory = "space_aware_memory"
    found = [ratio(memory, shape, "loop over locations", 10) for shape in "ABSQ"]
    found += [ratio(memory, shape, "batched", 3) for shape in "ABSQ"]
    found += [ratio(memory, shape, "batched, torch.compile", 1.5) for shape in "AB"]
    found += bandwidth_headlines(times)
    others = [time_of(memory, "C", name) for name in ("loop over locations", "batched", "batched, torch.compile")]
    others, fused = [value for value in others if value is not None], time_of(memory, "C", "fused")
    value = None if fused is None or not others else min(others) / fused
    text = "" if value is None else f"{value:.2f}x ({min(others):.1f} µs against {fused:.1f} µs)"
    found.append(_against(f"{memory} C, best of PyTorch", value, text, 1.0, "at least 1x", _ncu(memory, "C")))
    return [*found, ratio("neighbor_attention_layer", "A", "unfold + nn.MultiheadAttention", 5)]


def bandwidth_headlines(times: dict[tuple, Result]) -> list[Headline]:
    """Return what part of the measured copy bandwidth the memory op reaches at B, cold; backward is the difference."""
    op, shape, variant = "space_aware_memory", "B", "fused"
    forward = times.get((op, shape, "forward", variant))
    both = times.get((op, shape, "forward + backward", variant))
    values: list[float | None] = [None, None]
    if forward is not None and "percent_of_copy" in forward:
        values[0] = forward["percent_of_copy"]
        if both is not None:
            import roofline

            images, grid, items, features, _ = forward["sizes"]
            cost = roofline.space_aware_memory_backward(images, grid[0] * grid[1], items, features)
            copy = 100 * forward["gb_per_s"] / forward["percent_of_copy"]
            seconds = 1e-6 * (both["device_cold_us"] - forward["device_cold_us"])
            values[1] = 100 * cost.bytes / seconds / 1e9 / copy if seconds > 0 else None
    return [
        _against(
            f"{op} B, {name}, of the copy's bandwidth",
            value,
            "" if value is None else f"{value:.0f} %",
            least,
            f"at least {least} %",
            _ncu(op, shape),
        )
        for name, value, least in (("forward", values[0], 70), ("backward", values[1], 60))
    ]


def model_headlines(rows: list[Result]) -> list[Headline]:
    """Return the whole model's targets against the written-out baseline."""
    groups: dict[str, dict[str, Result]] = {}
    for row in rows:
        if "images_per_s" in row:
            groups.setdefault(report.group_of(row), {})[row["variant"]] = row

    found = []
    for group, members in groups.items():
        if not group.startswith(("train_step", "inference")):
            continue
        training, base = group.startswith("train_step"), members.get("baseline")
        wanted = [("simsid", 6.0 if training else 10.0)] + ([("fused, CUDA graph, bf16", 8.0)] if training else [])
        for variant, least in wanted:
            row = members.get(variant)
            value = None if row is None or base is None else base["ms"] / row["ms"]
            text = "" if value is None else f"{value:.2f}x ({base['ms']:.2f} ms against {row['ms']:.2f} ms)"
            found.append(_against(f"{group}, {variant}", value, text, least, f"at least {least:g}x"))
        row = members.get("simsid")
        if row is not None and base is not None and "peak_mb" in row and base.get("peak_mb"):
            value = row["peak_mb"] / base["peak_mb"]
            text = f"{value:.2f} ({row['peak_mb']:.0f} MB against {base['peak_mb']:.0f} MB)"
            found.append(Headline(f"{group}, peak memory", text, "at most 0.6", value <= 0.6))
    return found


def _against(name: str, value: float | None, text: str, least: float, target: str, hint: str = "") -> Headline:
    return Headline(name, text, target, None if value is None else value >= least, hint)


def _ncu(op: str, shape: str) -> str:
    kernels = {"space_aware_memory": "memory_", "neighbor_attention_layer": "neighbor_attention"}
    return (
        f"ncu --set full --clock-control none --kernel-name regex:{kernels[op]} --launch-skip 20 --launch-count 5 "
        f"--export {op}-{shape} python -m pytest benchmarks/ --benchmark "
        f'-k "{op}-{shape}-float32 and backward and fused and not graph"'
    )


def headline_table(found: list[Headline]) -> str:
    """Return Markdown, the missed ones' commands below."""
    marks = {True: "pass", False: "**MISS**", None: "not measured"}
    lines = ["| figure | value | target | |", "| --- | --- | --- | --- |"]
    lines += [f"| {entry.name} | {entry.value} | {entry.target} | {marks[entry.met]} |" for entry in found]
    missed = dict.fromkeys(entry.hint for entry in found if entry.met is False and entry.hint)
    if missed:
        lines += ["", "Where the time goes in what was missed:", "", *(f"    {hint}" for hint in missed)]
    return "\n".join(lines)


def _spread(values: list[float], digits: int = 3) -> str:
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" + (f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else "")


def trained(record: Result) -> dict[str, list[Result]]:
    """Return finished trainings by model, precision and epochs."""
    groups: dict[str, list[Result]] = {}
    for name, entry in record.get("items", {}).items():
        if entry["status"] == "measured" and "kept" in entry and "seed" in entry:
            groups.setdefault(name.rpartition(", seed ")[0], []).append(entry)
    return groups


def training_table(record: Result) -> str:
    """Return Markdown: seconds and AUC of every model, mean and standard deviation over seeds, and the baselines."""
    groups = trained(record)
    lines = []
    if groups:
        head = ["model", "seeds", "s an epoch", "s in all", "peak MB", "kept epoch"]
        lines += ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
        for name, runs in groups.items():
            peak = f"{max(run['peak_mb'] for run in runs):.0f}" if all("peak_mb" in run for run in runs) else ""
            cells = [name, str(len(runs)), _spread([run["seconds_an_epoch"] for run in runs])]
            cells += [_spread([run["seconds_training"] for run in runs], 1), peak]
            cells.append(", ".join(str(run["kept_epoch"] + 1) for run in runs))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    plain = record.get("items", {}).get("baselines", {})
    for split, what in (("test", "test films"), ("val", "validation films, on which the epoch was chosen too")):
        columns = {name: [run for run in runs if split in run["kept"]] for name, runs in groups.items()}
        columns = {name: runs for name, runs in columns.items() if runs}
        baselines = plain.get("kept", {}).get(split, {})
        if not columns and not baselines:
            continue
        lines += [f"AUC on the {what}; mean ± standard deviation over seeds:", ""]
        signals = list(dict.fromkeys(name for runs in columns.values() for run in runs for name in run["kept"][split]))
        titles = [f"{name}, {when}" for name in columns for when in _moments(split)]
        lines += ["| signal | " + " | ".join(titles) + " |", "| --- |" + " ---: |" * len(titles)]
        for chosen in signals:
            cells = [chosen]
            for runs in columns.values():
                having = [run for run in runs if chosen in run["kept"][split]]
                cells.append(_spread([run["kept"][split][chosen][0] for run in having]) if having else "")
                if split == "val":
                    last = [run["epochs"][-1].get(f"val_auc_{chosen}") for run in having]
                    cells.append(_spread([value for value in last if value is not None]) if any(last) else "")
            lines.append("| " + " | ".join(cells) + " |")
        for name, (value, low, high) in baselines.items():
            cells = [f"baseline: {name}, {value:.3f} ({low:.3f} to {high:.3f})"]
            lines.append("| " + " | ".join(cells + [""] * len(titles)) + " |")
        lines.append("")
    return "\n".join(lines).rstrip()


def _moments(split: str) -> tuple[str, ...]:
    return ("kept epoch", "last epoch") if split == "val" else ("kept epoch",)


def document(records: dict[str, Result], left_out: Iterable[str] = ()) -> str:
    """Return the whole report as Markdown."""
    if not records:
        return "No records."
    about = next(iter(records.values()))["about"]
    dry = about["dry_run"]
    commits = {entry["commit"] for record in records.values() for entry in record["items"].values()}
    shown = [f"{name} {value}" for name, value in about.items() if name not in ("dry_run", "device")]
    lines = ["# On a CPU, as a rehearsal" if dry else f"# On a GPU: {about['device']}", ""]
    lines += [DRY, ""] if dry else []
    lines += [f"{'; '.join(shown)}; commit {', '.join(sorted(commits)) or 'unknown'}", ""]
    found = headlines(records)
    if found:
        lines += ["## Figures against targets", "", headline_table(found), ""]
    failures = [
        f"- {name}: `{failure['test']}`: {failure['message'].splitlines()[0] if failure['message'] else ''}"
        for stage in ("correct", "fast")
        for name, entry in records.get(stage, {}).get("items", {}).items()
        for failure in entry.get("failures", [])
    ]
    if failures:
        lines += ["## Tests that failed", "", *failures, ""]
    rows = [row for entry in records.get("fast", {}).get("items", {}).values() for row in entry.get("rows", [])]
    if rows:
        lines += ["## Speed", "", report.table(rows), "", *report.epoch_lines(rows), ""]
    for stage, title in (("train", "## Training"), ("study", "## Component study")):
        told = training_table(records.get(stage, {}))
        if told:
            lines += [title, "", told, ""]
    left_out = list(left_out)
    if left_out:
        lines += ["## Left out", "", *(f"- {entry}" for entry in left_out), ""]
    return "\n".join([*lines, *([DRY] if dry else [])]).rstrip() + "\n"


def draw(records: dict[str, Result], folder: pathlib.Path) -> list[pathlib.Path]:
    """Draw the curves of the trainings, and the speeds."""
    written = []
    rows = [row for entry in records.get("fast", {}).get("items", {}).values() for row in entry.get("rows", [])]
    about = next(iter(records.values()))["about"] if records else {}
    title = "DRY RUN, NO GPU" if about.get("dry_run") else about.get("device", "")
    if rows:
        report.plot(rows, folder / "speed.png", title)
        written.append(folder / "speed.png")
    groups = trained(records.get("train", {})) | trained(records.get("study", {}))
    if not groups:
        return written
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    signals = list(dict.fromkeys(key for runs in groups.values() for key in _curves(runs[0])))
    height = math.ceil(len(signals) / 2)
    figure, axes = pyplot.subplots(height, 2, figsize=(13, 3.2 * height), squeeze=False, layout="constrained")
    for axis, key in zip(axes.flat, signals):
        for name, runs in groups.items():
            curves = [[(epoch["epoch"] + 1, epoch[key]) for epoch in run["epochs"] if key in epoch] for run in runs]
            curves = [curve for curve in curves if curve]
            if not curves:
                continue
            places = sorted(set.intersection(*({place for place, _ in curve} for curve in curves)))
            values = [[dict(curve)[place] for curve in curves] for place in places]
            middle = [statistics.fmean(column) for column in values]
            axis.plot(places, middle, label=name, linewidth=1)
            axis.fill_between(
                places, [min(column) for column in values], [max(column) for column in values], alpha=0.2, linewidth=0
            )
        axis.set(title=key, xlabel="epoch")
    for axis in list(axes.flat)[len(signals) :]:
        axis.set_visible(False)
    axes.flat[0].legend(fontsize="x-small")
    figure.suptitle(f"{title}: mean and range over seeds")
    figure.savefig(folder / "curves.png", dpi=110)
    pyplot.close(figure)
    return [*written, folder / "curves.png"]


def _curves(run: Result) -> list[str]:
    names = list(dict.fromkeys(name for epoch in run["epochs"] for name in epoch))
    return [name for name in names if name.startswith("val_auc_") or name == "loss_student"]


# The command -------------------------------------------------------------------------------------------------------


def preflight(options: argparse.Namespace) -> None:
    """Say what is missing before any time is spent.

    Raises:
        Refused: what is needed is not there.
    """
    missing = [PACKAGE.get(name, name) for name in NEEDED if importlib.util.find_spec(name) is None]
    for name, what in HELPFUL.items():
        if importlib.util.find_spec(name) is None:
            print(f"on_gpu: note: without {what}")
    if missing:
        said = f"missing: {', '.join(missing)}; pip install {' '.join(missing)}"
        if not options.anyway:
            raise Refused(f"{said} (--anyway goes on without)")
        print(f"on_gpu: {said}")
    if options.stage in ("train", "study") and options.data is None and not options.dry_run:
        raise Refused("--data must name ZhangLab's folder, chest_xray")
    if options.data is not None:
        if not options.data.is_dir():
            raise Refused(f"--data {options.data} is no folder")
        options.data = options.data.resolve()
    if not options.dry_run and os.environ.get("TRITON_INTERPRET"):
        print("on_gpu: TRITON_INTERPRET is set; the kernels run without it")


@contextlib.contextmanager
def alone(folder: pathlib.Path) -> Iterator[None]:
    """Keep a second call out of the same records."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = folder / ".lock"
    try:
        lock.touch(exist_ok=False)
    except FileExistsError:
        holder = lock.read_text("utf-8").strip()
        if holder.isdigit() and pathlib.Path(f"/proc/{holder}").exists():
            raise Refused(f"{folder} is in use by process {holder}") from None
    lock.write_text(str(os.getpid()), "utf-8")
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=(*STAGES, "report"))
    parser.add_argument("--output", type=pathlib.Path, required=True, help="folder of the records")
    parser.add_argument("--data", type=pathlib.Path, help="ZhangLab's folder chest_xray; nothing is ever fetched")
    parser.add_argument("--seconds", type=float, default=570.0, help="of the whole call (default: %(default)s)")
    parser.add_argument("--runs", type=pathlib.Path, help="folder of training states, large; default: OUTPUT/runs")
    parser.add_argument("--epochs", type=int, help="of a training (default: 200, or 2 of a dry run)")
    parser.add_argument("--seeds", type=int, help="trainings of each model (default: 3, of the study 1)")
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--commit", help="of the source, where a copy has no git to ask")
    parser.add_argument("--only", default="", help="only the items whose name contains this")
    parser.add_argument("--again", action="store_true", help="also do again what failed")
    parser.add_argument("--anyway", action="store_true", help="go on although packages are missing")
    parser.add_argument("--dry-run", action="store_true", help="tiny and on the CPU, to try the script itself")
    options = parser.parse_args(given)
    if options.epochs is None:
        options.epochs = 2 if options.dry_run else 200
    if options.seeds is None:
        options.seeds = 1 if options.stage == "study" else 2 if options.dry_run else 3
    options.output = options.output.resolve()
    options.runs = options.runs and options.runs.resolve()
    return options


def main(given: list[str] | None = None) -> int:
    """Do a stage, or render its records; returns 1 where something failed."""
    if importlib.util.find_spec("simsid") is None:
        sys.path.insert(0, str(ROOT))
    options = arguments(given)
    if options.stage == "report":
        return render(options.output)
    clock = Clock(options.seconds)
    preflight(options)
    about = part("about", {"dry_run": options.dry_run}, max(clock.left(), 1.0))
    if about.pop("status") != "passed":
        raise Refused(f"no GPU can be used (--dry-run tries the script on a CPU): {about.get('said', '')[-800:]}")
    about.pop("said")
    print(f"{about['device']}: PyTorch {about['torch']}, Triton {about['triton']}", flush=True)
    if options.dry_run:
        print(DRY)
    with alone(options.output):
        records = Records(options.output, options.stage, about, options.commit or commit())
        items = {
            "correct": lambda: correct_items(options),
            "fast": lambda: fast_items(options),
            "train": lambda: train_items(options, records),
            "study": lambda: study_items(options, records),
        }[options.stage]()
        chosen = [item for item in items if options.only in item.name]
        left_out = perform(chosen, records, clock, options.again)
        records.content["left_out"] = left_out
        records.write()
        render(options.output, left_out)
    return 1 if any(records.items.get(item.name, {}).get("status") == "failed" for item in chosen) else 0


def render(folder: pathlib.Path, left_out: Iterable[str] | None = None) -> int:
    """Write and print the report of a folder of records."""
    records = load(folder)
    if not records:
        raise Refused(f"{folder} holds no records")
    if left_out is None:
        left_out = [f"{stage}: {entry}" for stage, record in records.items() for entry in record.get("left_out", [])]
    told = document(records, left_out)
    (folder / "report.md").write_text(told, "utf-8")
    print(told)
    if importlib.util.find_spec("matplotlib") is None:
        print("on_gpu: note: no plots without matplotlib")
    else:
        draw(records, folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
