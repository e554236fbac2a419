"""What `on_gpu.py` runs in processes of their own, so that a fault on the GPU ends one part alone.

    python benchmarks/gpu_parts.py NAME '{"dry_run": false, ...}'

The last line is `RESULT` and the part's record as JSON. With `dry_run` everything is tiny and on the CPU.
"""

import contextlib
import importlib
import itertools
import json
import math
import os
import pathlib
import platform
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import compiled
import numpy as np
import torch
from torch import Tensor

from simsid import Config, Model, Trainer, TrainingConfig, metrics
from simsid.config import ABLATIONS
from simsid.data import ImageSet, Record, ZhangLab, load_images
from simsid.kernels import neighbor_attention, residual_layer_norm, space_aware_memory
from simsid.kernels.launch import record_launches
from simsid.training.step import LOSSES, TrainingStep

RESULT = "RESULT "
METHODS = {"simsid": Config.simsid, "squid": Config.squid}
TINY = {"image_size": 48, "patches": 2, "levels": 2, "width": 4, "items": 6, "decoder_items": 6, "heads": 2, "topk": 2}
VAL_SHARE = 0.1  # held out of the normal films where a data set has too few to validate on, as `simsid train` does
FLOAT32, BFLOAT16, FLOAT16 = torch.float32, torch.bfloat16, torch.float16
DTYPE_PAIRS = ((FLOAT32, FLOAT32), (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32), (BFLOAT16, BFLOAT16), (FLOAT16, FLOAT16))

Case = tuple[str, Callable[..., Tensor], tuple[Tensor, ...], tuple[bool, ...]]


def device_of(options: dict) -> torch.device:
    """Return where a part runs."""
    return torch.device("cpu" if options["dry_run"] else "cuda:0")


def about(options: dict) -> dict[str, object]:
    """Return what every record says of the machine."""
    try:
        import triton
    except ImportError:
        version = "none"
    else:
        version = triton.__version__
    found = {
        "dry_run": options["dry_run"],
        "device": f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    if options["dry_run"]:
        return found
    properties = torch.cuda.get_device_properties(0)
    found |= {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
    }
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit,mig.mode.current", "--format=csv"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        found |= dict(zip([name.strip() for name in said[0].split(",")], [cell.strip() for cell in said[1].split(",")]))
    return found


# Kernels ---------------------------------------------------------------------------------------------------------


def kernel_cases(dry_run: bool) -> Iterator[Case]:
    """Yield every family of variants: name, call, inputs, and which of them get gradients."""
    device = torch.device("cpu" if dry_run else "cuda:0")
    seeds = itertools.count()

    def normal(*shape: int, dtype: torch.dtype = FLOAT32, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(next(seeds)))
        return (scale * drawn).to(dtype).to(device)

    def memory(name: str, B: int, L: int, N: int, D: int, **options: object) -> Case:
        query, items = options.get("dtypes", DTYPE_PAIRS[0])
        shared, needs = options.get("shared", False), options.get("needs", (True, True))
        tensors = normal(B, L, D, dtype=query), normal(1 if shared else L, N, D, dtype=items, scale=D**-0.5)
        noise = normal(B, L, N) if options.get("noise") else None
        k, threshold = options.get("k", 5), options.get("threshold", "inclusive")

        def call(z: Tensor, M: Tensor) -> Tensor:
            return space_aware_memory(z, M, k, threshold=threshold, noise=noise, temperature=0.7, backend="triton")

        return f"memory {name}", call, tensors, needs

    odd = (2, 2, 9, 20) if dry_run else (3, 5, 37, 203)
    for dtypes in DTYPE_PAIRS:
        kinds = "-".join(str(dtype)[6:] for dtype in dtypes)
        yield memory(f"odd {kinds}", *odd, dtypes=dtypes)
        for B in () if dry_run else (16, 32, 64):
            yield memory(f"A {kinds}, batch {B}", B, 16, 100, 512, dtypes=dtypes)
    for needs in ((True, False), (False, True), (False, False)):
        yield memory(f"odd, gradients {needs}", *odd, needs=needs)
    yield memory("exclusive", *odd, threshold="exclusive")
    yield memory("noise", *odd, noise=True)
    yield memory("k=1", *odd, k=1)
    yield memory("k=N", *odd, k=64)
    yield memory("shared", *odd, shared=True)
    yield memory("batch 33", 33, *odd[1:])
    if not dry_run:
        yield memory("A, gradients of items alone", 16, 16, 100, 512, needs=(False, True))
        yield memory("B", 16, 16, 100, 8192)
        yield memory("S", 16, 4, 200, 2048)
        yield memory("many items", 2, 1, 5000, 24)

    def attention(grid: tuple[int, int], D: int, heads: int, dtype: torch.dtype, pads: bool) -> Case:
        tensors = tuple(normal(2, grid[0] * grid[1], D, dtype=dtype) for _ in range(3))
        more = (normal(D), normal(D)) if pads else ()

        def call(query: Tensor, key: Tensor, value: Tensor, *pad: Tensor) -> Tensor:
            named = dict(zip(("pad_key", "pad_value"), pad))
            return neighbor_attention(query, key, value, grid, heads, backend="triton", **named)

        name = f"attention {grid[0]}x{grid[1]} D={D} {str(dtype)[6:]}{' pads' if pads else ''}"
        return name, call, tensors + more, (True,) * len(tensors + more)

    grids = [((4, 4), 512, 8), ((2, 2), 2048, 8), ((3, 3), 256, 8), ((8, 8), 512, 8), ((16, 16), 512, 8)]
    grids = [((2, 2), 8, 2)] if dry_run else [*grids, ((3, 5), 35, 5)]
    for (grid, D, heads), dtype, pads in itertools.product(grids, (FLOAT32, BFLOAT16, FLOAT16), (True, False)):
        yield attention(grid, D, heads, dtype, pads)

    for (rows, D), dtype in itertools.product(
        [(3, 16)] if dry_run else [(256, 512), (64, 2048), (300, 8192), (7, 35)], (FLOAT32, BFLOAT16, FLOAT16)
    ):
        tensors = normal(rows, D, dtype=dtype), normal(rows, D, dtype=dtype), normal(D), normal(D)
        yield (
            f"norm {rows} x {D} {str(dtype)[6:]}",
            lambda *given: residual_layer_norm(*given, backend="triton"),
            tensors,
            (True,) * 4,
        )


def run_case(case: Case) -> list[Tensor]:
    """Return the output and the gradients asked for, the cotangent being one of fixed numbers."""
    _, call, tensors, needs = case
    inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needs)]
    if not any(needs):
        return [call(*inputs)]
    out = call(*inputs)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).to(out.dtype).to(out.device)
    return [out, *torch.autograd.grad(out, [x for x in inputs if x.requires_grad], cotangent)]


