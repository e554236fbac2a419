"""Folders of tensors that are complete at every moment: a JSON document that names a safetensors file.

The tensors go to a new file named by their hash, which is synced; then the document is replaced atomically. Whoever
opens the folder finds either the old pair or the new one. A folder has one writer at a time. Nothing that is read is
ever executed, and only regular files of a bounded size are read.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from simsid.errors import CheckpointError

FORMAT = 1

LARGEST_JSON = 64 << 20
"""Bytes of a JSON document; one that a calibration of a million held-out images fills has fewer."""

LARGEST_TENSORS = 16 << 30
"""Bytes of a tensor file: a training state with 1,000 items a location has a quarter of it."""


def write_file(path: pathlib.Path, content: bytes) -> None:
    """Write a file atomically: to a temporary name beside it, synced, then renamed over it."""
    with replaced(path) as temporary, open(temporary, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yield a new temporary name beside `path`; the file created and synced there replaces `path` at the end.

    The name is random and must be opened exclusively (`"x"`): a link planted at a name that is known beforehand would
    lead the writer to another file. After an exception `path` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    sync_folder(path.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Make the names in a folder durable, as after a rename."""
    # A rename is durable only once its folder is; Windows cannot open folders and needs no such step.
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: pathlib.Path, document: dict[str, object]) -> None:
    """Write a JSON document atomically."""
    write_file(path, (json.dumps(document, indent=1, allow_nan=False) + "\n").encode())


@contextlib.contextmanager
def csv_writer(path: pathlib.Path, columns: Sequence[str]) -> Iterator[Callable[[Iterable[object]], None]]:
    """Write a CSV file row by row and atomically: the file appears when the block ends, and not if it raises.

    The text is UTF-8 with `\\n` after each row; bytes of file names that are not UTF-8 are written as they are. Text
    that a spreadsheet would run as a formula is escaped, see `escape_cell`; numbers stay numbers, None is empty.

    Yields:
        A function that writes one row, a sequence of as many values as there are columns.
    """
    with (
        replaced(path) as temporary,
        open(temporary, "x", newline="", encoding="utf-8", errors="surrogateescape") as file,
    ):

        def write(row: Iterable[object]) -> None:
            file.write(",".join(map(_csv_cell, row)) + "\n")

        write(columns)
        yield write
        file.flush()
        os.fsync(file.fileno())


def escape_cell(text: str) -> str:
    """Return text that no spreadsheet takes for a formula.

    Text that begins with `=`, `+`, `-`, `@`, a tab or a line break gets an apostrophe before it, and so does such text
    with apostrophes before it, so that `unescape_cell` restores every text exactly.
    """
    return "'" + text if re.match(r"'*[=+\-@\t\r\n]", text) else text


def unescape_cell(text: str) -> str:
    """Return the text that `escape_cell` was given."""
    return text[1:] if re.match(r"'+[=+\-@\t\r\n]", text) else text


def _csv_cell(value: object) -> str:
    """Return one cell of a CSV file, quoted where needed; Python's csv module leaves a carriage return unquoted."""
    text = escape_cell(value) if isinstance(value, str) else "" if value is None else str(value)
    # Readers drop white space around a cell that is not quoted.
    if re.search(r'[",\r\n]|^\s|\s$', text):
        return '"' + text.replace('"', '""') + '"'
    return text


def read_json(path: pathlib.Path) -> dict[str, object]:
    """Read a JSON document; a missing or broken file is a `CheckpointError`."""
    try:
        document = json.loads(read_regular(path, LARGEST_JSON).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a JSON document: {error}") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(document).__name__}")
    return document


def read_regular(path: pathlib.Path, largest: int) -> bytes:
    """Read a regular file of at most `largest` bytes.

    Raises:
        CheckpointError: another kind of file (a device or a FIFO would never end), or a larger one.
        OSError: the file cannot be opened or read.
    """
    # Without blocking: opening a FIFO would wait for a writer.
    with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} must be a regular file")
        if status.st_size > largest:
            raise CheckpointError(f"{path} must have at most {largest} bytes, got {status.st_size}")
        return file.read()


