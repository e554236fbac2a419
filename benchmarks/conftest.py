"""`pytest benchmarks/ --benchmark`: the options, a description of the machine, and the tables at the end."""

import contextlib
import importlib.metadata
import os
import platform

import pytest
import report
import torch

# PyTorch reads it at its first allocation. As on the command line, for every variant alike: otherwise page faults
# decide between them on a busy machine.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

ROWS, SKIPPED, NOTES = pytest.StashKey[list](), pytest.StashKey[dict](), pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks, which are skipped otherwise")
    parser.addoption(
        "--variant", action="append", help="time this variant only (repeatable); the reference always runs"
    )
    parser.addoption("--width", type=int, help="width of the whole model; 32 is that of the papers, default on a GPU")
    parser.addoption("--data", help="the ZhangLab folder for the epoch; generated images otherwise")
    parser.addoption("--compile", action="store_true", help="torch.compile the whole model on a CPU too (minutes)")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    config.stash[ROWS], config.stash[SKIPPED], config.stash[NOTES] = [], {}, {}
    # The tables below replace the one of pytest-benchmark, which knows only the wall time of a round of all variants.
    config.option.benchmark_quiet = not config.option.benchmark_verbose


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run only with --benchmark"))


def pytest_benchmark_generate_machine_info():
    """Describe the machine; the default of pytest-benchmark spends seconds on the CPU's flags."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "triton": "none"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["triton"] = importlib.metadata.version("triton")
    device = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    if torch.cuda.is_available():
        device, versions["cuda"] = torch.cuda.get_device_name(), torch.version.cuda
    return {"device": device, "machine": platform.machine(), "system": platform.platform(), "versions": versions}


@pytest.fixture
def add_rows(request, benchmark):
    """Return a function that keeps the rows of a group for the table at the end and for the JSON file."""

    def add(rows):
        benchmark.extra_info["rows"] = rows
        request.config.stash[ROWS] += rows

    return add


@pytest.fixture
def skipped(request):
    """Return a function that lists a variant with the reason why it was not timed at the end of the session."""

    def skip(variant, reason):
        request.config.stash[SKIPPED].setdefault((variant, reason), []).append(request.node.name)

    return skip


@pytest.fixture
def wanted(request):
    """Return a function that says whether `--variant` allows a variant."""
    chosen = request.config.getoption("--variant")
    return lambda name: not chosen or name in chosen


@pytest.fixture
def note(request):
    """Return a function that prints a line once at the end of the session."""
    return lambda line: request.config.stash[NOTES].setdefault(line)


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if rows:
        terminalreporter.section("simsid: device and wall time")
        for block in filter(None, (report.table(rows), report.target_table(rows), *report.epoch_lines(rows))):
            terminalreporter.write_line(block)
    for line in config.stash[NOTES]:
        terminalreporter.write_line(line)
    for (variant, reason), names in sorted(config.stash[SKIPPED].items()):
        terminalreporter.write_line(f"not timed, {len(names)} groups: {variant}: {reason}")
