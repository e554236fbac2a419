"""Print where the time of the whole model goes on a CPU, by kind of work.

    OMP_NUM_THREADS=2 python benchmarks/profile_cpu.py --width 32

Scoring and a pair of training iterations run under torch.profiler. The own time of an operator, without the operators
that it calls, counts for the kind of the outermost named operator around it. What runs in a memory or in the attention,
forward or backward, counts there whatever its name.
"""

import argparse
import functools
from collections.abc import Callable

import baseline
import models
import torch
from torch.autograd.profiler import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

from simsid.models.inpainting import NeighborAttention
from simsid.models.memory import SpaceAwareMemory
from simsid.models.scorer import BATCH

RANGES = {
    (SpaceAwareMemory, "forward"): "memory",
    (NeighborAttention, "forward"): "attention",
    (baseline, "look_up"): "memory",
    (baseline, "attend"): "attention",
}
KINDS = {
    "convolution": ("convolution", "conv2d"),
    "normalization": ("batchnorm", "layernorm", "instancenorm"),
    "interpolation": ("upsample", "gridsampler"),
    "activation": ("relu", "threshold", "tanh"),
    "optimizer": ("optimizer",),
}
"""Parts of the names of operators and gradient nodes, in lower case without underscores."""

REST = "rest"
BACKWARD = "autograd::engine::evaluate_function"


def kind_of(name: str) -> str | None:
    """Return the kind of an operator by its name, or None."""
    name = name.replace("_", "").lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), None)


def seconds_by_kind(run: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of one call of `run`, by kind, most first."""
    with Ranges(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return by_kind(profiler.events())


class Ranges:
    """Name what runs in memories and in the attention, inside a `with` block."""

    def __enter__(self) -> None:
        self.before = {key: getattr(*key) for key in RANGES}
        for (owner, function), name in RANGES.items():
            setattr(owner, function, self._named(getattr(owner, function), name))

    def __exit__(self, *_: object) -> None:
        for key, call in self.before.items():
            setattr(*key, call)

    @staticmethod
    def _named(call: Callable[..., object], name: str) -> Callable[..., object]:
        @functools.wraps(call)
        def ranged(*args: object, **kwargs: object) -> object:
            with record_function(name):
                return call(*args, **kwargs)

        return ranged


def by_kind(events: list[FunctionEvent]) -> dict[str, float]:
    """Return the seconds of profiled operators, by kind, most first."""
    kind_in_forward = {
        event.sequence_nr: _within(event) for event in events if event.sequence_nr >= 0 and _within(event)
    }
    seconds: dict[str, float] = {}
    for event in events:
        kind = _within(event)
        for around in _upwards(event):
            if kind is None and around.name.startswith(BACKWARD):
                kind = kind_in_forward.get(around.sequence_nr)
        kind = kind or next((known for around in _upwards(event)[::-1] if (known := kind_of(around.name))), REST)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _upwards(event: FunctionEvent) -> list[FunctionEvent]:
    """Return the event and all events around it, the outermost last."""
    chain = [event]
    while chain[-1].cpu_parent is not None:
        chain.append(chain[-1].cpu_parent)
    return chain


def _within(event: FunctionEvent) -> str | None:
    return next((around.name for around in _upwards(event) if around.name in RANGES.values()), None)


def table(columns: dict[str, dict[str, float]], images: dict[str, int]) -> str:
    """Return Markdown, a row per kind: its percentage of each run and its milliseconds per image."""
    kinds = list(dict.fromkeys(kind for seconds in columns.values() for kind in seconds))
    lines = ["| kind | " + " | ".join(f"{name}, % | ms per image" for name in columns) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(columns))
    for kind in [*kinds, "all"]:
        cells = []
        for name, seconds in columns.items():
            total = sum(seconds.values())
            own = total if kind == "all" else seconds.get(kind, 0.0)
            cells += [f"{100 * own / total:.1f}", f"{1e3 * own / images[name]:.3f}"]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Profile the chosen variant and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32, help="width of the model (default: 32, as in the papers)")
    parser.add_argument("--method", choices=models.METHODS, default="SimSID")
    parser.add_argument("--variant", choices=(models.PRODUCT, models.BASELINE), default=models.PRODUCT)
    parser.add_argument("--rounds", type=int, default=3, help="profiled calls, after one warm-up")
    chosen = parser.parse_args(arguments)
    cpu = torch.device("cpu")
    fused = models.VARIANTS[chosen.variant].fused
    built = models.build(chosen.method, chosen.width, cpu, fused)
    images = models.noise(BATCH, built.config.image_size)
    score = models.scorer(chosen.variant, built, BATCH)
    step = models.training_step(chosen.variant, models.build(chosen.method, chosen.width, cpu, fused))
    runs = {
        "scoring": lambda _: score(images),
        "training step": lambda number: (step(images, 2 * number), step(images, 2 * number + 1)),
    }
    columns = {}
    for name, run in runs.items():
        run(0)
        columns[name] = seconds_by_kind(lambda run=run: [run(number) for number in range(1, chosen.rounds + 1)])
    counts = {"scoring": BATCH * chosen.rounds, "training step": 2 * BATCH * chosen.rounds}
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    print(
        f"{chosen.method}, {chosen.variant}, width {chosen.width}, batch {BATCH}, {threads}, torch {torch.__version__}"
    )
    print(table(columns, counts))


if __name__ == "__main__":
    main()
