"""`score_files`: a score depends on its file alone, comes in order, and nothing is held for longer than needed."""

import itertools

import numpy as np
import pytest
import tiny
import torch

from simsid import data, metrics
from simsid.errors import CalibrationError
from simsid.models import FrozenModel
from simsid.scoring import columns, row, score_files


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # By the papers' score, which lies within 0..1 for noise too; an error far from normal ends at 1.
    return tiny.calibrated(tmp_path_factory.mktemp("model"), signal="discriminator_per_image")


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return [str(path) for path in tiny.films(tmp_path_factory.mktemp("films"), 7)]


def test_a_score_depends_on_its_file_alone(model, films):
    alone = {path: next(score_files(model, [path], batch_size=4)) for path in films}
    for order in (films, films[::-1], films[3:] + films[:3]):
        assert list(score_files(model, order, batch_size=4, workers=3)) == [alone[path] for path in order]
    name = model.signal
    spread = model.calibration.std[name]
    for size in (1, 3, 16):
        for score in score_files(model, films, batch_size=size):
            # A trained discriminator's spread is above 1; an untrained one hardly tells images apart.
            assert abs(score.signals[name] - alone[score.path].signals[name]) < 1e-5 * max(spread, 1)
    one = alone[films[0]]
    assert 0 < one.score < 1 and set(one.signals) == set(model.signal_names)
    assert one.score == model.calibration.probability(name, np.array([one.signals[name]]))[0]
    assert len({score.score for score in alone.values()}) == len(films)


def test_every_file_has_its_score_in_its_position(model, films, tmp_path):
    broken = [tiny.damaged(tmp_path, f"damaged {i}.png") for i in range(4)]
    missing = tmp_path / "missing.png"
    files = [broken[0], *films[:3], broken[1], data.Record(films[3]), missing, *films[4:], broken[2], broken[3]]
    paths = [file.path if isinstance(file, data.Record) else str(file) for file in files]
    for size in (1, 2, 16):
        scores = list(score_files(model, iter(files), batch_size=size))
        assert [score.path for score in scores] == paths
        for score in scores:
            if score.path in films:
                assert not score.reason and score.flagged in (True, False)
            else:
                assert score.reason and score.score is score.flagged is None and score.signals == {}


def test_a_file_given_twice_is_scored_twice(model, films):
    scores = list(score_files(model, [films[0], films[1], films[0]], batch_size=2))
    assert [score.path for score in scores] == [films[0], films[1], films[0]]
    assert scores[0] == scores[2] != scores[1]


def test_files_are_taken_as_they_are_needed(model, films):
    taken = itertools.count()
    endless = (films[next(taken) % len(films)] for _ in itertools.count())
    scores = score_files(model, endless, batch_size=4, workers=2)
    for _ in range(8):
        next(scores)
    scores.close()
    assert next(taken) <= 8 + 4 + 2 * 2 + 4 + 2


@pytest.mark.parametrize("name", [None, "residual"])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_flagged_are_those_above_the_threshold_of_the_signal(model, films, name, rate):
    chosen = name or model.signal
    limit = metrics.normal_threshold(np.array(model.calibration.holdout[chosen]), rate)
    scores = list(score_files(model, films, signal=name, false_positive_rate=rate))
    assert [score.flagged for score in scores] == [score.signals[chosen] > limit for score in scores]
    raw = np.array([score.signals[chosen] for score in scores])
    assert [score.score for score in scores] == model.calibration.probability(chosen, raw).tolist()


def test_without_held_out_images_nothing_is_flagged(films, tmp_path):
    model = tiny.calibrated(tmp_path, held=0)
    assert [score.flagged for score in score_files(model, films[:2])] == [None, None]


def test_labels_and_findings_of_records_come_with_their_scores(model, films, tmp_path):
    records = [
        data.Record(films[0], label=1, finding="mass"),
        data.Record(tiny.damaged(tmp_path), label=0, finding="x"),
    ]
    good, bad = score_files(model, records)
    assert (good.label, good.finding, bad.label, bad.finding) == (1, "mass", 0, "x") and bad.reason
    assert row(good, model.signal_names)[:3] == [films[0], 1, "mass"]
    assert row(bad, model.signal_names) == [bad.path, 0, "x", *[""] * (2 + len(model.signal_names)), bad.reason]
    assert len(columns(model.signal_names)) == len(row(good, model.signal_names))


def test_wrong_options_are_refused_at_the_call(model, films):
    for rate in (0, 1, -1, 5, float("nan")):
        with pytest.raises(ValueError, match="false_positive_rate must lie strictly between 0 and 1"):
            score_files(model, films, false_positive_rate=rate)
    with pytest.raises(ValueError, match="signal must be one of"):
        score_files(model, films, signal="pixel_knn")
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_files(model, films, batch_size=0)
    with pytest.raises(CalibrationError, match="not calibrated"):
        score_files(tiny.model(), films)


def test_a_gpu_has_the_next_batch_before_the_last_is_read_back(model, films, monkeypatch):
    """The order of launches and reads with the CPU in a GPU's position; the scores are the same."""
    plain, happened = list(score_files(model, films, batch_size=2)), []
    real = FrozenModel.launch_signals

    def launch(self, images, names=None, **options):
        number = sum(kind == "launched" for kind, _ in happened)
        happened.append(("launched", number))
        with monkeypatch.context() as patch:
            patch.setattr(FrozenModel, "device", torch.device("cpu"))
            read = real(self, images, names, **options)
        return lambda: (happened.append(("read", number)), read())[1]

    frozen = model.freeze()
    monkeypatch.setattr(FrozenModel, "launch_signals", launch)
    monkeypatch.setattr(type(model), "freeze", lambda self: frozen)
    monkeypatch.setattr(FrozenModel, "device", torch.device("cuda"))
    ahead = list(score_files(model, films, batch_size=2))
    assert happened[:4] == [("launched", 0), ("launched", 1), ("read", 0), ("launched", 2)]
    assert happened[-1] == ("read", 3) and len(happened) == 8
    assert ahead == plain