def kernels(options: dict) -> dict[str, object]:
    """Run every `of`-th case from `start`, `times` times, and compare the runs bit for bit.

    `expected` names the kernels that there are, `kernels` those that ran.
    """
    every = set()
    for op in compiled.OPS:
        for _, call, _ in importlib.import_module(f"simsid.kernels.{op}.variants").cases():
            with record_launches(run=False) as launches:
                call()
            every |= {launched.kernel.fn.__name__ for launched in launches}
    count, unequal, infinite, seen = 0, [], [], set()
    for case in itertools.islice(kernel_cases(options["dry_run"]), options["start"], None, options["of"]):
        with record_launches() as launches:
            first = run_case(case)
        seen |= {launched.kernel.fn.__name__ for launched in launches}
        unequal += [case[0] for _ in range(options["times"] - 1) if not all(map(torch.equal, first, run_case(case)))]
        if not all(tensor.isfinite().all() for tensor in first):
            infinite.append(case[0])
        count += 1
    if not options["dry_run"]:
        torch.cuda.synchronize()
    result = {"cases": count, "unequal": sorted(set(unequal)), "not_finite": infinite, "kernels": sorted(seen)}
    return result | {"expected": sorted(every), "passed": not (unequal or infinite)}


# Training steps ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """Let PyTorch choose algorithms that repeat bit for bit; its bilinear upsampling otherwise adds atomically."""
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.backends.cudnn.deterministic = wanted
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.backends.cudnn.deterministic = False
        torch.utils.deterministic.fill_uninitialized_memory = fill


def step_of(options: dict, method: str, *, fused: bool | str = "auto", **training: object) -> TrainingStep:
    """Return the training step of an untrained model, the same weights every time."""
    torch.manual_seed(0)
    model = Model(METHODS[method](**TINY if options["dry_run"] else {}), fused=fused)
    return TrainingStep(model.to(device_of(options)).train(), TrainingConfig(**training))


def smooth_images(options: dict, count: int) -> Tensor:
    """Return images of the benchmarks, on the part's device."""
    import models

    return models.noise(count, TINY["image_size"] if options["dry_run"] else 128, device_of(options))


def outcome(options: dict, method: str, iterations: int, **training: object) -> tuple[dict[str, Tensor], dict]:
    """Return weights, buffers and losses after some iterations.

    Raises:
        RuntimeError: the step was to be recorded as a CUDA graph, and was not.
    """
    step = step_of(options, method, **training)
    batch = 4 if options["dry_run"] else 16
    images = smooth_images(options, 4 * batch)
    for number in range(iterations):
        start = number % 4 * batch
        step(images[start : start + batch], number)
    losses = step.means()
    if training.get("cuda_graph", True) and not options["dry_run"] and set(step._replays) != {True, False}:
        raise RuntimeError("the step was not recorded as a CUDA graph")
    return {name: value.clone() for name, value in step.model.state_dict().items()}, losses


