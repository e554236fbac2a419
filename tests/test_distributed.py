"""Training by two processes: what one computes alone, one writer, and an end when one of them dies."""

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
from simsid.distributed import Rank, Team
from simsid.errors import ProcessGroupError

HERE = pathlib.Path(__file__).parent


def torchrun(*program, timeout=240):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return subprocess.run(
        [*launcher, *map(str, program)],
        env={**tiny.ENVIRONMENT, "PYTHONPATH": os.pathsep.join(map(str, (HERE, HERE.parent)))},
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What two processes leave that step, train, and are interrupted and resumed."""
    folder = tmp_path_factory.mktemp("team")
    scenes = ["steps", "fit", "finished", "interrupt", "small", "differ", "bad", "shares"]
    done = torchrun(two_processes.__file__, folder, *scenes)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["double", "single"])
def test_two_processes_compute_what_one_does(folder, name):
    """On the same batches, statistics synchronised: gradients, losses, weights, running statistics, queue.

    In float64 all of it; in float32 the gradients, to its rounding, which the later iterations amplify.
    """
    dtype = {"double": torch.float64, "single": torch.float32}[name]
    alone = two_processes.steps(Team(), dtype)
    first, second = (checkpoint.read(folder / f"rank-{rank}", name)[0] for rank in (0, 1))
    assert first.keys() == second.keys() == alone.keys()
    assert not [key for key in first if not torch.equal(first[key], second[key])], "the members agree bit for bit"
    assert first["state student.inpainting.memory.pointer"] == 8 % 6
    checked = 0
    for key, value in alone.items():
        apart = (first[key].double() - value.double()).abs().max().item()
        if name == "double":
            assert apart <= 1e-9 * max(1.0, value.abs().max().item()), key
        elif key.startswith("gradient"):
            assert apart <= 1e-5 * max(1.0, value.abs().max().item()), key
        checked += 1
    assert checked > 200


def test_one_member_writes_what_all_have(folder):
    """With each member's own statistics the running ones are rank 0's; scores are measured in shares."""
    (first, about), (second, about_second) = (checkpoint.read(folder / f"rank-{rank}", "fit") for rank in (0, 1))
    assert not [key for key in first if not torch.equal(first[key], second[key])]
    model = Model.load(folder / "run")
    assert not [key for key, value in model.state_dict().items() if not torch.equal(first[key], value)]
    for epoch, other in zip(about["epochs"], about_second["epochs"], strict=True):
        assert {**epoch, "seconds": 0} == {**other, "seconds": 0}
    assert about["calibration"] == about_second["calibration"] == model.calibration.to_dict()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == about["epochs"] and len(lines) == 3
    # Measured by one process: the same films, none twice, in the same order.
    model.calibrate(tiny.images(12), tiny.images(5, 1))
    assert about["calibration"]["holdout"] == model.calibration.to_dict()["holdout"]
    assert about["calibration"]["mean"] == pytest.approx(model.calibration.mean, rel=1e-12)
    assert about["calibration"]["count"] == 12


def test_an_interrupted_team_goes_on(folder):
    first, _ = checkpoint.read(folder / "run", "last")
    again, about = checkpoint.read(folder / "again", "last")
    assert about["progress"]["finished"] and about["progress"]["step"] == 9
    # The first member's running statistics are those of the model; the others' are not kept.
    assert not [key for key in first if not torch.equal(first[key], again[key])]
    assert not (folder / "out of sight").exists()


def test_a_team_that_resumes_a_finished_run_has_its_model(folder):
    _, trained = checkpoint.read(folder / "rank-0", "fit")
    kept = Model.load(folder / "run")
    for rank in (0, 1):
        values, about = checkpoint.read(folder / f"rank-{rank}", "finished")
        assert not [key for key, value in kept.state_dict().items() if not torch.equal(values[key], value)]
        assert about["calibration"] == kept.calibration.to_dict() and about["epochs"] == trained["epochs"]


def test_fewer_images_to_validate_on_than_members(folder):
    about, other = (checkpoint.read(folder / f"rank-{rank}", "small")[1] for rank in (0, 1))
    assert about["epochs"][0]["val_reconstruction"] == other["epochs"][0]["val_reconstruction"] > 0
    assert len(about["calibration"]["holdout"]["residual"]) == 1 and about["calibration"] == other["calibration"]
    assert about["kinds"] == ["BatchNorm2d"], "a model is left as it was given"


@pytest.mark.parametrize(
    ("name", "what"),
    [("images", "other images"), ("count", "other images"), ("settings", "another training configuration")],
)
def test_members_that_were_given_different_things_do_not_train(folder, name, what):
    for rank in (0, 1):
        said = checkpoint.read(folder / f"rank-{rank}", name)[1]["said"]
        assert said == f"the processes must train on the same; rank 1 has {what} than rank 0"


def test_what_is_not_finite_at_one_member_stops_all(folder):
    for rank in (0, 1):
        said = checkpoint.read(folder / f"rank-{rank}", "bad")[1]["said"]
        assert said == "step 2: the student loss is inf; nothing was updated with it"
        assert checkpoint.read(folder / f"rank-{rank}", "changed")[1]["changed"] == []


def test_a_member_that_dies_ends_the_job(tmp_path):
    began = time.monotonic()
    done = torchrun(two_processes.__file__, tmp_path, "death", timeout=100)
    assert done.returncode != 0 and time.monotonic() - began < 60
    assert "Signal 9 (SIGKILL)" in done.stderr
    assert done.stderr.index("rank 1 is about to die") < done.stderr.index("Signal 9 (SIGKILL)")
    assert checkpoint.read(tmp_path / "dead", "last")[1]["progress"]["step"] <= 4


def test_the_command_line(tmp_path):
    """`torchrun -m simsid train`: one run folder, one report, one voice; a mistake is one sentence a process."""
    films = tiny.zhanglab(tmp_path / "films", train=20)
    (films / "train" / "NORMAL" / "IM-0500-0001.png").write_bytes(b"no image")
    command = ["-m", "simsid", "train", films, "-o", tmp_path / "run", "--epochs", "2", *tiny.OPTIONS]
    command += ["--device", "cpu"]  # of GPUs there may be one, and one alone
    done = torchrun(*command, "--batch-size", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("kept epoch") == done.stdout.count("training on 19 images") == 1
    assert (tmp_path / "run" / "report.html").exists() and len(tiny.metrics(tmp_path / "run")) == 2
    assert Model.load(tmp_path / "run").calibration.count == 19
    assert [row["path"][-16:] for row in tiny.rows(tmp_path / "run" / "failures.csv")] == ["IM-0500-0001.png"]
    done = torchrun(*command, "--batch-size", "5")
    assert done.returncode != 0
    first = next(line for line in done.stderr.splitlines() if line.startswith("simsid: rank "))
    assert first.startswith("simsid: rank 0: ") and "already holds a run or a model" in first


def test_ranks_are_what_torchrun_says(monkeypatch):
    assert Rank.from_environment({}) == Rank.from_environment({"RANK": "3", "LOCAL_RANK": "1"}) == Rank(0, 1)
    assert Rank.from_environment({"WORLD_SIZE": "1"}) == Rank(0, 1)
    set_by_torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert Rank.from_environment(set_by_torchrun) == Rank(5, 8, 1, 4)
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
            Rank.from_environment({**set_by_torchrun, name: value})
    with pytest.raises(ProcessGroupError, match="variable RANK must be"):
        Rank.from_environment({"WORLD_SIZE": "2"})

    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(distributed, "thread_count", lambda _: 14)
    rank = Rank(7, 8, 3, 4)
    assert [rank.take_device(device) for device in ("cuda", "cuda:1", "cpu")] == ["cuda:3", "cuda:1", "cpu"]
    assert taken == [3] and rank.workers() == 3 and Rank().workers() == 14 and Rank(0, 99, 0, 99).workers() == 1
    assert Rank().take_device("cuda") == "cuda"
    with pytest.raises(ProcessGroupError, match="rank 4 is number 5 on its machine, where PyTorch sees 4 GPUs"):
        Rank(4, 8, 4, 8).take_device("cuda")


def test_other_commands_are_for_one_process(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "simsid: rank 1: doctor runs as one process; start it without torchrun\n"


def test_processes_need_a_place_to_meet(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(ProcessGroupError, match=r"start the processes with torchrun.*MASTER_ADDR"),
        Team.gathered("cpu"),
    ):
        pass


def test_batch_norms_are_synchronised_and_back():
    model = tiny.model()
    images, expected = tiny.images(4), tiny.model()(tiny.images(4)).student
    tensors = {name: value.data_ptr() for name, value in model.state_dict().items()}
    for wanted in (True, True, False):
        distributed.synchronise_batch_norms(model, wanted)
        kinds = {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)}
        assert len(kinds) == 1 and (kinds == {nn.BatchNorm2d}) is not wanted
        assert {name: value.data_ptr() for name, value in model.state_dict().items()} == tensors
    assert torch.equal(model(images).student, expected)


def test_a_batch_divides_among_the_team():
    model, images = tiny.model(), tiny.images(8)
    with pytest.raises(ValueError, match=r"multiple of the 3 processes, .* got batch_size=16 and 8 images"):
        Trainer(model, TrainingConfig(epochs=1), team=Team(0, 3)).fit(images)
    with pytest.raises(ValueError, match=r"got batch_size=16 and 8 images"):
        Trainer(model, TrainingConfig(epochs=1), team=Team(0, 16)).fit(images)
    with pytest.raises(ValueError, match=r"must divide among 3 processes, got 8 images"):
        Team(1, 3).share(images)
    assert torch.equal(Team(1, 2).share(images), images[4:])


def test_alone_nothing_is_exchanged():
    team, values = Team(), torch.arange(3.0)
    assert list(team.in_order(abs, [-1, 2], 1)) == [(-1, 1), (2, 2)]
    assert team.from_main(lambda: 3) == 3 and team.everyones(3) == [3]
    assert team.main and team.any(True) and not team.any(False)
    assert team.mean(values) is values and team.concatenated(values) is values and team.share(values).equal(values)
    columns = {"residual": np.arange(3.0)}
    assert team.collected(columns, 3) is columns
    step = two_processes.steps(team, torch.float32, count=1)
    assert "state encoder.entry.entry.1.running_mean" in step
    model = tiny.model()
    Trainer(model, TrainingConfig(epochs=1, sync_batchnorm=True)).fit(tiny.images(4))
    assert {type(module) for module in model.modules() if isinstance(module, nn.BatchNorm2d)} == {nn.BatchNorm2d}