def write(folder: str | os.PathLike, name: str, tensors: dict[str, Tensor], document: dict[str, object]) -> None:
    """Write `tensors` and `document` as the pair `name` of `folder`, replacing an older pair atomically."""
    folder = pathlib.Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made a folder to write into: {error.strerror}") from None
    content = save_safetensors({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    with _only_writer(folder):
        _write_pair(folder, name, content, document)


@contextlib.contextmanager
def _only_writer(folder: pathlib.Path) -> Iterator[None]:
    """Lock a folder against other writers of pairs, each of whom removes what the others have not finished.

    Raises:
        CheckpointError: another process or thread is writing.
    """
    if os.name != "posix":
        yield
        return
    import fcntl

    # The folder itself is locked, so that no lock file remains.
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(f"{folder} is being written by another process; save again when it is done") from None
        yield
    finally:
        os.close(handle)


def _write_pair(folder: pathlib.Path, name: str, content: bytes, document: dict[str, object]) -> None:
    digest = hashlib.sha256(content).hexdigest()
    file = f"{name}-{digest[:16]}.safetensors"
    write_file(folder / file, content)
    write_json(folder / f"{name}.json", {"format": FORMAT, **document, "tensors": {"file": file, "sha256": digest}})
    # Files of older pairs and of killed writers do no harm, so failing to remove them is not an error.
    leftover = re.compile(rf"{_tensor_file(name)}|\.({_tensor_file(name)}|{re.escape(name)}\.json)\.[0-9a-f]{{8}}")
    for old in folder.iterdir():
        if old.name != file and leftover.fullmatch(old.name):
            with contextlib.suppress(OSError):
                old.unlink()


def read(folder: str | os.PathLike, name: str) -> tuple[dict[str, Tensor], dict[str, object]]:
    """Read the pair `name` of `folder`; a missing, damaged or foreign file is a `CheckpointError`."""
    folder = pathlib.Path(folder)
    document = read_json(folder / f"{name}.json")
    while True:
        entry = _tensor_entry(document, folder, name)
        path = folder / entry["file"]
        try:
            content = read_regular(path, LARGEST_TENSORS)
            break
        except OSError as error:
            # A writer may have replaced the pair between the two reads.
            before, document = document, read_json(folder / f"{name}.json")
            if document == before:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != entry.get("sha256"):
        raise CheckpointError(f"{path} is damaged: its content does not match the hash in {name}.json")
    try:
        return load_safetensors(content), document
    except (SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a safetensors file: {error}") from None


def tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """Return the parameters and persistent buffers of a module by name: its `state_dict` without extra state."""
    return {name: value for name, value in module.state_dict().items() if not name.endswith("_extra_state")}


def check_shapes(module: torch.nn.Module, values: dict[str, Tensor], source: object) -> None:
    """Raise `CheckpointError` unless the names and shapes of `values` are exactly those of the module's tensors."""
    own = tensors(module)
    for kind, names in (("lacks", own.keys() - values.keys()), ("has the unknown", values.keys() - own.keys())):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise CheckpointError(f"{source} {kind} tensor {min(names)}{more}")
    for name, tensor in own.items():
        if values[name].shape != tensor.shape:
            raise CheckpointError(
                f"{source}: tensor {name} must have shape {list(tensor.shape)}, got {list(values[name].shape)}"
            )


def load_state(module: torch.nn.Module, values: dict[str, Tensor], source: object) -> None:
    """Load tensors whose names and shapes must fit the module exactly, and whose values must be finite.

    Raises:
        CheckpointError: naming the tensor.
    """
    check_shapes(module, values, source)
    for name, value in values.items():
        # The sum shows NaN and infinity in a tenth of the time; it may also overflow.
        if value.is_floating_point() and not value.sum().isfinite() and not value.isfinite().all():
            raise CheckpointError(f"{source}: tensor {name} holds NaN or infinite values")
    # Not strict: extra state is not among the tensors.
    module.load_state_dict(values, strict=False)


def digest(text: str, values: dict[str, Tensor]) -> str:
    """Return a hash of `text` and of tensors with their names, dtypes, shapes and memory layouts."""
    found = hashlib.sha256(text.encode())
    for name, tensor in values.items():
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)} {tensor.stride()}".encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _tensor_file(name: str) -> str:
    return rf"{re.escape(name)}-[0-9a-f]{{16}}\.safetensors"


def _tensor_entry(document: dict[str, object], folder: pathlib.Path, name: str) -> dict[str, str]:
    """Return the document's entry for its tensor file, whose name must be one that `write` can give in this folder."""
    if document.get("format") != FORMAT:
        raise CheckpointError(f"{folder / name}.json must be of format {FORMAT}, got {document.get('format')!r}")
    entry = document.get("tensors")
    entry = entry if isinstance(entry, dict) else {}
    file = entry.get("file")
    if not isinstance(file, str) or not re.fullmatch(_tensor_file(name), file):
        raise CheckpointError(
            f"{folder / name}.json must name a file {name}-<hash>.safetensors beside it, got {file!r}"
        )
    return {str(key): str(value) for key, value in entry.items()}
