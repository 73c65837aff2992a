r"""Audited estimates: predictions corrected by entries that were drawn at random.

With R the n random entries and zhat^(-t) the row as it is predicted without the fold of entry t:

    mean = 1/n sum_{t in R} (mean_j zhat_j^(-t) + z_t - zhat_t^(-t))

which is unbiased, but for terms of 1 / N, whatever the predictions are, and the more precise the better they are; the share
above a threshold likewise, with indicators and the probabilities that the predictions give them. The variance of the terms is
pooled with the one that the predictions expect, since heavy tails and rare events hide in a few entries; for the share, that is
at least the variance of the surprises that the entries allow. Intervals are Student's: what none of few random entries shows
cannot be in them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import stats

from fastforget.prediction.robust import Posterior

__all__ = ["Audit", "Estimate", "audited"]

FOLDS = 10
PRIOR = 5  # weight of the expected variance, in entries


class Estimate(NamedTuple):
    """A number and its interval."""

    value: float
    low: float
    high: float


class Audit(NamedTuple):
    """What the random entries confirm about a row."""

    mean: Estimate
    """Mean forgetting of all examples, nats per token."""
    share: Estimate | None
    """Share of the examples above the threshold."""
    predicted_mean: float
    """What the predictions alone say."""
    sampled_mean: float
    """What the random entries alone say."""


def audited(
    posterior: Callable[[np.ndarray, np.ndarray], Posterior], columns: np.ndarray, values: np.ndarray, random: np.ndarray,
    threshold: float | None, level: float, seed: int,
) -> Audit:  # fmt: skip
    """Estimates of a row.

    Args:
        posterior: Of the row, given some of its entries.
        columns: `[S]` evaluated examples.
        values: `[S]`, finite.
        random: `[S]` bool, at least 3 of them.
        threshold: Of the share, or None.
        level: Of the intervals.
        seed: Of the folds.

    Returns:
        The estimates.
    """
    places = np.random.default_rng(seed).permutation(np.flatnonzero(random))
    terms, expected, surprises = [], [], 0  # of the mean and of the share
    limit = np.inf if threshold is None else threshold
    for fold in np.array_split(places, min(FOLDS, len(places))):
        rest = np.ones(len(columns), bool)
        rest[fold] = False
        row = posterior(columns[rest], values[rest])
        here, now, above = columns[fold], values[fold], _above(row, limit)
        terms.append(np.stack([row.mean.mean() + now - row.mean[here], above.mean() + (now > limit) - above[here]]))
        variances = np.array([np.square(row.std).mean(), (above * (1 - above)).mean()])
        expected.append(np.repeat(variances[:, None], len(fold), 1))
        surprises += int((np.abs((now > limit) - above[here]) > 0.5).sum())
    variances = np.nan_to_num(np.concatenate(expected, 1).mean(1))
    rate = (surprises + 1) / (len(places) + 2)
    variances[1] = max(variances[1], rate * (1 - rate))
    whole = posterior(columns, values).mean.copy()
    mean, share = _interval(np.concatenate(terms, 1), variances, len(whole), level)
    share = Estimate(*(min(max(number, 0.0), 1.0) for number in share))
    whole[columns] = values
    return Audit(mean, None if threshold is None else share, float(whole.mean()), float(values[random].mean()))


def _above(row: Posterior, threshold: float) -> np.ndarray:
    """The probability of each entry to be above a threshold."""
    with np.errstate(divide="ignore", invalid="ignore"):  # of a row without noise
        return np.nan_to_num(stats.norm.sf((threshold - row.mean) / row.std), nan=0.0)


def _interval(terms: np.ndarray, expected: np.ndarray, total: int, level: float) -> list[Estimate]:
    """Of the means of terms `[2, n]`, whose variances are expected to be `[2]`, drawn without replacement from `total`."""
    count = terms.shape[1]
    variance = ((count - 1) * terms.var(1, ddof=1) + PRIOR * expected) / (count - 1 + PRIOR)
    half = stats.t.ppf(0.5 + level / 2, count - 1 + PRIOR) * np.sqrt(variance / count * max(1 - count / total, 0.0))
    return [
        Estimate(float(value), float(value - h), float(value + h)) for value, h in zip(terms.mean(1), half, strict=True)
    ]
