r"""The predictors of the literature: a new task's row z of a forgetting matrix from S of its N entries and M known rows.

    additive    z_ij = mu + a_i + b_j
    neighbours  z_ij = mu + a_i + b_j + sum_k s_ik (z_kj - mu - a_k - b_j) / sum_k s_ik     over the k most similar tasks
    svd         z_ij = mu + a_i + b_j + p_i . q_j
    logistic    P(z_ij = 1) = sigmoid(mu + a_i + b_j + p_i . q_j)
    similarity  z_ij = m_j + sum_k w_jk (z_ik - m_k),   w_jk = softmax_k(cosine(h_j, h_k) / temperature)   over revealed k

Biases and factors have an L2 penalty and are exact or alternating minimisers; a new row is the minimiser over its own
parameters, given the columns'. NaN is an unknown entry. An example that no task knows is predicted without its own terms:
at mu + a_i (at sigmoid(mu + a_i), and for the similarity at mu plus the weighted mean). The defaults are those of
leave-one-task-out cross-validation (`benchmarks/NOTES.md`).

References:
    Jin & Ren, "Demystifying Language Model Forgetting with Low-rank Example Associations", arXiv 2406.14026, section 4.
    Koren, "Factor in the neighbors: scalable and accurate collaborative filtering", ACM TKDD 2010.
    Sun & Tran-Dinh, "Generalized self-concordant functions", Mathematical Programming 2019, for the damped Newton step.
"""

from __future__ import annotations

import numpy as np

from fastforget.prediction.matrices import known_entries
from fastforget.prediction.robust import decompose

__all__ = ["Additive", "BiasedFactors", "LogisticFactors", "Neighbours", "Similarity"]


