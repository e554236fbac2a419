"""Scoring files on a GPU: the scores of a CPU, whatever the batch, and an archive that is resumed."""

import pytest
import tiny
import torch

from simsid import Model
from simsid.commands.main import main
from simsid.scoring.stream import score_files


@pytest.fixture
def saved(tmp_path):
    """Return a folder with a calibrated model and a folder of images."""
    tiny.calibrated(tmp_path / "model")
    tiny.films(tmp_path / "images", 5)
    return tmp_path


def test_scores_of_files_are_those_of_a_cpu(saved, device, full_precision):
    files = sorted((saved / "images").iterdir())
    on_cpu, there = (list(score_files(Model.load(saved / "model", device=where), files)) for where in ("cpu", device))
    assert [score.path for score in there] == [score.path for score in on_cpu]
    for mine, reference in zip(there, on_cpu):
        assert mine.signals == pytest.approx(reference.signals, rel=1e-3, abs=1e-5)
        assert mine.score == pytest.approx(reference.score, rel=1e-3)


def test_scores_of_files_repeat_bit_for_bit_in_any_company(saved, device):
    files = sorted((saved / "images").iterdir())
    model = Model.load(saved / "model", device=device)
    together = {score.path: score.signals for score in score_files(model, files)}
    for some in (files[:1], files[2:], files):
        assert all(score.signals == together[score.path] for score in score_files(model, some))


def test_archive_scored_in_two_parts_has_the_table_of_one(saved, device):
    def score(folder):
        with pytest.raises(SystemExit) as status:
            main(
                ["score", *map(str, (saved / "model", saved / "images", "-o", saved / folder)), "--device", device.type]
            )
        assert status.value.code == 0

    score("once")
    moved = [(path, saved / path.name) for path in sorted((saved / "images").iterdir())[3:]]
    for path, aside in moved:
        path.rename(aside)
    score("twice")
    for path, aside in moved:
        aside.rename(path)
    score("twice")
    assert (saved / "twice/scores.csv").read_bytes() == (saved / "once/scores.csv").read_bytes()
    assert len(tiny.rows(saved / "once/scores.csv")) == 5


def test_model_trained_on_the_device_scores_the_same_once_loaded(device, tmp_path):
    model = tiny.model().to(device).train()
    model(tiny.images(4).to(device))  # moves the running statistics
    model.eval().calibrate(tiny.images(8, 1))
    want = model.signals(tiny.images(3))
    model.save(tmp_path)
    got = Model.load(tmp_path, device=device).signals(tiny.images(3))
    assert all(torch.equal(torch.from_numpy(got[name]), torch.from_numpy(want[name])) for name in want)
