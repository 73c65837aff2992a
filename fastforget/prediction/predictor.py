"""`ForgettingPredictor`: what a new task forgets, from a few evaluated examples and a forgetting matrix of other tasks."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import stats

from fastforget.prediction.audit import Audit, audited
from fastforget.prediction.baselines import Additive, BiasedFactors, LogisticFactors, Neighbours, Similarity
from fastforget.prediction.matrices import known_entries, matrix_values
from fastforget.prediction.robust import Posterior, RobustFactors, Settings

if TYPE_CHECKING:
    from fastforget.matrix import ForgettingMatrix

__all__ = ["Columns", "ForgettingPredictor", "Screening"]

BASELINES = {
    "additive": Additive,
    "knn": Neighbours,
    "svd": BiasedFactors,
    "logistic": LogisticFactors,
    "similarity": Similarity,
}
TAIL = 8.0  # degrees of freedom of a prediction's error over its standard deviation
LEFT_OUT = 30  # tasks that a baseline's error is measured on
DRAWS = 400  # of a row, from which a screening's recall is expected; fewer of a row longer than 100,000


class Columns(NamedTuple):
    """Which examples to evaluate for a new task."""

    columns: np.ndarray
    """`[S]` int64."""
    random: np.ndarray
    """`[S]` bool: drawn at random, as `audit` needs it; the others were chosen."""


class Screening(NamedTuple):
    """The predicted most forgotten examples."""

    columns: np.ndarray
    """`[k]` int64, the worst first; those that are evaluated already among them."""
    expected_recall: float
    """Share of the true k most forgotten that is expected among them."""


class ForgettingPredictor:
    """Predict a task's row of the forgetting matrix from S of its entries, with their uncertainty.

    Args:
        method: "robust" (factors with a heavy-tailed noise, see `fastforget.prediction.robust`), "svd" (the paper's biased
            factorisation), "additive", "knn", "similarity" (of the examples' representations), or "logistic" for a binary
            matrix, whose predictions are probabilities.
        **settings: Of the method. "similarity" needs `representations` `[N, H]`, see `example_representations`.

    Raises:
        ValueError: The method is unknown.

    References:
        Jin and Ren, "Demystifying language model forgetting with low-rank example associations", arXiv 2406.14026.
    """

    def __init__(self, method: str = "robust", **settings: Any) -> None:
        if method not in ("robust", *BASELINES):
            names = ", ".join(map(repr, ("robust", *BASELINES)))
            raise ValueError(f"method: expected one of {names}, got {method!r}")
        if method == "similarity" and settings.get("representations") is None:
            raise ValueError(
                'representations: expected [N, H] with method="similarity", got None; see example_representations'
            )
        own = Settings if method == "robust" else BASELINES[method]
        known = [name for name in inspect.signature(own).parameters if name != "values"]
        odd = sorted(settings.keys() - set(known))
        if odd:
            raise ValueError(f"{odd[0]}: expected a setting of method={method!r} ({', '.join(known)}), got {odd[0]!r}")
        if method == "robust":
            Settings(**settings).check()
        self.method, self.settings = method, settings
        self._known: np.ndarray | None = None
        self._examples: list[str] | None = None
        self._column_of: dict[str, int] = {}
        self._model: Any = None
        self._errors: dict[int, float] = {}

    def __repr__(self) -> str:
        """One line."""
        settings = "".join(f", {name}={_short(value)}" for name, value in self.settings.items())
        shape = "not fitted" if self._known is None else "fitted to {} tasks x {:,} examples".format(*self._known.shape)
        return f"ForgettingPredictor({self.method!r}{settings}), {shape}"

    def fit(self, matrix: ForgettingMatrix | np.ndarray) -> ForgettingPredictor:
        """Learn from the tasks that are known.

        Args:
            matrix: A forgetting matrix, or its values, `[M, N]`, NaN or infinite where unknown. Tasks without any value are
                left out, with a warning; examples without any are predicted by what all have in common.

        Returns:
            The predictor itself.

        Raises:
            ValueError: There is no value, or the values are not of the method's kind.
        """
        values = matrix_values(matrix)
        values = np.where(np.isfinite(values), values, np.nan)
        empty = ~np.isfinite(values).any(1)
        if empty.any():
            warnings.warn(
                f"matrix: {int(empty.sum())} tasks without a finite value are left out", RuntimeWarning, stacklevel=2
            )
        self._known = values[~empty]
        self._examples, self._column_of = getattr(matrix, "examples", None), {}
        self._model, self._errors = self._fitted(self._known), {}
        return self

    def choose_columns(
        self,
        count: int,
        *,
        random: int | None = None,
        seed: int = 0,
        columns: Any = None,
        values: Any = None,
    ) -> Columns:
        """Which examples to evaluate for a new task: those that take away most of the prediction's variance, and random ones.

        The random ones keep the audit honest, and protect against a task that is unlike the known ones. After some entries
        are seen, `columns` and `values` make the next choice depend on them.

        Args:
            count: S, how many to evaluate now.
            random: How many of them are drawn at random; default: half of them, and none where `columns` are given. A method
                without a variance has all of them random.
            seed: Of the draw.
            columns: `[R]` columns that are evaluated already, or ids.
            values: `[R]` their values, NaN where one could not be had.

        Returns:
            The columns, the chosen ones first, and which are random.

        Raises:
            ValueError: There are not so many examples left, or a number is outside its range.
        """
        model, known = self._fit(), self._known
        total = 0 if known is None else known.shape[1]
        given = [] if columns is None else columns
        known_columns, known_values = self._revealed(given, [] if values is None else values)
        seen = np.unique(self._columns(given)).astype(np.int64)  # what could not be evaluated is not chosen again
        if not isinstance(count, int | np.integer) or not 0 <= count <= total - len(seen):
            raise ValueError(
                f"count: expected an integer from 0 to {total - len(seen)} examples not seen, got {count!r}"
            )
        chooses = isinstance(model, RobustFactors)
        if random is None or not chooses:
            random = count if not chooses else 0 if len(seen) else -(-count // 2)
        if not 0 <= random <= count:
            raise ValueError(f"random: expected an integer from 0 to count = {count}, got {random}")
        free = np.setdiff1d(np.arange(total), seen)
        drawn = np.random.default_rng(seed).choice(free, random, replace=False)
        best = np.zeros(0, np.int64)
        if chooses:
            posterior = model.posterior(known_columns, known_values) if len(known_columns) else None
            best = model.choose(count - random, drawn, posterior, seen)
        return Columns(np.concatenate([best, drawn]), np.arange(count) >= count - random)

    def predict(self, columns: Any, values: Any, *, return_std: bool = False) -> Any:
        """A new task's row.

        Args:
            columns: `[S]` evaluated examples: columns, or, after a fit to a `ForgettingMatrix`, its examples' ids.
            values: `[S]` their forgetting; NaN is left out.
            return_std: Also return the standard deviation of each prediction's error.

        Returns:
            `[N]` float64, the evaluated entries as they are; with `return_std` a pair, 0 at the evaluated entries.

        Raises:
            ValueError: The predictor is not fitted, a column is out of range, or is given twice with two values.
        """
        columns, values = self._revealed(columns, values)
        posterior = self._posterior(columns, values)
        mean, std = posterior.mean.copy(), posterior.std.copy()
        mean[columns], std[columns] = values, 0.0
        return (mean, std) if return_std else mean

    def predict_interval(self, columns: Any, values: Any, *, level: float = 0.9) -> tuple[np.ndarray, np.ndarray]:
        """Intervals that hold a share `level` of the entries.

        Args:
            columns: As for `predict`.
            values: As for `predict`.
            level: Between 0 and 1.

        Returns:
            Lower and upper bounds, each `[N]`.

        Raises:
            ValueError: As for `predict`, or the level is outside its range.
        """
        _check_level(level)
        mean, std = self.predict(columns, values, return_std=True)
        half = std * np.sqrt((TAIL - 2) / TAIL) * stats.t.ppf(0.5 + level / 2, TAIL)
        return mean - half, mean + half

    def audit(
        self,
        columns: Any,
        values: Any,
        random: Any,
        *,
        threshold: float | None = None,
        level: float = 0.9,
        seed: int = 0,
    ) -> Audit:
        """The row's mean, and its share above a threshold, corrected so that wrong predictions do not mislead.

        Predictions of the whole row, corrected by what the random entries show of their error. Each random entry is predicted
        without itself.

        Args:
            columns: As for `predict`.
            values: As for `predict`.
            random: `[S]` bool: which of them were drawn at random from all examples, as `choose_columns` says.
            threshold: Also estimate the share of examples that are forgotten by more.
            level: Of the intervals.
            seed: Of the folds.

        Returns:
            The estimates.

        Raises:
            ValueError: As for `predict`, or fewer than three entries are random.
        """
        _check_level(level)
        self._fit()
        if threshold is not None and not np.isfinite(threshold):
            raise ValueError(f"threshold: expected a finite number or None, got {threshold}")
        columns, values, random = self._columns(columns), np.asarray(values), np.asarray(random)
        if random.shape != columns.shape or random.dtype != bool:
            raise ValueError(f"random: expected bool {columns.shape} like columns, got {random.dtype} {random.shape}")
        known = ~np.isnan(values.astype(np.float64))
        columns, values, random = columns[known], values[known], random[known]
        kept, kept_values = self._revealed(columns, values)
        if len(kept) != len(columns):
            raise ValueError("columns: expected every column once, got one twice")
        if random.sum() < 3:
            raise ValueError(f"random: expected at least 3 random entries, got {int(random.sum())}; see choose_columns")
        return audited(self._posterior, kept, kept_values, random, threshold, level, seed)

    def screen(self, columns: Any, values: Any, k: int, *, seed: int = 0) -> Screening:
        """The k examples that are predicted to be forgotten most, to be evaluated exactly.

        Args:
            columns: As for `predict`.
            values: As for `predict`.
            k: How many.
            seed: Of the draws that the recall is expected from.

        Returns:
            Them, and the recall to expect.

        Raises:
            ValueError: As for `predict`, or k is outside its range.
        """
        mean, std = self.predict(columns, values, return_std=True)
        if not isinstance(k, int | np.integer) or not 1 <= k <= len(mean):
            raise ValueError(f"k: expected an integer from 1 to N = {len(mean)}, got {k!r}")
        worst = np.argsort(-mean, kind="stable")[:k]
        generator = np.random.default_rng(seed)
        found = 0
        draws = min(DRAWS, max(DRAWS * 100_000 // len(mean), 20)) if k < len(mean) else 0
        for _ in range(draws):
            row = mean + std * np.sqrt((TAIL - 2) / TAIL) * generator.standard_t(TAIL, len(mean))
            found += int((row[worst] >= np.partition(row, -k)[-k]).sum())
        return Screening(worst, found / (draws * k) if draws else 1.0)

    # Inside -----------------------------------------------------------------------------------------------------------

    def _fitted(self, values: np.ndarray) -> Any:
        if self.method == "robust":
            return RobustFactors(values, Settings(**self.settings))
        return BASELINES[self.method](values, **self.settings)

    def _fit(self) -> Any:
        if self._model is None:
            raise ValueError("predictor: expected a fitted one; call fit(matrix) first")
        return self._model

    def _posterior(self, columns: np.ndarray, values: np.ndarray) -> Posterior:
        model = self._fit()
        if isinstance(model, RobustFactors):
            return model.posterior(columns, values)
        mean = model.predict(columns, values)
        return Posterior(mean, np.full(len(mean), self._error(len(columns))), np.zeros((0, 0)), 1.0)

    def _error(self, count: int) -> float:
        """Root mean squared error of a baseline with so many random entries, over known tasks that are left out."""
        known = self._known
        if known is None or len(known) < 2:
            return float("nan")
        if count not in self._errors:
            generator, squares, total = np.random.default_rng(0), 0.0, 0
            for i in np.linspace(0, len(known) - 1, min(LEFT_OUT, len(known))).astype(int):
                rest, own = np.delete(known, i, 0), np.flatnonzero(np.isfinite(known[i]))
                columns = generator.choice(own, min(count, len(own)), replace=False)
                error = self._fitted(rest).predict(columns, known[i, columns])[own] - known[i, own]
                error = error[~np.isin(own, columns)]
                squares, total = squares + float(error @ error), total + len(error)
            self._errors[count] = np.sqrt(squares / max(total, 1))
        return self._errors[count]

    def _columns(self, columns: Any) -> np.ndarray:
        """Columns; ids are looked up."""
        columns = np.asarray(columns)
        if columns.dtype.kind not in "UOT" or columns.ndim != 1 or not columns.size:
            return columns
        if self._examples is None:
            raise ValueError(
                f"columns: expected integers after a fit to plain values, got {columns.tolist()[0]!r}; fit to a "
                "ForgettingMatrix to use ids"
            )
        self._column_of = self._column_of or {name: j for j, name in enumerate(self._examples)}
        unknown = [name for name in columns.tolist() if name not in self._column_of]
        if unknown:
            raise ValueError(f"columns: expected ids of the fitted matrix, got {unknown[0]!r}; see its .examples")
        return np.array([self._column_of[name] for name in columns.tolist()], np.int64)

    def _revealed(self, columns: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
        """The entries that are known, each once."""
        self._fit()
        total = 0 if self._known is None else self._known.shape[1]
        columns, values = known_entries(self._columns(columns), values, total)
        unique, first, place = np.unique(columns, return_index=True, return_inverse=True)
        if len(unique) == len(columns):
            return columns, values
        if (values != values[first][place]).any():
            raise ValueError("columns: expected one value a column, got a column with two")
        return unique, values[first]


def _short(value: Any) -> str:
    return f"[{' x '.join(map(str, value.shape))}]" if hasattr(value, "shape") else repr(value)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
