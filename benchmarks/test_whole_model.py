"""The whole model against the written-out baseline: a training step, scoring, a folder of films, an epoch."""

import copy
import functools
import time

import measure
import models
import numpy as np
import pytest
import report
import torch
from baseline import Baseline
from models import BASELINE, METHODS, PAPERS, PRODUCT, VARIANTS
from shapes import MODEL

from simsid.data import ZhangLab, load_images
from simsid.models.losses import reconstruction_loss
from simsid.models.model import BATCH
from simsid.scoring.stream import preparation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LONG = 5.0  # seconds of a call from which on two rounds do

EXACT = 1e-9  # the same arithmetic in another order, in float64
LOSSES = {False: 1e-4, True: 5e-2}  # relative, in float32 and in bf16
SCORES = {False: 1e-3, True: 5e-2}
# Adam's first updates are its gradients' signs, which rounding decides where a gradient is all but zero. At this rate
# that moves no loss by 1e-4, yet every update shows: without the discriminator's its losses are 1e-2 off.
SLOW = 1e-6


@pytest.fixture
def sizes(request, note):
    chosen, width = MODEL[DEVICE.type], request.config.getoption("--width")
    if DEVICE.type == "cpu":
        note(f"no GPU: the whole model ran on the CPU, at width {width or chosen.width} (--width 32 is the papers')")
    return chosen if width is None else chosen._replace(width=width)


@pytest.fixture
def model(request, sizes, leave_out):
    """Return a function that builds a variant's model of a method, or leaves the benchmark out with the reason."""

    def build(variant, method="SimSID"):
        reason = models.left_out(VARIANTS[variant], DEVICE, request.config.getoption("--compile"))
        if reason is not None:
            leave_out(variant, reason)
        torch._dynamo.reset()
        assert_baseline_agrees(method, sizes.width)
        return models.build(method, sizes.width, DEVICE, VARIANTS[variant].fused)

    return build


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    """Return a folder of generated films."""
    sizes = MODEL[DEVICE.type]
    return models.write_films(tmp_path_factory.mktemp("films"), max(sizes.folder, sizes.train or 0, sizes.test or 0))


@functools.cache
def assert_baseline_agrees(method, width):
    """The baseline's reconstructions, loss and gradients are the model's, in training, but for float64's rounding."""
    ours = models.build(method, width, DEVICE).double().train()
    theirs = copy.deepcopy(ours)
    images = models.noise(4, ours.config.image_size, DEVICE).double()
    results = []
    for owner, reconstruct in ((ours, ours), (theirs, Baseline(theirs))):
        torch.manual_seed(0)  # the masked shortcut's draws
        found = reconstruct(images)
        loss = sum(reconstruction_loss(images, made) for made in (found.student, found.teacher)) + found.distillation
        parameters = [weight for name, weight in owner.named_parameters() if not name.startswith("discriminator.")]
        gradient = torch.cat([part.flatten() for part in torch.autograd.grad(loss, parameters)])
        results.append([result.detach() for result in (found.student, found.teacher, loss, gradient)])
    for mine, reference in zip(*results):
        assert (mine - reference).norm() <= EXACT * reference.norm()


@measure.full_precision
def assert_step_agrees(variant, model, method="SimSID"):
    """Losses over two pairs of iterations are the baseline's; works on copies."""
    images, means = models.noise(4, model.config.image_size, DEVICE), []
    reference = models.build(method, model.config.width, DEVICE)
    for name, owner in ((BASELINE, reference), (variant, copy.deepcopy(model))):
        step = models.training_step(name, owner, translate=0.0, scale=0.0, learning_rate=SLOW)
        for number in range(4):
            step(images, number)
        means.append(step.means())
    theirs, mine = means
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        assert mine[name] == pytest.approx(value, rel=LOSSES["bf16" in variant]), name


@measure.full_precision
def assert_scores_agree(variant, score, reference):
    """Signals are the baseline's."""
    got, want = score(), reference()
    assert got.keys() == want.keys()
    for name, values in want.items():
        worst = np.linalg.norm(got[name] - values) / np.linalg.norm(values)
        assert worst <= SCORES["bf16" in variant], f"{name} is {worst:.2g} off"


def took(call):
    """Return the seconds of a call with its work on the device."""
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def columns(scores):
    """Return every signal of scored files as an array, the files in their order."""
    return {name: np.array([score.signals[name] for score in scores]) for name in scores[0].signals}


@pytest.fixture
def timed(request, benchmark, rows):
    """Return a function that times a variant's call and keeps its row; `build(variant)` makes the call.

    On a CPU the baseline runs in turn with every other variant, since what else the machine does comes and goes.
    """
    options = request.config.option

    def time_rounds(row, variant, build, images, gflop=None, held=None):
        calls = {variant: build(variant)}
        if DEVICE.type == "cpu" and variant != BASELINE:
            calls[BASELINE] = build(BASELINE)
        once = {name: took(call) for name, call in calls.items()}[variant]  # prepares, too
        if once < LONG:
            once = took(calls[variant])
        rounds = 2 if once > LONG else max(options.benchmark_min_rounds, int(float(options.benchmark_max_time) / once))
        seconds, baseline = [], []

        def before():
            if len(calls) > 1:
                baseline.append(took(calls[BASELINE]))

        benchmark.group = report.group_of(row)
        benchmark.pedantic(lambda: seconds.append(took(calls[variant])), setup=before, rounds=rounds, iterations=1)
        best = min(seconds)
        row |= {"ms": 1e3 * best, "image_ms": 1e3 * best / images, "images_per_s": images / best}
        if baseline:
            row["baseline_ms"] = 1e3 * min(baseline)
        if gflop is not None:
            row |= {"gflop_per_image": gflop, "gflop_per_s": gflop * images / best}
        if held is not None:
            row |= held.row()
        benchmark.extra_info.update(row)
        rows.append(row | {"wall_us": 1e6 * best})

    return time_rounds


