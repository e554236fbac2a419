"""A training that is stopped, at any moment and by any means, resumes to the result of an uninterrupted one."""

import errno
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
from simsid.training import trainer as trainer_module
from simsid.training.run_folder import RunFolder
from simsid.training.step import TrainingStep

EPOCHS = 4
OPTIONS = [*tiny.OPTIONS, "--memory", "queue", "--rho", "0.8", "--epochs", str(EPOCHS), "--batch-size", "4"]
# Bitwise equality holds on a CPU only: on a GPU, PyTorch's gradient of an upsampling uses atomics.
OPTIONS += ["--val-share", "0.2", "--patience", "6", "--seed", "5", "--device", "cpu"]


def fit(run, images, *, resume=False, val=None, sizes=(), **options):
    config = TrainingConfig(**{"batch_size": 4, "epochs": 3, "checkpoint_seconds": 0.0, **options})
    return Trainer(tiny.model(memory="queue", rho=0.8, **dict(sizes)), config, run=run).fit(images, val, resume=resume)


def interrupt_at(monkeypatch, steps, times=1):
    """Press Ctrl-C, `times` times, while these steps run."""
    real = TrainingStep.__call__

    def step(self, images, number):
        for _ in range(times if number in steps else 0):
            signal.raise_signal(signal.SIGINT)
        return real(self, images, number)

    monkeypatch.setattr(TrainingStep, "__call__", step)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """An uninterrupted run in this process: 3 epochs of 3 iterations."""
    run = tmp_path_factory.mktemp("uninterrupted") / "run"
    fit(run, tiny.images(12), val=tiny.images(3, 1))
    return run


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_ctrl_c_finishes_the_iteration_and_resumes(monkeypatch, tmp_path, uninterrupted, seconds):
    options = {"val": tiny.images(3, 1), "checkpoint_seconds": seconds}
    with monkeypatch.context() as patch:
        interrupt_at(patch, {1, 2, 7})
        stopped = []
        for _ in range(3):
            history = fit(tmp_path / "run", tiny.images(12), resume=bool(stopped), **options)
            assert history.interrupted
            stopped.append(checkpoint.read(tmp_path / "run", "last")[1]["progress"])
        assert [progress["step"] for progress in stopped] == [2, 3, 8], "the running iteration is finished"
        history = fit(tmp_path / "run", tiny.images(12), resume=True, **options)
    assert not history.interrupted and len(history.epochs) == 3
    if seconds:
        # The configuration differs, but in nothing that is computed.
        assert tiny.metrics(tmp_path / "run") == tiny.metrics(uninterrupted)
        actual, expected = (checkpoint.read(run, "last")[0] for run in (tmp_path / "run", uninterrupted))
        assert all(torch.equal(actual[name], expected[name]) for name in expected)
    else:
        tiny.assert_same_run(tmp_path / "run", uninterrupted)


