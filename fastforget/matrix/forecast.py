"""A run that evaluates a few examples under new tasks, and predicts the rest of their rows from tasks that are known.

The examples are those that tell most about any row of the known matrix, half of them drawn at random, so that the predicted
means can be audited. They are the same for all new tasks; the known matrix has to be of the same base, examples and settings.
"""

import hashlib
import json
import os
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from fastforget._files import differences
from fastforget.matrix.result import ForgettingMatrix
from fastforget.matrix.store import EVALUATED, KNOWN, Store, predicted_file

if TYPE_CHECKING:
    from fastforget.matrix.job import Job

AUDIT_LEVEL = 0.9
FEWEST_AUDITED = 3  # random entries
SAME_BASE = 0.05  # nats per token that two measurements of a base may differ by


class Forecast:
    """What the known matrix says about the rows of new tasks.

    Args:
        known: Folder or URL of the known matrix.
        count: Examples to evaluate for each new task.

    Raises:
        ValueError: It is no matrix, is not finished, or has fewer examples.
    """

    def __init__(self, known: str | os.PathLike[str], count: int):
        from fastforget.prediction import ForgettingPredictor

        self.path = os.fspath(known)
        self.known = ForgettingMatrix.load(known)
        if not self.known.complete:
            raise ValueError(f"known: expected a finished matrix, got {self.path}, which is not; finish its run first")
        if isinstance(count, bool) or not isinstance(count, int) or not 2 <= count <= len(self.known.examples):
            raise ValueError(
                f"predict: expected 2 to {len(self.known.examples)} examples, as many as {self.path} has, got {count!r}"
            )
        self.predictor = ForgettingPredictor().fit(self.known)
        chosen = self.predictor.choose_columns(count)
        order = np.argsort(chosen.columns)
        self.columns, self.random = chosen.columns[order], chosen.random[order]

    def check(self, inputs: dict[str, Any]) -> None:
        """Refuse a known matrix of another base, other examples or other settings.

        Args:
            inputs: Of the run's manifest.

        Raises:
            ValueError: Something differs; it is named.
        """

        def compared(of: dict[str, Any]) -> dict[str, Any]:
            settings = {name: of.get("settings", {}).get(name) for name in ("max_length", "eos", "skip_empty", "dtype")}
            return {"base": of.get("base"), "upstream": of.get("upstream"), "settings": settings}

        here, there = (json.loads(json.dumps(compared(of))) for of in (inputs, self.known.about.get("inputs", {})))
        found = list(differences(there, here))
        if found:
            raise ValueError(
                f"known: expected a matrix of the same base, examples and settings, got {self.path} with "
                + "; ".join(found)
            )

    def manifest(self) -> dict[str, Any]:
        """What the run's manifest says of it, among the inputs that have to be the same to continue."""
        content = hashlib.sha256(np.ascontiguousarray(self.known.values).tobytes()).hexdigest()
        columns = hashlib.sha256(self.columns.tobytes()).hexdigest()
        return {"evaluated": len(self.columns), "columns": columns[:16], "known": content[:16]}

    def tables(self) -> dict[str, pa.Table]:
        """Which examples are evaluated, and the base's row, by file name."""
        return {
            EVALUATED: pa.table({"example": pa.array(self.columns, pa.int32()), "random": pa.array(self.random)}),
            KNOWN: pa.table({"log_perplexity": self.known.base, "exact": self.known.base_exact}),
        }

    def missing(self, store: Store, job: "Job") -> bool:
        """Whether a row whose units are finished is not predicted yet.

        Args:
            store: The run's files.
            job: What it computes.

        Returns:
            Whether `write` has something to do.
        """
        finished, there = store.finished(), set(store.folder.names("predicted"))
        names = {task: [u.file_name for u in job.units if u.task in (-1, task)] for task in range(len(job.models) - 1)}
        return any(
            finished.issuperset(units) and predicted_file(task).rpartition("/")[2] not in there
            for task, units in names.items()
        )

    def write(self, store: Store, job: "Job") -> None:
        """Predict the rows whose units are finished, unless they are predicted already.

        Args:
            store: The run's files.
            job: What it computes.
        """
        finished = store.finished()
        files = {task: [u.file_name for u in job.units if u.task == task] for task in range(-1, len(job.models) - 1)}
        if not finished.issuperset(files[-1]):
            return
        base = self._row(store, files[-1])
        self._compare(base)
        for task in range(len(job.models) - 1):
            name = job.model(task).name
            if not finished.issuperset(files[task]) or store.folder.exists(predicted_file(task)):
                continue
            values = self._row(store, files[task]) - base
            if not np.isfinite(values).any():
                warnings.warn(
                    f"{name}: none of its values is finite; its row is not predicted", RuntimeWarning, stacklevel=3
                )
                continue
            mean, std = self.predictor.predict(self.columns, values, return_std=True)
            audit = {"audit": json.dumps(self._audit(values))}
            store.write_table(predicted_file(task), pa.table({"mean": mean, "std": std}).replace_schema_metadata(audit))

    def _row(self, store: Store, files: list[str]) -> np.ndarray:
        """Log-perplexities of the evaluated examples, NaN where they are not finite."""
        table = store.read_units(files)
        row = np.full(len(self.known.examples), np.nan)
        row[table["example"].to_numpy()] = table["nll_sum"].to_numpy() / table["tokens"].to_numpy()
        row[~np.isfinite(row)] = np.nan
        return row[self.columns]

    def _compare(self, base: np.ndarray) -> None:
        difference = np.abs(base - self.known.base[self.columns])
        largest = float(np.nanmax(difference, initial=0.0))
        if largest > SAME_BASE:
            warnings.warn(
                f"known: the base's log-perplexities differ from those of {self.path} by up to {largest:.2g} nats per token: "
                "measured in another environment, perhaps; the predictions are off by as much",
                RuntimeWarning,
                stacklevel=4,
            )

    def _audit(self, values: np.ndarray) -> dict[str, float] | None:
        if (self.random & np.isfinite(values)).sum() < FEWEST_AUDITED:
            return None
        mean = self.predictor.audit(self.columns, values, self.random, level=AUDIT_LEVEL).mean
        return {"mean": mean.value, "low": mean.low, "high": mean.high, "level": AUDIT_LEVEL}