@pytest.mark.parametrize("variant", VARIANTS)
def test_train_step(timed, sizes, model, variant):
    """A pair of iterations: one that trains the generator too, one of the discriminator alone."""
    held = measure.Held()
    built = model(variant)
    assert_step_agrees(variant, built)
    held.restart()
    images = models.noise(BATCH, built.config.image_size, DEVICE)

    def build(name):
        step, numbers = models.training_step(name, model(name)), iter(range(0, 1 << 30, 2))

        def pair():
            number = next(numbers)
            step(images, number)
            step(images, number + 1)

        return pair

    del built
    row = {"op": "train_step", "shape": f"SimSID, width {sizes.width}, batch {BATCH}", "variant": variant}
    timed(row, variant, build, 2 * BATCH, models.gflop("train_step", "SimSID", sizes.width, variant == BASELINE), held)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_inference(timed, sizes, model, variant, batch):
    """Films in memory to every signal of each; the released evaluation has batches of one."""
    held = measure.Held()
    images = models.noise(BATCH, model(variant).config.image_size, DEVICE)

    def build(name):
        score = models.scorer(name, model(name), batch)
        return lambda: score(images)

    assert_scores_agree(variant, build(variant), build(BASELINE))
    held.restart()
    row = {"op": "inference", "shape": f"SimSID, width {sizes.width}, batch {batch}", "variant": variant}
    timed(row, variant, build, BATCH, models.gflop("inference", "SimSID", sizes.width, variant == BASELINE), held)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("batch", [1, BATCH])
def test_score_folder(timed, sizes, model, films, variant, batch):
    """A folder of JPEG films to one row each, reading included."""
    if batch == 1 and variant != BASELINE:
        pytest.skip("only the released evaluation scores film by film")

    def scorer(name):
        return models.folder_scorer(name, model(name), batch)

    few = models.films_of(films, BATCH)
    assert_scores_agree(variant, lambda: columns(scorer(variant)(few)), lambda: columns(scorer(BASELINE)(few)))

    def build(name):
        score = scorer(name)
        return lambda: score(models.films_of(films, sizes.folder))

    shape = f"SimSID, width {sizes.width}, {sizes.folder} films of {' x '.join(map(str, models.FILM))}"
    shown = variant if batch == BATCH else f"{variant}, batch {batch}"
    timed({"op": "score_folder", "shape": shape, "variant": shown}, variant, build, sizes.folder)


@pytest.fixture(scope="session")
def epoch_films(request):
    """Return what an epoch trains on, what inference scores, how many films of each there are, and whose they are."""
    folder, sizes = request.config.getoption("--data"), MODEL[DEVICE.type]
    if folder is None:
        # Only here: writing as many as a GPU gets takes most of a minute.
        every = models.films_of(request.getfixturevalue("films"), None)
        train, test, whose = every, every, "generated films"
    else:
        records = ZhangLab(folder).records
        train = [record.path for record in records if record.split == "train" and record.label == 0]
        last = "test" if any(record.split == "test" for record in records) else "val"
        test, whose = [record.path for record in records if record.split == last], folder
    return train[: sizes.train], test[: sizes.test], (len(train), len(test)), whose


@pytest.mark.parametrize("variant", [BASELINE, PRODUCT])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("what", PAPERS)
def test_epoch(timed, sizes, model, note, epoch_films, what, method, variant):
    """Seconds of one epoch of training, films in memory, and of one pass of inference, reading included.

    The baseline scores film by film, as the released evaluation does.
    """
    train, test, (all_train, all_test), whose = epoch_films

    def training(name):
        built = model(name, method)
        images, step = load_images(train, **preparation(built)), models.training_step(name, built)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))

        def epoch():
            for number, index in enumerate(order[: len(order) // BATCH * BATCH].split(BATCH)):
                step(images.batch(index, DEVICE), number)
            step.means()

        return epoch

    def inference(name):
        score = models.folder_scorer(name, model(name, method), 1 if name == BASELINE else BATCH)
        return lambda: score(test)

    build, count = (training, len(train) // BATCH * BATCH) if what == "training" else (inference, len(test))
    row = {"op": "epoch", "shape": f"{what}, {count} films", "variant": f"{method}, {variant}"}
    row |= {"against": f"{method}, {BASELINE}", "papers_s": PAPERS[what][method]}
    timed(row, variant, build, count)
    note(
        f"epoch: width {sizes.width}, {len(train)} of {all_train} films trained on, {len(test)} of {all_test} scored, "
        f"{whose}; the papers' seconds are ZhangLab's, whole, at width 32 on a GPU"
    )
