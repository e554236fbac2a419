"""Kills: at every step in the file system, in the middle of a long scoring, of one rank of two, under torchrun."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
import tiny
from archives import expected_table, fill

from simsid.models import PixelPCA


def start(model, data, output, *options, program=("-m", "simsid")):
    """Start `simsid score` as a process."""
    command = [sys.executable, *program, "score", model, data, "-o", output, "--device", "cpu", "--threads", "1"]
    return subprocess.Popen(
        [str(part) for part in (*command, *options)],
        env=tiny.ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def rows_of(output, rank=0, count=1):
    path = output / ".scoring" / f"shard-{rank}-of-{count}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)


def peak(process):
    """Wait for a process and return its exit status and the most memory it had, in MB."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage.ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="needs a POSIX system")
def test_a_long_scoring_resumes_after_two_kills_in_bounded_memory(model, loaded, tmp_path):
    count, output, options = 3_000, tmp_path / "out", ("--batch-size", "64", "--pictures", "0")
    few, many = fill(tmp_path / "few", 500), fill(tmp_path / "many", count)
    status, baseline = peak(start(model, few, tmp_path / "small", *options))
    assert status == 1
    memory, before = [], 0
    for part in (0.05, 0.25):
        process = start(model, many, output, *options)
        wait_for(lambda: rows_of(output) > part * count, process)  # noqa: B023
        process.send_signal(signal.SIGKILL)
        status, megabytes = peak(process)
        memory.append(megabytes)
        assert status == -signal.SIGKILL and before < rows_of(output) < count
        before = rows_of(output)
        assert not (output / "scores.csv").exists()
    process = start(model, many, output, *options)
    # The pipes hold the few lines that are printed, so the process can end before they are read.
    status, megabytes = peak(process)
    memory.append(megabytes)
    printed = process.stdout.read()
    assert status == 1 and f"resumed after {before} files that were done" in printed
    assert "2250 of 3000 files scored, 750 failed" in printed
    assert (output / "scores.csv").read_bytes() == expected_table(loaded, many, 64)
    assert not (output / ".scoring").exists()
    # The measurement itself varies by some 3 MB; keeping the images of the last start's 1,500 and more takes 14.
    assert max(memory) - baseline < 8, (baseline, memory)


# Starts two ranks with the environment that torchrun gives them, without importing PyTorch in each.
TWO_RANKS = """
import os, sys, torch
from simsid import scoring
from simsid.commands import main as command_line

torch.set_num_threads(1)
pids = []
for rank in ("0", "1"):
    pids.append(os.fork())
    if not pids[-1]:
        os.environ.update(RANK=rank, WORLD_SIZE="2", LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
        command_line.main(sys.argv[1:])
print(*pids, flush=True)
print(*(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids))
"""


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc to find the processes of the launcher")
def test_two_ranks_resume_after_one_of_them_is_killed(tmp_path):
    count, output, model = 600, tmp_path / "out", tmp_path / "model"
    # With a narrower discriminator a rank would take a fraction of a second, too short to be killed in.
    loaded = tiny.calibrated(model, discriminator_width=16)
    films = fill(tmp_path / "films", count)

    def done(rank):
        return rows_of(output, rank, 2)

    def run(*program):
        return start(model, films, output, "--pictures", "3", "--batch-size", "4", program=program)

    # The launcher ends the other rank when one is killed.
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "simsid")
    process = run(*torchrun)
    wait_for(lambda: done(1) > 10, process)
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (second,) = [pid for pid in children if b"\0RANK=1\0" in pathlib.Path(f"/proc/{pid}/environ").read_bytes()]
    # Paused, so that it does not finish before the other has begun.
    os.kill(int(second), signal.SIGSTOP)
    wait_for(lambda: done(0) > 10, process)
    os.kill(int(second), signal.SIGKILL)
    process.communicate()
    assert process.returncode != 0 and not (output / "scores.csv").exists()
    before = [done(0), done(1)]
    assert 20 < sum(before) < count

    # Without the launcher, the other rank scores its shard to the end.
    process = run("-c", TWO_RANKS)
    second = int(process.stdout.readline().split()[1])
    wait_for(lambda: done(1) > before[1] + 30, process)
    os.kill(second, signal.SIGKILL)
    printed = process.communicate()[0].splitlines()
    assert printed[-1] == f"0 -{signal.SIGKILL.value}"
    assert any(line.startswith(f"rank 0 of 2: resumed after {before[0]} files") for line in printed)
    assert "rank 0 of 2: 300 files done; rank 1 has not finished" in printed
    last = done(1)
    assert before[1] + 30 < last < 300 and not (output / "scores.csv").exists()

    process = run(*torchrun)
    printed = process.communicate()[0]
    resumed = [int(line.split("resumed after ")[1].split()[0]) for line in printed.splitlines() if "resumed" in line]
    assert sorted(resumed) == [last, 300] and f"rank 1 of 2: resumed after {last} files" in printed
    assert "450 of 600 files scored, 150 failed" in printed and f"scores: {output / 'scores.csv'}" in printed
    assert (output / "scores.csv").read_bytes() == expected_table(loaded, films, 4)
    assert (output / "report.html").exists() and not (output / ".scoring").exists()


