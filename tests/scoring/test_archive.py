"""`score_archive`: resumption, shards, merging, refusals, pictures, and memory that does not grow with the files."""

import errno
import gc
import json
import os
import threading
import time
import tracemalloc

import numpy as np
import pytest
import tiny
from archives import TWO, expected_table, rows, score

from simsid import Model
from simsid.distributed import ProcessGroup
from simsid.errors import ArchiveError, CalibrationError, InputError
from simsid.scoring import archive, score_archive


def copy(films, folder):
    for path in films.rglob("*.png"):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        os.link(path, folder / path.parent.name / path.name)
    return folder


def paths(output):
    return [row["path"] for row in tiny.rows(output / "scores.csv")]


def test_the_summary_counts_and_the_table_has_every_file(loaded, films, tmp_path):
    summary = score(loaded, films, tmp_path / "new" / "out", pictures=4)
    assert (summary.state, summary.done, summary.resumed) == ("merged", 23, 0)
    assert (summary.scored, summary.failed, summary.missing, summary.shift) == (18, 5, (), None)
    table = tmp_path / "new" / "out" / "scores.csv"
    assert table.read_bytes() == expected_table(loaded, films)
    flagged = [row["flagged"] for row in tiny.rows(table)]
    assert summary.flagged == flagged.count("1") and flagged.count("") == 5
    assert sorted(path.name for path in table.parent.iterdir()) == [".scoring.lock", "scores.csv"]


def test_the_highest_scores_come_ascending_with_their_images(loaded, tmp_path):
    files = tiny.films(tmp_path / "data", 7)
    summary = score(loaded, tmp_path / "data", tmp_path / "out", pictures=3, batch_size=2, signal="residual")
    table = sorted(tiny.rows(tmp_path / "out" / "scores.csv"), key=lambda row: float(row["residual"]))
    assert [top.path for top in summary.top] == [row["path"] for row in table[-3:]]
    for top in summary.top:
        assert top.image.shape == (48, 48) and top.image.dtype == np.float32
        own = loaded.signals(np.ascontiguousarray(top.image)[None, None], batch_size=2)
        assert own["residual"][0] == top.signals["residual"]
    assert {top.path for top in summary.top} <= {str(path) for path in files}


def test_ranks_return_the_pictures_of_all_shards_without_reading_again(loaded, tmp_path, monkeypatch):
    tiny.films(tmp_path / "data", 7)
    alone = score(loaded, tmp_path / "data", tmp_path / "alone", pictures=4)
    monkeypatch.setattr(archive, "load_images", lambda *_, **__: pytest.fail("an image was read again"))
    assert score(loaded, tmp_path / "data", tmp_path / "two", TWO[1], pictures=4).state == "waiting"
    summary = score(loaded, tmp_path / "data", tmp_path / "two", TWO[0], pictures=4)
    assert [top.path for top in summary.top] == [top.path for top in alone.top]
    assert all(np.array_equal(one.image, other.image) for one, other in zip(summary.top, alone.top))
    assert rows(tmp_path / "two") == rows(tmp_path / "alone")


def test_a_picture_whose_file_is_gone_is_left_out_with_a_warning(loaded, tmp_path):
    (path,) = tiny.films(tmp_path / "data", 1)
    score(loaded, tmp_path / "data", tmp_path / "out", stop=1)
    content = path.read_bytes()
    path.write_bytes(b"")
    with pytest.warns(UserWarning, match=r"some of the highest scores have no picture: .*film 0, 0.png"):
        summary = score(loaded, tmp_path / "data", tmp_path / "out", pictures=1)
    assert [top.image for top in summary.top] == [None] and summary.scored == 1 and content


def test_a_signal_that_is_not_finite_is_a_failed_row_with_its_reason(loaded, tmp_path, monkeypatch):
    files = tiny.films(tmp_path / "data", 5)
    frozen = type(loaded.freeze())
    real = frozen.launch_signals

    def broken(self, images, names=None, **options):
        read = real(self, images, names, **options)

        def values():
            found = read()
            found["residual"][1], found["memory_distance"][3] = np.nan, np.inf
            return found

        return values

    monkeypatch.setattr(frozen, "launch_signals", broken)
    summary = score(loaded, tmp_path / "data", tmp_path / "out", pictures=5)
    assert (summary.scored, summary.failed, len(summary.top)) == (3, 2, 3)
    table = tiny.rows(tmp_path / "out" / "scores.csv")
    reasons = ["", "the signal residual is nan", "", "the signal memory_distance is inf", ""]
    assert [row["reason"] for row in table] == reasons
    for row, path in zip(table, files):
        assert row["path"] == str(path) and (row["flagged"] == "") == (row["score"] == "") == bool(row["reason"])


