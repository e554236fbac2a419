"""The command line: each command is a dataclass whose fields are its options."""

import contextlib
import io
import os
import re
import sys
import warnings
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from simsid.commands.adapt import Adapt
from simsid.commands.calibrate import Calibrate
from simsid.commands.convert import Convert
from simsid.commands.demo import Demo
from simsid.commands.doctor import Doctor
from simsid.commands.evaluate import Evaluate
from simsid.commands.explain import Explain
from simsid.commands.export import Export
from simsid.commands.models import Models
from simsid.commands.report import Report
from simsid.commands.scan import Scan
from simsid.commands.score import Score
from simsid.commands.study import Study
from simsid.commands.train import Train
from simsid.config import PRESETS, Config
from simsid.errors import ConfigError, IncompleteError, SimsidError, UsageError, printable

# PyTorch reads it at its first allocation: memory in pages of 2 MB costs fewer page faults, which took a fifth of the
# time of a pretrained encoder on a CPU.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

RESEARCH = "For research use only; not a medical device."

RESUMABLE = ("resume", "device", "threads", "workers", "help")
"""Options that may be given with `--resume`: all others were settled when the run was started."""

COMMANDS: dict[str, type] = {
    "demo": Demo,
    "train": Train,
    "evaluate": Evaluate,
    "score": Score,
    "explain": Explain,
    "report": Report,
    "adapt": Adapt,
    "calibrate": Calibrate,
    "scan": Scan,
    "study": Study,
    "convert": Convert,
    "export": Export,
    "models": Models,
    "doctor": Doctor,
}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit with its status: 0 done, 1 in part, 2 not at all, 130 stopped by Ctrl-C."""
    try:
        # File names may hold bytes that are not text, and a terminal may lack a character.
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        with warnings.catch_warnings():
            warnings.showwarning = _Notes()
            status = _run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        # Outside of a command: during the imports, for instance.
        status = 130
    except BrokenPipeError:
        # The reader of the output has ended, as with `| head`; Python would complain once more when it flushes.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
        status = 141
    sys.exit(status)


class _Notes:
    """Shows each warning once: evaluation and report may both meet it."""

    def __init__(self) -> None:
        self._shown: set[str] = set()

    def __call__(self, message: Warning | str, *_: object, **__: object) -> None:
        text = printable(str(message))
        if text not in self._shown:
            self._shown.add(text)
            print(f"simsid: note: {text}", file=sys.stderr)


def _run(arguments: list[str]) -> int | str | None:
    if arguments == ["--version"]:
        from simsid import __version__

        print(f"simsid {__version__}")
        return 0
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    who = f"rank {os.environ.get('RANK')}: " if several else ""
    try:
        if "" in arguments:
            raise UsageError("an argument is empty, perhaps a variable of the shell that is not set")
        _refuse_no_pattern(arguments)
        command = _parse(arguments)
        if several and arguments[0] not in ("train", "score"):
            raise UsageError(f"{arguments[0]} runs as a single process; start it without torchrun")
        return command.run()
    except SystemExit as stop:
        return stop.code
    except BrokenPipeError:
        raise
    except KeyboardInterrupt:
        return 130
    except SimsidError as error:
        _print_error(f"{who}{error}")
        return 1 if isinstance(error, IncompleteError) else 2
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _print_error(f"{who}{where}{error.strerror}")
        return 2


def _refuse_no_pattern(arguments: list[str]) -> None:
    """Refuse an option for patterns without one, as of a shell variable that is not set: it would choose every one."""
    for argument, following in zip(arguments, [*arguments[1:], "-"]):
        if argument in ("--only", "--exclude") and following.startswith("-"):
            raise UsageError(f"{argument} needs at least one pattern, got none; leave it out, or give one such as 'a*'")


def _print_error(message: str) -> None:
    """Print one line in one write, or the lines of several ranks would mix."""
    sys.stderr.write(f"simsid: {printable(message)}\n")


def _parse(arguments: list[str]) -> Any:
    """Read a command's options; a preset or ablation sets the defaults of the model's options, so it is read first."""
    known: dict[str, tuple[type, Any]] = {
        name: (kind, subcommand(name, prefix_name=False)) for name, kind in COMMANDS.items()
    }
    if arguments[:1] == ["train"]:
        _check_resume(arguments[1:])
        known["train"] = _train_command(arguments)
    union: Any = None
    for kind, options in known.values():
        command = Annotated[kind, options]  # type: ignore[valid-type]
        union = command if union is None else union | command
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return tyro.cli(
                union, prog="simsid", description=f"{sys.modules['simsid'].__doc__}\n\n{RESEARCH}", args=arguments
            )
    except SystemExit as stop:
        # The parser wraps the message of a configuration's error in one that names its own internals.
        cause = stop.__context__
        while cause is not None and not isinstance(cause, ConfigError):
            cause = cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(message.getvalue())
        raise


def _train_command(arguments: list[str]) -> tuple[type, Any]:
    """Return the class of `train` and its defaults: those of the preset or ablation that the arguments name."""
    if _option(arguments, "ablation") and _option(arguments, "preset"):
        raise UsageError("--ablation names a configuration of its own; leave out --preset")
    name = _option(arguments, "ablation") or _option(arguments, "preset") or "simsid"
    if _option(arguments, "ablation") or name in PRESETS:
        with contextlib.suppress(ConfigError):  # an unknown name: the parser lists the known ones
            config = Config.ablation(name) if _option(arguments, "ablation") else PRESETS[name]()
            return Train, subcommand("train", prefix_name=False, default=Train(model=config))
        return Train, subcommand("train", prefix_name=False)
    from simsid.commands.fit import fit_command
    from simsid.models import presets

    if name not in presets.PRESETS:
        return Train, subcommand("train", prefix_name=False)
    config = presets.preset(name).config()
    kind: Any = fit_command(type(config))  # type: ignore[arg-type]  # a class is hashable
    return kind, subcommand("train", prefix_name=False, default=kind(model=config))


def _option(arguments: list[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument == f"--{name}" and i + 1 < len(arguments):
            return arguments[i + 1]
        if argument.startswith(f"--{name}="):
            return argument.split("=", 1)[1]
    return None


def _check_resume(arguments: list[str]) -> None:
    """Refuse options that a resumed run would ignore."""
    names = [found[1].replace("_", "-") for found in map(re.compile(r"--?([a-zA-Z][\w-]*)").match, arguments) if found]
    ignored = [name for name in names if name not in RESUMABLE and name != "h"]
    if "resume" in names and ignored:
        listed = ", ".join(f"--{name}" if len(name) > 1 else f"-{name}" for name in ignored)
        raise UsageError(f"--resume resumes a run with the options it was started with; leave out {listed}")
