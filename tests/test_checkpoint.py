"""Folders of tensors: whole at every moment, and nothing in them is trusted or executed."""

import builtins
import hashlib
import json
import os
import pathlib
import pickle

import pytest
import torch

from simsid import checkpoint
from simsid.errors import CheckpointError

OLD, NEW = {"weight": torch.arange(6.0).view(2, 3)}, {"weight": torch.ones(2, 3), "step": torch.tensor(7)}


def same(found, wanted) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path):
    tensors = {
        "float": torch.randn(3, 4),
        "half": torch.randn(3).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "step": torch.tensor(5),
        "turned": torch.randn(4, 3).T,
        "last": torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
        "gradient": torch.nn.Parameter(torch.randn(2)),
    }
    checkpoint.write(tmp_path / "deep" / "folder", "model", tensors, {"kind": "test", "value": 0.1})
    found, document = checkpoint.read(tmp_path / "deep" / "folder", "model")
    assert same(found, tensors) and all(found[name].dtype == tensors[name].dtype for name in tensors)
    assert document["kind"] == "test" and document["value"] == 0.1


def test_writing_over_an_older_pair_leaves_nothing_of_it(tmp_path):
    checkpoint.write(tmp_path, "model", OLD, {"n": 1})
    checkpoint.write(tmp_path, "last", OLD, {})
    (tmp_path / "model-backup.safetensors").write_bytes(b"mine")
    (tmp_path / "notes.json").write_text("{}")
    checkpoint.write(tmp_path, "model", NEW, {"n": 2})
    found, document = checkpoint.read(tmp_path, "model")
    assert same(found, NEW) and document["n"] == 2
    assert same(checkpoint.read(tmp_path, "last")[0], OLD), "another pair of the folder is left alone"
    kept = [name for name in names(tmp_path) if not name.startswith("last")]
    assert kept == [document["tensors"]["file"], "model-backup.safetensors", "model.json", "notes.json"]


def test_writing_the_same_again(tmp_path):
    for n in range(2):
        checkpoint.write(tmp_path, "model", OLD, {"n": n})
    assert same(checkpoint.read(tmp_path, "model")[0], OLD) and len(names(tmp_path)) == 2


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        checkpoint.write_file(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


class Crash(Exception):
    pass


def crash_at(monkeypatch, step: int, clean: bool) -> list[str]:
    """Fail at the step-th of the calls that change the disk; `clean=False` runs no clean-up, as a kill would."""
    calls = []

    def counted(name, real):
        def call(*args, **kwargs):
            calls.append(name)
            if len(calls) > step:
                raise Crash(name)
            return real(*args, **kwargs)

        return call

    class Half:
        """A file whose write fails in the middle."""

        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, content):
            calls.append("write")
            if len(calls) > step:
                self.file.write(content[: len(content) // 2])
                raise Crash("write")
            self.file.write(content)

        def __getattr__(self, name):
            return getattr(self.file, name)

    real_open = builtins.open
    monkeypatch.setattr(checkpoint, "open", lambda *args: Half(real_open(*args)), raising=False)
    for name in ("fsync", "replace"):
        monkeypatch.setattr(os, name, counted(name, getattr(os, name)))
    if not clean:

        def refuse(*_, **__):
            raise OSError("killed")

        monkeypatch.setattr(os, "unlink", refuse)
        monkeypatch.setattr(pathlib.Path, "unlink", refuse)
    return calls


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_whole_at_every_moment(tmp_path, before, clean):
    steps = 0
    while True:
        folder = tmp_path / str(steps)
        if before:
            checkpoint.write(folder, "model", OLD, {"n": 1})
        with pytest.MonkeyPatch.context() as patch:
            calls = crash_at(patch, steps, clean)
            try:
                checkpoint.write(folder, "model", NEW, {"n": 2})
                finished = True
            except Crash:
                finished = False
        replaced = calls[: steps if not finished else None].count("replace") == 2
        if replaced or before:
            found, document = checkpoint.read(folder, "model")
            assert (document["n"], same(found, NEW if replaced else OLD)) == (2 if replaced else 1, True)
        else:
            with pytest.raises(CheckpointError, match=r"model.json does not exist"):
                checkpoint.read(folder, "model")
        # What was left lying about does no harm, and the next write takes it away.
        checkpoint.write(folder, "model", OLD, {"n": 3})
        assert same(checkpoint.read(folder, "model")[0], OLD) and len(names(folder)) == 2
        if finished:
            break
        steps += 1
    assert steps == 8 and calls == ["write", "fsync", "replace", "fsync"] * 2, "synced before and after each rename"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_killed_for_real(tmp_path):
    """The process ends between the two files, with no clean-up of any kind."""
    checkpoint.write(tmp_path, "model", OLD, {"n": 1})
    child = os.fork()
    if not child:
        checkpoint.write_json = lambda *_: os._exit(9)
        checkpoint.write(tmp_path, "model", {"weight": torch.zeros(9)}, {"n": 2})
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(names(tmp_path)) == 3
    found, document = checkpoint.read(tmp_path, "model")
    assert same(found, OLD) and document["n"] == 1


def test_a_reader_meets_a_writer(tmp_path, monkeypatch):
    """The pair is replaced after the document is read and before its tensors are."""
    checkpoint.write(tmp_path, "model", OLD, {"n": 1})
    real, reads = checkpoint.read_json, []

    def read_json(path):
        document = real(path)
        reads.append(document["n"])
        if len(reads) == 1:
            checkpoint.write(tmp_path, "model", NEW, {"n": 2})
        return document

    monkeypatch.setattr(checkpoint, "read_json", read_json)
    found, document = checkpoint.read(tmp_path, "model")
    assert same(found, NEW) and document["n"] == 2 and reads == [1, 2]


def edit(folder, **changes):
    document = json.loads((folder / "model.json").read_text())
    (folder / "model.json").write_text(json.dumps(document | changes))


def tensor_file(folder) -> pathlib.Path:
    return next(folder.glob("model-*.safetensors"))


def swap(folder, content: bytes) -> None:
    """Put `content` in place of the tensors, with the right hash."""
    tensor_file(folder).write_bytes(content)
    file = tensor_file(folder).name
    edit(folder, tensors={"file": file, "sha256": hashlib.sha256(content).hexdigest()})


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "append"])
def test_damaged_tensors(tmp_path, damage):
    checkpoint.write(tmp_path, "model", OLD, {})
    content = bytearray(tensor_file(tmp_path).read_bytes())
    if damage == "flip":
        content[-3] ^= 1
    damaged = {"flip": content, "truncate": content[:-4], "empty": b"", "append": content + b"x"}[damage]
    tensor_file(tmp_path).write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"model-\w+.safetensors is damaged: its content does not match the hash"):
        checkpoint.read(tmp_path, "model")


