"""`find_shift`: silent on images of the calibration's distribution, and on one with many abnormal ones."""

import numpy as np
import pytest
import tiny
from archives import score

from simsid.scoring import find_shift


def drawn(seed, count, mean=0.0):
    return np.random.default_rng(seed).normal(mean, size=count)


@pytest.mark.parametrize("scored", [20, 100, 1000])
@pytest.mark.parametrize("held_out", [20, 100, 1000])
def test_scores_of_the_same_distribution_are_no_shift(scored, held_out):
    reports = [find_shift(drawn(seed, scored), drawn(10_000 + seed, held_out)) for seed in range(2000)]
    # The documented probability of 0.001, of 2,000 draws: more than 8 would come with a probability below 0.001.
    assert sum(report is not None for report in reports) <= 8


@pytest.mark.parametrize("seed", range(5))
def test_a_third_of_abnormal_images_is_no_shift(seed):
    scores = np.concatenate([drawn(seed, 200), drawn(100 + seed, 100, mean=5.0)])
    assert find_shift(scores, drawn(200 + seed, 150)) is None


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("mean", "side"), [(2.0, "above"), (-2.0, "below")])
def test_a_shift_is_found_in_both_directions(seed, mean, side):
    shift = find_shift(drawn(seed, 100, mean), drawn(100 + seed, 100))
    assert (shift.scored, shift.held_out) == (100, 100)
    assert (shift.above > 0.9) if side == "above" else (shift.above < 0.1)
    share = max(shift.above, 1 - shift.above)
    assert str(shift).startswith(f"the scores have shifted: {share:.0%} of 100 images lie {side} the median of the 100")
    assert "simsid adapt MODEL FOLDER -o NEW" in str(shift) and "simsid calibrate MODEL FOLDER --local" in str(shift)


@pytest.mark.parametrize(("scored", "held_out"), [(19, 100), (100, 19), (0, 100), (100, 0)])
def test_too_few_images_conclude_nothing(scored, held_out):
    assert find_shift(drawn(0, scored, 9.0), drawn(1, held_out)) is None


def test_equal_and_infinite_values_do_not_count_as_a_shift():
    assert find_shift(np.zeros(100), np.zeros(100)) is None
    scores = drawn(0, 100)
    assert find_shift(np.concatenate([scores, np.full(900, np.inf)]), drawn(1, 100)) is None


def test_scoring_an_archive_reports_the_shift_of_the_signal_that_scores(tmp_path):
    files = tiny.films(tmp_path / "data", 30)
    model = tiny.model(width=2, heads=1)
    same = tiny.images(40, 1)
    model.calibrate(same, same)
    held = np.array(model.calibration.holdout["residual"])
    # Images of almost black and almost white pixels have a higher residual than those of uniform noise.
    for i, path in enumerate(files):
        generator = np.random.default_rng(i)
        pixels = generator.choice([5, 245], (48, 48)) + generator.integers(0, 10, (48, 48))
        tiny.write_png(path, pixels.astype(np.uint8))
    summary = score(model, tmp_path / "data", tmp_path / "out", signal="residual")
    values = np.array([float(row["residual"]) for row in tiny.rows(tmp_path / "out" / "scores.csv")])
    assert summary.shift == find_shift(values, held) and summary.shift.scored == 30
    assert summary.shift.held_out == 40
