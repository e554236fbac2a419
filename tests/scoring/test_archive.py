"""Archives: shares, resumption after a kill at any moment, merging, and memory that does not grow with the films."""

import itertools
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import pytest
import tiny
import torch

from simsid import Model
from simsid.distributed import ProcessGroup
from simsid.errors import ArchiveError
from simsid.scoring import stream as scoring
from simsid.scoring.archive import Work

TWO = [ProcessGroup(0, 2), ProcessGroup(1, 2)]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """As in the processes that are started here: another number of threads may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny.calibrated(folder, width=2, heads=1)
    return folder


@pytest.fixture(scope="module")
def loaded(model):
    return Model.load(model)


def fill(folder, count, kinds=("0", "1", "2", "broken"), each=500):
    """Write `count` files as links to a few, `each` in a folder, quickly."""
    sources = folder.parent / f"{folder.name} sources"
    sources.mkdir()
    for i, kind in enumerate(kinds):
        if kind == "broken":
            (sources / kind).write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
        else:
            tiny.film(sources / kind, i)
    for i in range(count):
        if i % each == 0:
            (folder / f"{i // each:03d}").mkdir(parents=True)
        os.link(sources / kinds[i % len(kinds)], folder / f"{i // each:03d}" / f"film {i:06d}.png")
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("films") / "archive", 23, each=10)


def expected(model, folder, batch_size=16):
    """The bytes of scores.csv, put together without any of the work on archives."""
    names = model.signal_names
    lines = [",".join(["path", "score", "alarm", *names, "reason"])]
    known = {}
    for path in sorted(folder.rglob("*.png")):
        inode = path.stat().st_ino
        if inode not in known:
            (known[inode],) = scoring.score_files(model, [path], batch_size=batch_size)
        score = known[inode]
        values = ["" if score.reason else repr(score.signals[name]) for name in names]
        first = ["", ""] if score.reason else [repr(score.score), str(int(score.alarm))]
        lines.append(",".join([str(path), *first, *values, score.reason]))
    return ("\n".join(lines) + "\n").encode()


def environment(rank=None):
    """The environment of a process, as torchrun sets it."""
    if rank is None:
        return tiny.ENVIRONMENT
    return {**tiny.ENVIRONMENT, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}


def start(model, data, output, *options, rank=None, launcher=()):
    command = [
        sys.executable,
        *launcher,
        "-m",
        "simsid",
        "score",
        model,
        data,
        "-o",
        output,
        "--device",
        "cpu",
        *options,
    ]
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(rank),
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
def test_twenty_thousand_films_with_two_kills(model, loaded, tmp_path):
    count, output, options = 20_000, tmp_path / "out", ("--batch-size", "64", "--pictures", "0")
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
    # In this order: the pipes hold what little it says.
    status, megabytes = peak(process)
    memory.append(megabytes)
    said = process.stdout.read()
    assert status == 1 and f"going on after {before} files that are done" in said
    assert "15000 of 20000 files scored, 5000 failed" in said
    assert (output / "scores.csv").read_bytes() == expected(loaded, many, 64)
    assert not (output / ".scoring").exists()
    # The measurement itself moves by some 3 MB. Holding the scores of the last start's 15,000 files takes 13.
    assert max(memory) - baseline < 8, (baseline, memory)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs /proc to find the processes of the launcher")
def test_two_processes_one_of_them_killed(model, loaded, tmp_path):
    films = fill(tmp_path / "films", 1200)
    reference = expected(loaded, films)
    output = tmp_path / "by hand"
    ranks = [start(model, films, output, "--pictures", "3", rank=rank) for rank in (0, 1)]
    wait_for(lambda: rows_of(output, 1, 2) > 100, ranks[1])
    ranks[1].kill()
    said = ranks[0].communicate()[0]
    assert ranks[0].returncode == 0 and said.endswith("rank 0 of 2: 600 files done; rank 1 still to come\n")
    ranks[1].communicate()
    done = rows_of(output, 1, 2)
    assert 100 < done < 600 and not (output / "scores.csv").exists()
    again = start(model, films, output, "--pictures", "3", rank=1)
    said = again.communicate()[0]
    assert again.returncode == 1 and f"rank 1 of 2: going on after {done} files" in said
    assert "900 of 1200 files scored, 300 failed" in said and f"scores: {output / 'scores.csv'}" in said
    assert (output / "scores.csv").read_bytes() == reference and (output / "report.html").exists()

    # The same with the real launcher, which ends the other rank when one is killed.
    output, launcher = tmp_path / "torchrun", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run = start(model, films, output, launcher=launcher)
    wait_for(lambda: min(rows_of(output, rank, 2) for rank in (0, 1)) > 50, run)
    children = pathlib.Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    (second,) = [pid for pid in children if b"\0RANK=1\0" in pathlib.Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second), signal.SIGKILL)
    run.communicate()
    assert run.returncode != 0 and not (output / "scores.csv").exists()
    done = sum(rows_of(output, rank, 2) for rank in (0, 1))
    assert 100 < done < 1200
    run = start(model, films, output, launcher=launcher)
    said = run.communicate()[0]
    assert (
        sum(int(line.split("going on after ")[1].split()[0]) for line in said.splitlines() if "going" in line) == done
    )
    assert "900 of 1200 files scored, 300 failed" in said
    assert (output / "scores.csv").read_bytes() == reference and not (output / ".scoring").exists()


KILLS = """
import os, pathlib, shutil, sys, time, torch, traceback
from simsid import archive, checkpoint, cli, report, runs, scoring
from simsid.distributed import ProcessGroup