def test_second_ctrl_c_stops_at_once(monkeypatch, tmp_path):
    before = signal.getsignal(signal.SIGINT)  # a shell starts background jobs with SIGINT ignored
    interrupt_at(monkeypatch, {4}, times=2)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", tiny.images(12))
    assert checkpoint.read(tmp_path / "run", "last")[1]["progress"]["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before
    with RunFolder(tmp_path / "run"):
        pass


def test_ctrl_c_without_a_run_folder_ends_the_training(monkeypatch):
    interrupt_at(monkeypatch, {3})
    history = fit(None, tiny.images(12))
    assert history.interrupted and len(history.epochs) == 1


def test_resuming_a_finished_run_changes_no_file(tmp_path, uninterrupted):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    model = tiny.model(9, memory="queue", rho=0.8)
    config = TrainingConfig(batch_size=4, epochs=3, checkpoint_seconds=0.0)
    history = Trainer(model, config, run=uninterrupted).fit(tiny.images(12), tiny.images(3, 1), resume=True)
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before
    assert len(history.epochs) == 3 and not model.training
    best = Model.load(uninterrupted)
    assert model.calibration == best.calibration is not None
    expected = checkpoint.tensors(best)
    assert all(torch.equal(value, expected[name]) for name, value in checkpoint.tensors(model).items())


def test_early_stopping_and_best_epoch_survive_interruptions(monkeypatch, tmp_path):
    values = [5.0, 3.0, 4.0, 3.5, 3.2, 1.0]
    options = {"val": tiny.images(2, 1), "epochs": 6, "patience": 3, "learning_rate": 0.01}
    real_choose, real_step = trainer_module.choose_best, TrainingStep.__call__

    def choose(history, epoch, *rest):
        epoch["val_reconstruction"] = values[epoch["epoch"]]
        return real_choose(history, epoch, *rest)

    def run(folder, stops):
        """Train until it is done, with Ctrl-C in each iteration of `stops`."""

        def step(self, images, number):
            if number in stops:
                stops.remove(number)
                signal.raise_signal(signal.SIGINT)
            return real_step(self, images, number)

        monkeypatch.setattr(TrainingStep, "__call__", step)
        history = fit(folder, tiny.images(8), **options)
        while history.interrupted:
            history = fit(folder, tiny.images(8), resume=True, **options)
        return history

    monkeypatch.setattr(trainer_module, "choose_best", choose)
    expected = run(tmp_path / "uninterrupted", set())
    history = run(tmp_path / "run", {2, 5, 8})
    assert (history.best_epoch, history.best_value, len(history.epochs)) == (1, -3.0, 5)
    assert expected.best_epoch == 1
    tiny.assert_same_run(tmp_path / "run", tmp_path / "uninterrupted")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": tiny.images(12, 8)}, "other images"),
        ({"val": tiny.images(2, 8)}, "other images"),
        ({"learning_rate": 2e-4}, "another training configuration"),
    ],
)
def test_state_of_another_request_is_refused(uninterrupted, changes, message):
    before = {path.name: path.read_bytes() for path in uninterrupted.iterdir()}
    with pytest.raises(
        RunError, match=f"was started with {message}; resume it with the same, or start a new run in another"
    ):
        fit(uninterrupted, **{"images": tiny.images(12), "val": tiny.images(3, 1), "resume": True, **changes})
    assert {path.name: path.read_bytes() for path in uninterrupted.iterdir()} == before


def test_state_of_an_older_version_resumes(tmp_path, uninterrupted):
    """Settings that it did not have were at their defaults."""
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    document = json.loads((run / "last.json").read_text())
    for name, setting in (("training", "cuda_graph"), ("config", "temperature")):
        del document[name][setting]
    (run / "last.json").write_text(json.dumps(document))
    history = fit(run, tiny.images(12), val=tiny.images(3, 1), resume=True)
    assert len(history.epochs) == 3 and tiny.metrics(run) == tiny.metrics(uninterrupted)


def test_state_of_another_model_is_refused(uninterrupted):
    trainer = Trainer(tiny.model(), TrainingConfig(batch_size=4, epochs=3, checkpoint_seconds=0.0), run=uninterrupted)
    with pytest.raises(RunError, match="was started with another model configuration"):
        trainer.fit(tiny.images(12), tiny.images(3, 1), resume=True)


def test_existing_run_or_model_is_not_overwritten(tmp_path, uninterrupted):
    with pytest.raises(RunError, match="already holds a run or a model"):
        fit(uninterrupted, tiny.images(12), val=tiny.images(3, 1))
    tiny.calibrated(tmp_path / "model")
    with pytest.raises(RunError, match="already holds a run or a model"):
        fit(tmp_path / "model", tiny.images(12))
    with pytest.raises(RunError, match="needs the run folder"):
        fit(None, tiny.images(12), resume=True)


def test_full_disk_names_the_file_and_the_remedy(monkeypatch, tmp_path):
    real, run = os.fsync, tmp_path / "run"

    def fail(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def full(handle):
        (fail if (run / "last.json").exists() else real)(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError) as caught:
            fit(run, tiny.images(12))
    assert str(caught.value) == (
        f"{run / 'last.json'} cannot be written: No space left on device; "
        f"correct this, then resume the run, whose last state is intact ({run})"
    )
    assert fit(run, tiny.images(12), resume=True).best_epoch == 2
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match=r"metrics\.jsonl cannot be written: .*, then start the run again"):
            fit(tmp_path / "other", tiny.images(12))


# The next tests kill processes. The first one imports once and forks processes that die when a file is synced, renamed
# or removed; the others run the command line and kill it by the clock.

