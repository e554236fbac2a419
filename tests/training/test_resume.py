"""A training that is stopped, at whatever moment and by whatever means, goes on as if it had never been."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny
import torch

from simsid import Model, Trainer, TrainingConfig, checkpoint
from simsid.commands import main as cli
from simsid.errors import RunError
from simsid.training.run_folder import RunFolder
from simsid.training.step import TrainingStep

EPOCHS = 6
OPTIONS = [*tiny.OPTIONS, "--memory", "queue", "--rho", "0.8", "--epochs", str(EPOCHS), "--batch-size", "4"]
# Bit for bit is a CPU's promise: PyTorch's gradient of an upsampling adds in any order on a GPU.
OPTIONS += ["--val-share", "0.2", "--patience", "6", "--seed", "5", "--device", "cpu"]


def fit(run, images, *, resume=False, val=None, **options):
    config = TrainingConfig(**{"batch_size": 4, "epochs": 3, "checkpoint_seconds": 0.0, **options})
    return Trainer(tiny.model(memory="queue", rho=0.8), config, run=run).fit(images, val, resume=resume)


def interrupt_at(monkeypatch, steps, times=1):
    """Press Ctrl-C, that many times, while these steps run."""
    real = TrainingStep.__call__

    def step(self, images, number):
        for _ in range(times if number in steps else 0):
            signal.raise_signal(signal.SIGINT)
        return real(self, images, number)

    monkeypatch.setattr(TrainingStep, "__call__", step)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run in this process: 3 epochs of 3 iterations."""
    run = tmp_path_factory.mktemp("whole") / "run"
    fit(run, tiny.images(12), val=tiny.images(3, 1))
    return run


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_ctrl_c_and_resume(monkeypatch, tmp_path, whole, seconds):
    options = {"val": tiny.images(3, 1), "checkpoint_seconds": seconds}
    with monkeypatch.context() as patch:
        interrupt_at(patch, {1, 2, 7})
        stopped = []
        for _ in range(3):
            history = fit(tmp_path / "run", tiny.images(12), resume=bool(stopped), **options)
            assert history.interrupted
            stopped.append(checkpoint.read(tmp_path / "run", "last")[1]["progress"])
        assert [at["step"] for at in stopped] == [2, 3, 8], "the iteration of the moment is finished"
        history = fit(tmp_path / "run", tiny.images(12), resume=True, **options)
    assert not history.interrupted and len(history.epochs) == 3
    if seconds:
        # The configuration differs, in nothing that is computed.
        assert tiny.metrics(tmp_path / "run") == tiny.metrics(whole)
        mine, theirs = (checkpoint.read(run, "last")[0] for run in (tmp_path / "run", whole))
        assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    else:
        tiny.assert_same_run(tmp_path / "run", whole)