folder, expected, which, *arguments = sys.argv[1:]
expected = pathlib.Path(expected).read_bytes()
ranks = [None] if which == "alone" else [0, 1]
torch.set_num_threads(1)

def start(rank, output, limit=None):
    '''Score in a fork, which dies like one that is killed at its `limit`-th step in the file system.'''
    pid = os.fork()
    if pid:
        return pid
    if rank is not None:
        os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    steps, scored, real = 0, 0, scoring.score_files

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
        # Processes take seconds to import PyTorch, forks do not: none shall have merged before the other is there.
        pathlib.Path(folder, f"{limit} {rank} is here").touch()
        while limit is None and not all(pathlib.Path(folder, f"None {other} is here").exists() for other in ranks):
            time.sleep(0.001)
        return real()

    # The page takes longer than all else; what matters here is that it is written, and when.
    report.write_report = lambda path, **_: checkpoint.write_file(path, b"page")
    scoring.score_files = counted
    ProcessGroup.from_environment = classmethod(together)
    sys.addaudithook(watch)
    try:
        cli.main([*arguments, "-o", output])
    except SystemExit as stop:
        pathlib.Path(folder, f"scored {rank}").write_text(str(scored))
        os._exit(stop.code)
    except BaseException:
        traceback.print_exc()
    os._exit(77)

def ended(pids):
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]

def rows(output, rank):
    path = pathlib.Path(output, ".scoring", f"shard-{rank or 0}-of-{len(ranks)}.jsonl")
    return path.read_bytes().count(b"\\n") if path.exists() else 0