def apart(one: tuple[dict[str, Tensor], dict], other: tuple[dict[str, Tensor], dict]) -> dict[str, object]:
    """Return how two outcomes differ: tensors that do, and the largest relative difference of a loss."""
    different = [name for name, value in one[0].items() if not torch.equal(value, other[0][name])]
    losses = {name: abs(value - other[1][name]) / max(abs(value), 1e-12) for name, value in one[1].items()}
    return {"tensors": len(one[0]), "different": len(different), "first": different[:3], "loss": max(losses.values())}


def repeat(options: dict) -> dict[str, object]:
    """Train twice the same way; bit for bit the same under deterministic algorithms, and as it comes without.

    The deterministic steps are eager: there PyTorch checks the queue's places on the host, which no recording allows.
    """
    iterations, found = 4 if options["dry_run"] else 20, {}
    for method, deterministic in itertools.product(METHODS, (True, False)):
        with determinism(deterministic):
            pair = [outcome(options, method, iterations, cuda_graph=not deterministic) for _ in range(2)]
        found[f"{method}, {'deterministic' if deterministic else 'default'}"] = apart(*pair)
    exact = [entry for name, entry in found.items() if name.endswith("deterministic")]
    return {"runs": found, "passed": all(not entry["different"] and not entry["loss"] for entry in exact)}


def graph(options: dict) -> dict[str, object]:
    """Compare a recorded step with an eager one in both precisions; under deterministic algorithms they are the same.

    Otherwise two eager runs differ too, in the last digits.
    """
    iterations, found = 4 if options["dry_run"] else 12, {}
    for method, precision in itertools.product(METHODS, ("float32", "bfloat16")):
        both = (outcome(options, method, iterations, cuda_graph=on, precision=precision) for on in (False, True))
        found[f"{method}, {precision}"] = apart(*both)
    passed, note = all(entry["loss"] <= 1e-2 for entry in found.values()), ""
    try:
        with determinism(True):
            exact = apart(*(outcome(options, "simsid", iterations, cuda_graph=on) for on in (False, True)))
    except RuntimeError as error:
        # Last, since what follows a failed recording is not to be trusted; no promise of ours rests on it.
        note = f"deterministic: {error}"
    else:
        found["simsid, deterministic"] = exact
        passed = passed and not exact["different"]
    return {"runs": found, "note": note, "passed": passed}