KILLS = """
import dataclasses, os, pathlib, random, shutil, sys, time, torch, traceback
from simsid import checkpoint, report
from simsid.commands import main as command_line
from simsid.distributed import ProcessGroup
from simsid.report import selection
from simsid.scoring import archive
from simsid.training import run_folder

folder, expected, *arguments = sys.argv[1:]
expected = pathlib.Path(expected).read_bytes()
torch.set_num_threads(1)

command = command_line._parse([*arguments, "-o", os.path.join(folder, "warm-up")])
# Imports what a scoring imports, which every fork would otherwise do again.
assert command.run() == 1

def start(rank, output, limit=None):
    '''Score in a fork, which ends like one that is killed at its `limit`-th step in the file system.'''
    pid = os.fork()
    if pid:
        return pid
    if rank is not None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    steps, scored, real = 0, 0, archive.score_files

    def watch(event, values):
        nonlocal steps
        if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.scandir"):
            inside = isinstance(values[0], (str, os.PathLike)) and os.fspath(values[0]).startswith(output)
            if inside or event in ("os.remove", "os.rmdir"):
                steps += 1
                if steps == limit:
                    os._exit(9)

    def counted(*values, **options):
        nonlocal scored
        for score in real(*values, **options):
            scored += 1
            yield score

    def together(_, real=ProcessGroup.from_environment):
        # Processes take seconds to import PyTorch, forks do not: none may merge before the other has started.
        pathlib.Path(folder, f"{limit} {rank} has started").touch()
        while limit is None and not all(pathlib.Path(folder, f"None {other} has started").exists() for other in ranks):
            time.sleep(0.001)
        return real()

    # The page takes longer than all else; what matters here is that it is written, and when.
    report.write_report = lambda path, **_: checkpoint.write_file(path, b"page")
    selection.examples_of_scores = lambda *_: []
    archive.score_files = counted
    ProcessGroup.from_environment = classmethod(together)
    sys.addaudithook(watch)
    try:
        status = dataclasses.replace(command, output=pathlib.Path(output)).run()
        pathlib.Path(folder, f"scored {rank}").write_text(str(scored))
        os._exit(status)
    except BaseException:
        traceback.print_exc()
    os._exit(77)

def ended(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

def rows(output, rank):
    path = pathlib.Path(output, ".scoring", f"shard-{rank or 0}-of-{len(ranks)}.jsonl")
    return path.read_bytes().count(b"\\n") if path.exists() else 0

# One process shows every step; of two, whose steps interleave differently each time, a part is enough.
for ranks, stride in (([None], 1), ([0, 1], 3)):
    for limit in range(random.randint(1, stride), 1000, stride):
        output = os.path.join(folder, f"{len(ranks)} {limit}")
        died = ended([start(rank, output, limit) for rank in ranks])
        table, request = pathlib.Path(output, "scores.csv"), pathlib.Path(output, ".scoring", "request.json")
        assert not table.exists() or table.read_bytes() == expected, limit
        begun = request.exists()
        there = [rows(output, rank) if begun else 0 for rank in ranks]
        if 9 not in died:
            break
        if begun or not table.exists():
            for mark in pathlib.Path(folder).glob("None * has started"):
                mark.unlink()
            statuses = ended([start(rank, output) for rank in ranks])
            assert sorted(statuses) == [0] * (len(ranks) - 1) + [1], (limit, statuses)
            scored = [int(pathlib.Path(folder, f"scored {rank}").read_text()) for rank in ranks]
            assert sum(there) + sum(scored) == 23, (limit, there, scored)
        assert table.read_bytes() == expected and not request.exists(), limit
        assert pathlib.Path(output, "report.html").read_text() == "page", limit
        shutil.rmtree(output)
    assert sorted(died) == [0] * (len(ranks) - 1) + [1] and not request.parent.exists(), died
    print("all of", limit - 1, "steps")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a POSIX system")
def test_a_kill_before_any_step_loses_and_repeats_nothing(films, tmp_path):
    """Of a process that scores alone, and of two ranks at once."""
    # The steps in the file system are those of any model: of this one, a scoring takes little else.
    model = tmp_path / "model"
    PixelPCA(image_size=16, components=3).fit(tiny.noise(12, 16), tiny.noise(19, 16, seed=1)).save(model)
    (tmp_path / "expected").write_bytes(expected_table(PixelPCA.load(model), films))
    (tmp_path / "kills.py").write_text(KILLS)
    options = ["--pictures", "1", "--device", "cpu", "--workers", "1", "--threads", "1"]
    arguments = [tmp_path, tmp_path / "expected", "score", model, films, *options]
    done = subprocess.run(
        [sys.executable, tmp_path / "kills.py", *arguments], env=tiny.ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    steps = [int(part.split()[0]) for part in done.stdout.split("all of ")[1:]]
    assert len(steps) == 2 and min(steps) > 15