KILLER = """
import json, os, pathlib, random, shutil, signal, sys
sys.path[:0] = [sys.argv[1], os.path.dirname(sys.argv[1])]
import test_resume, tiny
from simsid.models import discriminator

work = pathlib.Path(sys.argv[2])
images, val = (tiny.noise(count, tiny.ONE_LEVEL["image_size"], seed=count) for count in (8, 2))
options = {"val": val, "epochs": 1, "sizes": tiny.ONE_LEVEL}


def train(run, seconds, resume=False, die_at=0):
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
    test_resume.fit(run, images, resume=resume, checkpoint_seconds=seconds, **options)


def fork(*arguments):
    child = os.fork()
    if not child:
        train(*arguments)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_everywhere(seconds, run, expected):
    # In this process first, so that no child has to import anything.
    test_resume.fit(expected, images, checkpoint_seconds=seconds, **options)
    moment, killed, rng = 0, 0, random.Random()
    while True:
        moment += rng.randint(1, 8)
        if fork(run, seconds, False, moment) == 0:
            return killed
        killed += 1
        # Sometimes it is killed again while it resumes.
        if rng.random() < 0.3:
            fork(run, seconds, True, rng.randint(1, 12))
        assert fork(run, seconds, True) == 0, moment
        names = [sorted(path.name.split("-")[0] for path in folder.iterdir()) for folder in (run, expected)]
        assert names[0] == names[1], (moment, names)
        tiny.assert_same_run(run, expected)
        shutil.rmtree(run)


# States after every iteration, and only at the end.
print(json.dumps([kill_everywhere(seconds, work / f"run {seconds}", work / f"{seconds}") for seconds in (0.0, 30.0)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_process_killed_at_any_write_resumes(tmp_path):
    command = [sys.executable, "-c", KILLER, os.path.dirname(__file__), str(tmp_path)]
    done = subprocess.run(command, env=tiny.ENVIRONMENT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    often, seldom = json.loads(done.stdout.splitlines()[-1])
    assert often >= 4 and seldom >= 2


def start(*arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "simsid", "train", *map(str, arguments)],
        env=tiny.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process, condition, seconds=300):
    """Wait until the condition holds or the process ends; return whether it still runs."""
    end = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < end, "the process makes no progress"
        time.sleep(0.002)
    return process.poll() is None


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    tiny.films(folder, 10)
    return folder


@pytest.fixture(scope="module")
def uninterrupted_command(films, tmp_path_factory):
    """An uninterrupted run of the command line, in this process."""
    run = tmp_path_factory.mktemp("command") / "run"
    command_line("train", films, "-o", run, *OPTIONS, "--checkpoint-seconds", "0", "--threads", "1")
    return run


def command_line(*arguments):
    """Run a command in this process, which has imported everything already."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(map(str, arguments)))
    assert stop.value.code == 0


def test_killed_processes_resume_to_the_same_run(films, tmp_path, uninterrupted_command):
    run, kills = tmp_path / "run", 0
    arguments = [films, "-o", run, *OPTIONS, "--checkpoint-seconds", "0", "--threads", "1"]
    state = run / "last.json"
    for attempt in range(2):
        process = start(*arguments)
        arguments = ["--resume", run]
        if attempt == 0:
            # Before the first checkpoint: there is a request and no state.
            alive = wait_for(process, (run / "run.json").exists)
        else:
            alive = wait_for(process, state.exists)
            time.sleep(random.uniform(0, 0.2))
        if alive and attempt == 1:
            # Paused, so that it does not finish meanwhile.
            process.send_signal(signal.SIGSTOP)
            with pytest.raises(RunError, match="in use by another process"):
                RunFolder(run)
            with pytest.raises(SystemExit) as stop:
                cli.main(["train", "--resume", str(run)])
            assert stop.value.code == 2
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
    assert kills == 2
    command_line("train", "--resume", run)
    tiny.assert_same_run(run, uninterrupted_command)
    assert (run / "manifest.csv").read_bytes() == (uninterrupted_command / "manifest.csv").read_bytes()
    assert not [path.name for path in run.iterdir() if path.name.startswith(".") and path.name != ".lock"]


def test_ctrl_c_of_a_process_resumes_to_the_same_run(films, tmp_path, uninterrupted_command, capsys):
    run = tmp_path / "run"
    process = start(films, "-o", run, *OPTIONS, "--checkpoint-seconds", "0", "--threads", "1")
    assert wait_for(process, (run / "last.json").exists)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert errors.splitlines()[-1] == f"stopped; resume with: simsid train --resume {run}"
    assert "Traceback" not in errors
    # The second time it is finished already.
    for _ in range(2):
        command_line("train", "--resume", run)
        assert "kept epoch" in capsys.readouterr().out
        tiny.assert_same_run(run, uninterrupted_command)
