"""The process group, and training by two ranks: equal to one process, one writer, an orderly end after errors."""

import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny
import torch
import two_processes
from torch import nn

from simsid import Model, Trainer, TrainingConfig, checkpoint, distributed
from simsid.commands import main as cli
from simsid.distributed import ProcessGroup
from simsid.errors import InputError, ProcessGroupError
from simsid.models.batch_norm import BatchNorm2d
from simsid.training.parallel import synchronize_batch_norms

HERE = pathlib.Path(__file__).parent
ENVIRONMENT = {name: value for name, value in tiny.ENVIRONMENT.items() if name not in ("RANK", "WORLD_SIZE")}


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", two_processes.__file__)
SCENES = ["steps", "fit", "finished", "interrupt", "small", "differ", "nonfinite", "collectives", "features"]


def start(*command, timeout=240):
    return subprocess.run(
        [sys.executable, *map(str, command)],
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """A training from the command line, started by torchrun, whose rank 1 is killed: folder, process and last state."""
    folder = tmp_path_factory.mktemp("ranks")
    films = tiny.zhanglab(folder / "films", train=20)
    (films / "train" / "NORMAL" / "IM-0500-0001.png").write_bytes(b"not an image")
    done = start(*LAUNCHER, folder, "train_until_a_rank_dies")
    died = float(done.stderr.split("rank 1 is about to die at ")[1].split()[0])
    assert time.monotonic() - died < 60
    assert not (folder / "killed" / "report.html").exists()
    return folder, done, checkpoint.read(folder / "killed", "last")[1]["progress"]


@pytest.fixture(scope="module")
def ranks(killed):
    """Two forked ranks that are refused, and that run the scenes."""
    folder = killed[0]
    done = start(two_processes.__file__, folder, *SCENES, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]), done


@pytest.fixture(scope="module")
def folder(killed, ranks):
    """The folder of two ranks that step, train, are interrupted and resumed."""
    statuses, done = ranks
    assert statuses[3] == [0, 0], done.stderr[-3000:]
    return killed[0]


@pytest.mark.parametrize("name", ["double", "single"])
def test_two_ranks_compute_what_one_process_does(folder, name):
    """On the same batches, with synchronized statistics: gradients, losses, weights, running statistics, queue.

    All of it in float64; in float32 the gradients, because later iterations amplify its rounding.
    """
    dtype = {"double": torch.float64, "single": torch.float32}[name]
    alone = two_processes.steps(ProcessGroup(), dtype)
    first, second = (checkpoint.read(folder / f"rank-{rank}", name)[0] for rank in (0, 1))
    assert first.keys() == second.keys() == alone.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])], "the ranks agree bit for bit"
    assert first["state student.inpainting.memory.pointer"] == 8 % 6
    checked = 0
    for key, value in alone.items():
        error = (first[key].double() - value.double()).abs().max().item()
        if name == "double":
            assert error <= 1e-9 * max(1.0, value.abs().max().item()), key
        elif key.startswith("gradient"):
            assert error <= 1e-5 * max(1.0, value.abs().max().item()), key
        checked += 1
    assert checked > 200


def test_rank_0_writes_the_model_that_all_ranks_have(folder):
    """The running statistics are those of rank 0; each rank measures the signals of a shard."""
    (first, about), (second, about_second) = (checkpoint.read(folder / f"rank-{rank}", "fit") for rank in (0, 1))
    assert not [key for key in first if not torch.equal(first[key], second[key])]
    model = Model.load(folder / "run")
    assert not [key for key, value in checkpoint.tensors(model).items() if not torch.equal(first[key], value)]
    for epoch, other in zip(about["epochs"], about_second["epochs"], strict=True):
        assert {**epoch, "seconds": 0} == {**other, "seconds": 0}
    assert about["calibration"] == about_second["calibration"] == model.calibration.to_dict()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == about["epochs"] and len(lines) == 2
    # As measured by one process: every image once, in the same order; of 31, each is judged by the others.
    model.calibrate(tiny.images(12), tiny.images(31, 1))
    assert about["calibration"]["holdout"] == model.calibration.to_dict()["holdout"]
    assert about["calibration"]["mean"] == pytest.approx(model.calibration.mean, rel=1e-12)
    assert about["calibration"]["count"] == 12


def test_interrupted_ranks_resume_to_the_same_run(folder):
    first, _ = checkpoint.read(folder / "run", "last")
    again, about = checkpoint.read(folder / "again", "last")
    assert about["progress"]["finished"] and about["progress"]["step"] == 6
    # The running statistics of rank 0 are the model's; those of other ranks are dropped.
    assert not [key for key in first if not torch.equal(first[key], again[key])]
    assert not (folder / "out of sight").exists()