def test_the_second_ctrl_c_stops_at_once(monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell starts its background jobs with SIGINT ignored
    interrupt_at(monkeypatch, {4}, times=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", tiny.images(12))
    assert checkpoint.read(tmp_path / "run", "last")[1]["progress"]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before
    with RunFolder(tmp_path / "run"):
        pass


def test_ctrl_c_without_a_run_folder(monkeypatch):
    interrupt_at(monkeypatch, {3})
    history = fit(None, tiny.images(12))
    assert history.interrupted and len(history.epochs) == 1


def test_resuming_a_finished_run_is_harmless(tmp_path, whole):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    model = tiny.model(9, memory="queue", rho=0.8)
    config = TrainingConfig(batch_size=4, epochs=3, checkpoint_seconds=0.0)
    history = Trainer(model, config, run=whole).fit(tiny.images(12), tiny.images(3, 1), resume=True)
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before
    assert len(history.epochs) == 3 and not model.training
    kept = Model.load(whole)
    assert model.calibration == kept.calibration is not None
    assert all(torch.equal(value, kept.state_dict()[name]) for name, value in model.state_dict().items())


def test_early_stopping_and_the_best_epoch_survive(monkeypatch, tmp_path):
    values = [5.0, 3.0, 4.0, 3.5, 3.2, 1.0]
    real = Trainer._validate

    def run(folder, stops):
        def validate(self, val):
            real(self, val)
            return {"val_reconstruction": values[self._step.epoch]}

        def step(self, images, number):
            self.epoch = number // 2
            if number in stops:
                stops.remove(number)
                signal.raise_signal(signal.SIGINT)
            return real_step(self, images, number)

        monkeypatch.setattr(Trainer, "_validate", validate)
        with monkeypatch.context() as patch:
            real_step = TrainingStep.__call__
            patch.setattr(TrainingStep, "__call__", step)
            resume = False
            while True:
                history = fit(
                    folder,
                    tiny.images(8),
                    val=tiny.images(2, 1),
                    epochs=6,
                    patience=3,
                    resume=resume,
                    learning_rate=0.01,
                )
                if not history.interrupted:
                    return history
                resume = True

    uninterrupted = run(tmp_path / "whole", set())
    history = run(tmp_path / "run", {2, 5, 8})
    assert (history.best_epoch, history.best_value, len(history.epochs)) == (1, -3.0, 5)
    assert uninterrupted.best_epoch == 1
    tiny.assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": tiny.images(12, 8)}, "other images"),
        ({"val": tiny.images(2, 8)}, "other images"),
        ({"learning_rate": 2e-4}, "another training configuration"),
    ],
)
def test_another_request_is_refused(whole, changes, message):
    before = {path.name: path.read_bytes() for path in whole.iterdir()}
    with pytest.raises(RunError, match=f"was started with {message}; resume it with the same, or start anew$"):
        fit(whole, **{"images": tiny.images(12), "val": tiny.images(3, 1), "resume": True, **changes})
    assert {path.name: path.read_bytes() for path in whole.iterdir()} == before


def test_a_state_of_an_older_version_is_gone_on_from(tmp_path, whole):
    """Settings that it did not know were at their defaults."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    document = json.loads((run / "last.json").read_text())
    for name, setting in (("training", "cuda_graph"), ("config", "temperature")):
        del document[name][setting]
    (run / "last.json").write_text(json.dumps(document))
    history = fit(run, tiny.images(12), val=tiny.images(3, 1), resume=True)
    assert len(history.epochs) == 3 and tiny.metrics(run) == tiny.metrics(whole)


def test_another_model_is_refused(whole):
    trainer = Trainer(tiny.model(), TrainingConfig(batch_size=4, epochs=3, checkpoint_seconds=0.0), run=whole)
    with pytest.raises(RunError, match="was started with another model configuration"):
        trainer.fit(tiny.images(12), tiny.images(3, 1), resume=True)


def test_a_run_or_a_model_is_not_overwritten(tmp_path, whole):
    with pytest.raises(RunError, match="already holds a run or a model"):
        fit(whole, tiny.images(12), val=tiny.images(3, 1))
    tiny.calibrated(tmp_path / "model")
    with pytest.raises(RunError, match="already holds a run or a model"):
        fit(tmp_path / "model", tiny.images(12))
    with pytest.raises(RunError, match="needs the run folder"):
        fit(None, tiny.images(12), resume=True)


# What follows kills processes. The first test imports once and forks processes that die when a file is synced, renamed
# or removed; the second runs the command line itself and kills it by the clock.

KILLER = """
import json, os, pathlib, random, shutil, signal, sys
sys.path.insert(0, sys.argv[1])
import test_resume, tiny

work = pathlib.Path(sys.argv[2])
images, val, options = tiny.images(8), tiny.images(2, 1), {"epochs": 1, "checkpoint_seconds": float(sys.argv[3])}


