"""`fastforget predict`: what it prints and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fastforget.matrix import ForgettingMatrix
from fastforget.prediction.analysis import Analysis, analyse
from fastforget.prediction.audit import Audit
from fastforget.prediction.files import (
    Measured,
    Prediction,
    read_values,
    write_columns,
    write_json,
    write_predictions,
)
from fastforget.prediction.predictor import ForgettingPredictor, Screening
from fastforget.prediction.report import plot_analysis, shorten, task_clusters

__all__ = ["run_analysis", "run_choice", "run_prediction"]

SHOWN = 10  # tasks and examples of either end in a table
TEXT = 60  # characters


def run_analysis(matrix: ForgettingMatrix, out: Path, rank: int) -> None:
    """Print an analysis, and write `analysis.png` and `analysis.json`.

    Args:
        matrix: The matrix.
        out: Folder.
        rank: The largest rank.
    """
    found = analyse(matrix, rank=rank)
    _show(_analysis_tables(found))
    clusters = [found.tasks[i] for i in task_clusters(found)]
    write_json(out / "analysis.json", found.to_dict(SHOWN) | {"task_clusters": clusters})
    plot_analysis(matrix, found, out / "analysis.png")
    print(f"wrote {out / 'analysis.png'} and {out / 'analysis.json'}")


def run_choice(
    matrix: ForgettingMatrix, out: Path, count: int, *, random: int | None, seed: int, values: Path | None
) -> None:
    """Write the examples to evaluate for a new task.

    Args:
        matrix: Of the known tasks.
        out: The JSONL file.
        count: How many.
        random: How many of them at random.
        seed: Of the draw.
        values: What a first round has measured, of one task.

    Raises:
        ValueError: The values are of several tasks.
    """
    seen: list[Any] = [None, None]
    if values is not None:
        measured = read_values(values, matrix.examples)
        if len(measured) > 1:
            raise ValueError(
                f"values: expected one task with --choose, got {len(measured)} in {values}; choose for each"
            )
        seen = [measured[0].columns, measured[0].values]
    predictor = ForgettingPredictor().fit(matrix)
    chosen = predictor.choose_columns(count, random=random, seed=seed, columns=seen[0], values=seen[1])
    write_columns(out, matrix, chosen.columns, chosen.random)
    print(f"wrote {out}: {count} examples to evaluate, {int(chosen.random.sum())} of them drawn at random")
    print('add "value", the measured forgetting, to each line, and pass the file to --values')


def run_prediction(
    matrix: ForgettingMatrix, values: Path, out: Path, *, method: str, level: float, threshold: float | None, top: int
) -> None:
    """Predict rows, print what is expected of them, and write `prediction.parquet` and `prediction.json`.

    Args:
        matrix: Of the known tasks.
        values: What was measured.
        out: Folder.
        method: Of the predictor.
        level: Of the intervals.
        threshold: Of the share that is forgotten.
        top: How many of the predicted worst examples.

    Raises:
        ValueError: The values do not fit, or a setting is outside its range.
    """
    measured = read_values(values, matrix.examples)
    if not 1 <= top <= len(matrix.examples):
        raise ValueError(f"top: expected 1 to {len(matrix.examples)}, got {top}")
    predictor = ForgettingPredictor(method).fit(matrix)
    predictions, records, tables = [], [], []
    for own in measured:
        prediction = _predicted(predictor, own, level)
        audit = None
        if own.random is not None and (own.random & ~np.isnan(own.values)).sum() >= 3:
            audit = predictor.audit(own.columns, own.values, own.random, threshold=threshold, level=level)
        worst = predictor.screen(own.columns, own.values, top)
        predictions.append(prediction)
        tables.append(_estimates(matrix, prediction, own, audit, level, threshold))
        tables.append(_worst(matrix, prediction, worst))
        records.append(_record(matrix, prediction, own, audit, worst))
    _show(tables)
    if any(own.random is None for own in measured):
        print('no line says "random", so that nothing could be audited: keep it of the chosen examples')
    write_predictions(out / "prediction.parquet", matrix.examples, predictions)
    about = {"method": method, "level": level, "threshold": threshold, "unit": matrix.unit, "tasks": records}
    write_json(out / "prediction.json", about)
    print(f"wrote {out / 'prediction.parquet'} and {out / 'prediction.json'}")


def _predicted(predictor: ForgettingPredictor, own: Measured, level: float) -> Prediction:
    mean, std = predictor.predict(own.columns, own.values, return_std=True)
    low, high = predictor.predict_interval(own.columns, own.values, level=level)
    evaluated = np.zeros(len(mean), bool)
    evaluated[own.columns[~np.isnan(own.values)]] = True
    return Prediction(own.task, mean, std, low, high, evaluated)


def _analysis_tables(found: Analysis) -> list[Table]:
    shares = _table(f"Share of the variance (R²), mean {found.mean:+.4f} {found.unit}", "model", "R²")
    shares.add_row("additive", f"{found.additive_r2:.3f}")
    if found.exact_f1:
        shares.add_column("F1 of exact match", justify="right")
    for rank, share in enumerate(found.rank_r2, 1):
        shares.add_row(f"rank {rank}", f"{share:.3f}", *([f"{found.exact_f1[rank - 1]:.3f}"] if found.exact_f1 else []))
    tasks = _table(f"Effects of tasks, {found.unit}", "task", "effect", "most similar task", "correlation")
    order = np.argsort(-found.task_effects, kind="stable").tolist()
    between = len(order) > 2 * SHOWN
    for place, i in enumerate(order):
        if between and place == SHOWN:
            tasks.add_row(f"… {len(order) - 2 * SHOWN} more …", "", "", "", style="dim")
        if not between or place < SHOWN or place >= len(order) - SHOWN:
            tasks.add_row(escape(found.tasks[i]), f"{found.task_effects[i]:+.4f}", *_nearest(found, i))
    tables = [shares, tasks]
    for name, columns in (("Most", found.most_forgotten(SHOWN)), ("Least", found.least_forgotten(SHOWN))):
        table = _table(f"{name} forgotten examples, effects in {found.unit}", "example", "effect", "text")
        for j in columns.tolist():
            text = found.texts[j] if found.texts else ""
            table.add_row(
                escape(found.examples[j]), f"{found.example_effects[j]:+.4f}", escape(shorten(text, TEXT)) or "-"
            )
        tables.append(table)
    return tables


def _nearest(found: Analysis, task: int) -> tuple[str, str]:
    """The most similar task, and their correlation."""
    if len(found.tasks) < 2:
        return "-", "-"
    others = found.task_similarity[task].copy()
    others[task] = -np.inf
    return escape(found.tasks[int(others.argmax())]), f"{others.max():+.2f}"


def _estimates(
    matrix: ForgettingMatrix,
    prediction: Prediction,
    own: Measured,
    audit: Audit | None,
    level: float,
    threshold: float | None,
) -> Table:
    title = (
        f"{own.task or 'New task'}: {int(prediction.evaluated.sum())} of {len(matrix.examples):,} examples evaluated"
    )
    table = _table(escape(title), "estimate", "value", f"{level:.0%} interval")
    if audit is not None:
        table.add_row(f"mean, audited, {matrix.unit}", f"{audit.mean.value:+.4f}", _interval(audit.mean, "+.4f"))
        if audit.share is not None:
            table.add_row(f"share above {threshold:g}", f"{audit.share.value:.1%}", _interval(audit.share, ".1%"))
    table.add_row("mean, predicted alone", f"{prediction.mean.mean():+.4f}", "-")
    return table


def _worst(matrix: ForgettingMatrix, prediction: Prediction, worst: Screening) -> Table:
    count = len(worst.columns)
    title = f"Predicted {count} most forgotten; {worst.expected_recall:.0%} of the true {count} are expected among them"
    table = _table(title, "example", "forgetting", "interval", "text")
    for j in worst.columns.tolist():
        interval = "measured" if prediction.evaluated[j] else f"{prediction.low[j]:+.3f} to {prediction.high[j]:+.3f}"
        text = escape(shorten(matrix.texts[j], TEXT)) or "-"
        table.add_row(escape(matrix.examples[j]), f"{prediction.mean[j]:+.4f}", interval, text)
    return table


def _record(
    matrix: ForgettingMatrix, prediction: Prediction, own: Measured, audit: Audit | None, worst: Screening
) -> dict[str, Any]:
    audited = None
    if audit is not None:
        audited = {"mean": audit.mean._asdict(), "share": audit.share._asdict() if audit.share else None}
    return {
        "task": own.task,
        "evaluated": int(prediction.evaluated.sum()),
        "random": None if own.random is None else int(own.random.sum()),
        "audited": audited,
        "predicted_mean": float(prediction.mean.mean()),
        "expected_recall": worst.expected_recall,
        "worst": [
            {"column": j, "id": matrix.examples[j], "mean": float(prediction.mean[j])} for j in worst.columns.tolist()
        ],
    }


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for place, name in enumerate(columns):
        left = not place or name in {"text", "most similar task"}
        table.add_column(name, justify="left" if left else "right", no_wrap=True, overflow="ellipsis")
    return table


def _show(tables: list[Table]) -> None:
    """Print tables, each below its title, which may be wider."""
    console = Console(highlight=False)
    for table in tables:
        console.print(table.title, style="bold")
        table.title = None
        console.print(table)


def _interval(estimate: Any, spec: str) -> str:
    return f"{estimate.low:{spec}} to {estimate.high:{spec}}"
