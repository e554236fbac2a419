"""Say where the time of the whole model goes on a CPU, by kind of work.

    OMP_NUM_THREADS=2 python benchmarks/profile_cpu.py --width 32

Scoring and a pair of training iterations run under torch.profiler. An operator's own time, without that of operators it
calls, counts to the kind of the outermost named operator around it; what runs in a memory or in the attention, forward
or backward, counts there whatever its name.
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
from simsid.models.model import BATCH

RANGES = {
    (SpaceAwareMemory, "forward"): "memory",
    (NeighborAttention, "forward"): "attention",
    (baseline, "look_up"): "memory",
    (baseline, "attend"): "attention",
}
KINDS = {
    "convolution": ("convolution", "conv2d"),
    "normalisation": ("batchnorm", "layernorm", "instancenorm"),
    "interpolation": ("upsample", "gridsampler"),
    "activation": ("relu", "threshold", "tanh"),
    "optimiser": ("optimizer",),
}
"""Parts of operators' and gradient nodes' names, in lower case without underscores."""

REST = "rest"
BACKWARD = "autograd::engine::evaluate_function"


def kind_of(name: str) -> str | None:
    """Return an operator's kind by its name, or None."""
    name = name.replace("_", "").lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), None)


def shares(run: Callable[[], object]) -> dict[str, float]:
    """Return the seconds of one call of `run`, by kind, most first."""
    with ranges(), profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return by_kind(profiler.events())


class ranges:
    """Name what runs in memories and attention, for as long as this lasts."""

    def __enter__(self) -> None:
        self.before = {place: getattr(*place) for place in RANGES}
        for (owner, function), name in RANGES.items():
            setattr(owner, function, self._named(getattr(owner, function), name))

    def __exit__(self, *_: object) -> None:
        for place, call in self.before.items():
            setattr(*place, call)

    @staticmethod
    def _named(call: Callable[..., object], name: str) -> Callable[..., object]:
        @functools.wraps(call)
        def ranged(*args: object, **kwargs: object) -> object:
            with record_function(name):
                return call(*args, **kwargs)

        return ranged


def by_kind(events: list[FunctionEvent]) -> dict[str, float]:
    """Return the seconds of a profile's operators, by kind, most first."""
    of_forward = {event.sequence_nr: _within(event) for event in events if event.sequence_nr >= 0 and _within(event)}
    seconds: dict[str, float] = {}
    for event in events:
        kind = _within(event)
        for around in _upwards(event):
            if kind is None and around.name.startswith(BACKWARD):
                kind = of_forward.get(around.sequence_nr)
        kind = kind or next((found for around in _upwards(event)[::-1] if (found := kind_of(around.name))), REST)
        seconds[kind] = seconds.get(kind, 0.0) + event.self_cpu_time_total / 1e6
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _upwards(event: FunctionEvent) -> list[FunctionEvent]:
    """Return the event and all around it, the outermost last."""
    found = [event]
    while found[-1].cpu_parent is not None:
        found.append(found[-1].cpu_parent)
    return found


def _within(event: FunctionEvent) -> str | None:
    return next((around.name for around in _upwards(event) if around.name in RANGES.values()), None)


def table(columns: dict[str, dict[str, float]], images: dict[str, int]) -> str:
    """Return Markdown, a row a kind: its share of each run and its milliseconds an image."""
    kinds = list(dict.fromkeys(kind for seconds in columns.values() for kind in seconds))
    lines = ["| kind | " + " | ".join(f"{name}, % | ms an image" for name in columns) + " |"]
    lines.append("| --- |" + " ---: | ---: |" * len(columns))
    for kind in [*kinds, "all"]:
        cells = []
        for name, seconds in columns.items():
            whole = sum(seconds.values())
            own = whole if kind == "all" else seconds.get(kind, 0.0)
            cells += [f"{100 * own / whole:.1f}", f"{1e3 * own / images[name]:.3f}"]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Profile the variant asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32, help="width of the model (default: 32, the papers')")
    parser.add_argument("--method", choices=models.METHODS, default="SimSID")
    parser.add_argument("--variant", choices=(models.PRODUCT, models.BASELINE), default=models.PRODUCT)
    parser.add_argument("--rounds", type=int, default=3, help="calls that are profiled, after one that is not")
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
        columns[name] = shares(lambda run=run: [run(number) for number in range(1, chosen.rounds + 1)])
    counts = {"scoring": BATCH * chosen.rounds, "training step": 2 * BATCH * chosen.rounds}
    threads = f"{torch.get_num_threads()} thread{'s' if torch.get_num_threads() > 1 else ''}"
    print(
        f"{chosen.method}, {chosen.variant}, width {chosen.width}, batch {BATCH}, {threads}, torch {torch.__version__}"
    )
    print(table(columns, counts))


if __name__ == "__main__":
    main()
