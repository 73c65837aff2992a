r"""What a forgetting matrix is made of: how much of it is additive or low-rank, and which tasks and examples stand out.

    R^2 = 1 - sum (Z - fit)^2 / sum (Z - mean(Z))^2    over the known entries

for the additive model mu + a_i + b_j and for the best approximations of rank 1, 2, ... (uncentred singular vectors). Unknown
entries are filled by the fit itself, again and again. Decompositions go by the `[M, M]` Gram matrix, and everything else by
blocks of columns: M is small, N is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastforget.prediction.baselines import LogisticFactors
from fastforget.prediction.matrices import matrix_values

if TYPE_CHECKING:
    from fastforget.matrix import ForgettingMatrix

__all__ = ["Analysis", "analyse"]

BLOCK = 1 << 15  # examples that are in the works at once
FILLS = 30  # rounds at most in which unknown entries are filled
SAMPLE = 20_000  # examples with unknown entries, of which more are represented by so many in the rounds
EXACT_SAMPLE = 2_000  # answered examples, of which more are represented by so many in a factorisation of exact matches
IN_SAMPLE = 0.005  # penalty of a factorisation that describes a matrix, instead of predicting a new row
ENOUGH = 20  # answers that the base gives right, of which a factorisation of exact matches is worth something


@dataclass(frozen=True, repr=False)
class Analysis:
    """Of a matrix of M tasks and N examples.

    Attributes:
        tasks: M names.
        examples: N ids.
        texts: N texts, or None.
        mean: mu: of all entries, as the additive model completes them.
        additive_r2: Share of the variance that mu + a_i + b_j explains.
        rank_r2: Share that rank 1, 2, ... explains.
        exact_f1: F1 of logistic factorisations of rank 1, 2, ... for exact-match forgetting, of 2,000 examples where there are
            more; None without enough answers.
        task_effects: `[M]` a_i.
        example_effects: `[N]` b_j.
        task_similarity: `[M, M]` correlations of the tasks' rows, the example effects taken away.
        directions: `[M, r]` leading directions of the tasks, orthonormal; what is positive on the first forgets what is.
        loadings: `[N, r]` of the examples on them, for `similar_examples`.
        unit: Of the values.
        known: `[M, N]` which entries are known.
    """

    tasks: list[str]
    examples: list[str]
    texts: list[str] | None
    mean: float
    additive_r2: float
    rank_r2: list[float]
    exact_f1: list[float] | None
    task_effects: np.ndarray
    example_effects: np.ndarray
    task_similarity: np.ndarray
    directions: np.ndarray
    loadings: np.ndarray
    unit: str
    known: np.ndarray = field(repr=False)

    def __repr__(self) -> str:
        """One line."""
        ranks = ", ".join(f"{value:.3f}" for value in self.rank_r2)
        return (
            f"Analysis({len(self.tasks)} tasks x {len(self.examples):,} examples, R^2: additive {self.additive_r2:.3f}, rank 1 "
            f"to {len(self.rank_r2)}: {ranks})"
        )

    def most_forgotten(self, count: int = 10) -> np.ndarray:
        """Columns of the examples that are forgotten most over all tasks, the worst first."""
        return np.argsort(-self.example_effects, kind="stable")[:count]

    def least_forgotten(self, count: int = 10) -> np.ndarray:
        """Columns of the examples that are forgotten least."""
        return np.argsort(self.example_effects, kind="stable")[:count]

    def similar_examples(self, column: int, count: int = 10) -> np.ndarray:
        """Columns of the examples that are forgotten by the same tasks as one is.

        Args:
            column: The example.
            count: How many, the most similar first.

        Returns:
            `[count]` int64, by the cosine of their loadings.
        """
        norms = np.linalg.norm(self.loadings, axis=1)
        cosines = self.loadings @ self.loadings[column] / np.maximum(norms * norms[column], 1e-300)
        cosines[column] = -np.inf
        return np.argsort(-cosines, kind="stable")[:count]

    def to_dict(self, count: int = 10) -> dict[str, Any]:
        """The numbers, ready for JSON, with the `count` most and least forgotten examples."""
        shown = {"most_forgotten": self.most_forgotten(count), "least_forgotten": self.least_forgotten(count)}
        return {
            "tasks": len(self.tasks),
            "examples": len(self.examples),
            "unknown": int(self.known.size - np.count_nonzero(self.known)),
            "unit": self.unit,
            "mean": self.mean,
            "additive_r2": self.additive_r2,
            "rank_r2": self.rank_r2,
            "exact_f1": self.exact_f1,
            "task_effects": dict(zip(self.tasks, self.task_effects.tolist(), strict=True)),
            "task_similarity": self.task_similarity.tolist(),
        } | {name: [self._example(int(j)) for j in columns] for name, columns in shown.items()}

    def _example(self, column: int) -> dict[str, Any]:
        text = {} if self.texts is None else {"text": self.texts[column]}
        return {"id": self.examples[column], "effect": float(self.example_effects[column])} | text


def analyse(matrix: ForgettingMatrix | np.ndarray, *, rank: int = 5) -> Analysis:
    """Analyse a forgetting matrix.

    Args:
        matrix: A forgetting matrix, or its values `[M, N]`, NaN where unknown.
        rank: The largest rank.

    Returns:
        The analysis.

    Raises:
        ValueError: There is no known entry, or the rank is not positive.
    """
    values = matrix_values(matrix)
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank: expected an integer >= 1, got {rank!r}")
    known = np.isfinite(values)
    mean, tasks, examples = _effects(values, known)
    count = np.count_nonzero(known)
    grand = float(sum(_known(values, known, block).sum() for block in _blocks(values)) / count)
    total = _squares(values, known, lambda block: grand)
    additive = _squares(values, known, lambda block: mean + tasks[:, None] + examples[block])
    rank = min(rank, *values.shape)
    errors, directions, loadings = _low_rank(values, known, mean + tasks, examples, rank)
    flat = total <= 1e-20 * count * grand**2
    names, ids = getattr(matrix, "tasks", None), getattr(matrix, "examples", None)  # of a ForgettingMatrix
    return Analysis(
        tasks=names or [f"task {i}" for i in range(len(values))],
        examples=ids or [str(j) for j in range(values.shape[1])],
        texts=getattr(matrix, "texts", None),
        mean=mean,
        additive_r2=float("nan") if flat else 1 - additive / total,
        rank_r2=[float("nan") if flat else 1 - error / total for error in errors],
        exact_f1=_exact_f1(getattr(matrix, "exact", None), rank),
        task_effects=tasks,
        example_effects=examples,
        task_similarity=_similarity(values, known, tasks, examples + mean),
        directions=directions,
        loadings=loadings,
        unit=getattr(matrix, "unit", "nats per token"),
        known=known,
    )


def _blocks(values: np.ndarray) -> Iterator[slice]:
    for start in range(0, values.shape[1], BLOCK):
        yield slice(start, start + BLOCK)


def _known(values: np.ndarray, known: np.ndarray, block: slice, fit: Any = 0.0) -> np.ndarray:
    """What a fit leaves of the known entries of some columns; 0 at the others."""
    return np.where(known[:, block], values[:, block] - fit, 0.0)


def _squares(values: np.ndarray, known: np.ndarray, fit: Callable[[slice], Any]) -> float:
    return float(sum(np.square(_known(values, known, block, fit(block))).sum() for block in _blocks(values)))


def _effects(values: np.ndarray, known: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """mu, a and b of least squares over the known entries; b is eliminated, which leaves M equations."""
    counts = np.maximum(np.count_nonzero(known, 0), 1)
    matrix, right = np.diag(np.count_nonzero(known, 1).astype(np.float64)), np.zeros(len(values))
    sums = np.zeros(values.shape[1])
    for block in _blocks(values):
        own, weights = _known(values, known, block), known[:, block].astype(np.float64)
        sums[block] = own.sum(0)
        right += own.sum(1) - weights @ (sums[block] / counts[block])
        # Of columns without a hole the product has one value.
        whole = counts[block] == len(values)
        matrix -= np.count_nonzero(whole) / len(values)
        holes = weights[:, ~whole]
        matrix -= (holes / counts[block][~whole]) @ holes.T
    tasks = np.linalg.lstsq(matrix, right)[0]
    tasks -= tasks.mean()
    examples = np.concatenate([sums[block] - tasks @ known[:, block] for block in _blocks(values)]) / counts
    mean = float(examples.mean())
    return mean, tasks, examples - mean


def _low_rank(
    values: np.ndarray, known: np.ndarray, tasks: np.ndarray, examples: np.ndarray, rank: int
) -> tuple[list[float], np.ndarray, np.ndarray]:
    """Squared errors of rank 1 to r, the r directions, and the loadings; unknown entries start at tasks + examples."""
    whole = np.logical_and.reduce(known, 0)
    gram = np.zeros((len(values), len(values)))
    for block in _blocks(values):
        own = values[:, block] if whole[block].all() else values[:, block][:, whole[block]]
        gram += own @ own.T
    holes = np.flatnonzero(~whole)
    sample, weight = holes, 1.0
    if len(holes) > SAMPLE:
        sample = np.sort(np.random.default_rng(0).choice(holes, SAMPLE, replace=False))
        squares = np.square(np.where(known[:, sample], values[:, sample], 0.0)).sum()
        weight = (_squares(values, known, lambda block: 0.0) - float(np.trace(gram))) / max(float(squares), 1e-300)
    own, seen, left, errors = values[:, sample], known[:, sample], np.zeros((len(values), 0)), []
    fit = filled = np.where(seen, own, tasks[:, None] + examples[sample])
    for r in range(1, rank + 1):
        for _ in range(FILLS):
            left = np.linalg.eigh(gram + weight * filled @ filled.T)[1][:, ::-1][:, :r]
            fit = left @ (left.T @ filled)
            moved = np.abs(np.where(seen, 0.0, fit - filled)).max(initial=0.0)
            filled = np.where(seen, own, fit)
            if moved <= 1e-6 * np.abs(fit).max(initial=0.0):
                break
        missed = float(np.trace(gram) - np.einsum("ir,ij,jr->", left, gram, left))
        errors.append(max(missed, 0.0) + weight * float(np.square(np.where(seen, own - fit, 0.0)).sum()))
    left = left * np.where(left.sum(0) < 0, -1.0, 1.0)  # the signs are free: the tasks' are to be positive
    loadings = np.concatenate([_loadings(values, known, tasks, examples, left, block) for block in _blocks(values)])
    return errors, left, loadings


def _loadings(
    values: np.ndarray, known: np.ndarray, tasks: np.ndarray, examples: np.ndarray, left: np.ndarray, block: slice
) -> np.ndarray:
    """`[J, r]` of some columns on the directions `left`."""
    own, seen = values[:, block], known[:, block]
    holes = ~seen.all(0)
    loadings, own, seen = own.T @ left, own[:, holes], seen[:, holes]
    filled = np.where(seen, own, tasks[:, None] + examples[block][holes])
    for _ in range(FILLS if holes.any() else 0):
        right = left.T @ filled
        fit = left @ right
        if np.abs(np.where(seen, 0.0, fit - filled)).max() <= 1e-6 * np.abs(fit).max():
            break
        filled = np.where(seen, own, fit)
    loadings[holes] = filled.T @ left
    return loadings


def _similarity(values: np.ndarray, known: np.ndarray, tasks: np.ndarray, examples: np.ndarray) -> np.ndarray:
    """Correlations of the rows without the examples' effects; unknown entries are as the task's effect."""
    gram, sums = np.zeros((len(values), len(values))), np.zeros(len(values))
    for block in _blocks(values):
        rows = _known(values, known, block, tasks[:, None] + examples[block])  # an offset of a row does not matter
        gram, sums = gram + rows @ rows.T, sums + rows.sum(1)
    gram -= np.outer(sums, sums) / values.shape[1]
    norms = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    return np.clip(gram / np.outer(norms, norms), -1.0, 1.0)


def _exact_f1(exact: np.ndarray | None, rank: int) -> list[float] | None:
    """F1 of the forgotten answers, where the base gives enough of them and some are forgotten."""
    if exact is None:
        return None
    answered = np.flatnonzero(np.isfinite(exact).any(0))
    if len(answered) > EXACT_SAMPLE:
        answered = np.random.default_rng(0).choice(answered, EXACT_SAMPLE, replace=False)
    exact = np.asarray(exact[:, answered], np.float64)
    if len(answered) < ENOUGH or not np.nansum(exact):
        return None
    known = np.isfinite(exact)
    forgotten, result = exact[known] == 1, []
    for r in range(1, rank + 1):
        predicted = LogisticFactors(exact, rank=r, penalty=IN_SAMPLE).probabilities()[known] >= 0.5
        hits = int((predicted & forgotten).sum())
        result.append(2 * hits / max(int(predicted.sum()) + int(forgotten.sum()), 1))
    return result
