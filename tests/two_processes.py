"""What each of two ranks does for test_distributed.py: a scene by name.

`python two_processes.py FOLDER SCENE...` imports PyTorch once and forks the ranks. Under `torchrun`, which starts the
ranks one by one, SCENE is the name of the function that trains or resumes from the command line.
"""

import functools
import gc
import importlib
import json
import math
import os
import pathlib
import signal
import socket
import sys
import time

import tiny
import tiny_features
import torch

from simsid import Trainer, TrainingConfig, checkpoint
from simsid.commands import main as cli
from simsid.distributed import ProcessGroup
from simsid.errors import NonFiniteError, ProcessGroupError, RunError
from simsid.models.feature_baselines import PaDiM
from simsid.models.feature_encoder import FeatureEncoder
from simsid.report import embedding, figures
from simsid.training import step as step_module
from simsid.training.step import TrainingStep

CHANGES = {"memory": "queue"}
OPTIONS = {"batch_size": 4, "learning_rate": 1e-3, "sync_batchnorm": True, "precision": "float32"}


def steps(group, dtype, changes=CHANGES, count=3):
    """Run iterations on this rank's shard of the same batches; return gradients of the first, and the final state."""
    step = TrainingStep(tiny.model(**changes).to(dtype).train(), TrainingConfig(**OPTIONS), group)
    tensors = {}
    for number in range(count):
        step(group.shard(tiny.images(4, number).to(dtype)), number)
        if number == 0:
            gradients = {name: value.grad for name, value in step.model.named_parameters()}
            tensors |= {f"gradient {name}": value.clone() for name, value in gradients.items() if value is not None}
    tensors |= {f"state {name}": value for name, value in checkpoint.tensors(step.model).items()}
    return tensors | {f"loss {name}": torch.tensor(value) for name, value in step.means().items()}


def fit(group, run, resume=False, images=None, val=31, **options):
    """Train as every rank does; only rank 0 sees the run folder."""
    model = tiny.model()
    config = TrainingConfig(**{"batch_size": 4, "epochs": 2, "checkpoint_seconds": 0.0, **options})
    trainer = Trainer(model, config, run=run if group.main else run.with_name("out of sight"), group=group)
    return model, trainer.fit(tiny.images(12) if images is None else images, tiny.images(val, 1), resume=resume)


def write(group, folder, name, tensors, document):
    checkpoint.write(folder / f"rank-{group.rank}", name, tensors, document)


def write_error(group, folder, name, error, call):
    """Write the message of the error that a call raises."""
    try:
        call()
    except error as raised:
        write(group, folder, name, {}, {"message": str(raised)})


def scene_steps(group, folder):
    for name, dtype in (("double", torch.float64), ("single", torch.float32)):
        write(group, folder, name, steps(group, dtype), {})


def scene_fit(group, folder):
    """With the statistics of each rank's own shard, which is the default, all ranks still end with one model."""
    model, history = fit(group, folder / "run")
    document = {"epochs": history.epochs, "calibration": model.calibration.to_dict()}
    write(group, folder, "fit", checkpoint.tensors(model), document)


def scene_finished(group, folder):
    """A finished run is resumed: nothing is left to do, and every rank gets the best model."""
    model, history = fit(group, folder / "run", resume=True)
    document = {"epochs": history.epochs, "calibration": model.calibration.to_dict()}
    write(group, folder, "finished", checkpoint.tensors(model), document)


def scene_small(group, folder):
    """One image to validate on, and synchronized statistics during training."""
    model, history = fit(group, folder / "small", val=1, sync_batchnorm=True, epochs=1)
    kinds = sorted({type(module).__name__ for module in model.modules() if "BatchNorm" in type(module).__name__})
    document = {"epochs": history.epochs, "calibration": model.calibration.to_dict(), "kinds": kinds}
    write(group, folder, "small", {}, document)


def scene_differ(group, folder):
    """The ranks have different images, or different settings."""
    run = folder / "differ"
    write_error(group, folder, "images", RunError, lambda: fit(group, run, images=tiny.images(12, group.rank)))
    write_error(group, folder, "count", RunError, lambda: fit(group, run, images=tiny.images(12 + 4 * group.rank)))
    write_error(group, folder, "settings", RunError, lambda: fit(group, run, seed=group.rank))


def features(group, **changes):
    """Fit a feature memory and a baseline with room for fewer images than there are, as every rank does."""
    stream = iter(tiny_features.normal(40).split(7))
    model = tiny_features.memory(most_images=24, synthetic=True, **changes)
    padim = PaDiM(encoder=tiny_features.TinyEncoder(), **{**tiny_features.SIZES, "inputs": "gray"})
    val = tiny_features.normal(9, 5)
    return model.fit(stream, val, group=group), padim.fit(tiny_features.normal(20), val, group=group)


def scene_features(group, folder):
    """Each rank encodes every second image; all have the model of one process. Different images are refused."""
    encoded = []
    hook = FeatureEncoder.forward

    def forward(self, images, *args):
        encoded.append(len(images))
        return hook(self, images, *args)

    FeatureEncoder.forward = forward
    for name, model in zip(("memory", "padim"), features(group)):
        tensors, _ = model.state()
        write(group, folder, name, tensors, {"calibration": model.calibration.to_dict(), "encoded": sum(encoded)})
    FeatureEncoder.forward = hook
    differ = tiny_features.normal(12, group.rank)
    write_error(group, folder, "features", ProcessGroupError, lambda: tiny_features.memory().fit(differ, group=group))


