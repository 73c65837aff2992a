"""The forgetting matrix of a run: values, exact match, summary, and how much of it is low-rank."""

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastforget.matrix.store import Store

if TYPE_CHECKING:
    import pandas

NAMES_SHOWN = 100  # NaN entries that a summary lists


@dataclass(frozen=True, repr=False)
class ForgettingMatrix:
    """M tasks x N upstream examples; `ForgettingMatrix.load(out)` reads it.

    Attributes:
        values: Z[i, j] = lp_j(task i) - lp_j(base), nats per token, float64 `[M, N]`; positive is forgotten. NaN where
            a log-perplexity is not finite, and where the unit is not finished yet.
        base: the base's log-perplexities, nats per token, float64 `[N]`.
        exact: exact-match forgetting, float32 `[M, N]`: 1 where the base reproduces the targets under greedy decoding
            and the task's model does not, 0 where both do, NaN where the base does not or a unit is unfinished.
        base_exact: whether the base reproduces the targets, bool `[N]`.
        tasks: M names.
        examples: N ids.
        texts: N source texts.
        tokens: tokens of each example, int64 `[N]`.
        targets: target tokens of each example, int64 `[N]`.
        noise: the run's noise floor, see `matrix.noise`; empty until it is measured.
        complete: whether every unit is finished.
        unfinished: which entries wait for a unit, bool `[M, N]`.
        about: what the manifest records: inputs, environment, truncations.
    """

    values: np.ndarray
    base: np.ndarray
    exact: np.ndarray
    base_exact: np.ndarray
    tasks: list[str]
    examples: list[str]
    texts: list[str]
    tokens: np.ndarray
    targets: np.ndarray
    noise: dict[str, Any]
    complete: bool
    unfinished: np.ndarray
    about: dict[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        """One line: its size and mean, not a million ids."""
        mean = np.nanmean(self.values) if np.isfinite(self.values).any() else np.nan
        state = "complete" if self.complete else "unfinished"
        return f"ForgettingMatrix({len(self.tasks)} tasks x {len(self.examples):,} examples, mean {mean:+.4f}, {state})"

    @classmethod
    def load(cls, out: str | os.PathLike[str]) -> "ForgettingMatrix":
        """Read the folder of a run, finished or not.

        Args:
            out: the folder.

        Returns:
            The matrix.

        Raises:
            ValueError: if the folder holds no run, or a file of it is damaged.
        """
        store = Store(Path(os.fspath(out)))
        manifest = store.manifest()
        tasks, examples = (_table(store, name) for name in ("tasks.parquet", "examples.parquet"))
        names = tasks["name"].to_pylist()[1:]
        shape = (len(names) + 1, len(examples))  # row 0 is the base
        perplexity, exact, seen = np.full(shape, np.nan), np.zeros(shape, bool), np.zeros(shape, bool)
        units = store.read_units(sorted(store.finished()))
        place = units["task"].to_numpy() + 1, units["example"].to_numpy()
        perplexity[place] = units["nll_sum"].to_numpy() / units["tokens"].to_numpy()
        exact[place] = units["exact"].to_numpy()
        seen[place] = True
        with np.errstate(invalid="ignore"):  # inf - inf
            values = perplexity[1:] - perplexity[0]
        values[~np.isfinite(values)] = np.nan
        unfinished = ~(seen[1:] & seen[0])
        return cls(
            values=values,
            base=perplexity[0],
            exact=np.where(exact[0] & ~unfinished, ~exact[1:], np.nan).astype(np.float32),
            base_exact=exact[0],
            tasks=names,
            examples=examples["id"].to_pylist(),
            texts=examples["text"].to_pylist(),
            tokens=examples["tokens"].to_numpy().astype(np.int64),
            targets=examples["targets"].to_numpy().astype(np.int64),
            noise=json.loads(store.noise_file.read_text(encoding="utf-8")) if store.noise_file.exists() else {},
            complete=bool(seen.all()),
            unfinished=unfinished,
            about=manifest,
        )

    def to_pandas(self) -> "pandas.DataFrame":
        """The values as a table.

        Returns:
            A data frame, tasks x example ids, nats per token.

        Raises:
            ImportError: if pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise ImportError("to_pandas: expected pandas, got none; pip install 'fastforget[pandas]'") from error
        return pd.DataFrame(
            self.values, index=pd.Index(self.tasks, name="task"), columns=pd.Index(self.examples, name="example")
        )

    def summary(self) -> dict[str, Any]:
        """Statistics of the matrix, ready for JSON; NaN entries are left out of them and listed.

        Returns:
            `mean`, `median` (nats per token) and `share_increased` of all entries and, under `per_task`, of each row;
            `exact_forgotten`, the share of what the base reproduces and the task's model does not (None where the base
            reproduces nothing); `nan` with `count` and the first `entries`; `noise`; the counts of the run.
        """
        nan = np.argwhere(np.isnan(self.values) & ~self.unfinished)
        return {
            "tasks": len(self.tasks),
            "examples": len(self.examples),
            "tokens": int(self.tokens.sum()),
            "unit": "nats per token",
            "complete": self.complete,
            **_statistics(self.values, self.exact),
            "per_task": {
                name: _statistics(*row) for name, *row in zip(self.tasks, self.values, self.exact, strict=True)
            },
            "base": {
                "mean": _number(np.mean, self.base[np.isfinite(self.base)]),
                "exact": int(self.base_exact.sum()),
            },
            "nan": {
                "count": len(nan),
                "entries": [[self.tasks[i], self.examples[j]] for i, j in nan[:NAMES_SHOWN]],
            },
            "unfinished": int(self.unfinished.sum()),
            "truncated": self.about["about"]["truncated"],
            "skipped": len(self.about["about"]["skipped"]),
            "noise": self.noise,
        }

    def additive_r2(self) -> float:
        """R^2 = 1 - MSE / mean((Z - mean)^2) of the additive model mu + a_i + b_j, fitted to the whole matrix.

        Columns with NaN are left out, with a warning.

        Returns:
            The share of the variance that the model explains.
        """
        z = self._finite_columns()
        return _r2(z, z.mean(1, keepdims=True) + z.mean(0, keepdims=True) - z.mean())

    def low_rank_r2(self, rank: int) -> float:
        """R^2 = 1 - MSE / mean((Z - mean)^2) of the best approximation of rank r (uncentred SVD).

        Columns with NaN are left out, with a warning.

        Args:
            rank: r, at least 1.

        Returns:
            The share of the variance that the approximation explains.

        Raises:
            ValueError: if the rank is not positive.
        """
        if rank < 1:
            raise ValueError(f"rank: expected 1 or more, got {rank}; use additive_r2() for the additive model")
        z = self._finite_columns()
        left, singular, right = np.linalg.svd(z, full_matrices=False)
        return _r2(z, (left[:, :rank] * singular[:rank]) @ right[:rank])

    def _finite_columns(self) -> np.ndarray:
        finite = np.isfinite(self.values).all(0)
        if not finite.any():
            raise ValueError(
                "matrix: expected a column without NaN, got none; finish the run, or look at summary()['nan']"
            )
        if not finite.all():
            warnings.warn(
                f"{(~finite).sum()} of {self.values.shape[1]} columns hold NaN and are left out of R^2",
                RuntimeWarning,
                stacklevel=3,
            )
        return self.values[:, finite]


def singular_order(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of rows and columns by the first singular vectors, most forgotten first; columns with NaN come last.

    Args:
        values: float `[M, N]`.

    Returns:
        Row indices `[M]` and column indices `[N]`.
    """
    finite = np.isfinite(values).all(0)
    if not finite.any():
        return np.arange(values.shape[0]), np.arange(values.shape[1])
    left, _, right = np.linalg.svd(values[:, finite], full_matrices=False)
    flip = -1.0 if left[:, 0].sum() < 0 else 1.0  # the pair's sign is free: the rows' loadings are to be positive
    columns = np.flatnonzero(finite)[np.argsort(-flip * right[0], kind="stable")]
    return np.argsort(-flip * left[:, 0], kind="stable"), np.concatenate([columns, np.flatnonzero(~finite)])


def _table(store: Store, name: str) -> pa.Table:
    try:
        return pq.ParquetFile(store.out / name).read()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"out: cannot read {store.out / name}: {error}; delete it if it is damaged, and run the same command again"
        ) from error


def _statistics(values: np.ndarray, exact: np.ndarray) -> dict[str, float | None]:
    finite = values[np.isfinite(values)]
    return {
        "mean": _number(np.mean, finite),
        "median": _number(np.median, finite),
        "share_increased": _number(np.mean, np.greater(finite, 0.0)),
        "exact_forgotten": _number(np.mean, exact[np.isfinite(exact)]),
    }


def _number(statistic: Any, values: Any) -> float | None:
    return float(statistic(values)) if len(values) else None


def _r2(z: np.ndarray, fit: np.ndarray) -> float:
    variance = np.mean((z - z.mean()) ** 2)
    return float(1 - np.mean((z - fit) ** 2) / variance) if variance else float("nan")
