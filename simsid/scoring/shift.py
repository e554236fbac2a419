"""Notices scored images that do not resemble those the threshold rests on, as after a change of scanner."""

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

FEWEST = 20
"""Scored images, and held-out normal ones, below which nothing is concluded."""

SHARE = 0.75
"""Share of images above (or below) the calibration's median from which a shift is reported. Images of the calibration's
distribution of which a fraction q is abnormal have at most 1/2 + q/2 above it: half of them may be abnormal."""

SIGNIFICANCE = 0.001
"""Largest probability of such a share by chance."""


@dataclass(frozen=True)
class Shift:
    """How far scored images lie from the calibration.

    Args:
        above: share of the scored images above the median of the held-out normal images.
        scored: number of images scored.
        held_out: number of held-out normal images.
    """

    above: float
    scored: int
    held_out: int

    def __str__(self) -> str:
        side, share = ("above", self.above) if self.above > 0.5 else ("below", 1 - self.above)
        return (
            f"the scores have shifted: {share:.0%} of {self.scored} images lie {side} the median of the "
            f"{self.held_out} normal images that set the threshold, which therefore does not hold here; with normal "
            "images of the same origin, adapt a feature memory (simsid adapt MODEL FOLDER -o NEW) or recalibrate any "
            "model (simsid calibrate MODEL FOLDER --local -o NEW)"
        )


def find_shift(scores: np.ndarray, held_out: np.ndarray) -> Shift | None:
    """Compare the signal of scored images, `[n]`, with that of held-out normal images, `[m]`; None where they agree.

    Reported is a share above or below the median of the held-out images of at least 75 % that chance gives with a
    probability below 0.001 (two-sided, normal approximation, with the uncertainty of a median of m images added).
    """
    scores, held_out = np.asarray(scores, np.float64), np.asarray(held_out, np.float64)
    scores = scores[np.isfinite(scores)]
    if len(scores) < FEWEST or len(held_out) < FEWEST:
        return None
    median = np.median(held_out)
    above = float(np.mean(scores > median) + 0.5 * np.mean(scores == median))
    # Of normal images of the same distribution, the share above a median of m others has this standard deviation.
    deviation = 0.5 * (1 / len(scores) + 1 / len(held_out)) ** 0.5
    chance = 2 * NormalDist().cdf(-abs(above - 0.5) / deviation)
    if max(above, 1 - above) < SHARE or chance > SIGNIFICANCE:
        return None
    return Shift(above, len(scores), len(held_out))
