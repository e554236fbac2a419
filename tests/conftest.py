"""Settings shared by all tests."""

import os
import pathlib
import sys

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).parent))
WORKER = "PYTEST_XDIST_WORKER" in os.environ

# Threads that wait spin: two processes with two threads each on two cores are many times slower than with one each.
torch.set_num_threads(1 if WORKER else min(2, torch.get_num_threads()))

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST_WORKERS = 8
FIRST = ("test_distributed.py", "test_archive_kills.py", "test_ptx_mutations.py")
"""Modules with the longest tests."""


@pytest.fixture
def one_figure(monkeypatch):
    """Draw the first figure of the reports, with few pixels, for all of them: they take most of a tiny command."""
    from simsid.report import embedding, figures

    draw, drawn = figures.png, []

    def png(figure, dpi=0):
        if not drawn:
            drawn.append(draw(figure, dpi=20))
        return drawn[0]

    monkeypatch.setattr(figures, "png", png)
    monkeypatch.setattr(embedding, "POINTS", 20)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Divide the whole suite among one process per core, where pytest-xdist is installed and `-n` is not given."""
    if WORKER:
        return  # a worker that divided its part again would start processes without end
    whole = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if whole and config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None:
        config.option.numprocesses = min(CORES, MOST_WORKERS)
        # Each worker begins with a contiguous half, so that few fixtures of modules are made in both.
        config.option.dist = "worksteal"


def pytest_collection_modifyitems(items):
    """Begin with the longest tests: a worker that began one at the end would keep the others waiting."""
    items.sort(key=lambda item: item.path.name not in FIRST)