def test_incomplete_last_rows_are_scored_again(loaded, films, tmp_path):
    """What a kill or a power failure leaves: rows cut short, zeros, other bytes."""
    score(loaded, films, tmp_path)
    whole = rows(tmp_path)
    assert len(whole) == 23
    score(loaded, films, tmp_path, stop=9)
    shard = tmp_path / ".scoring" / "shard-0-of-1.jsonl"
    content = shard.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 9
    for left, done in (
        (content[:-1], 8),
        (content[: -len(lines[-1])], 8),
        (content[: -len(lines[-1]) - 1], 7),
        (content[: len(lines[0]) + 1], 1),
        (b"", 0),
        (content + b"\0" * 4096, 9),
        (lines[0] + b"\0" * 40 + b"\n" + lines[2], 1),
        (lines[0] + b"7\n" + lines[2], 1),
        (lines[0] + b"\xff" * (1 << 17), 1),
    ):
        shard.write_bytes(left)
        summary = score(loaded, films, tmp_path, stop=0)
        assert (summary.state, summary.resumed, summary.done) == ("interrupted", done, done)
        assert shard.read_bytes() == b"".join(lines[:done])
    shard.write_bytes(content[:-1])
    assert score(loaded, films, tmp_path).resumed == 8
    assert rows(tmp_path) == whole


def test_a_changed_list_is_refused_unless_it_only_grew(loaded, films, tmp_path):
    data, output = copy(films, tmp_path / "data"), tmp_path / "out"
    score(loaded, data, output, stop=13)
    before = (output / ".scoring" / "shard-0-of-1.jsonl").read_bytes()
    new, gone = data / "000" / "film 000003b.png", data / "001" / "film 000010.png"
    tiny.film(new)
    with pytest.raises(ArchiveError, match=f"{data} has changed .*{new} is found where .*4.png was scored; undo"):
        score(loaded, data, output)
    new.unlink()
    gone.rename(tmp_path / "away.png")
    message = rf"film 000011.png is found where {gone} was .* or delete {output}/.scoring"
    with pytest.raises(ArchiveError, match=message):
        score(loaded, data, output)
    for pattern in ("film 00001*.png", "film 00002*.png"):
        for path in data.rglob(pattern):
            path.rename(tmp_path / path.name)
    with pytest.raises(ArchiveError, match=f"the list ends where {gone} was scored"):
        score(loaded, data, output)
    assert (output / ".scoring" / "shard-0-of-1.jsonl").read_bytes() == before
    (tmp_path / "away.png").rename(gone)
    for path in tmp_path.glob("film *.png"):
        path.rename(data / f"00{path.name[9]}" / path.name)
    tiny.film(data / "003" / "new.png")
    assert score(loaded, data, output).resumed == 13
    assert paths(output) == [str(path) for path in sorted(data.rglob("*.png"))] and len(paths(output)) == 24


def test_ranks_that_saw_different_lists_do_not_merge(loaded, films, tmp_path):
    data, output = copy(films, tmp_path / "data"), tmp_path / "out"
    assert score(loaded, data, output, TWO[0]).missing == (1,)
    tiny.film(data / "003" / "new.png")
    with pytest.raises(ArchiveError, match="changed while it was scored: ranks 0 saw other files than rank 1; start"):
        score(loaded, data, output, TWO[1])
    assert score(loaded, data, output, TWO[1]).state == "waiting"
    assert score(loaded, data, output, TWO[0]).state == "merged"
    assert paths(output) == [str(path) for path in sorted(data.rglob("*.png"))]
    merged = rows(output)
    score(loaded, data, output)
    assert rows(output) == merged


def test_more_ranks_than_files_merge(loaded, films, tmp_path):
    image = sorted(films.rglob("*.png"))[0]
    assert score(loaded, image, tmp_path, ProcessGroup(2, 3)).missing == (0, 1)
    assert score(loaded, image, tmp_path, ProcessGroup(0, 3)).missing == (1,)
    assert score(loaded, image, tmp_path, ProcessGroup(1, 3)).scored == 1
    assert paths(tmp_path) == [str(image)]