def parity(options: dict) -> dict[str, object]:
    """Train by the fused kernels and by the reference; a reference moved by a millionth says what rounding does."""
    iterations, window = (8, 2) if options["dry_run"] else (200, 20)
    batch = 4 if options["dry_run"] else 16
    images, curves = smooth_images(options, 8 * batch), {}
    for name, fused, moved in (("reference", False, 0.0), ("reference, moved", False, 1e-6), ("fused", True, 0.0)):
        step = step_of(options, "simsid", fused=fused)
        with torch.no_grad():
            for parameter in step.model.parameters():
                parameter.mul_(1 + moved)
        rows = []
        for number in range(iterations):
            start = number % 8 * batch
            step(images[start : start + batch], number)
            rows.append(step.means())
            step.reset()
        curves[name] = {loss: [row[loss] for row in rows if loss in row] for loss in LOSSES}

    def means(values: list[float]) -> np.ndarray:
        kept = len(values) // (window // 2) * (window // 2)
        return np.array(values[:kept]).reshape(-1, window // 2).mean(1)

    distance = {}
    for loss in ("student", "teacher"):
        want = means(curves["reference"][loss])
        for name in ("reference, moved", "fused"):
            distance[f"{loss}, {name}"] = float(np.max(np.abs(means(curves[name][loss]) - want) / want))
    allowed = {loss: 3 * distance[f"{loss}, reference, moved"] + 1e-2 for loss in ("student", "teacher")}
    passed = all(distance[f"{loss}, fused"] <= most for loss, most in allowed.items())
    student = {name: [float(f"{value:.6g}") for value in curve["student"]] for name, curve in curves.items()}
    return {"iterations": iterations, "distance": distance, "student": student, "passed": passed}


# Training ----------------------------------------------------------------------------------------------------------


def films(options: dict, size: int) -> dict[str, ImageSet]:
    """Return normal films to train on, labelled ones to validate on, and those of a test split where there is one."""
    if options.get("data") is None:
        return {"train": _random_films(12, 0, size, 0), "val": _random_films(4, 4, size, 1)}
    from simsid.commands.main import partition

    dataset = ZhangLab(options["data"])
    train, val = partition(dataset, VAL_SHARE)
    found = {"train": train, "val": val, "test": [record for record in dataset.records if record.split == "test"]}
    if options["dry_run"]:
        found = {name: records[:4] + records[-4:] for name, records in found.items()}
    return {name: load_images(records, size) for name, records in found.items() if records}


def _random_films(normal: int, abnormal: int, size: int, seed: int) -> ImageSet:
    pixels = np.random.default_rng(seed).integers(0, 256, (normal + abnormal, 1, size, size), dtype=np.uint8)
    labels = [0] * normal + [1] * abnormal
    return ImageSet(torch.from_numpy(pixels), tuple(Record(str(i), label=label) for i, label in enumerate(labels)))


def configuration(options: dict) -> Config:
    """Return the configuration of a method or of an ablation."""
    sizes = TINY if options["dry_run"] else {}
    name = options["name"]
    return Config.ablation(name, **sizes) if name in ABLATIONS else METHODS[name](**sizes)


def areas(labels: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return AUC and its interval by signal."""
    found = {name: metrics.auc((labels == 1).astype(int), values) for name, values in scores.items()}
    return {name: [area.value, area.low, area.high] for name, area in found.items()}


@contextlib.contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    """Press Ctrl-C once the time is over, upon which the trainer writes its state."""
    timer = threading.Timer(max(seconds, 1.0), os.kill, (os.getpid(), signal.SIGINT))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def train(options: dict) -> dict[str, object]:
    """Train one model, or go on with it; `seconds` is when it is to stop and write its state."""
    began = time.monotonic()
    config, seed = configuration(options), options["seed"]
    images = films(options, config.image_size)
    training = TrainingConfig(
        epochs=options["epochs"],
        seed=seed,
        precision=options["precision"],
        batch_size=4 if options["dry_run"] else 16,
        checkpoint_seconds=120.0,
    )
    torch.manual_seed(seed)
    model = Model(config).to(device_of(options))
    if not options["dry_run"]:
        torch.cuda.reset_peak_memory_stats()
    run = pathlib.Path(options["runs"]) / f"{options['name']}-{options['precision']}-seed{seed}"
    # Before it, reading; after it, the scores of the epoch that is kept.
    left = options["seconds"] - (time.monotonic() - began)
    with interrupted_after(left):
        history = Trainer(model, training, run=run).fit(images["train"], images["val"], resume=True)
    epochs = history.epochs
    # The first one compiles and records.
    seconds = [epoch["seconds"] for epoch in epochs[1:]] or [epoch["seconds"] for epoch in epochs]
    result = {
        "finished": not history.interrupted,
        "name": options["name"],
        "seed": seed,
        "config": config.to_dict(),
        "training": training.to_dict(),
        "films": {name: len(part) for name, part in images.items()},
        "epochs": [
            {name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in epoch.items()}
            for epoch in epochs
        ],
        "seconds_an_epoch": statistics.median(seconds) if seconds else None,
        "seconds_training": sum(epoch["seconds"] for epoch in epochs),
        "wall": time.monotonic() - began,
    }
    if not options["dry_run"]:
        result["peak_mb"] = torch.cuda.max_memory_reserved() / 1e6
    if history.interrupted:
        return result
    result["kept_epoch"] = history.best_epoch
    result["kept"] = {
        name: areas(part.labels, model.signals(part.batches())) for name, part in images.items() if name != "train"
    }
    return result


def baselines(options: dict) -> dict[str, object]:
    """Score the same films by the plain baselines on their pixels."""
    from simsid.models.baselines import BASELINES

    images = films(options, TINY["image_size"] if options["dry_run"] else 128)
    pixels = {
        name: np.concatenate([batch.flatten(1).numpy() for batch in part.batches()]) for name, part in images.items()
    }
    kept = {}
    for name, part in images.items():
        if name != "train":
            scores = {known: score(pixels["train"], pixels[name]) for known, score in BASELINES.items()}
            kept[name] = areas(part.labels, scores)
    return {"finished": True, "films": {name: len(part) for name, part in images.items()}, "kept": kept}


PARTS = {part.__name__: part for part in (about, kernels, repeat, graph, parity, train, baselines)}


def main() -> None:
    """Run one part and print its record."""
    name, options = sys.argv[1], json.loads(sys.argv[2])
    result = PARTS[name](options)
    if not _finite(result):
        raise ValueError(f"{name} gave a number that is not finite: {result}")
    print(f"{RESULT}{json.dumps(result)}", flush=True)


def _finite(value: object) -> bool:
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    if isinstance(value, list):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


if __name__ == "__main__":
    main()
