"""What each of two processes does for test_distributed.py; torchrun starts them with the name of a scene."""

import os
import pathlib
import signal
import sys

import tiny
import torch

from simsid import Trainer, TrainingConfig, checkpoint
from simsid.distributed import Team
from simsid.step import TrainingStep

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


def fit(team, run, resume=False, **options):
    model = tiny.model()
    config = TrainingConfig(**{"batch_size": 4, "epochs": 3, "checkpoint_seconds": 0.0, **options})
    history = Trainer(model, config, run=run, team=team).fit(tiny.images(12), tiny.images(5, 1), resume=resume)
    return model, history


def scene_steps(team, folder):
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        checkpoint.write(folder / f"rank-{team.rank}", name, steps(team, dtype), {})


def scene_fit(team, folder):
    """Without synchronised statistics, as is the default: the members end with one model all the same."""
    model, history = fit(team, folder / "run")
    values = {name: value.clone() for name, value in model.state_dict().items()}
    about = {"epochs": history.epochs, "calibration": model.calibration.to_dict()}
    checkpoint.write(folder / f"rank-{team.rank}", "fit", values, about)


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