class _Predictor:
    """Of N examples: checks what it is given."""

    def __init__(self, examples: int) -> None:
        self.examples = examples

    def predict(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        """A new task.

        Args:
            columns: `[S]` integers, distinct; none is fine.
            values: `[S]`; NaN where unknown after all.

        Returns:
            `[N]`, of the revealed entries too; probabilities of 1 with `LogisticFactors`.
        """
        return self._row(*known_entries(columns, values, self.examples))

    def _row(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The prediction from checked entries."""
        raise NotImplementedError


class Additive(_Predictor):
    """Offsets of tasks and examples: `sum (z_ij - mu - a_i - b_j)^2 + row_penalty |a|^2 + column_penalty |b|^2`, exactly.

    Args:
        values: `[M, N]`; NaN where unknown.
        row_penalty: In entries: a task of as many known entries has its offset halved.
        column_penalty: The same for examples.

    Attributes:
        mean: mu, of all known entries.
        rows: `[M]` a.
        columns: `[N]` b.
    """

    def __init__(self, values: np.ndarray, row_penalty: float = 2.0, column_penalty: float = 1.0) -> None:
        values, known = _matrix(values)
        super().__init__(values.shape[1])
        _positive(row_penalty=row_penalty, column_penalty=column_penalty)
        self.row_penalty, self.mean = row_penalty, float(values[known].mean())
        centred, weights = np.where(known, values - self.mean, 0.0), known.astype(np.float64)
        diagonal = weights.sum(0) + column_penalty  # [N]
        # b is eliminated, which leaves M equations.
        matrix = np.diag(weights.sum(1) + row_penalty) - (weights / diagonal) @ weights.T
        self.rows = np.linalg.solve(matrix, centred.sum(1) - weights @ (centred.sum(0) / diagonal))
        self.columns = (centred.sum(0) - self.rows @ weights) / diagonal

    def fit(self) -> np.ndarray:
        """`[M, N]` of the known tasks."""
        return self.mean + self.rows[:, None] + self.columns

    def _row(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        offset = (values - self.mean - self.columns[columns]).sum() / (len(columns) + self.row_penalty)
        return self.mean + self.columns + offset


class Neighbours(_Predictor):
    """The additive model, and what the most similar known tasks differ from it by.

    The similarity is `s_ik = 1 / (d_ik / v + floor)`, with d the mean squared difference of the tasks on the revealed
    examples and v the variance of all known entries, which makes it free of units; 0 without a common example.

    Args:
        values: `[M, N]`; NaN where unknown.
        neighbours: k. Of every example those that know it are counted.
        floor: Above 0; the smaller it is, the more the nearest task counts.

    Attributes:
        additive: The additive model of the known tasks.
        residuals: `[M, N]`, what it leaves; 0 where unknown.
    """

    def __init__(self, values: np.ndarray, neighbours: int = 10, floor: float = 0.01) -> None:
        self._values, self._known = _matrix(values)
        super().__init__(self._values.shape[1])
        _positive(neighbours=neighbours, floor=floor)
        self._variance = float(self._values[self._known].var()) or 1.0
        self.neighbours, self.floor, self.additive = neighbours, floor, Additive(values)
        self.residuals = np.where(self._known, self._values - self.additive.fit(), 0.0)

    def _row(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        common = self._known[:, columns]  # [M, S]
        squares = np.where(common, self._values[:, columns] - values, 0.0) ** 2
        distance = squares.sum(1) / np.maximum(common.sum(1), 1)
        similarity = np.where(common.any(1), 1 / (distance / self._variance + self.floor), 0.0)
        order = np.argsort(-similarity, kind="stable")
        nearest = self._known[order]  # [M, N], becomes those of every column that are counted
        nearest &= nearest.cumsum(0, dtype=np.int32) <= self.neighbours
        total = similarity[order] @ nearest
        moved = similarity[order] @ (nearest * self.residuals[order])
        return self.additive.predict(columns, values) + moved / np.where(total > 0, total, 1.0)


class BiasedFactors(_Predictor):
    """Biased matrix factorisation, by alternating ridge regressions.

        sum over known ij of (z_ij - mu - a_i - b_j - p_i . q_j)^2 + penalty (a_i^2 + b_j^2 + |p_i|^2 + |q_j|^2)

    with z in units of the standard deviation of the known entries. A penalty an entry is what the stochastic gradient
    descent of Surprise's SVD has, which the paper uses.

    Args:
        values: `[M, N]`; NaN where unknown.
        rank: r; one less than M or N at most is used.
        penalty: Above 0.
        sweeps: Alternations.

    Attributes:
        mean: mu, in units of `scale`.
        rows: `[M, 1 + r]` a and p.
        columns: `[N, 1 + r]` b and q.
        scale: Standard deviation of the known entries.
    """

    def __init__(self, values: np.ndarray, rank: int = 5, penalty: float = 0.05, sweeps: int = 20) -> None:
        values, known = _matrix(values)
        super().__init__(values.shape[1])
        _positive(penalty=penalty)
        self.penalty, self.scale = penalty, float(values[known].std()) or 1.0
        values = values / self.scale
        additive = Additive(values)
        left, right = _balanced(np.where(known, values - additive.fit(), 0.0), rank)
        self.mean = additive.mean
        self.rows, self.columns = np.c_[additive.rows, left], np.c_[additive.columns, right]
        for _ in range(sweeps):
            self.columns = _ridge(values.T - self.mean - self.rows[:, 0], known.T, _with_one(self.rows), penalty)
            self.rows = _ridge(values - self.mean - self.columns[:, 0], known, _with_one(self.columns), penalty)

    def _row(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        features, fixed = _with_one(self.columns), self.mean + self.columns[:, 0]
        errors = (values / self.scale - fixed[columns])[None]
        row = _ridge(errors, np.ones(errors.shape, bool), features[columns], self.penalty)[0]
        return self.scale * (fixed + features @ row)


class LogisticFactors(_Predictor):
    """Logistic matrix factorisation, for a matrix of exact matches: 1 is forgotten, 0 is not.

        sum over known ij of -log P(z_ij) + penalty / 2 (|p_i|^2 + |q_j|^2)  +  bias_penalty / 2 (|a|^2 + |b|^2)

    by alternating Newton steps (iteratively reweighted least squares), damped so that none can increase the loss.

    Args:
        values: `[M, N]` of 0 and 1; NaN where unknown.
        rank: r; one less than M or N at most is used.
        penalty: Above 0, of factors, once an entry.
        bias_penalty: Above 0, of biases, each once.
        sweeps: Alternations; as many Newton steps for a new row.

    Attributes:
        mean: mu, the logit of the share of ones, each of 0 and 1 counted once more.
        rows: `[M, 1 + r]` a and p.
        columns: `[N, 1 + r]` b and q.
    """

    def __init__(
        self, values: np.ndarray, rank: int = 5, penalty: float = 0.04, bias_penalty: float = 0.1, sweeps: int = 20
    ) -> None:
        values, known = _matrix(values)
        super().__init__(values.shape[1])
        _binary(values[known])
        _positive(penalty=penalty, bias_penalty=bias_penalty, sweeps=sweeps)
        self.penalty, self.bias_penalty, self.sweeps = penalty, bias_penalty, sweeps
        ones = values[known].sum()
        self.mean = float(np.log((ones + 1) / (known.sum() - ones + 1)))
        self.rows, self.columns = np.zeros((len(values), 1)), np.zeros((values.shape[1], 1))
        self._alternate(values, known, sweeps=5)
        left, right = _balanced(np.where(known, values - self.probabilities(), 0.0), rank)
        self.rows, self.columns = np.c_[self.rows, left], np.c_[self.columns, right]
        self._alternate(values, known, sweeps)

    def probabilities(self) -> np.ndarray:
        """`[M, N]` of 1, for the known tasks."""
        return _sigmoid(self.mean + self.rows[:, :1] + _with_one(self.rows) @ self.columns.T)

    def _alternate(self, values: np.ndarray, known: np.ndarray, sweeps: int) -> None:
        """Newton steps of all columns and of all rows in turn."""
        for _ in range(sweeps):
            self.columns = self._stepped(self.columns, values.T, known.T, self.rows)
            self.rows = self._stepped(self.rows, values, known, self.columns)

    def _stepped(self, start: np.ndarray, values: np.ndarray, known: np.ndarray, others: np.ndarray) -> np.ndarray:
        """`[I, 1 + r]` one side of `values` `[I, J]` after a Newton step from `start`, given the other side `[J, 1 + r]`."""
        features, size = _with_one(others), start.shape[1]
        penalties = np.maximum(known.sum(1), 1)[:, None] * np.full(size, self.penalty)  # [I, 1 + r]
        penalties[:, 0] = self.bias_penalty
        chances = _sigmoid(self.mean + others[:, 0] + start @ features.T)  # [I, J]
        gradient = np.where(known, chances - values, 0.0) @ features + penalties * start
        curvature = (np.where(known, chances * (1 - chances), 0.0) @ _outer(features)).reshape(-1, size, size)
        step = np.linalg.solve(curvature + penalties[:, :, None] * np.eye(size), gradient[:, :, None])[:, :, 0]
        # Along a step the curvature changes at most by the factor e^m, m the largest change of a logit: log(1 + m) / m of
        # the step never increases the loss, and is nearly the whole step near the minimum.
        reach = np.where(known, np.abs(step @ features.T), 0.0).max(1, initial=1e-12, keepdims=True)
        return start - step * (np.log1p(reach) / reach)

    def _row(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        _binary(values)
        row, known = np.zeros((1, self.columns.shape[1])), np.ones((1, len(columns)), bool)
        for _ in range(self.sweeps):
            row = self._stepped(row, values[None], known, self.columns[columns])
        return _sigmoid(self.mean + self.columns[:, 0] + _with_one(self.columns) @ row[0])


class Similarity(_Predictor):
    """The known tasks' mean, and what the revealed examples most similar in a model's representation differ from it by.

    Args:
        values: `[M, N]`; NaN where unknown.
        representations: `[N, H]`, as from `example_representations`; kept, not copied.
        temperature: Above 0; None for the one of `TEMPERATURES` with the least leave-one-task-out error of the known tasks,
            of which 30 examples are revealed and at most 970 predicted.

    Attributes:
        mean: `[N]` m; mu, the mean of all known entries, for an example that has none.
        temperature: The one in use.
    """

    TEMPERATURES = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 2.0)  # from the nearest example alone to the mean of all
    BLOCK = 4096  # examples of which weights exist at once

    def __init__(self, values: np.ndarray, representations: np.ndarray, temperature: float | None = None) -> None:
        values, known = _matrix(values)
        super().__init__(values.shape[1])
        self._representations, examples = np.asarray(representations), values.shape[1]
        shape = self._representations.shape
        if len(shape) != 2 or shape[0] != examples:
            raise ValueError(
                f"representations: expected [N, H] with N = {examples}, got {shape}; pass one row an example"
            )
        blocks = [self._representations[start : start + self.BLOCK] for start in range(0, examples, self.BLOCK)]
        self._norms = np.concatenate([np.linalg.norm(block, axis=1, keepdims=True) for block in blocks])
        if not np.isfinite(self._norms).all():
            row = int(np.isfinite(self._norms).argmin())
            raise ValueError(f"representations: expected finite rows, got NaN or infinity in row {row}; leave it out")
        self._norms[self._norms == 0] = 1
        counts, mean = known.sum(0), values[known].mean()
        self.mean = np.where(counts, np.where(known, values, 0.0).sum(0) / np.maximum(counts, 1), mean)
        if temperature is None:
            errors = np.sum([self._errors(values, known, seed) for seed in range(3)], axis=0)
            temperature = self.TEMPERATURES[int(errors.argmin())]
        _positive(temperature=temperature)
        self.temperature = temperature

    def _row(self, columns: np.ndarray, values: np.ndarray) -> np.ndarray:
        prediction, errors = self.mean.copy(), values - self.mean[columns]
        for start in range(0, len(prediction) if len(columns) else 0, self.BLOCK):
            block = slice(start, start + self.BLOCK)
            prediction[block] += _softmax(self._cosine(block, columns) / self.temperature) @ errors
        return prediction

    def _cosine(self, examples: np.ndarray | slice, columns: np.ndarray) -> np.ndarray:
        """`[E, S]` of E examples and the revealed ones."""
        revealed = self._representations[columns] / self._norms[columns]
        return (self._representations[examples] @ revealed.T / self._norms[examples]).astype(np.float64)

    def _errors(self, values: np.ndarray, known: np.ndarray, seed: int) -> np.ndarray:
        """Sums of squared errors at `TEMPERATURES` over the known tasks, each predicted with the mean of the others."""
        columns = np.random.RandomState(seed).permutation(values.shape[1])[:1000]
        count, errors = min(30, len(columns) // 2), np.zeros(len(self.TEMPERATURES))
        values, known = values[:, columns], known[:, columns]
        filled, others = np.where(known, values, 0.0), known.sum(0) - known  # others: tasks but the row's own
        means = np.where(others, (filled.sum(0) - filled) / np.maximum(others, 1), self.mean[columns])
        away = np.where(known, values - means, 0.0)  # [M, count + E]
        cosine = self._cosine(columns[count:], columns[:count])
        for index, temperature in enumerate(self.TEMPERATURES if count else ()):
            weights = _softmax(cosine / temperature)
            total = known[:, :count] @ weights.T
            moved = away[:, :count] @ weights.T / np.where(total > 0, total, 1.0)
            errors[index] = np.square((away[:, count:] - moved)[known[:, count:]]).sum()
        return errors


def _matrix(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The matrix in float64 and where it is known, checked."""
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise ValueError(f"values: expected shape [M, N] with M, N >= 1, got {values.shape}; pass one row a known task")
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0].tolist()
        raise ValueError(f"values: expected finite numbers or NaN, got infinity at [{row}, {column}]; set it to NaN")
    known = ~np.isnan(values)
    if not known.any():
        raise ValueError("values: expected at least one known entry, got only NaN; measure a task first")
    return values, known


def _positive(**settings: float) -> None:
    """Refuse settings that are not above 0."""
    for name, value in settings.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name}: expected a finite number above 0, got {value}; leave it at its default")


