"""What each of two processes does for test_distributed.py; torchrun starts them with the name of a scene."""

import os
import pathlib
import signal
import sys

import tiny
import torch

from simsid import Trainer, TrainingConfig, checkpoint
from simsid.distributed import Team
from simsid.errors import NonFiniteError, RunError
from simsid.training import step as step_module
from simsid.training.step import TrainingStep

CHANGES = {"memory": "queue"}
OPTIONS = {"batch_size": 4, "learning_rate": 1e-3, "sync_batchnorm": True}


def steps(team, dtype, changes=CHANGES, count=4):
    """Run iterations on this member's share of the same batches; returns all that they leave, gradients first."""
    step = TrainingStep(tiny.model(**changes).to(dtype).train(), TrainingConfig(**OPTIONS), team)
    found = {}
    for number in range(count):
        step(team.share(tiny.images(4, number).to(dtype)), number)
        if number == 0:
            gradients = {name: value.grad for name, value in step.model.named_parameters()}
            found |= {f"gradient {name}": value.clone() for name, value in gradients.items() if value is not None}
    found |= {f"state {name}": value for name, value in step.model.state_dict().items()}
    return found | {f"loss {name}": torch.tensor(value) for name, value in step.means().items()}


def fit(team, run, resume=False, images=None, val=5, **options):
    """Train as every member does; only the first of them sees the run folder."""
    model = tiny.model()
    config = TrainingConfig(**{"batch_size": 4, "epochs": 3, "checkpoint_seconds": 0.0, **options})
    trainer = Trainer(model, config, run=run if team.main else run.with_name("out of sight"), team=team)
    return model, trainer.fit(tiny.images(12) if images is None else images, tiny.images(val, 1), resume=resume)


def refused(team, folder, name, error, call):
    """Write what a call says as it fails."""
    try:
        call()
    except error as said:
        checkpoint.write(folder / f"rank-{team.rank}", name, {}, {"said": str(said)})


def scene_steps(team, folder):
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        checkpoint.write(folder / f"rank-{team.rank}", name, steps(team, dtype), {})


def scene_fit(team, folder):
    """Without synchronised statistics, as is the default: the members end with one model all the same."""
    model, history = fit(team, folder / "run")
    values = {name: value.clone() for name, value in model.state_dict().items()}
    about = {"epochs": history.epochs, "calibration": model.calibration.to_dict()}
    checkpoint.write(folder / f"rank-{team.rank}", "fit", values, about)


def scene_finished(team, folder):
    """A finished run is resumed: nothing is left to do, and everyone has the kept model."""
    model, history = fit(team, folder / "run", resume=True)
    about = {"epochs": history.epochs, "calibration": model.calibration.to_dict()}
    checkpoint.write(folder / f"rank-{team.rank}", "finished", model.state_dict(), about)


def scene_small(team, folder):
    """One image to validate on, statistics synchronised while it lasts."""
    model, history = fit(team, folder / "small", val=1, sync_batchnorm=True, epochs=1)
    kinds = sorted({type(module).__name__ for module in model.modules() if "BatchNorm" in type(module).__name__})
    about = {"epochs": history.epochs, "calibration": model.calibration.to_dict(), "kinds": kinds}
    checkpoint.write(folder / f"rank-{team.rank}", "small", {}, about)


def scene_differ(team, folder):
    """The members were given different images, or different settings."""
    run = folder / "differ"
    refused(team, folder, "images", RunError, lambda: fit(team, run, images=tiny.images(12, team.rank)))
    refused(team, folder, "count", RunError, lambda: fit(team, run, images=tiny.images(12 + 4 * team.rank)))
    refused(team, folder, "settings", RunError, lambda: fit(team, run, seed=team.rank))


def scene_bad(team, folder):
    """A loss is not finite at one member, where no gradient shows it."""
    real = step_module.reconstruction_loss

    def loss(images, reconstruction):
        return real(images, reconstruction) + (torch.inf if team.rank == 1 and bad else 0)

    step_module.reconstruction_loss = loss
    step = TrainingStep(tiny.model().train(), TrainingConfig(batch_size=4), team)
    for number in range(3):
        bad = number == 2
        if bad:
            step.optimizers["generator"].zero_grad()
            before = {name: value.clone() for name, value in step.model.named_parameters()}
        images = team.share(tiny.images(4, number))
        refused(team, folder, "bad", NonFiniteError, lambda: step(images, number))  # noqa: B023 - called at once
    step_module.reconstruction_loss = real
    changed = [name for name, value in step.model.named_parameters() if not torch.equal(value, before[name])]
    checkpoint.write(folder / f"rank-{team.rank}", "changed", {}, {"changed": changed})


def scene_shares(team, folder):
    """Each computes a part of what all are given."""
    mine = []

    def square(item):
        mine.append(item)
        return item**2

    for count in (0, 1, 2, 300):
        mine.clear()
        assert list(team.in_order(square, range(count), 2)) == [(item, item**2) for item in range(count)]
        assert sorted(mine) == list(range(team.rank, count, 2))
    assert team.from_main(lambda: team.rank) == 0 and team.everyones(team.rank) == [0, 1]


def scene_interrupt(team, folder):
    """Ctrl-C at one member stops both at the same iteration; then both go on."""
    real = TrainingStep.__call__

    def step(self, images, number):
        if number == 4 and team.rank == 1:
            signal.raise_signal(signal.SIGINT)
        real(self, images, number)

    TrainingStep.__call__ = step
    _, history = fit(team, folder / "again")
    assert history.interrupted
    TrainingStep.__call__ = real
    _, history = fit(team, folder / "again", resume=True)
    assert not history.interrupted and len(history.epochs) == 3


def scene_death(team, folder):
    """One member dies in the middle of an epoch."""
    real = TrainingStep.__call__

    def step(self, images, number):
        if number == 4 and team.rank == 1:
            print("rank 1 is about to die", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, images, number)

    TrainingStep.__call__ = step
    fit(team, folder / "dead")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with Team.gathered("cpu") as team:
        for scene in sys.argv[2:]:
            globals()[f"scene_{scene}"](team, pathlib.Path(sys.argv[1]))
