"""What `fastforget predict` reads and writes: matrices, the examples to evaluate, their values, predictions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastforget._files import write_atomically
from fastforget.matrix import ForgettingMatrix

__all__ = ["Measured", "Prediction", "load_matrix", "read_values", "write_columns", "write_json", "write_predictions"]


class Measured(NamedTuple):
    """The evaluated examples of a new task."""

    task: str
    columns: np.ndarray
    """`[S]` int64."""
    values: np.ndarray
    """`[S]`; NaN where none could be had."""
    random: np.ndarray | None
    """`[S]` bool; None where the lines do not say."""


class Prediction(NamedTuple):
    """Of a new task's row, each `[N]`."""

    task: str
    mean: np.ndarray
    std: np.ndarray
    low: np.ndarray
    high: np.ndarray
    evaluated: np.ndarray


def load_matrix(path: str | Path) -> ForgettingMatrix:
    """Read a matrix.

    Args:
        path: Folder or URL of a run, folder of an export, or an `.npz` with `values` `[M, N]` and perhaps `tasks`, `examples`
            and `texts`, arrays of strings.

    Returns:
        The matrix.

    Raises:
        ValueError: It is none of these.
    """
    if not str(path).lower().endswith(".npz"):
        return ForgettingMatrix.load(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            fields = {name: file[name] for name in ("values", "tasks", "examples", "texts") if name in file}
    except FileNotFoundError:
        raise ValueError(f"matrix: expected an .npz, got {path}, which does not exist; check the path") from None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"matrix: expected an .npz of plain arrays, got {path} ({error}); save names as np.array(names, dtype=str)"
        ) from None
    if "values" not in fields:
        raise ValueError(
            f"matrix: expected an array `values` in {path}, got none; save it with np.savez(path, values=...)"
        )
    names = {name: array.tolist() for name, array in fields.items() if name != "values"}
    return ForgettingMatrix.from_values(fields["values"], **names)


def write_columns(path: Path, matrix: ForgettingMatrix, columns: np.ndarray, random: np.ndarray) -> None:
    """Write the examples to evaluate, one JSON object a line: `column`, `id`, `text` where there is one, `random`.

    Args:
        path: The file.
        matrix: What they belong to.
        columns: `[S]`.
        random: `[S]` bool.
    """
    rows = []
    for j, drawn in zip(columns.tolist(), random.tolist(), strict=True):
        text = {"text": matrix.texts[j]} if matrix.texts[j] else {}
        rows.append({"column": j, "id": matrix.examples[j], **text, "random": drawn})
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(lines, encoding="utf-8"))


def read_values(path: Path, examples: Sequence[str]) -> list[Measured]:
    """Read evaluated examples, one JSON object a line.

    Args:
        path: Lines with `id` or `column`, `value` (null where none could be had), and perhaps `random` and `task`.
        examples: N ids.

    Returns:
        One a task, in the order of the file.

    Raises:
        ValueError: A line does not fit; it is named.
    """
    place = {name: j for j, name in enumerate(examples)}
    tasks: dict[str, dict[int, tuple[float, bool | None]]] = {}
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            if not text.strip():
                continue
            where = f"{path}, line {number}"
            line = _line(where, text)
            column = _column(where, line, place)
            rows = tasks.setdefault(str(line.get("task", "")), {})
            if column in rows:
                raise ValueError(f"{where}: expected every example once, got {examples[column]!r} twice; delete a line")
            rows[column] = _value(where, line), _random(where, line)
    if not tasks:
        raise ValueError(f"{path}: expected lines with id and value, got none; add what was measured")
    return [_measured(path, task, rows) for task, rows in tasks.items()]


def write_predictions(path: Path, examples: Sequence[str], predictions: Sequence[Prediction]) -> None:
    """Write predicted rows as Parquet: `column`, `id`, `mean`, `std`, `low`, `high`, `evaluated`, and `task` where it is named.

    Args:
        path: The file.
        examples: N ids.
        predictions: One a task, below one another.
    """
    tables = []
    for prediction in predictions:
        fields = prediction._asdict()
        task = fields.pop("task")
        named = {"task": pa.array([task] * len(examples)).dictionary_encode()} if len(predictions) > 1 or task else {}
        ids = {"column": np.arange(len(examples)), "id": pa.array(examples, pa.string())}
        tables.append(pa.table(named | ids | fields))
    table = pa.concat_tables(tables)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: pq.write_table(table, temporary))


def write_json(path: Path, value: Any) -> None:
    """Write a record; NaN becomes null.

    Args:
        path: The file.
        value: Nested dictionaries and lists.
    """
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(where: str, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise ValueError(
            f"{where}: expected a JSON object, got {text.strip()[:40]!r} ({error}); fix the line"
        ) from None
    if not isinstance(line, dict):
        raise ValueError(
            f'{where}: expected a JSON object, got {text.strip()[:40]!r}; write {{"id": ..., "value": ...}}'
        )
    return line


def _column(where: str, line: dict[str, Any], place: dict[str, int]) -> int:
    name, column = line.get("id"), line.get("column")
    if name is None and column is None:
        raise ValueError(f"{where}: expected id or column, got neither; add the one of the examples to evaluate")
    if column is not None and (type(column) is not int or not 0 <= column < len(place)):
        raise ValueError(
            f"{where}: expected a column from 0 to {len(place) - 1}, got {column!r}; use the matrix's columns"
        )
    if name is None:
        return int(column)  # type: ignore[arg-type]
    if str(name) not in place:
        raise ValueError(
            f"{where}: expected the id of an example of the matrix, got {name!r}; keep the id that was chosen"
        )
    if column not in {None, place[str(name)]}:
        raise ValueError(
            f"{where}: expected column {place[str(name)]} for id {name!r}, got {column}; leave one of the two out"
        )
    return place[str(name)]


def _value(where: str, line: dict[str, Any]) -> float:
    if "value" not in line:
        raise ValueError(f"{where}: expected a value, got none; add the measured forgetting, or null if there is none")
    value = line["value"]
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}: expected a finite value or null, got {value!r}; write a number")
    return float(value)


def _random(where: str, line: dict[str, Any]) -> bool | None:
    flag = line.get("random")
    if flag is not None and not isinstance(flag, bool):
        raise ValueError(f"{where}: expected random to be true or false, got {flag!r}; keep what was chosen")
    return flag


def _measured(path: Path, task: str, rows: dict[int, tuple[float, bool | None]]) -> Measured:
    values = [value for value, _ in rows.values()]
    flags = [flag for _, flag in rows.values()]
    if not np.isfinite(values).any():
        raise ValueError(f"{path}: expected a value of task {task!r} that is a number, got none; add what was measured")
    random = None if all(flag is None for flag in flags) else np.array([bool(flag) for flag in flags])
    return Measured(task, np.array(list(rows), np.int64), np.array(values), random)
