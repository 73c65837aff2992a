"""The heatmap of a forgetting matrix."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from fastforget._files import write_atomically
from fastforget.matrix.result import ForgettingMatrix, singular_order

PERCENTILE = 99.0  # of |Z|: beyond it colours saturate, or a few entries would leave the rest white
COLUMNS = 1500  # more cannot be told apart: neighbours are averaged
LABEL = 40  # characters of a task's name
MISSING = "0.8"  # grey


def plot_heatmap(matrix: ForgettingMatrix, path: str | os.PathLike[str]) -> Path:
    """Draw the matrix as a PNG: red where an example was forgotten, blue where it became easier, grey where it is NaN.

    Rows and columns are ordered by the first singular vectors; the bars on the right are the rows' means.

    Args:
        matrix: the matrix.
        path: the file, ending in `.png`.

    Returns:
        The path.

    Raises:
        ValueError: if the path does not end in `.png`, or the matrix has no finite entry.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(os.fspath(path))
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: expected a file ending in .png, got {path}; rename it")
    if not np.isfinite(matrix.values).any():
        raise ValueError("matrix: expected at least one finite value, got none; finish the run first")
    rows, columns = singular_order(matrix.values)
    values = matrix.values[np.ix_(rows, columns)]
    n_tasks = len(rows)
    row_height = min(max(0.26, 3.0 / n_tasks), 12.0 / n_tasks)  # inches
    height = 1.4 + row_height * n_tasks
    text = min(9.0, 0.7 * 72 * row_height)  # points
    figure = Figure(figsize=(11, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    main, side = figure.subplots(1, 2, width_ratios=[8, 1], sharey=True)
    limit = float(np.percentile(np.abs(values[np.isfinite(values)]), PERCENTILE)) or 1.0
    image = _draw_values(main, values, limit)
    main.set_yticks(range(n_tasks), [_short(matrix.tasks[row]) for row in rows], fontsize=text)
    main.set_xlabel(f"{values.shape[1]:,} upstream examples, ordered by first singular vector")
    main.set_ylabel("fine-tuned model")
    _draw_means(side, values)
    bar = figure.colorbar(image, ax=side, extend="both", fraction=0.25, pad=0.1, aspect=20 + height, extendfrac=0.02)
    bar.set_label(f"log-perplexity increase ({matrix.unit})")
    figure.suptitle(
        f"Forgetting of {values.shape[1]:,} upstream examples by {n_tasks} fine-tuned models",
        fontsize=13,
        weight="bold",
    )
    figure.supxlabel(_caption(matrix), fontsize=9, color="0.3")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _draw_values(axes: Any, values: np.ndarray, limit: float) -> Any:
    from matplotlib import colormaps

    n_tasks, n_examples = values.shape
    if n_examples > COLUMNS:
        values = np.stack([part.mean(1) for part in np.array_split(values, COLUMNS, axis=1)], axis=1)
    return axes.imshow(
        values,
        aspect="auto",
        cmap=colormaps["RdBu_r"].with_extremes(bad=MISSING),
        vmin=-limit,
        vmax=limit,
        interpolation="nearest",
        extent=(0, n_examples, n_tasks - 0.5, -0.5),
    )


def _draw_means(axes: Any, values: np.ndarray) -> None:
    finite = np.isfinite(values)
    means = np.where(finite, values, 0).sum(1) / np.maximum(finite.sum(1), 1)
    axes.barh(range(len(means)), means, color=["#b2182b" if mean > 0 else "#2166ac" for mean in means])
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_title("row mean", fontsize=9)
    axes.locator_params(axis="x", nbins=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _short(name: str) -> str:
    return name if len(name) <= LABEL else name[: LABEL // 2 - 1] + "…" + name[-LABEL // 2 :]


def _caption(matrix: ForgettingMatrix) -> str:
    summary = matrix.summary()
    parts = [f"mean {summary['mean']:+.3f} {matrix.unit}", f"{summary['share_increased']:.0%} of entries rose"]
    noise = [
        f"{what} {matrix.noise[key]['rms']:.1e}"
        for key, what in (("batch_composition", "other batches"), ("wider_dtype", "wider dtype"))
        if "rms" in matrix.noise.get(key, {})
    ]
    if noise:
        parts.append(f"noise floor (rms): {', '.join(noise)}")
    if summary["nan"]["count"]:
        parts.append(f"{summary['nan']['count']} NaN (grey)")
    if not matrix.complete:
        parts.append("unfinished run")
    return "; ".join(parts)
