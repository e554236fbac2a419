"""The written-out baseline of the benchmarks computes the numbers of the model."""

import copy
import pathlib
import sys

import pytest
import tiny
import torch

from simsid import TrainingConfig
from simsid.models.losses import reconstruction_loss
from simsid.scoring.stream import score_files
from simsid.training.step import TrainingStep

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "benchmarks"))

import baseline

CONFIGS = {
    "simsid": {},
    "squid": {"memory": "queue", "rho": 0.7, "topk": 3},
    "released": {"threshold": "exclusive", "decoder_memory": "subpatch"},
    "merged last": {"merge_levels": 0, "skip_levels": 0, "image_size": 72, "patches": 3},
    "shared": {"space_aware": False, "temperature": 2.0, "stop_gradient": False},
}


def pair(**changes):
    """Return a model in float64 and a baseline of the same weights."""
    ours = tiny.model(**changes).double()
    return ours, baseline.Baseline(copy.deepcopy(ours))


def random_images(model, count=3):
    size = model.config.image_size
    noise = torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise * 2 - 1


def close(mine, reference, relative=1e-9):
    assert (mine - reference).norm() <= relative * reference.norm()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("training", [True, False])
def test_baseline_has_the_reconstructions_and_gradients_of_the_model(name, training):
    ours, theirs = pair(**CONFIGS[name])
    images, results = random_images(ours), []
    for model, reconstruct in ((ours, ours), (theirs.model, theirs)):
        model.train(training)
        torch.manual_seed(1)
        outputs = reconstruct(images) if training or model is theirs.model else reconstruct(images, teacher=True)
        loss = reconstruction_loss(images, outputs.student) + reconstruction_loss(images, outputs.teacher)
        parameters = [weight for part, weight in model.named_parameters() if not part.startswith("discriminator.")]
        gradients = torch.autograd.grad(loss + outputs.distillation, parameters)
        results.append((outputs, torch.cat([gradient.flatten() for gradient in gradients])))
    (mine, my_gradient), (reference, gradient) = results
    for part in ("student", "teacher", "distillation", "query", "retrieved"):
        close(getattr(mine, part), getattr(reference, part))
    close(my_gradient, gradient)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_baseline_has_the_signals_of_the_model(name, batch_size):
    ours, theirs = pair(**CONFIGS[name])
    want, got = ours.signals(random_images(ours)), theirs.signals(random_images(ours), batch_size)
    assert got.keys() == want.keys()
    for signal, values in want.items():
        assert got[signal] == pytest.approx(values, rel=1e-7), signal


@pytest.mark.parametrize("name", ["simsid", "squid"])
def test_baseline_step_trains_like_the_training_step(name):
    # Without random numbers, which the two draw in another order.
    ours, theirs = pair(**CONFIGS[name] | {"rho": 1.0})
    options = TrainingConfig(translate=0.0, scale=0.0)
    images, means = random_images(ours, 5), []
    for model, make in ((ours, TrainingStep), (theirs.model, baseline.BaselineStep)):
        model.train()
        step = make(model, options)
        for number in range(4):
            step(images, number)
        means.append(step.means())
    mine, reference = means
    assert mine == pytest.approx(reference, rel=1e-4)
    assert reference.keys() == {"real", "fake", "student", "teacher", "distillation", "adversarial"}
    if ours.queue is not None:
        close(ours.queue.items, theirs.model.queue.items, 1e-4)
        assert ours.queue.pointer == theirs.model.queue.pointer == 10 % ours.config.items


def test_baseline_scores_files_like_score_files(tmp_path):
    model = tiny.calibrated(tmp_path / "model")
    files = tiny.films(tmp_path / "films", 3)
    want = list(score_files(model, files))
    for batch_size in (1, 2):
        got = list(baseline.Baseline(copy.deepcopy(model)).score_files(files, batch_size))
        assert [score.path for score in got] == [score.path for score in want]
        assert [score.flagged for score in got] == [score.flagged for score in want]
        assert [score.score for score in got] == pytest.approx([score.score for score in want], rel=1e-3)


def test_baseline_rejects_a_configuration_of_no_paper():
    with pytest.raises(
        ValueError, match="border must be 'zero', the only value that the baseline computes, got 'mask'"
    ):
        baseline.Baseline(tiny.model(border="mask"))
