r"""What a forgetting matrix is made of: how much of it is additive or low-rank, and which tasks and examples stand out.

    R^2 = 1 - sum (Z - fit)^2 / sum (Z - mean(Z))^2    over the known entries

for the additive model mu + a_i + b_j and for the best approximations of rank 1, 2, ... (uncentred singular vectors). Unknown
entries are filled by the fit itself, again and again. Decompositions go by the `[M, M]` Gram matrix: M is small, N is not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from fastforget.prediction.baselines import LogisticFactors
from fastforget.prediction.matrices import matrix_values

if TYPE_CHECKING:
    from fastforget.matrix import ForgettingMatrix

__all__ = ["Analysis", "analyse"]

FILLS = 30  # rounds at most in which unknown entries are filled
IN_SAMPLE = 0.005  # penalty of a factorisation that describes a matrix, instead of predicting a new row
ENOUGH = 20  # answers that the base gives right, of which a factorisation of exact matches is worth something


@dataclass(frozen=True, repr=False)
class Analysis:
    """Of a matrix of M tasks and N examples.

    Attributes:
        tasks: M names.
        examples: N ids.
        texts: N texts, or None.
        mean: Of the known entries, nats per token.
        additive_r2: Share of the variance that mu + a_i + b_j explains.
        rank_r2: Share that rank 1, 2, ... explains.
        exact_f1: F1 of logistic factorisations of rank 1, 2, ... for exact-match forgetting; None without enough answers.
        task_effects: `[M]` a_i.
        example_effects: `[N]` b_j.
        task_similarity: `[M, M]` correlations of the tasks' rows, the example effects taken away.
        loadings: `[N, r]` of the examples on the leading directions, for `similar_examples`.
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
    loadings: np.ndarray
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
            "unknown": int((~self.known).sum()),
            "mean": self.mean,
            "additive_r2": self.additive_r2,
            "rank_r2": self.rank_r2,
            "exact_f1": self.exact_f1,
            "task_effects": dict(zip(self.tasks, self.task_effects.tolist(), strict=True)),
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
    additive = mean + tasks[:, None] + examples
    rank = min(rank, *values.shape)
    rank_r2, loadings = _low_rank(values, known, additive, rank)
    names, ids = getattr(matrix, "tasks", None), getattr(matrix, "examples", None)  # of a ForgettingMatrix
    return Analysis(
        tasks=names or [f"task {i}" for i in range(len(values))],
        examples=ids or [str(j) for j in range(values.shape[1])],
        texts=getattr(matrix, "texts", None),
        mean=mean,
        additive_r2=_r2(values, known, additive),
        rank_r2=rank_r2,
        exact_f1=_exact_f1(getattr(matrix, "exact", None), rank),
        task_effects=tasks,
        example_effects=examples,
        task_similarity=_similarity(np.where(known, values, additive) - examples),
        loadings=loadings,
        known=known,
    )


def _effects(values: np.ndarray, known: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """mu, a and b of least squares over the known entries, by turns; one turn is exact where all are known."""
    mean = float(values[known].mean())
    tasks, examples = np.zeros(len(values)), np.zeros(values.shape[1])
    rows, columns = np.maximum(known.sum(1), 1), np.maximum(known.sum(0), 1)
    for _ in range(1 if known.all() else FILLS):
        tasks = np.where(known, values - mean - examples, 0.0).sum(1) / rows
        tasks -= tasks.mean()
        examples = np.where(known, values - mean - tasks[:, None], 0.0).sum(0) / columns
    return mean + float(examples.mean()), tasks, examples - examples.mean()


def _low_rank(values: np.ndarray, known: np.ndarray, start: np.ndarray, rank: int) -> tuple[list[float], np.ndarray]:
    """R^2 of rank 1 to r, and the examples' loadings on the r directions."""
    filled, fit, result, right = np.where(known, values, start), start, [], np.zeros((values.shape[1], rank))
    for r in range(1, rank + 1):
        for _ in range(FILLS):
            _, vectors = np.linalg.eigh(filled @ filled.T)
            left = vectors[:, ::-1][:, :r]
            right = filled.T @ left
            fit = left @ right.T
            moved = np.abs(np.where(known, 0.0, fit - filled)).max()
            filled = np.where(known, values, fit)
            if moved <= 1e-6 * np.abs(right).max():
                break
        result.append(_r2(values, known, fit))
    return result, right


def _similarity(rows: np.ndarray) -> np.ndarray:
    centred = rows - rows.mean(1, keepdims=True)
    gram = centred @ centred.T
    norms = np.sqrt(np.maximum(np.diag(gram), 1e-300))
    return np.clip(gram / np.outer(norms, norms), -1.0, 1.0)


def _exact_f1(exact: np.ndarray | None, rank: int) -> list[float] | None:
    """F1 of the forgotten answers, where the base gives enough of them and some are forgotten."""
    if exact is None:
        return None
    answered = np.isfinite(exact).any(0)
    exact = np.asarray(exact[:, answered], np.float64)
    if answered.sum() < ENOUGH or not np.nansum(exact):
        return None
    known = np.isfinite(exact)
    forgotten, result = exact[known] == 1, []
    for r in range(1, rank + 1):
        predicted = LogisticFactors(exact, rank=r, penalty=IN_SAMPLE).probabilities()[known] >= 0.5
        hits = int((predicted & forgotten).sum())
        result.append(2 * hits / max(int(predicted.sum()) + int(forgotten.sum()), 1))
    return result


def _r2(values: np.ndarray, known: np.ndarray, fit: np.ndarray) -> float:
    own = values[known]
    variance = float(np.square(own - own.mean()).sum())
    return 1 - float(np.square(own - fit[known]).sum()) / variance if variance else float("nan")
