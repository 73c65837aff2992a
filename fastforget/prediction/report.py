"""One page about a forgetting matrix: what it looks like, how much of it is low-rank, which tasks and examples stand out."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fastforget._files import write_atomically
from fastforget.prediction.analysis import Analysis
from fastforget.prediction.matrices import matrix_values

__all__ = ["plot_analysis", "shorten", "task_clusters"]

PERCENTILE = 99.0  # of what is shown: beyond it colours saturate, or a few entries would leave the rest white
COLUMNS = 1500  # more cannot be told apart: neighbours are averaged
NAMED = 30  # tasks of which all effects and similarities are named
EXTREMES = 14  # of more tasks: so many of either end
EXAMPLES = 8  # most and least forgotten ones
NAME, TEXT = 30, 88  # characters
RED, BLUE, MISSING = "#b2182b", "#2166ac", "0.8"


def plot_analysis(matrix: Any, analysis: Analysis, path: str | os.PathLike[str]) -> Path:
    """Draw the page as a PNG.

    Args:
        matrix: What was analysed.
        analysis: Of it.
        path: The file, ending in `.png`.

    Returns:
        The path.

    Raises:
        ValueError: The path does not end in `.png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(os.fspath(path))
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: expected a file ending in .png, got {path}; rename it")
    tasks = len(analysis.tasks)
    top = min(max(0.09 * tasks + 1.0, 3.2), 6.8)  # inches of the heatmap
    middle = min(max(0.16 * tasks + 1.2, 3.2), 5.0)
    bottom = 0.19 * min(EXAMPLES, len(analysis.examples)) + 0.4
    figure = Figure(figsize=(11.5, top + middle + bottom + 1.3), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(h_pad=0.1, w_pad=0.08)  # type: ignore[union-attr]
    rows: Any = figure.subfigures(3, 1, height_ratios=[top, middle, bottom])
    _draw_matrix(rows[0], matrix_values(matrix), analysis, top)
    ranks, effects, similarity = rows[1].subplots(1, 3, width_ratios=[1, 1, 1.25])
    _draw_ranks(ranks, analysis)
    _draw_effects(effects, analysis, middle)
    _draw_similarity(rows[1], similarity, analysis, middle)
    most, least = rows[2].subplots(1, 2)
    _draw_examples(most, analysis, analysis.most_forgotten(EXAMPLES), "most forgotten examples")
    _draw_examples(least, analysis, analysis.least_forgotten(EXAMPLES), "least forgotten examples")
    title = f"Forgetting of {len(analysis.examples):,} upstream examples by {tasks} fine-tuned models"
    figure.suptitle(title, fontsize=14, weight="bold")
    figure.supxlabel(_caption(analysis), fontsize=9, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")  # texts are in any script
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def task_clusters(analysis: Analysis) -> np.ndarray:
    """The tasks, similar ones side by side: the leaves of an average linkage of 1 - similarity.

    Args:
        analysis: Of the matrix.

    Returns:
        `[M]` int64.
    """
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    if len(analysis.tasks) < 3:
        return np.arange(len(analysis.tasks))
    distance = 1 - (analysis.task_similarity + analysis.task_similarity.T) / 2
    np.fill_diagonal(distance, 0)
    return leaves_list(linkage(squareform(np.maximum(distance, 0)), "average", optimal_ordering=True)).astype(np.int64)


def shorten(text: str, length: int) -> str:
    """A text in one line of at most so many characters.

    Args:
        text: Any.
        length: At least 2.

    Returns:
        Its first words; spaces for what cannot be printed.
    """
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in text[: 4 * length]).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + "…"


def _draw_matrix(figure: Any, values: np.ndarray, analysis: Analysis, height: float) -> None:
    from matplotlib import colormaps

    axes = figure.subplots()
    order = np.argsort(-analysis.directions[:, 0], kind="stable")
    picture = _binned(values, np.argsort(-analysis.loadings[:, 0], kind="stable"))[order]
    finite = np.abs(picture[np.isfinite(picture)])
    limit = float(np.percentile(finite, PERCENTILE)) or 1.0
    image = axes.imshow(
        picture,
        aspect="auto",
        cmap=colormaps["RdBu_r"].with_extremes(bad=MISSING),
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
        extent=(0, values.shape[1], len(order) - 0.5, -0.5),
    )
    size = min(8.0, 0.8 * 72 * (height - 0.9) / len(order))  # points
    names = [shorten(analysis.tasks[i], NAME) for i in order] if size >= 4.5 else []
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.set_ylabel("fine-tuned model", fontsize=9)
    averaged = f"; a column is the mean of about {values.shape[1] / picture.shape[1]:.0f}"
    averaged = averaged if picture.shape[1] < values.shape[1] else ""
    axes.set_xlabel(f"upstream examples; both ordered by the first singular direction{averaged}", fontsize=9)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.tick_params(axis="x", labelsize=8)
    extend = "both" if finite.max() > limit else "neither"
    bar = figure.colorbar(image, ax=axes, extend=extend, fraction=0.03, pad=0.01, extendfrac=0.02)
    bar.set_label(f"increase of the log-perplexity,\n{analysis.unit}", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _binned(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`[M, COLUMNS]` at most: means over neighbours in an order of the columns; NaN where none is known."""
    tasks, examples = values.shape
    count = min(examples, COLUMNS)
    place = np.empty(examples, np.int64)
    place[order] = np.arange(examples) * count // examples
    picture = np.empty((tasks, count))
    for i, row in enumerate(values):
        known = np.isfinite(row)
        sums = np.bincount(place, np.where(known, row, 0.0), count)
        counts = np.bincount(place, known, count)
        picture[i] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return picture


def _draw_ranks(axes: Any, analysis: Analysis) -> None:
    ranks, shares = np.arange(1, len(analysis.rank_r2) + 1), np.array(analysis.rank_r2)
    axes.plot(ranks, shares, "o-", color="black", markersize=4, label="rank")
    axes.axhline(analysis.additive_r2, color=RED, linestyle="--", linewidth=1.2)
    if np.isfinite(shares).all():
        for rank, share in zip(ranks, shares, strict=True):
            axes.annotate(f"{share:.2f}", (rank, share), (-1, 5), textcoords="offset points", ha="right", fontsize=8)
        axes.set_ylim(min(0.0, *shares, analysis.additive_r2) - 0.02, 1.08)
    axes.set_xlim(0.3, len(ranks) + 0.3)
    axes.set_xticks(ranks)
    axes.set_xlabel(f"rank; dashed: additive model, {analysis.additive_r2:.2f}", fontsize=9)
    axes.set_title("R² of low rank", fontsize=10)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_effects(axes: Any, analysis: Analysis, height: float) -> None:
    order = np.argsort(-analysis.task_effects, kind="stable")
    shown: list[int | None] = [int(i) for i in order]
    if len(order) > NAMED:
        shown = [*shown[:EXTREMES], None, *shown[-EXTREMES:]]
    means = [0.0 if i is None else analysis.mean + float(analysis.task_effects[i]) for i in shown]
    left = f"… {len(order) - 2 * EXTREMES} more …"
    names = [left if i is None else shorten(analysis.tasks[i], NAME) for i in shown]
    axes.barh(range(len(shown)), means, color=[RED if mean > 0 else BLUE for mean in means])
    axes.axvline(0, color="black", linewidth=0.6)
    axes.axvline(analysis.mean, color="black", linewidth=0.9, linestyle=":")
    size = min(8.0, 0.75 * 72 * (height - 0.9) / len(shown))
    axes.set_yticks(range(len(shown)), names, fontsize=size, parse_math=False)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_title("task effects", fontsize=10)
    axes.set_xlabel(f"mean + effect, {analysis.unit}; dotted: mean", fontsize=9)
    axes.locator_params(axis="x", nbins=4)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_similarity(figure: Any, axes: Any, analysis: Analysis, height: float) -> None:
    order = task_clusters(analysis)
    image = axes.imshow(analysis.task_similarity[np.ix_(order, order)], cmap="PuOr_r", vmin=-1, vmax=1, aspect="auto")
    named = len(order) <= NAMED
    names = [shorten(analysis.tasks[i], NAME) for i in order] if named else []
    axes.set_yticks(
        range(len(names)), names, fontsize=min(8.0, 0.75 * 72 * (height - 0.9) / len(order)), parse_math=False
    )
    axes.set_xticks([])
    axes.set_title("similarity of tasks", fontsize=10)
    axes.set_xlabel(f"{'' if named else f'{len(order)} tasks, '}ordered by average linkage", fontsize=9)
    bar = figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02)
    bar.set_label("correlation of rows", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _draw_examples(axes: Any, analysis: Analysis, columns: np.ndarray, title: str) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(EXAMPLES - 0.5, -0.5)
    axes.set_title(f"{title}: mean + effect, text", fontsize=10, loc="left")
    style = {"fontsize": 7.5, "va": "center", "parse_math": False, "clip_on": True}
    for y, j in enumerate(columns.tolist()):
        text = analysis.texts[j] if analysis.texts else ""
        mean = analysis.mean + float(analysis.example_effects[j])
        axes.text(0.075, y, f"{mean:+.3f}", ha="right", color=RED if mean > 0 else BLUE, **style)
        axes.text(0.09, y, shorten(text or analysis.examples[j], TEXT), **style)


def _caption(analysis: Analysis) -> str:
    unknown = 1 - np.count_nonzero(analysis.known) / analysis.known.size
    parts = [f"mean {analysis.mean:+.3f} {analysis.unit}", "red: forgotten, blue: easier than before"]
    if unknown:
        parts.append(f"{unknown:.1%} of the entries are unknown (grey)")
    return "; ".join(parts)
