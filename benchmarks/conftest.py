"""`pytest benchmarks/ --benchmark`: the flag, what the machine is, and the table at the end."""

import platform

import pytest
import report
import torch

ROWS, LEFT_OUT, NOTES = pytest.StashKey[list](), pytest.StashKey[dict](), pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--benchmark", action="store_true", help="run the benchmarks, which are skipped otherwise")
    parser.addoption("--width", type=int, help="width of the whole model; 32 is the papers', and a GPU's default")
    parser.addoption("--data", help="ZhangLab's folder for the epoch; generated films otherwise")
    parser.addoption("--compile", action="store_true", help="torch.compile the whole model on a CPU too: minutes")


@pytest.hookimpl(tryfirst=True)  # before pytest-benchmark reads its options
def pytest_configure(config):
    config.stash[ROWS], config.stash[LEFT_OUT], config.stash[NOTES] = [], {}, {}
    # Ours replaces pytest-benchmark's table, which knows wall time alone; --benchmark-verbose shows that one too.
    config.option.benchmark_quiet = not config.option.benchmark_verbose


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--benchmark"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason="benchmarks run only with --benchmark"))


def pytest_benchmark_update_machine_info(machine_info):
    machine_info["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
    try:
        import triton
    except ImportError:
        machine_info["versions"]["triton"] = "none"
    else:
        machine_info["versions"]["triton"] = triton.__version__
    if torch.cuda.is_available():
        machine_info["device"] = torch.cuda.get_device_name()
        machine_info["versions"]["cuda"] = torch.version.cuda
    else:
        machine_info["device"] = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


@pytest.fixture
def rows(request):
    """Results of this session, one dict a benchmark."""
    return request.config.stash[ROWS]


@pytest.fixture
def leave_out(request):
    """Skip the benchmark and name it with its reason at the end."""

    def skip(what, reason):
        request.config.stash[LEFT_OUT].setdefault((what, reason), []).append(request.node.name)
        pytest.skip(reason)

    return skip


@pytest.fixture
def note(request):
    """Say a line once at the end."""
    return lambda line: request.config.stash[NOTES].setdefault(line)


def pytest_terminal_summary(terminalreporter, config):
    if config.stash[ROWS]:
        terminalreporter.section("simsid: device and wall time")
        terminalreporter.write_line(report.table(config.stash[ROWS]))
        for line in report.epoch_lines(config.stash[ROWS]):
            terminalreporter.write_line(line)
    for line in config.stash[NOTES]:
        terminalreporter.write_line(line)
    for (what, reason), names in sorted(config.stash[LEFT_OUT].items()):
        terminalreporter.write_line(f"left out, {len(names)} times: {what}: {reason}")