def _binary(values: np.ndarray) -> None:
    """Refuse numbers other than 0 and 1."""
    wrong = values[(values != 0) & (values != 1)]
    if wrong.size:
        raise ValueError(f"values: expected 0, 1 or NaN, got {wrong[0]:g}; use BiasedFactors for real numbers")


def _with_one(parameters: np.ndarray) -> np.ndarray:
    """Bias and factors `[J, 1 + r]` as the features of the other side: 1 and factors."""
    return np.c_[np.ones(len(parameters)), parameters[:, 1:]]


def _balanced(residuals: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Factors `[M, r]` and `[N, r]` to start from: singular vectors times the roots of the singular values."""
    if rank < 0:
        raise ValueError(f"rank: expected 0 or more, got {rank}; leave it at its default")
    _, left, right = decompose(residuals, min(rank, min(residuals.shape) - 1))
    root = np.sqrt(np.linalg.norm(right, axis=0))
    return left * root, right / np.where(root > 0, root, 1.0)


def _outer(features: np.ndarray) -> np.ndarray:
    """`[J, K * K]` products of the features of each of J."""
    return np.einsum("jk,jl->jkl", features, features).reshape(len(features), features.shape[1] ** 2)


def _ridge(values: np.ndarray, known: np.ndarray, features: np.ndarray, penalty: float) -> np.ndarray:
    """`[I, K]` minimisers x_i of `sum_j (values_ij - features_j . x_i)^2 + penalty |x_i|^2` over the known j."""
    size = features.shape[1]
    patterns = known[:1] if known.all() else known  # one matrix for all rows
    counts = np.maximum(patterns.sum(1), 1)[:, None, None]
    gram = (patterns.astype(np.float64) @ _outer(features)).reshape(-1, size, size) + penalty * counts * np.eye(size)
    return np.einsum("ikl,il->ik", np.linalg.inv(gram), np.where(known, values, 0.0) @ features)


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    """Without overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def _softmax(logits: np.ndarray) -> np.ndarray:
    """Of every row."""
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)
