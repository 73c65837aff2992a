"""Upstream examples to replay, drawn into a file: what `fastforget replay` does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastforget._files import write_atomically
from fastforget.replay.mixer import ReplayMixer
from fastforget.replay.weights import replay_weights

__all__ = ["draw_to_file"]


def draw_to_file(
    source: Path,
    out: Path,
    *,
    count: int,
    task: str | None = None,
    matrix: Path | None = None,
    temperature: float = 0.1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Draw upstream examples, without replacement, and write them as JSONL, in the order in which they were drawn.

    Args:
        source: Folder of a forgetting matrix, or a prediction, a Parquet file with the columns `id` and `mean`.
        out: The JSONL file: `id`, `text` where there is one, `forecast` in nats per token, and `weight`, the probability to be
            drawn first.
        count: How many.
        task: Name of the row; None where there is one only.
        matrix: Folder of the matrix that has the texts of a prediction.
        temperature: Of `replay_weights`.
        seed: Of the draws.

    Returns:
        What was written.

    Raises:
        ValueError: The source is neither, has no such row, or has fewer examples.
    """
    ids, texts, forecast = _from_matrix(source, task) if source.is_dir() else _from_prediction(source, task, matrix)
    weights = replay_weights(forecast, temperature)
    total = int(np.isfinite(forecast).sum())
    if not 1 <= count <= total:
        raise ValueError(f"count: expected 1 to {total} examples, as {source} has, got {count}")
    drawn = ReplayMixer(ids, forecast, temperature=temperature, seed=seed).next(count, rank=0, world_size=1)
    rows: list[dict[str, Any]] = []
    for j in drawn.tolist():
        text = {} if texts is None or not texts[j] else {"text": texts[j]}
        rows.append({"id": ids[j], **text, "forecast": float(forecast[j]), "weight": float(weights[j])})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(out, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    return rows


def _from_matrix(folder: Path, task: str | None) -> tuple[list[str], list[str] | None, np.ndarray]:
    from fastforget.matrix import ForgettingMatrix

    matrix = ForgettingMatrix.load(folder)
    return matrix.examples, matrix.texts, matrix.values[matrix.tasks.index(_task(task, matrix.tasks))]


def _task(given: str | None, tasks: list[str]) -> str:
    """The one that is asked for, or the only one."""
    if given is None and len(tasks) == 1:
        return tasks[0]
    if given not in tasks:
        raise ValueError(f"task: expected --task with one of {', '.join(tasks)}, got {given}")
    return given


def _from_prediction(
    file: Path, task: str | None, matrix: Path | None
) -> tuple[list[str], list[str] | None, np.ndarray]:
    try:
        table = pq.ParquetFile(file).read()
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"source: expected the folder of a matrix or a prediction.parquet, got {file} ({error})"
        ) from None
    if missing := {"id", "mean"} - set(table.column_names):
        raise ValueError(
            f"source: expected columns id and mean in {file}, got none named {' or '.join(sorted(missing))}"
        )
    if "task" in table.column_names:
        own = _task(task, table["task"].unique().to_pylist())
        table = table.filter(np.array([name == own for name in table["task"].to_pylist()]))
    elif task is not None:
        raise ValueError(f"task: expected none, since {file} names no task, got {task}; leave --task out")
    ids = [str(name) for name in table["id"].to_pylist()]
    texts = table["text"].to_pylist() if "text" in table.column_names else None
    if matrix is not None:
        from fastforget.matrix import ForgettingMatrix

        known = ForgettingMatrix.load(matrix)
        text_of = dict(zip(known.examples, known.texts, strict=True))
        if unknown := [name for name in ids if name not in text_of]:
            raise ValueError(f"matrix: expected all examples of {file}, got none with id {unknown[0]!r}")
        texts = [text_of[name] for name in ids]
    return ids, texts, table["mean"].to_numpy().astype(np.float64)