def test_missing_files(tmp_path):
    with pytest.raises(CheckpointError, match=r"model.json does not exist"):
        checkpoint.read(tmp_path, "model")
    with pytest.raises(CheckpointError, match=r"model.json does not exist"):
        checkpoint.read(tmp_path / "nowhere", "model")
    checkpoint.write(tmp_path, "model", OLD, {})
    tensor_file(tmp_path).unlink()
    with pytest.raises(CheckpointError, match=r"model-\w+.safetensors cannot be read: No such file"):
        checkpoint.read(tmp_path, "model")
    (tmp_path / "model.json").unlink()
    (tmp_path / "model.json").mkdir()
    with pytest.raises(CheckpointError, match=r"model.json cannot be read: Is a directory"):
        checkpoint.read(tmp_path, "model")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not a JSON document"),
        (b"{", "is not a JSON document"),
        (b"\xff\xfe{}", "is not a JSON document"),
        (b"[" * 100_000, "is not a JSON document"),
        (b"[]", "must hold a JSON object, got list"),
        (b"{}", "must be of format 1, got None"),
        (b'{"format": 2}', "must be of format 1, got 2"),
        (b'{"format": 1}', "must name a file model-<hash>.safetensors beside it, got None"),
        (b'{"format": 1, "tensors": "x"}', "must name a file .*, got None"),
        (b'{"format": 1, "tensors": {"file": 3}}', "must name a file .*, got 3"),
    ],
)
def test_foreign_documents(tmp_path, text, message):
    (tmp_path / "model.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=f"model.json {message}"):
        checkpoint.read(tmp_path, "model")


@pytest.mark.parametrize(
    "place", ["../outside", "/absolute", "sub/inside", "..", ".", "", "a\0b", "model.json", "..\\x"]
)
def test_tensors_lie_beside_their_document(tmp_path, place):
    folder = tmp_path / "folder"
    checkpoint.write(folder, "model", OLD, {})
    content = tensor_file(folder).read_bytes()
    (folder / "sub").mkdir()
    for path in (tmp_path / "outside", folder / "sub" / "inside", tmp_path / "absolute"):
        path.write_bytes(content)
    place = str(tmp_path / "absolute") if place == "/absolute" else place
    edit(folder, tensors={"file": place, "sha256": hashlib.sha256(content).hexdigest()})
    with pytest.raises(CheckpointError, match=r"must name a file model-<hash>.safetensors beside it, got "):
        checkpoint.read(folder, "model")


class Malicious:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_is_refused(tmp_path):
    checkpoint.write(tmp_path / "model", "model", OLD, {})
    trap = tmp_path / "trap"
    swap(tmp_path / "model", pickle.dumps(Malicious(trap)))
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.read(tmp_path / "model", "model")
    torch.save({"weight": Malicious(trap)}, tmp_path / "trap.pth")
    swap(tmp_path / "model", (tmp_path / "trap.pth").read_bytes())
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.read(tmp_path / "model", "model")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Malicious(trap))).close()
    assert trap.exists(), "the trap works: it was not sprung"


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, (10).to_bytes(8, "little") + b'{"a":{}}  '])
def test_broken_safetensors_with_the_right_hash(tmp_path, content):
    checkpoint.write(tmp_path, "model", OLD, {})
    swap(tmp_path, content)
    with pytest.raises(CheckpointError, match="is not a safetensors file"):
        checkpoint.read(tmp_path, "model")