def scene_nonfinite(group, folder):
    """A loss is not finite on one rank, where no gradient shows it."""
    real = step_module.reconstruction_loss

    def loss(images, reconstruction):
        return real(images, reconstruction) + (torch.inf if group.rank == 1 and bad else 0)

    step_module.reconstruction_loss = loss
    step = TrainingStep(tiny.model().train(), TrainingConfig(batch_size=4), group)
    for number in (0, 2):
        bad = number == 2
        if bad:
            step.optimizers["generator"].zero_grad()
            before = {name: value.clone() for name, value in step.model.named_parameters()}
        images = group.shard(tiny.images(4, number))
        write_error(group, folder, "nonfinite", NonFiniteError, lambda: step(images, number))  # noqa: B023 - called now
    step_module.reconstruction_loss = real
    changed = [name for name, value in step.model.named_parameters() if not torch.equal(value, before[name])]
    write(group, folder, "changed", {}, {"changed": changed})


def scene_collectives(group, folder):
    """Each rank computes its part, and all get the whole result."""
    own = []

    def square(item):
        own.append(item)
        return item**2

    for count in (0, 1, 2, 300):
        own.clear()
        assert list(group.in_order(square, range(count), 2)) == [(item, item**2) for item in range(count)]
        assert sorted(own) == list(range(group.rank, count, 2))
    assert group.broadcast(lambda: group.rank) == 0 and group.all_gather_object(group.rank) == [0, 1]
    assert group.gather(torch.tensor([float(group.rank)])).tolist() == [0, 1]
    assert group.mean(torch.tensor([float(group.rank)])).tolist() == [0.5]
    assert group.any(group.rank == 1) and not group.any(False)
    values = torch.full((2,), float(group.rank))
    group.broadcast_tensors([values])
    assert values.tolist() == [0, 0]
    for count in (1, 4, 5):
        column = torch.arange(float(count), dtype=torch.float64)[group.rank :: 2].numpy()
        assert group.interleave({"a": column}, count)["a"].tolist() == list(range(count))


def scene_interrupt(group, folder):
    """Ctrl-C on one rank stops both at the same iteration; then both resume."""
    real = TrainingStep.__call__

    def step(self, images, number):
        if number == 4 and group.rank == 1:
            signal.raise_signal(signal.SIGINT)
        real(self, images, number)

    TrainingStep.__call__ = step
    _, history = fit(group, folder / "again")
    assert history.interrupted
    TrainingStep.__call__ = real
    _, history = fit(group, folder / "again", resume=True)
    assert not history.interrupted and len(history.epochs) == 2


def train_until_a_rank_dies(folder):
    """Train from the command line; rank 1 is killed in the middle of the second epoch."""
    real = TrainingStep.__call__

    def step(self, images, number):
        if number == 3 and os.environ["RANK"] == "1":
            print(f"rank 1 is about to die at {time.monotonic()}", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, images, number)

    TrainingStep.__call__ = step
    options = [*tiny.OPTIONS, "--epochs", "2", "--batch-size", "8", "--checkpoint-seconds", "0"]
    # There may be fewer GPUs than ranks.
    command_line("train", folder / "films", "-o", folder / "killed", *options, "--device", "cpu")


def resume_from_the_command_line(folder):
    """Resume the training that was killed, to its end."""
    draw = figures.png
    figures.png = lambda figure, dpi=0: draw(figure, dpi=20)  # at full size the figures take most of the time
    embedding.POINTS = 20
    command_line("train", "--resume", folder / "killed")


def refused(folder):
    """Let the command line refuse a batch size, after the ranks have exchanged the decoded images."""
    options = [*tiny.OPTIONS, "--batch-size", "5", "--device", "cpu", "--threads", "1"]
    command_line("train", folder / "films", "-o", folder / "refused", *options)


def command_line(*arguments):
    cli.main(list(map(str, arguments)))


def fork_ranks(work):
    """Let two forked ranks do the work and exit as any process does; return their exit statuses."""
    # Otherwise a rank that exits would traverse, and copy, all that the parent has imported.
    gc.freeze()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = {}
    for rank in (0, 1):
        pid = os.fork()
        if not pid:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            work()
            sys.exit()
        ranks[pid] = rank
    statuses, end = {}, math.inf
    while len(statuses) < 2:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            statuses[ranks.pop(pid)] = os.waitstatus_to_exitcode(status)
            end = time.monotonic() + 60
        elif time.monotonic() > end:
            for pid in ranks:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return [statuses[rank] for rank in (0, 1)]


def main(folder, scenes):
    def run_scenes():
        with ProcessGroup.from_environment().joined("cpu") as group:
            for scene in scenes:
                globals()[f"scene_{scene}"](group, folder)

    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        globals()[scenes[0]](folder)
        return
    refusals = [fork_ranks(functools.partial(refused, folder)) for _ in range(3)]
    # DistributedDataParallel imports it, which would take each rank seconds.
    importlib.import_module("torch._dynamo")
    print(json.dumps([*refusals, fork_ranks(run_scenes)]))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), sys.argv[2:])