def test_another_request_than_the_unfinished_one_is_refused(loaded, films, tmp_path):
    score(loaded, films, tmp_path, stop=5)
    before = {path: path.read_bytes() for path in (tmp_path / ".scoring").iterdir()}
    other = tiny.calibrated(tmp_path / "other", seed=1, width=2, heads=1)
    for model, data, group, options, message in (
        (other, films, None, {}, "begun with another model"),
        (loaded, films / "000", None, {}, "begun with other data"),
        (loaded, films, TWO[0], {}, "begun with another number of processes"),
        (loaded, films, None, {"signal": "residual"}, "begun with another signal"),
        (loaded, films, None, {"exclude": "002"}, "begun with other patterns to exclude"),
        (
            loaded,
            films,
            None,
            {"batch_size": 3, "false_positive_rate": 0.5},
            "another false positive rate, another batch size",
        ),
    ):
        message = f"{tmp_path} holds an unfinished scoring of {films}.*{message}.*repeat its options.*-o.*delete"
        with pytest.raises(ArchiveError, match=message):
            score(model, data, tmp_path, group, **options)
    assert {path: path.read_bytes() for path in (tmp_path / ".scoring").iterdir()} == before
    assert score(loaded, films, tmp_path).scored == 18


def test_the_same_model_resumes_from_another_folder_unless_calibrated_again(loaded, films, tmp_path):
    score(loaded, films, tmp_path, stop=5)
    loaded.save(tmp_path / "moved")
    moved = Model.load(tmp_path / "moved")
    assert score(moved, films, tmp_path).resumed == 5
    score(loaded, films, tmp_path, stop=5)
    moved.calibrate(tiny.images(8, 5))
    with pytest.raises(ArchiveError, match="another model"):
        score(moved, films, tmp_path)


def test_a_second_start_of_the_same_rank_is_refused_while_the_first_runs(loaded, films, tmp_path, monkeypatch):
    real = archive.score_files

    def nested(*arguments, **options):
        monkeypatch.setattr(archive, "score_files", real)
        with pytest.raises(ArchiveError, match="in use by another process that scores into it as rank 0 of 2"):
            score(loaded, films, tmp_path, TWO[0])
        # The other rank has a shard of its own.
        assert score(loaded, films, tmp_path, TWO[1], stop=0).state == "interrupted"
        yield from real(*arguments, **options)

    monkeypatch.setattr(archive, "score_files", nested)
    assert score_archive(loaded, films, tmp_path, group=TWO[0], workers=1).state == "waiting"
    assert score(loaded, films, tmp_path, TWO[1]).state == "merged"


def test_a_second_process_is_refused_while_the_first_merges(loaded, films, tmp_path):
    def again(_):
        with pytest.raises(ArchiveError, match=r"in use by another process that scores into it$"):
            score(loaded, films, tmp_path)

    assert score(loaded, films, tmp_path, report=again).state == "merged"


def test_a_rank_that_starts_after_the_merge_begins_nothing(loaded, films, tmp_path):
    before = archive.table_version(tmp_path)
    assert before is None and score(loaded, films, tmp_path).state == "merged"
    for group in TWO:
        assert score(loaded, films, tmp_path, group, before=before).state == "already merged"
    assert not (tmp_path / ".scoring").exists()
    # A single process, or one that was started when the table was there already, scores again.
    assert score(loaded, films, tmp_path, before=before).done == 23
    assert score(loaded, films, tmp_path, TWO[0]).state == "waiting"


def test_a_rank_that_starts_during_the_merge_begins_nothing(loaded, films, tmp_path, monkeypatch):
    """Both shards were finished by an earlier start; this rank waits for the lock before the table is replaced."""
    assert score(loaded, films, tmp_path, TWO[1]).state == "waiting"
    real, states = archive.columns, []
    late = threading.Thread(target=lambda: states.append(score(loaded, films, tmp_path, TWO[1], before=None).state))

    def columns(names):
        late.start()
        time.sleep(0.3)
        return real(names)

    monkeypatch.setattr(archive, "columns", columns)
    assert score(loaded, films, tmp_path, TWO[0], before=None).state == "merged"
    late.join()
    assert states == ["already merged"] and not (tmp_path / ".scoring").exists()


