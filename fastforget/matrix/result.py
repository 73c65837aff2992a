"""The forgetting matrix of a run: values, exact match, summary, and how much of it is low-rank."""

import json
import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastforget.matrix.store import EVALUATED, KNOWN, Store, predicted_file

if TYPE_CHECKING:
    import pandas

NAMES_SHOWN = 100  # NaN entries that a summary lists


@dataclass(frozen=True, repr=False)
class ForgettingMatrix:
    """M tasks x N upstream examples; `ForgettingMatrix.load(out)` reads it.

    Attributes:
        values: Z[i, j] = lp_j(task i) - lp_j(base), float64 `[M, N]`, in `unit`, nats per token for a run; positive is
            forgotten. NaN where a log-perplexity is not finite, and where the unit is not finished yet.
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
        predicted: which values are predictions, bool `[M, N]`; None where there are none.
        uncertainty: their standard deviations, `[M, N]`, NaN where a value was measured; None where there are none.
        audits: of predicted rows, by task: `mean` as the examples that were drawn at random confirm it, with the interval
            from `low` to `high`, and its `level`.
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
    predicted: np.ndarray | None = None
    uncertainty: np.ndarray | None = None
    audits: dict[str, Any] = field(default_factory=dict)

    @property
    def unit(self) -> str:
        """Of the values."""
        return self.about.get("unit", "nats per token")

    def __repr__(self) -> str:
        """One line: its size and mean, not a million ids."""
        mean = np.nanmean(self.values) if np.isfinite(self.values).any() else np.nan
        state = "complete" if self.complete else "unfinished"
        return f"ForgettingMatrix({len(self.tasks)} tasks x {len(self.examples):,} examples, mean {mean:+.4f}, {state})"

    @classmethod
    def load(cls, out: str | os.PathLike[str]) -> "ForgettingMatrix":
        """Read the folder of a run, finished or not, or of an export.

        Args:
            out: the folder; of a run, or a URL that fsspec knows.

        Returns:
            The matrix.

        Raises:
            ValueError: if the folder holds no run, or a file of it is damaged.
        """
        from fastforget.matrix.hub import is_export, read_export

        if is_export(out):
            return read_export(out)
        store = Store(out)
        manifest = store.manifest()
        tasks, examples = (store.read_table(name) for name in ("tasks.parquet", "examples.parquet"))
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
        measured = seen[1:] & seen[0]
        predictions = _predictions(store, names, values, perplexity[0], exact[0], measured)
        unfinished = ~measured
        if "predicted" in predictions:
            unfinished &= ~predictions["predicted"]
        return cls(
            values=values,
            base=perplexity[0],
            exact=np.where(exact[0] & measured, ~exact[1:], np.nan).astype(np.float32),
            base_exact=exact[0],
            tasks=names,
            examples=examples["id"].to_pylist(),
            texts=examples["text"].to_pylist(),
            tokens=examples["tokens"].to_numpy().astype(np.int64),
            targets=examples["targets"].to_numpy().astype(np.int64),
            noise=store.noise(),
            complete=not unfinished.any(),
            unfinished=unfinished,
            about=manifest,
            **predictions,
        )

    @classmethod
    def from_values(
        cls,
        values: Any,
        *,
        tasks: Sequence[str] | None = None,
        examples: Sequence[str] | None = None,
        texts: Sequence[str] | None = None,
        unit: str = "nats per token",
        **fields: Any,
    ) -> "ForgettingMatrix":
        """A matrix that no run of this library has measured.

        Args:
            values: `[M, N]`; what is not finite becomes NaN.
            tasks: M names; default: task 0, task 1, ...
            examples: N ids; default: 0, 1, ...
            texts: N texts; default: empty ones.
            unit: Of the values.
            **fields: Other attributes; what is not given is unknown: NaN, 0 or False.

        Returns:
            The matrix.

        Raises:
            ValueError: A shape does not fit, or a name occurs twice.
        """
        values = np.array(values, np.float64)
        if values.ndim != 2 or not values.size:
            raise ValueError(f"values: expected shape [M, N], got {values.shape}; pass tasks x examples")
        values[~np.isfinite(values)] = np.nan
        m, n = values.shape
        tasks = _names("tasks", [f"task {i}" for i in range(m)] if tasks is None else tasks, m)
        examples = _names("examples", [str(j) for j in range(n)] if examples is None else examples, n)
        own_texts = [""] * n if texts is None else [str(text) for text in texts]
        if len(own_texts) != n:
            raise ValueError(f"texts: expected {n}, as values have, got {len(own_texts)}")
        unknown: dict[str, Any] = {
            "base": np.full(n, np.nan),
            "exact": np.full((m, n), np.nan, np.float32),
            "base_exact": np.zeros(n, bool),
            "tokens": np.zeros(n, np.int64),
            "targets": np.zeros(n, np.int64),
            "noise": {},
            "unfinished": np.zeros((m, n), bool),
            "about": {},
        }
        fields = unknown | fields
        fields["about"] = {"unit": unit, **fields["about"]}
        complete = not fields["unfinished"].any()
        return cls(values=values, tasks=tasks, examples=examples, texts=own_texts, complete=complete, **fields)

    @classmethod
    def from_lm_eval(cls, *, base: Any, tasks: Mapping[str, Any], per: str = "example") -> "ForgettingMatrix":
        """The matrix of evaluations that lm-evaluation-harness logged with `--log_samples`.

        An example is a document of an evaluation, its log-perplexity the negative log-likelihood of the gold choice, or of
        the whole text where there are no choices. `exact` counts what the base answers correctly (`exact_match` if it was
        logged, else `acc`) and the task's model does not.

        Args:
            base: Of the base model: a `samples_*.jsonl`, several, or a folder of them.
            tasks: The same of every fine-tuned model, by its name.
            per: "example" for nats per example, "byte" for nats per byte of the gold choice's text. Numbers of tokens are not
                logged.

        Returns:
            The matrix; NaN where a model was not evaluated on a document that the base was evaluated on.

        Raises:
            ValueError: A file has no log-likelihoods, a model was evaluated on other documents or prompts than the base, or a
                gold choice cannot be told.
        """
        from fastforget.matrix.lm_eval import read_lm_eval

        return read_lm_eval(base, tasks, per)

    def export(self, folder: str | os.PathLike[str], *, texts: bool = False) -> Path:
        """Write the matrix as a data set: `values.parquet`, one row an example, `matrix.json` and a card, `README.md`.

        `load` reads it, and so does `datasets.load_dataset(folder)`.

        Args:
            folder: New, empty, or of an earlier export.
            texts: Also the examples' texts, which may be under a licence of their own.

        Returns:
            The folder.

        Raises:
            ValueError: The folder holds something else.
        """
        from fastforget.matrix.hub import export

        return export(self, folder, texts=texts)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, texts: bool = False
    ) -> str:
        """Export the matrix to a data set of the Hugging Face hub.

        Args:
            repo_id: "user/name"; made where it does not exist.
            private: Of a new data set; default: as the account has it.
            token: Default: of the login.
            texts: As for `export`.

        Returns:
            Its address.
        """
        from fastforget.matrix.hub import push

        return push(self, repo_id, private=private, token=token, texts=texts)

    @classmethod
    def from_hub(cls, repo_id: str, *, revision: str | None = None, token: str | None = None) -> "ForgettingMatrix":
        """Read a matrix that `push_to_hub` has written.

        Args:
            repo_id: "user/name".
            revision: Branch, tag or commit.
            token: Default: of the login.

        Returns:
            The matrix.

        Raises:
            ValueError: The data set holds no matrix, or one of a newer format.
        """
        from fastforget.matrix.hub import fetch

        return fetch(repo_id, revision=revision, token=token)

    def to_pandas(self) -> "pandas.DataFrame":
        """The values as a table.

        Returns:
            A data frame, tasks x example ids.

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
            `mean`, `median` and `share_increased` of all entries and, under `per_task`, of each row;
            `exact_forgotten`, the share of what the base reproduces and the task's model does not (None where the base
            reproduces nothing), and `audited_mean` of predicted rows; `predicted`, how many entries are; `nan` with
            `count` and the first `entries`; `noise`; the counts of the run.
        """
        nan = np.argwhere(np.isnan(self.values) & ~self.unfinished)
        return {
            "tasks": len(self.tasks),
            "examples": len(self.examples),
            "tokens": int(self.tokens.sum()),
            "unit": self.unit,
            "complete": self.complete,
            **_statistics(self.values, self.exact),
            "per_task": {
                name: _statistics(*row) | ({"audited_mean": self.audits[name]} if name in self.audits else {})
                for name, *row in zip(self.tasks, self.values, self.exact, strict=True)
            },
            "predicted": 0 if self.predicted is None else int(self.predicted.sum()),
            "base": {
                "mean": _number(np.mean, self.base[np.isfinite(self.base)]),
                "exact": int(self.base_exact.sum()),
            },
            "nan": {
                "count": len(nan),
                "entries": [[self.tasks[i], self.examples[j]] for i, j in nan[:NAMES_SHOWN]],
            },
            "unfinished": int(self.unfinished.sum()),
            "truncated": self.about.get("about", {}).get("truncated", 0),
            "skipped": len(self.about.get("about", {}).get("skipped", ())),
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


def _predictions(
    store: Store, tasks: list[str], values: np.ndarray, base: np.ndarray, base_exact: np.ndarray, measured: np.ndarray
) -> dict[str, Any]:
    """Fill what was not evaluated of `values`, `base` and `base_exact`, in place, and say where."""
    if not store.folder.exists(EVALUATED):
        return {}
    known = store.read_table(KNOWN)
    rest = np.ones(len(base), bool)
    rest[store.read_table(EVALUATED)["example"].to_numpy()] = False
    base[rest] = known["log_perplexity"].to_numpy()[rest]
    base_exact[rest] = known["exact"].to_numpy(zero_copy_only=False)[rest]
    predicted, uncertainty, audits = np.zeros(values.shape, bool), np.full(values.shape, np.nan), {}
    for task, name in enumerate(tasks):
        if store.folder.exists(predicted_file(task)):
            row = store.read_table(predicted_file(task))
            here = rest & ~measured[task]
            values[task, here] = row["mean"].to_numpy()[here]
            uncertainty[task, here] = row["std"].to_numpy()[here]
            predicted[task] = here
            audit = (row.schema.metadata or {}).get(b"audit")
            if audit:
                audits[name] = json.loads(audit)
    return {"predicted": predicted, "uncertainty": uncertainty, "audits": audits}


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
    own = values if finite.all() else values[:, finite]
    left = np.linalg.eigh(own @ own.T)[1][:, -1]  # by the `[M, M]` Gram matrix: M is small, N is not
    left = -left if left.sum() < 0 else left  # its sign is free: the rows' loadings are to be positive
    columns = np.flatnonzero(finite)[np.argsort(-(left @ own), kind="stable")]
    return np.argsort(-left, kind="stable"), np.concatenate([columns, np.flatnonzero(~finite)])


def _names(argument: str, given: Sequence[str], count: int) -> list[str]:
    """As strings, each once."""
    names = [str(name) for name in given]
    if len(names) != count:
        raise ValueError(f"{argument}: expected {count}, as values have, got {len(names)}")
    if len(set(names)) != count:
        twice = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{argument}: expected different names, got {twice!r} twice; rename one")
    return names


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