# One process shows every step; of two, whose steps interleave anew each time, a part will do.
for limit in range(1, 1000, 1 if which == "alone" else 3):
    output = os.path.join(folder, f"{which} {limit}")
    died = ended([start(rank, output, limit) for rank in ranks])
    table, request = pathlib.Path(output, "scores.csv"), pathlib.Path(output, ".scoring", "request.json")
    assert not table.exists() or table.read_bytes() == expected, limit
    begun = request.exists()
    there = [rows(output, rank) if begun else 0 for rank in ranks]
    if 9 not in died:
        break
    if begun or not table.exists():
        for mark in pathlib.Path(folder).glob("None * is here"):
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
@pytest.mark.parametrize("which", ["alone", "two"])
def test_a_kill_before_any_step(model, loaded, films, tmp_path, which):
    (tmp_path / "expected").write_bytes(expected(loaded, films))
    (tmp_path / "kills.py").write_text(KILLS)
    options = ["--pictures", "1", "--device", "cpu", "--workers", "1"]
    done = subprocess.run(
        [
            sys.executable,
            tmp_path / "kills.py",
            tmp_path,
            tmp_path / "expected",
            which,
            "score",
            model,
            films,
            *options,
        ],
        env=tiny.ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert int(done.stdout.split("all of ")[1].split()[0]) > 15


def take_part(model, data, output, rank=None, stop=None, **options):
    """Score a rank's share up to `stop` files, and merge where all are through; returns the rows, or None before."""
    with Work(model, data, output, rank, **options) as work:
        assert work.begin()
        done = work.resume()
        for _ in itertools.islice(work.score(), None if stop is None else stop - done):
            done += 1
        if stop is not None:
            return None
        with work.finish() as missing:
            if missing:
                return None
            rows = []
            work.merge(rows.append)
            work.remove()
            return rows


def copy(films, folder):
    for path in films.rglob("*.png"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(path, folder / path.parent.name / path.name)
    return folder


def test_what_a_kill_or_a_power_failure_left_of_the_last_rows_is_scored_again(loaded, films, tmp_path):
    whole = take_part(loaded, films, tmp_path)
    assert len(whole) == 23
    take_part(loaded, films, tmp_path, stop=9)
    shard = tmp_path / ".scoring" / "shard-0-of-1.jsonl"
    rows = shard.read_bytes()
    lines = rows.splitlines(keepends=True)
    assert len(lines) == 9
    for left, done in (
        (rows[:-1], 8),
        (rows[: -len(lines[-1])], 8),
        (rows[: -len(lines[-1]) - 1], 7),
        (rows[: len(lines[0]) + 1], 1),
        (b"", 0),
        (rows + b"\0" * 4096, 9),
        (lines[0] + b"\0" * 40 + b"\n" + lines[2], 1),
        (lines[0] + b"7\n" + lines[2], 1),
        (lines[0] + b"\xff" * (1 << 17), 1),
    ):
        shard.write_bytes(left)
        with Work(loaded, films, tmp_path) as work:
            assert work.begin() and work.resume() == done and shard.read_bytes() == b"".join(lines[:done])
    shard.write_bytes(rows[:-1])
    assert take_part(loaded, films, tmp_path) == whole


def test_a_list_that_has_changed_is_refused_unless_it_only_grew(loaded, films, tmp_path):
    data, output = copy(films, tmp_path / "data"), tmp_path / "out"
    output.mkdir()
    take_part(loaded, data, output, stop=13)
    before = (output / ".scoring" / "shard-0-of-1.jsonl").read_bytes()
    new, gone = data / "000" / "film 000003b.png", data / "001" / "film 000010.png"
    tiny.film(new)
    with pytest.raises(ArchiveError, match=f"{data} has changed .*{new} is found where .*4.png was scored; undo"):
        take_part(loaded, data, output)
    new.unlink()
    gone.rename(tmp_path / "away.png")
    with pytest.raises(
        ArchiveError, match=rf"film 000011.png is found where {gone} was .* or delete {output}/.scoring"
    ):
        take_part(loaded, data, output)
    for path in data.rglob("film 00001*.png"):
        path.rename(tmp_path / path.name)
    for path in data.rglob("film 00002*.png"):
        path.rename(tmp_path / path.name)
    with pytest.raises(ArchiveError, match=f"the list ends where {gone} was scored"):
        take_part(loaded, data, output)
    assert (output / ".scoring" / "shard-0-of-1.jsonl").read_bytes() == before
    (tmp_path / "away.png").rename(gone)
    for path in tmp_path.glob("film *.png"):
        path.rename(data / f"00{path.name[9]}" / path.name)
    tiny.film(data / "003" / "new.png")
    rows = take_part(loaded, data, output)
    assert [row[0] for row in rows] == [str(path) for path in sorted(data.rglob("*.png"))] and len(rows) == 24


def test_ranks_that_saw_different_lists_do_not_merge(loaded, films, tmp_path):
    data, output = copy(films, tmp_path / "data"), tmp_path / "out"
    output.mkdir()
    assert take_part(loaded, data, output, TWO[0]) is None
    tiny.film(data / "003" / "new.png")
    with pytest.raises(ArchiveError, match="changed while it was scored: ranks 0 saw other files than rank 1; start"):
        take_part(loaded, data, output, TWO[1])
    assert take_part(loaded, data, output, TWO[1]) is None
    rows = take_part(loaded, data, output, TWO[0])
    assert [row[0] for row in rows] == [str(path) for path in sorted(data.rglob("*.png"))]
    assert rows == take_part(loaded, data, output)


def test_more_ranks_than_files(loaded, films, tmp_path):
    film = sorted(films.rglob("*.png"))[0]
    assert take_part(loaded, film, tmp_path, ProcessGroup(2, 3)) is None
    assert take_part(loaded, film, tmp_path, ProcessGroup(0, 3)) is None
    (row,) = take_part(loaded, film, tmp_path, ProcessGroup(1, 3))
    assert row[0] == str(film) and take_part(loaded, film, tmp_path) == [row]


def test_another_request_than_the_unfinished_one_is_refused(loaded, films, tmp_path):
    take_part(loaded, films, tmp_path, stop=5)
    before = {path: path.read_bytes() for path in (tmp_path / ".scoring").iterdir()}
    other = tiny.calibrated(tmp_path / "other", seed=1, width=2, heads=1)
    for model, data, rank, options, message in (
        (other, films, None, {}, "begun with another model"),
        (loaded, films / "000", None, {}, "begun with other data"),
        (loaded, films, TWO[0], {}, "begun with another number of processes"),
        (
            loaded,
            films,
            None,
            {"batch_size": 3, "false_alarm_rate": 0.5},
            "another false alarm rate, another batch size",
        ),
    ):
        with pytest.raises(
            ArchiveError, match=f"{tmp_path} holds an unfinished scoring of {films}.*{message}"
        ) as refused:
            take_part(model, data, tmp_path, rank, **options)
        assert "the same again" in str(refused.value) and "-o" in str(refused.value) and "delete" in str(refused.value)
    assert {path: path.read_bytes() for path in (tmp_path / ".scoring").iterdir()} == before
    assert len(take_part(loaded, films, tmp_path)) == 23


def test_the_same_model_is_the_same_request_wherever_it_lies(model, loaded, films, tmp_path):
    take_part(loaded, films, tmp_path, stop=5)
    loaded.save(tmp_path / "moved")
    moved = Model.load(tmp_path / "moved")
    assert len(take_part(moved, films, tmp_path)) == 23
    take_part(loaded, films, tmp_path, stop=5)
    moved.calibrate(tiny.images(8, 5))
    with pytest.raises(ArchiveError, match="another model"):
        take_part(moved, films, tmp_path)


def test_a_second_start_of_the_same_rank_is_refused(loaded, films, tmp_path):
    with Work(loaded, films, tmp_path, TWO[0]) as work:
        assert work.begin()
        with pytest.raises(ArchiveError, match="in use by another process that scores into it as rank 0 of 2"):
            Work(loaded, films, tmp_path, TWO[0]).begin()
        with Work(loaded, films, tmp_path, TWO[1]) as other:
            assert other.begin()
    with Work(loaded, films, tmp_path, TWO[0]) as work:
        assert work.begin()

    output = tmp_path / "alone"
    output.mkdir()
    with Work(loaded, films, output) as work:
        work.begin()
        work.resume()
        assert len(list(work.score())) == 23
        with work.finish(), pytest.raises(ArchiveError, match=r"in use by another process that scores into it$"):
            Work(loaded, films, output).begin()


def test_a_rank_that_comes_when_all_is_merged_begins_nothing(loaded, films, tmp_path):
    for rank in TWO:
        with Work(loaded, films, tmp_path, rank, superseded=lambda: True) as work:
            assert not work.begin()
    assert not (tmp_path / ".scoring").exists()
    with Work(loaded, films, tmp_path, superseded=lambda: True) as work:
        assert work.begin()


def test_a_shard_damaged_before_the_merge_is_mended_by_the_next_start(loaded, films, tmp_path):
    whole = take_part(loaded, films, tmp_path)
    assert take_part(loaded, films, tmp_path, TWO[0]) is None
    shard = tmp_path / ".scoring" / "shard-0-of-2.jsonl"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ArchiveError, match=f"{shard} was damaged after it was written; start the same command again"):
        take_part(loaded, films, tmp_path, TWO[1])
    assert take_part(loaded, films, tmp_path, TWO[0]) == whole


def test_memory_does_not_grow_with_a_list(loaded, tmp_path):
    """Every object counted, where the measurement of a process has its noise: the files of these lists are missing."""
    peaks = []
    for count in (1_000, 1_000, 20_000):
        with open(tmp_path / "list.csv", "w") as file:
            file.write("path\n")
            file.writelines(f"a folder with a long name/another one/film {i:06d}.png\n" for i in range(count))
        take_part(loaded, tmp_path / "list.csv", tmp_path, stop=count // 2)
        tracemalloc.start()
        with Work(loaded, tmp_path / "list.csv", tmp_path) as work:
            assert work.begin() and work.resume() == count // 2
            assert sum(1 for _ in work.score()) == count // 2
            with work.finish():
                summary = work.merge(lambda row: None, 24)
                work.remove()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert (summary.scored, summary.failed, summary.top) == (0, count, [])
    assert peaks[2] - peaks[1] < 200_000, peaks


def test_the_request_says_what_is_scored(loaded, films, tmp_path):
    take_part(loaded, films, tmp_path, stop=1, batch_size=2)
    request = json.loads((tmp_path / ".scoring" / "request.json").read_text())
    assert (
        request.pop("model")
        and request.pop("version")
        and request
        == {
            "data": str(films),
            "false_alarm_rate": 0.05,
            "batch_size": 2,
            "ranks": 1,
            "device": "cpu",
        }
    )