def test_a_report_that_fails_is_made_by_the_next_start_from_the_same_scores(loaded, films, tmp_path):
    def fail(summary):
        assert (tmp_path / "scores.csv").exists() and len(summary.top) == 2
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        score(loaded, films, tmp_path, pictures=2, report=fail)
    seen = []
    summary = score(loaded, films, tmp_path, pictures=2, report=seen.append)
    assert summary.resumed == summary.done == 23 and seen[0].top == summary.top and len(summary.top) == 2
    assert not (tmp_path / ".scoring").exists()


def test_a_shard_damaged_before_the_merge_is_scored_again_by_the_next_start(loaded, films, tmp_path):
    score(loaded, films, tmp_path)
    whole = rows(tmp_path)
    assert score(loaded, films, tmp_path, TWO[0]).state == "waiting"
    shard = tmp_path / ".scoring" / "shard-0-of-2.jsonl"
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(ArchiveError, match=f"{shard} was damaged after it was written; start the same command again"):
        score(loaded, films, tmp_path, TWO[1])
    assert score(loaded, films, tmp_path, TWO[0]).state == "merged"
    assert rows(tmp_path) == whole


@pytest.mark.parametrize(("kind", "few", "many"), [("missing", 200, 3000), ("image", 100, 600)])
def test_memory_does_not_grow_with_the_number_of_files(loaded, tmp_path, monkeypatch, kind, few, many):
    """Counts Python objects and NumPy arrays after the last score and after the merge; none is kept for each file."""
    image, real, sizes = tiny.film(tmp_path / "image.png"), archive.score_files, []

    def measure(*_):
        gc.collect()
        sizes.append(tracemalloc.get_traced_memory()[0])

    def measured(*arguments, **options):
        yield from real(*arguments, **options)
        measure()

    for count in (few, few, many):
        listed = [[image if kind == "image" else f"a folder with a long name/film {i:06d}.png"] for i in range(count)]
        tiny.write_list(tmp_path / "list.csv", ["path"], listed)
        score(loaded, tmp_path / "list.csv", tmp_path, stop=count // 2, pictures=24)
        monkeypatch.setattr(archive, "score_files", measured)
        tracemalloc.start()
        summary = score(loaded, tmp_path / "list.csv", tmp_path, pictures=24, report=measure)
        tracemalloc.stop()
        monkeypatch.setattr(archive, "score_files", real)
        assert summary.resumed == count // 2
        assert (summary.scored, summary.failed) == ((count, 0) if kind == "image" else (0, count))
    # A path of these is 100 bytes, a score 1,000: a list of those of this call's files takes 250,000 at least.
    assert len(sizes) == 6 and max(sizes[4:]) - max(sizes[:4]) < 100_000, sizes


def test_the_request_says_what_is_scored(loaded, films, tmp_path):
    score(loaded, films, tmp_path, stop=1, batch_size=2, exclude=["002"])
    request = json.loads((tmp_path / ".scoring" / "request.json").read_text())
    assert request.pop("model") and request.pop("version")
    assert request == {
        "data": str(films),
        "signal": "standardized_residual",
        "false_positive_rate": 0.05,
        "batch_size": 2,
        "exclude": ["002"],
        "ranks": 1,
        "device": "cpu",
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pictures": -1}, "pictures must be at least 0, got -1"),
        ({"signal": "pixel_knn"}, "signal must be one of discriminator_per_image, .*, got 'pixel_knn'"),
        ({"false_positive_rate": 2}, "false_positive_rate must lie strictly between 0 and 1, got 2"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"exclude": "*.png"}, "has no image"),
    ],
)
def test_wrong_options_are_named_before_anything_is_written(loaded, films, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        score(loaded, films, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_model_without_calibration_is_refused(films, tmp_path):
    with pytest.raises(CalibrationError, match="not calibrated"):
        score(tiny.model(), films, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_full_device_is_named_with_how_to_resume(loaded, tmp_path, monkeypatch):
    tiny.films(tmp_path / "data", 3)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(archive, "write_row", full)
        with pytest.raises(
            ArchiveError, match=r"no space is left on the device of .*out: free some and start the same"
        ):
            score(loaded, tmp_path / "data", tmp_path / "out")
    assert score(loaded, tmp_path / "data", tmp_path / "out").scored == 3
