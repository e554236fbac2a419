"""Run folders: one writer at a time, a manifest of every file, atomic writes."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import tiny
import torch

from simsid import checkpoint, data
from simsid.errors import RunError
from simsid.training.run_folder import WRITTEN, RunFolder, versions

HOLD = """
import sys, time
from filelock import FileLock

lock = FileLock(sys.argv[1])
lock.acquire()
print("held", flush=True)
time.sleep(99)
"""
"""The lock of `RunFolder` without its imports, which take seconds."""


def test_second_writer_is_refused(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        with pytest.raises(RunError, match=r"is in use by another process that writes into it$"):
            RunFolder(tmp_path / "run")
        assert not folder.started and not folder.taken
    with RunFolder(tmp_path / "run"):
        pass


def test_lock_of_a_killed_process_is_free(tmp_path):
    RunFolder(tmp_path / "run").close()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=tiny.ENVIRONMENT) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match="in use"):
            RunFolder(tmp_path / "run")
        holder.kill()
        holder.wait()
        with RunFolder(tmp_path / "run"):
            pass


def test_file_instead_of_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="must be a folder, got the file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(OSError, match="file"):
        RunFolder(tmp_path / "file" / "below")
    assert (tmp_path / "file").read_text() == "mine"


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    unfinished = [tmp_path / f".{name.replace('*', '0123')}.x7_k2" for name in WRITTEN]
    others = [tmp_path / name for name in (".notes", "run.json", "mine.csv", ".DS_Store")]
    for path in (*unfinished, *others):
        path.write_text("{}")
    with RunFolder(tmp_path):
        assert not [path for path in unfinished if path.exists()]
        assert all(path.exists() for path in others)


def test_manifest_names_every_image_with_the_hash_of_its_file(tmp_path):
    film = tiny.film(tmp_path / 'a, "b"' / "film 1.png")
    odd = tiny.film(os.path.join(os.fsencode(tmp_path), b"caf\xe9.png").decode("utf-8", "surrogateescape"), 1)
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (film, odd)]
    train = data.load_images([data.Record(str(film), "train", 0, "NORMAL", "p1")], 48)
    val = data.load_images([data.Record(str(odd), "val", 1, "PNEUMONIA")], 48)
    digits = data.ImageSet(torch.zeros(1, 1, 48, 48), (data.Record("digits/train/00000", "train", None),))
    # The manifest must not read the files again.
    film.unlink(), odd.unlink()
    with RunFolder(tmp_path / "run") as folder:
        folder.write_manifest(train, val, None, digits)
    rows = tiny.rows(tmp_path / "run" / "manifest.csv")
    assert list(rows[0]) == ["path", "sha256", "split", "label", "finding", "patient"]
    assert [row["path"] for row in rows] == [str(film), str(odd), "digits/train/00000"]
    assert [row["sha256"] for row in rows] == [*hashes, ""]
    assert [row["split"] for row in rows] == ["train", "val", "train"]
    assert [row["label"] for row in rows] == ["0", "1", ""]
    assert [row["finding"] for row in rows] == ["NORMAL", "PNEUMONIA", ""]
    assert [row["patient"] for row in rows] == ["p1", "", ""]


def test_request_and_metrics_round_trip(tmp_path):
    with RunFolder(tmp_path / "run") as folder:
        folder.write_request({"command": "train"})
        assert checkpoint.read_json(folder.path / "run.json") == {"command": "train", "versions": versions()}
        folder.write_metrics([{"epoch": 0}])
        folder.append_metrics({"epoch": 1})
        lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line) for line in lines] == [{"epoch": 0}, {"epoch": 1}]
        folder.write_metrics([{"epoch": 0}])
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"epoch": 0}\n'
