"""Scores of files and of labelled sets: the film alone decides, and nothing is held for longer than needed."""

import itertools

import numpy as np
import pytest
import tiny
import torch

from simsid import Model, data, metrics
from simsid.errors import CalibrationError
from simsid.scoring import stream as scoring


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.calibrated(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    return [str(path) for path in tiny.films(tmp_path_factory.mktemp("films"), 7)]


def labelled(normal=6, abnormal=5):
    records = [data.Record(f"n{i}", "test", 0, "NORMAL") for i in range(normal)]
    records += [data.Record(f"a{i}", "test", 1, ("edema", "mass")[i % 2]) for i in range(abnormal)]
    pixels = np.random.default_rng(3).integers(0, 256, (len(records), 1, 48, 48), dtype=np.uint8)
    return data.ImageSet(torch.from_numpy(pixels), tuple(records))


def test_a_score_depends_on_the_film_alone(model, films):
    alone = {path: next(scoring.score_files(model, [path], batch_size=4)) for path in films}
    for order in (films, films[::-1], films[3:] + films[:3]):
        assert list(scoring.score_files(model, order, batch_size=4, workers=3)) == [alone[path] for path in order]
    name = model.signal
    spread = model.calibration.std[name]
    for size in (1, 3, 16):
        for score in scoring.score_files(model, films, batch_size=size):
            # A trained discriminator's spread is above 1; an untrained one hardly tells images apart.
            assert abs(score.signals[name] - alone[score.path].signals[name]) < 1e-5 * max(spread, 1)
    one = alone[films[0]]
    assert 0 < one.score < 1 and set(one.signals) == set(model.signal_names)
    assert one.score == model.calibration.probability(name, np.array([one.signals[name]]))[0]
    assert len({score.score for score in alone.values()}) == len(films)


def test_every_file_has_its_score_where_it_stood(model, films, tmp_path):
    broken = [tmp_path / f"broken {i}.png" for i in range(4)]
    for path in broken:
        path.write_bytes(b"\x89PNG\r\n\x1a\n nothing more")
    missing = tmp_path / "missing.png"
    files = [broken[0], *films[:3], broken[1], data.Record(films[3]), missing, *films[4:], broken[2], broken[3]]
    paths = [file.path if isinstance(file, data.Record) else str(file) for file in files]
    for size in (1, 2, 16):
        scores = list(scoring.score_files(model, iter(files), batch_size=size))
        assert [score.path for score in scores] == paths
        for score in scores:
            if score.path in films:
                assert not score.reason and score.alarm in (True, False)
            else:
                assert score.reason and score.score is score.alarm is None and score.signals == {}


def test_a_file_given_twice_is_scored_twice(model, films):
    scores = list(scoring.score_files(model, [films[0], films[1], films[0]], batch_size=2))
    assert [score.path for score in scores] == [films[0], films[1], films[0]]
    assert scores[0] == scores[2] != scores[1]


def test_files_are_taken_as_they_are_needed(model, films):
    taken = itertools.count()
    endless = (films[next(taken) % len(films)] for _ in itertools.count())
    scores = scoring.score_files(model, endless, batch_size=4, workers=2)
    for _ in range(8):
        next(scores)
    scores.close()
    assert next(taken) <= 8 + 4 + 2 * 2 + 4 + 2


def test_alarms_are_those_above_the_threshold(model, films):
    held = np.array(model.calibration.holdout[model.signal])
    assert scoring.threshold(model) == metrics.normal_threshold(held, 0.05)
    assert scoring.threshold(model, 0.5, "residual") == np.sort(model.calibration.holdout["residual"])[9]
    for rate in (0.05, 0.5, 0.95):
        limit = scoring.threshold(model, rate)
        scores = list(scoring.score_files(model, films, false_alarm_rate=rate))
        assert [score.alarm for score in scores] == [score.signals[model.signal] > limit for score in scores]


def test_without_held_out_films_there_is_no_threshold(films, tmp_path):
    model = tiny.calibrated(tmp_path, held=0)
    assert scoring.threshold(model) is None
    assert [score.alarm for score in scoring.score_files(model, films[:2])] == [None, None]
    assert scoring.evaluate(model, labelled()).holdout is None


def test_bad_requests_are_refused_at_the_call(model, films):
    for rate in (0, 1, -1, 5, float("nan")):
        with pytest.raises(ValueError, match="false_alarm_rate must lie strictly between 0 and 1"):
            scoring.score_files(model, films, false_alarm_rate=rate)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        scoring.score_files(model, films, batch_size=0)
    with pytest.raises(CalibrationError, match="not calibrated"):
        scoring.score_files(tiny.model(), films)


def test_evaluation_holds_every_signal(model):
    images = labelled()
    evaluation = scoring.evaluate(model, images, false_alarm_rate=0.1)
    assert evaluation.default == model.signal and set(evaluation.signals) == set(model.signal_names)
    assert evaluation.kinds == ["edema", "mass"] and evaluation.false_alarm_rate == 0.1
    raw = model.signals(images.batches())
    assert all(np.array_equal(evaluation.signals[name], raw[name]) for name in raw)
    assert evaluation.thresholds()[model.signal] == scoring.threshold(model, 0.1)


def test_labels_are_checked_before_anything_is_computed(model, monkeypatch):
    monkeypatch.setattr(Model, "signals", lambda *_, **__: pytest.fail("computed"))
    for labels, message in (
        ([0, 1, None, -1], "got 2 of 4 without one"),
        ([0, 0], "got 2 normal and 0 abnormal"),
        ([1], "got 0 normal and 1 abnormal"),
    ):
        with pytest.raises(ValueError, match=message):
            scoring.require_labels(labels)
    with pytest.raises(ValueError, match="got 0 normal and 5 abnormal"):
        scoring.evaluate(model, labelled(normal=0))
    with pytest.raises(ValueError, match="false_alarm_rate"):
        scoring.evaluate(model, labelled(), false_alarm_rate=2)


def test_pictures_show_films_of_every_kind(model):
    images = labelled()
    evaluation = scoring.evaluate(model, images)
    places = scoring.typical_places(evaluation, each=2)
    shown = [evaluation.findings[place] for place in places]
    assert len(set(places)) == len(places)
    assert shown == ["NORMAL"] * 2 + ["edema"] * 2 + ["mass"] * shown.count("mass") and "mass" in shown
    examples = scoring.examples(model, images, evaluation.signals[model.signal], places)
    for place, example in zip(places, examples):
        assert (example.path, example.label) == (images.paths[place], images.labels[place])
        assert example.score == evaluation.signals[model.signal][place]
        assert np.array_equal(example.input, images.batch([place])[0, 0].numpy())
        assert example.reconstruction.shape == example.heat_map.shape == (48, 48)
        assert np.abs(example.reconstruction).max() <= 1 and example.heat_map.min() >= 0
    assert scoring.examples(model, images, evaluation.signals[model.signal], []) == []


def test_the_highest_scores_are_pictured(model, films, tmp_path):
    scores = [*scoring.score_files(model, films), scoring.Score(str(tmp_path / "gone.png"), "gone")]
    examples = scoring.examples_of_files(model, scores, 3)
    best = sorted((score for score in scores if not score.reason), key=lambda score: -score.score)[:3]
    assert [example.path for example in examples] == [score.path for score in best]
    assert [example.score for example in examples] == [score.score for score in best]
    assert scoring.examples_of_files(model, scores[-1:], 3) == []


def test_a_gpu_has_the_next_batch_before_the_last_is_read_back(model, films, monkeypatch):
    """The order of launches and reads, with the CPU in a GPU's place; the scores are the same."""
    plain, happened = list(scoring.score_files(model, films, batch_size=2)), []
    real = Model.launch_signals

    def launch(self, images, **options):
        number = sum(kind == "launched" for kind, _ in happened)
        happened.append(("launched", number))
        read = real(self, images, **options)
        return lambda: (happened.append(("read", number)), read())[1]

    monkeypatch.setattr(Model, "launch_signals", launch)
    monkeypatch.setattr(Model, "device", property(lambda self: torch.device("cuda")))
    monkeypatch.setattr(Model, "_batches", lambda self, images, size: [(images, len(images))])
    ahead = list(scoring.score_files(model, films, batch_size=2))
    assert happened[:4] == [("launched", 0), ("launched", 1), ("read", 0), ("launched", 2)]
    assert happened[-1] == ("read", 3) and len(happened) == 8
    assert [score.path for score in ahead] == [score.path for score in plain]
    for one, other in zip(ahead, plain):
        assert one.signals == pytest.approx(other.signals, rel=1e-3)
