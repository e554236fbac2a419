"""Print the cost of a training step and of scoring on a CPU, in one process, all variants in turn.

    OMP_NUM_THREADS=1 python benchmarks/cpu.py --width 32

In seconds of the processor, which other work on the machine changes less than wall time; --wall measures that instead.
Of two calls of a variant after each other the second counts, and of these the best of the rounds: the first pays for
memory that another variant gave back to the system. See `models.py` for the variants.
"""

import argparse
import os
import pathlib
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as on the command line, for all variants alike

import models
import torch

from simsid.models.scorer import BATCH

VARIANTS = (models.BASELINE, models.PRODUCT, models.PRODUCT_BF16)
WORK = ("scoring", "folder", "training")
CPU = torch.device("cpu")


def calls(work: str, width: int, folder: pathlib.Path, variants: tuple[str, ...]) -> dict[str, Callable[[int], object]]:
    """Return one call of each variant by name; its argument counts the calls.

    Args:
        work: one of `WORK`: every signal of a batch in memory, of two batches of JPEG files, or a pair of iterations.
        width: of the model.
        folder: where the files are written.
        variants: their names, the baseline first.
    """
    files = models.files_of(models.write_images(folder, 2 * BATCH), None) if work == "folder" else []

    def call(name: str, batch: int = BATCH) -> Callable[[int], object]:
        variant = models.VARIANTS[name]
        model = models.build("SimSID", width, CPU, variant.fused, str(variant.options.get("precision", "float32")))
        images = models.noise(BATCH, model.config.image_size)
        if work == "scoring":
            score = models.scorer(name, model, batch)
            return lambda _: score(images)
        if work == "folder":
            score_folder = models.folder_scorer(name, model, batch)
            return lambda _: score_folder(files)
        step = models.training_step(name, model)
        return lambda number: (step(images, 2 * number), step(images, 2 * number + 1))

    found = {name: call(name) for name in variants}
    if work != "training" and variants == VARIANTS:
        found["baseline, batch 1"] = call(models.BASELINE, 1)
    return found


def main() -> None:
    """Measure and print Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=32, help="width of the model (default: 32, as in the papers)")
    parser.add_argument("--rounds", type=int, default=4, help="rounds after one warm-up")
    parser.add_argument("--work", choices=WORK, action="append", help="default: all")
    parser.add_argument("--wall", action="store_true", help="wall time")
    parser.add_argument("--variant", choices=VARIANTS[1:], help="beside the baseline this one alone; default: all")
    chosen = parser.parse_args()
    variants = VARIANTS if chosen.variant is None else (models.BASELINE, chosen.variant)
    clock = time.perf_counter if chosen.wall else time.process_time
    print(f"width {chosen.width}, batch {BATCH}, threads {torch.get_num_threads()}, torch {torch.__version__}")
    print("| | seconds | against the baseline |\n| --- | ---: | ---: |")
    for work in chosen.work or WORK:
        seconds: dict[str, list[float]] = {}
        with tempfile.TemporaryDirectory() as folder:
            made = calls(work, chosen.width, pathlib.Path(folder), variants)
            for number in range(chosen.rounds + 1):
                for name, call in made.items():
                    call(2 * number)
                    start = clock()
                    call(2 * number + 1)
                    seconds.setdefault(name, []).append(clock() - start)
        best = {name: min(values[1:]) for name, values in seconds.items()}
        for name, value in best.items():
            print(f"| {work}: {name} | {value:.2f} | {best[models.BASELINE] / value:.2f}x |", flush=True)


if __name__ == "__main__":
    main()