def test_a_document_is_strict_json(tmp_path):
    with pytest.raises(ValueError):
        checkpoint.write_json(tmp_path / "x.json", {"value": float("nan")})
    assert names(tmp_path) == []


def test_load_state_fits_exactly():
    module = torch.nn.BatchNorm2d(3)
    good = {name: value + 1 for name, value in module.state_dict().items()}
    for change, message in [
        ({"weight": torch.ones(4)}, r"here: tensor weight must have shape \[3\], got \[4\]"),
        ({"extra": torch.ones(1)}, "here has the unknown tensor extra$"),
        ({"extra": torch.ones(1), "more": torch.ones(1)}, "here has the unknown tensor extra and 1 more"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load_state(module, good | change, "here")
    with pytest.raises(CheckpointError, match=r"here lacks tensor bias$"):
        checkpoint.load_state(module, {name: value for name, value in good.items() if name != "bias"}, "here")
    assert (module.weight == 1).all(), "a refusal changes nothing"
    checkpoint.load_state(module, good, "here")
    assert (module.weight == 2).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a POSIX system")
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "model.json"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    with pytest.raises(CheckpointError, match=r"model\.json (must be a regular file|cannot be read: Is a directory)"):
        checkpoint.read(tmp_path, "model")


def test_oversized_document_is_refused_before_it_is_read(tmp_path):
    with open(tmp_path / "model.json", "wb") as file:
        file.truncate(1 << 40)  # sparse: takes no space
    with pytest.raises(CheckpointError, match=r"model\.json must have at most \d+ bytes, got 1099511627776"):
        checkpoint.read(tmp_path, "model")


def test_planted_link_at_a_temporary_name_is_never_followed(tmp_path, monkeypatch):
    target = tmp_path / "precious"
    target.write_text("kept")
    monkeypatch.setattr(checkpoint.secrets, "token_hex", lambda _: "0")
    (tmp_path / ".report.html.0").symlink_to(target)
    with pytest.raises(FileExistsError):
        checkpoint.write_file(tmp_path / "report.html", b"new")
    assert target.read_text() == "kept"


def test_csv_writer_leaves_the_old_file_after_an_error(tmp_path):
    path = tmp_path / "scores.csv"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), checkpoint.csv_writer(path, ["a"]) as write:
        write([1 / 0])
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_load_state_refuses_nonfinite_values():
    module = torch.nn.Linear(2, 1)
    values = checkpoint.tensors(module) | {"bias": torch.tensor([float("inf")])}
    with pytest.raises(CheckpointError, match="here: tensor bias holds NaN or infinite values"):
        checkpoint.load_state(module, values, "here")


@pytest.mark.skipif(os.name != "posix", reason="folders can be locked on POSIX systems alone")
def test_second_writer_fails_clearly_and_the_folder_stays_loadable(tmp_path):
    checkpoint.write(tmp_path, "model", OLD, {"kind": "test"})
    with (
        checkpoint._only_writer(tmp_path),
        pytest.raises(CheckpointError, match="is being written by another process; save again when it is done"),
    ):
        checkpoint.write(tmp_path, "model", NEW, {"kind": "test"})
    assert same(checkpoint.read(tmp_path, "model")[0], OLD)
    checkpoint.write(tmp_path, "model", NEW, {"kind": "test"})
    assert same(checkpoint.read(tmp_path, "model")[0], NEW)
