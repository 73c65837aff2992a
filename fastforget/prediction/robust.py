r"""The robust predictor: factors of the tasks that are known, and a posterior for a new one under heavy-tailed noise.

Row i of a forgetting matrix, over N examples j:

    z_ij = m_j + a_i + c_i m_j + sum_k f_ik l_jk + e_ij,      e_ij ~ Student-t_nu(0, s_i^2 psi_j)

with m the examples' means, a_i an offset, c_i a scale, f_i factors whose loadings l are the leading singular directions of
Z - m, psi_j an example's own noise and s_i^2 a task's. Priors: f_ik ~ N(0, shrinkage), c_i ~ N(0, its variance among the known
tasks), s_i^2 near 1, and a_i ~ N(0, mean(Z^2)), which is nearly flat: a task unlike all others moves everything at once, and
must not be explained by factors. The posterior is Gaussian given the weights of the noise and s^2, which are iterated (EM).
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np

__all__ = ["Posterior", "RobustFactors", "Settings", "decompose"]


@dataclass(frozen=True)
class Settings:
    """The model's constants; the defaults and why they are these: `benchmarks/NOTES.md`.

    Attributes:
        rank: Factors at most.
        freedom: nu, degrees of freedom of the noise.
        shrinkage: Prior variance of a factor, of unit variance among the known tasks.
        pooling: From 0, every example's own noise, to 1, the same noise for all.
        inflation: Of psi, which the fit to the known tasks makes too small.
        steadiness: Weight of the prior of s^2, in entries.
        outlier: Entries of the known tasks further from the fit, in robust standard deviations, count as unknown.
        iterations: Of the posterior.
    """

    rank: int = 10
    freedom: float = 5.0
    shrinkage: float = 0.5
    pooling: float = 0.25
    inflation: float = 1.5
    steadiness: float = 5.0
    outlier: float = 6.0
    iterations: int = 20

    def check(self) -> None:
        """Refuse constants that the model cannot have.

        Raises:
            ValueError: One is outside its range.
        """
        for name in ("rank", "iterations"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 0:
                raise ValueError(f"{name}: expected an integer >= 0, got {value!r}")
        for name in ("freedom", "shrinkage", "inflation", "steadiness", "outlier"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}: expected a number > 0, got {getattr(self, name)!r}")
        if not 0 <= self.pooling <= 1:
            raise ValueError(f"pooling: expected a number from 0 to 1, got {self.pooling!r}")


@dataclass(frozen=True)
class Posterior:
    """What is known of a new task.

    Attributes:
        mean: `[N]`.
        std: `[N]` of a new entry, the noise included.
        covariance: `[K, K]` of offset, scale and factors.
        spread: s^2.
    """

    mean: np.ndarray
    std: np.ndarray
    covariance: np.ndarray
    spread: float


def decompose(values: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Column means and the leading singular directions of what is left, by the `[M, M]` Gram matrix: M is small, N is not.

    Args:
        values: float64 `[M, N]`, finite.
        rank: r, at most M.

    Returns:
        Means `[N]`, left vectors `[M, r]`, and right vectors times singular values `[N, r]`.
    """
    mean = values.mean(0)
    centred = values - mean
    _, vectors = np.linalg.eigh(centred @ centred.T)
    left = vectors[:, ::-1][:, :rank]
    return mean, left, centred.T @ left