def train(run, resume, die_at):
    calls = 0

    def counted(real):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **keywords)
        return call

    for name in ("fsync", "replace", "unlink"):
        setattr(os, name, counted(getattr(os, name)))
    test_resume.fit(run, images, val=val, resume=resume, **options)
    return calls


def fork(run, resume, die_at):
    child = os.fork()
    if not child:
        train(run, resume, die_at)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


# In this process, so that no child has to load anything for the first time.
test_resume.fit(work / "whole", images, val=val, **options)
moment, killed, rng = 0, 0, random.Random()
while True:
    moment += rng.randint(1, 8)
    run = work / "run"
    if fork(run, False, moment) == 0:
        break
    killed += 1
    # Sometimes killed again while it resumes, and then left alone.
    if rng.random() < 0.3:
        fork(run, True, rng.randint(1, 12))
    assert fork(run, True, 0) == 0, moment
    left = sorted(path.name for path in run.iterdir())
    assert sorted(path.name.split("-")[0] for path in (work / "whole").iterdir()) == [
        name.split("-")[0] for name in left
    ], (moment, left)
    tiny.assert_same_run(run, work / "whole")
    shutil.rmtree(run)
print(json.dumps({"killed": killed}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(("seconds", "least"), [(0.0, 4), (30.0, 2)])
def test_killed_at_any_write(tmp_path, seconds, least):
    command = [sys.executable, "-c", KILLER, os.path.dirname(__file__), str(tmp_path), str(seconds)]
    done = subprocess.run(command, env=tiny.ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1])["killed"] >= least


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "simsid", "train", *map(str, arguments)],
        env=tiny.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition, seconds=300):
    """Wait until something is so or the process ends; returns whether it still runs."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the process does not come on"
        time.sleep(0.002)
    return process.poll() is None


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    tiny.films(folder, 10)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(films, tmp_path_factory):
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", str(films), "-o", str(run), *OPTIONS, "--checkpoint-seconds", "0", "--threads", "1"])
    assert stop.value.code == 0
    return run


def test_real_processes_killed_at_random(films, tmp_path, uninterrupted):
    run, rng, kills = tmp_path / "run", random.Random(), 0
    arguments = [films, "-o", run, *OPTIONS, "--checkpoint-seconds", "0", "--threads", "1"]
    state = run / "last.json"
    for attempt in range(4):
        process = start(*arguments)
        arguments = ["--resume", run]
        if attempt == 0:
            # Before the first checkpoint: there is a request and no state.
            alive = wait_for(process, (run / "run.json").exists)
        else:
            seen = state.stat().st_mtime_ns if state.exists() else 0
            alive = wait_for(process, lambda seen=seen: state.exists() and state.stat().st_mtime_ns != seen)
            time.sleep(rng.uniform(0, 0.2) if attempt != 1 else 0)
        if alive and attempt == 1:
            # Held still, so that it does not finish meanwhile.
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(RunError, match="in use by another process"):
                RunFolder(run)
            second = start("--resume", run)
            said = second.communicate()
            assert second.returncode == 2 and said[0] == ""
            assert said[1].strip() == f"simsid: {run} is in use by another process that writes into it"
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 3
    process = start("--resume", run)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "kept epoch" in output
    tiny.assert_same_run(run, uninterrupted)
    assert (run / "manifest.csv").read_bytes() == (uninterrupted / "manifest.csv").read_bytes()
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_a_real_ctrl_c(films, tmp_path, uninterrupted):
    run = tmp_path / "run"
    process = start(films, "-o", run, *OPTIONS, "--checkpoint-seconds", "0", "--threads", "1")
    assert wait_for(process, (run / "last.json").exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"stopped; continue with: simsid train --resume {run}"
    assert "Traceback" not in errors
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--resume", str(run)])
    assert stop.value.code == 0
    tiny.assert_same_run(run, uninterrupted)
    # Once more, now that it is finished.
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "--resume", str(run)])
    assert stop.value.code == 0
    tiny.assert_same_run(run, uninterrupted)