def test_ranks_that_resume_a_finished_run_have_its_model(folder):
    _, trained = checkpoint.read(folder / "rank-0", "fit")
    best = Model.load(folder / "run")
    for rank in (0, 1):
        values, about = checkpoint.read(folder / f"rank-{rank}", "finished")
        assert not [key for key, value in checkpoint.tensors(best).items() if not torch.equal(values[key], value)]
        assert about["calibration"] == best.calibration.to_dict() and about["epochs"] == trained["epochs"]


def test_two_ranks_fit_the_feature_models_of_one_process(folder):
    """Each encodes half of the images, in other batches, so that the last digits may differ."""
    for name, model in zip(("memory", "padim"), two_processes.features(ProcessGroup())):
        (first, about), (second, other) = (checkpoint.read(folder / f"rank-{rank}", name) for rank in (0, 1))
        assert not [key for key in first if not torch.equal(first[key], second[key])], "the ranks agree bit for bit"
        assert about["calibration"] == other["calibration"]
        want, calibration = model.state()[0], model.calibration.to_dict()
        assert first.keys() == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(first[key].float(), value.float(), rtol=1e-2, atol=1e-3, msg=key)
        np.testing.assert_allclose(
            about["calibration"]["holdout"][model.signal], calibration["holdout"][model.signal], atol=1e-3
        )
    encoded = [checkpoint.read(folder / f"rank-{rank}", "memory")[1]["encoded"] for rank in (0, 1)]
    assert max(encoded) < 0.7 * sum(encoded)
    for rank in (0, 1):
        message = checkpoint.read(folder / f"rank-{rank}", "features")[1]["message"]
        assert message == "all ranks must fit to the same images in the same order, got different ones"


def test_fewer_validation_images_than_ranks(folder):
    about, other = (checkpoint.read(folder / f"rank-{rank}", "small")[1] for rank in (0, 1))
    assert about["epochs"][0]["val_reconstruction"] == other["epochs"][0]["val_reconstruction"] > 0
    assert len(about["calibration"]["holdout"]["residual"]) == 1 and about["calibration"] == other["calibration"]
    assert about["kinds"] == ["BatchNorm2d"], "the model gets its own BatchNorms back"


@pytest.mark.parametrize(
    ("name", "what"),
    [("images", "other images"), ("count", "other images"), ("settings", "another training configuration")],
)
def test_ranks_with_different_requests_do_not_train(folder, name, what):
    for rank in (0, 1):
        message = checkpoint.read(folder / f"rank-{rank}", name)[1]["message"]
        assert message == f"the processes must train on the same; rank 1 has {what} than rank 0"


def test_nonfinite_loss_on_one_rank_stops_all(folder):
    for rank in (0, 1):
        message = checkpoint.read(folder / f"rank-{rank}", "nonfinite")[1]["message"]
        assert message == "step 2: the student loss is inf; nothing was updated with it"
        assert checkpoint.read(folder / f"rank-{rank}", "changed")[1]["changed"] == []


def test_death_of_a_rank_ends_the_job(killed):
    _, done, state = killed
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert done.stderr.index("rank 1 is about to die") < done.stderr.index("Signal 9 (SIGKILL)")
    assert done.stdout.count("training on 19 images") == 1, "the ranks print what one process prints"
    assert state["step"] <= 3 and not state["finished"]


def test_torchrun_resumes_a_killed_training_from_the_command_line(killed):
    """One run folder, one report, and the output of one process."""
    run = killed[0] / "killed"
    done = start(*LAUNCHER, killed[0], "resume_from_the_command_line")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kept epoch") == 1
    assert (run / "report.html").exists() and len(tiny.metrics(run)) == 2
    assert Model.load(run).calibration.count == 19
    assert [row["path"][-16:] for row in tiny.rows(run / "failures.csv")] == ["IM-0500-0001.png"]


def test_refused_ranks_exit_in_order(ranks):
    """Each prints one sentence and exits with status 2; gloo's threads must not abort the process (SIGABRT)."""
    statuses, done = ranks
    assert statuses[:3] == [[2, 2]] * 3
    lines = [line for line in done.stderr.splitlines() if line.startswith("simsid: rank ")]
    assert {line.split(":")[1] for line in lines} == {" rank 0", " rank 1"} and len(lines) == 6
    expected = "must be a multiple of the 2 processes, with an image for each, got batch_size=5 and"
    assert all(expected in line for line in lines)
    assert "Traceback" not in done.stderr and "terminate" not in done.stderr