class RobustFactors:
    """The fitted model.

    Args:
        values: `[M, N]`; NaN where unknown.
        settings: The model's constants.

    Attributes:
        mean: `[N]` m.
        loadings: `[N, K]` of offset, scale and factors, whose prior is N(0, 1).
        noise: `[N]` psi.
    """

    def __init__(self, values: np.ndarray, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        known = np.isfinite(values)
        filled, fit, left, right = self._fill(values, known)
        rows = len(values)
        self.mean = filled.mean(0)
        squares = np.where(known, filled - fit, 0.0) ** 2
        freedom = np.maximum(known.sum(0) - 1 - left.shape[1], 1)
        noise = squares.sum(0) / freedom if rows > 1 else np.full(values.shape[1], np.square(filled).mean())
        least = 1e-9 * np.square(filled).mean() or 1.0  # of a matrix without noise, whose rounding is none
        self.noise = self._pooled(noise, known.sum(0) > left.shape[1] + 1, least) * self.settings.inflation
        centred = filled - self.mean
        shape = self.mean - self.mean.mean()
        spread = np.square(shape).sum()
        flat = (
            spread <= 1e-20 * np.square(self.mean).sum()
        )  # rounding: every example is forgotten alike, or there is one
        slopes = np.zeros(rows) if flat else centred @ shape / spread
        deviations = np.sqrt([np.square(filled).mean(), slopes.var()])
        common = np.stack([np.ones_like(self.mean), self.mean], 1) * deviations
        self.loadings = np.concatenate([common, right * np.sqrt(self.settings.shrinkage / rows)], 1)

    def _fill(self, values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, ...]:
        """Values with outliers and unknown entries at the fit; the fit; its left and right vectors."""
        rank = max(min(self.settings.rank, len(values) - 2), 0)
        fit, left, right = _medians(np.where(known, values, np.nan)), np.zeros((len(values), 0)), np.zeros((1, 0))
        filled = fit
        # One factor more in each round, so that outliers are known before there are enough factors to fit them.
        for factors in [*range(rank + 1), *[rank] * (2 if known.all() else 8)]:
            filled = fit + self._inside(np.where(known, values - fit, np.nan))
            mean, left, right = decompose(filled, factors)
            fit = mean + left @ right.T
        return filled, fit, left, right

    def _inside(self, residuals: np.ndarray) -> np.ndarray:
        """Residuals; 0 where they are unknown, or too large for their row and column."""
        away = np.abs(residuals)
        column = _median(away, 0) / 0.6745
        row = _median(away / np.maximum(column, 1e-300), 1)[:, None] / 0.6745
        limit = self.settings.outlier * column * row
        return np.where((away <= limit) | (limit == 0), np.nan_to_num(residuals), 0.0)

    def _pooled(self, noise: np.ndarray, enough: np.ndarray, least: float) -> np.ndarray:
        """Each example's noise drawn to the mean; the mean where there are too few entries."""
        average = max(noise[enough].mean() if enough.any() else noise.mean(), least)
        noise = np.where(enough, np.maximum(noise, 1e-9 * average), average)
        return noise ** (1 - self.settings.pooling) * average**self.settings.pooling

    def posterior(self, columns: np.ndarray, values: np.ndarray) -> Posterior:
        """A new task, of which some entries are known.

        Args:
            columns: `[S]` int64.
            values: `[S]`, finite.

        Returns:
            The posterior of all entries.
        """
        settings, loadings, noise = self.settings, self.loadings[columns], self.noise[columns]
        error, spread, weights = values - self.mean[columns], 1.0, np.ones(len(columns))
        covariance, scores = np.eye(self.loadings.shape[1]), np.zeros(self.loadings.shape[1])
        for _ in range(settings.iterations if len(columns) else 0):
            precise = loadings * (weights / (noise * spread))[:, None]
            size, axes = np.linalg.eigh(loadings.T @ precise)  # (I + it)^-1, however much larger it is than I
            covariance = (axes / (1.0 + np.maximum(size, 0.0))) @ axes.T
            scores = covariance @ (precise.T @ error)
            uncertain = np.einsum("ij,jk,ik->i", loadings, covariance, loadings)
            squares = ((error - loadings @ scores) ** 2 + uncertain) / noise
            spread = (weights @ squares + settings.steadiness) / (len(columns) + settings.steadiness)
            weights = (settings.freedom + 1) / (settings.freedom + squares / spread)
        variance = np.einsum("ij,jk,ik->i", self.loadings, covariance, self.loadings) + spread * self.noise
        return Posterior(self.mean + self.loadings @ scores, np.sqrt(variance), covariance, float(spread))

    def choose(
        self, count: int, known: np.ndarray, posterior: Posterior | None = None, seen: np.ndarray | None = None
    ) -> np.ndarray:
        """The columns that take away most of the predictive variance of all entries, one after the other.

        Args:
            count: How many.
            known: Columns that will be evaluated anyway.
            posterior: After others were seen.
            seen: Those, and others that are not to be chosen.

        Returns:
            `[count]` int64, none of the known or seen.
        """
        loadings, noise = self.loadings, self.noise * (1.0 if posterior is None else posterior.spread)
        covariance = np.eye(loadings.shape[1]) if posterior is None else posterior.covariance
        gram, free = loadings.T @ loadings, np.ones(len(loadings), bool)
        free[known] = False
        free[np.zeros(0, np.int64) if seen is None else seen] = False
        for j in known:
            covariance = _observed(covariance, loadings[j], noise[j])
        chosen = []
        for _ in range(count):
            along = loadings @ covariance  # [N, K]
            removed = np.einsum("ij,jk,ik->i", along, gram, along) / (noise + np.einsum("ij,ij->i", along, loadings))
            chosen.append(int(np.where(free, removed, -1.0).argmax()))
            free[chosen[-1]] = False
            covariance = _observed(covariance, loadings[chosen[-1]], noise[chosen[-1]])
        return np.array(chosen, np.int64)


def _observed(covariance: np.ndarray, loading: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """The covariance of the scores after one more entry is seen."""
    along = covariance @ loading
    return covariance - np.outer(along, along) / (noise + loading @ along)


def _median(values: np.ndarray, axis: int) -> np.ndarray:
    """Median of the known entries, 0 where there are none."""
    lines = values if axis else values.T
    holes = np.isnan(lines).any(1)
    result = np.empty(len(lines))
    result[~holes] = np.median(lines[~holes], 1)  # nanmedian takes ten times as long
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # columns and rows without a known entry
        result[holes] = np.nan_to_num(np.nanmedian(lines[holes], 1))
    return result


def _medians(values: np.ndarray) -> np.ndarray:
    """Row median + column median: a start that a few wrong entries do not move. Columns without a known entry are as all."""
    rows = _median(values, 1)[:, None]
    columns = np.where(np.isfinite(values).any(0), _median(values - rows, 0), 0.0)
    return rows + columns
