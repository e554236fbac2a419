"""A calibrated model and an archive of 23 files, a quarter of them damaged."""

import archives
import pytest
import tiny
import torch

from simsid import Model


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """As in the processes that some tests start: another number of threads may sum in another order."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("model")
    tiny.calibrated(folder, width=2, heads=1)
    return folder


@pytest.fixture(scope="session")
def loaded(model):
    return Model.load(model)


@pytest.fixture(scope="session")
def films(tmp_path_factory):
    return archives.fill(tmp_path_factory.mktemp("films") / "archive", 23, each=10)