def test_process_group_is_read_from_the_environment(monkeypatch):
    assert (
        ProcessGroup.from_environment({})
        == ProcessGroup.from_environment({"RANK": "3", "LOCAL_RANK": "1"})
        == ProcessGroup(0, 1)
    )
    assert ProcessGroup.from_environment({"WORLD_SIZE": "1"}) == ProcessGroup(0, 1)
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert ProcessGroup.from_environment(environment) == ProcessGroup(5, 8, 1, 4)
    for name, value, limits in (
        ("RANK", "8", "from 0 to 7"),
        ("RANK", "-1", "from 0 to 7"),
        ("RANK", "", "from 0 to 7"),
        ("WORLD_SIZE", "0", "at least 1"),
        ("WORLD_SIZE", "two", "at least 1"),
        ("LOCAL_RANK", "x", "at least 0"),
        ("LOCAL_WORLD_SIZE", "0", "at least 1"),
    ):
        message = f"environment variable {name} must be a whole number {limits}, got '{value}'"
        with pytest.raises(ProcessGroupError, match=message):
            ProcessGroup.from_environment({**environment, name: value})
    with pytest.raises(ProcessGroupError, match="variable RANK must be"):
        ProcessGroup.from_environment({"WORLD_SIZE": "2"})

    selected = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", selected.append)
    monkeypatch.setattr(distributed, "thread_count", lambda _: 14)
    group = ProcessGroup(7, 8, 3, 4)
    assert [group.select_device(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    assert selected == [3] and group.cpu_threads() == 3
    assert ProcessGroup().cpu_threads() == 14 and ProcessGroup(0, 99, 0, 99).cpu_threads() == 1
    assert ProcessGroup().select_device("cuda") == "cuda"
    with pytest.raises(ProcessGroupError, match="rank 4 is number 5 on its machine, where PyTorch sees 4 GPUs"):
        ProcessGroup(4, 8, 4, 8).select_device("cuda")


def test_other_commands_refuse_several_processes(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "simsid: rank 1: doctor runs as a single process; start it without torchrun\n"


def test_joining_without_an_address_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ProcessGroupError, match=r"start the processes with torchrun.*MASTER_ADDR"),
        ProcessGroup.from_environment().joined("cpu"),
    ):
        pass


def test_batch_norms_are_synchronized_and_restored():
    model = tiny.model()
    images, expected = tiny.images(4), tiny.model()(tiny.images(4)).student
    tensors = {name: value.data_ptr() for name, value in checkpoint.tensors(model).items()}
    for enabled in (True, True, False):
        synchronize_batch_norms(model, enabled)
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
        assert len(kinds) == 1 and (kinds == {BatchNorm2d}) is not enabled
        assert {name: value.data_ptr() for name, value in checkpoint.tensors(model).items()} == tensors
    assert torch.equal(model(images).student, expected)


def test_batch_that_does_not_divide_among_the_ranks_is_refused():
    model, images = tiny.model(), tiny.images(8)
    with pytest.raises(InputError, match=r"multiple of the 3 processes, .* got batch_size=16 and 8 images"):
        Trainer(model, TrainingConfig(epochs=1), group=ProcessGroup(0, 3)).fit(images)
    with pytest.raises(InputError, match=r"got batch_size=16 and 8 images"):
        Trainer(model, TrainingConfig(epochs=1), group=ProcessGroup(0, 16)).fit(images)
    with pytest.raises(InputError, match=r"must divide among 3 processes, got 8 images"):
        ProcessGroup(1, 3).shard(images)
    assert torch.equal(ProcessGroup(1, 2).shard(images), images[4:])


def test_single_process_exchanges_nothing():
    group, values = ProcessGroup(), torch.arange(3.0)
    assert list(group.in_order(abs, [-1, 2], 1)) == [(-1, 1), (2, 2)]
    assert group.broadcast(lambda: 3) == 3 and group.all_gather_object(3) == [3]
    assert group.main and group.any(True) and not group.any(False)
    assert group.mean(values) is values and group.gather(values) is values and group.shard(values).equal(values)
    columns = {"residual": np.arange(3.0)}
    assert group.interleave(columns, 3) is columns
    step = two_processes.steps(group, torch.float32, count=1)
    assert "state encoder.entry.entry.1.running_mean" in step
    model = tiny.model()
    Trainer(model, TrainingConfig(epochs=1, sync_batchnorm=True)).fit(tiny.images(4))
    assert {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {BatchNorm2d}
