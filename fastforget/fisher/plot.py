"""The picture of a Fisher: mean by layer and kind, mass by layer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastforget._files import write_atomically

if TYPE_CHECKING:
    from fastforget.fisher.summary import FisherSummary

ABSENT, ZERO, NONFINITE = range(3)
COLOURS = ("0.95", "0.7", "#e41a1c")  # of these cells, which have no place on a log scale
DECADES = 10.0  # of the colour scale: on a wider one no differences show
CELL = 0.55  # inches, the width of a column


def plot_summary(summary: FisherSummary, path: str | os.PathLike[str]) -> Path:
    """Draw the mean F of every layer and kind on a log scale, and beside it the mass of every layer.

    Args:
        summary: the summary.
        path: the file, ending in `.png`.

    Returns:
        The path.

    Raises:
        ValueError: if the path does not end in `.png`.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path = Path(os.fspath(path))
    if path.suffix.lower() != ".png":
        raise ValueError(f"path: expected a file ending in .png, got {path}; rename it")
    rows, columns = len(summary.places), len(summary.kinds)
    row_height = min(max(0.24, 3.6 / rows), 16.0 / rows, 0.42)  # inches
    text = min(9.0, 0.7 * 72 * row_height)  # points
    width = CELL * max(columns, 7)
    figure = Figure(figsize=(width + 4.4, row_height * rows + 3.0), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    main, side = figure.subplots(1, 2, width_ratios=[width, 2.4], sharey=True)
    image = _draw_means(main, summary)
    main.set_xticks(range(columns), summary.kinds, rotation=40, ha="right", rotation_mode="anchor", fontsize=9)
    main.set_yticks(range(rows), [str(place) for place in summary.places], fontsize=text)
    main.set_ylabel("layer")
    main.set_title("mean F by layer and kind of parameter", fontsize=10)
    _draw_mass(side, summary, text)
    if image is not None:
        lowest = float(image.get_array().min())
        extend = "min" if lowest < image.norm.vmin else "neither"
        # Below both, so that their rows stay side by side.
        place = {
            "location": "bottom",
            "anchor": (0.0, 0.0),
            "shrink": 0.6,
            "aspect": 40,
            "pad": 0.2 / figure.get_figheight(),
        }
        bar = figure.colorbar(image, ax=[main, side], extend=extend, extendfrac=0.02, **place)
        bar.set_label(f"mean F, {summary.unit}", fontsize=9)
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(_title(summary), fontsize=13, weight="bold")
    figure.supxlabel(_caption(summary), fontsize=9, color="0.3")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return path


def _draw_means(axes: Any, summary: FisherSummary) -> Any:
    from matplotlib.colors import ListedColormap, LogNorm

    shape = len(summary.places), len(summary.kinds)
    means, states = np.zeros(shape), np.full(shape, ABSENT)
    for (place, kind), share in summary.cells.items():
        cell = summary.places.index(place), summary.kinds.index(kind)
        states[cell] = ZERO if np.isfinite(share.mean) else NONFINITE
        means[cell] = share.mean if np.isfinite(share.mean) else 0.0
    axes.imshow(states, cmap=ListedColormap(COLOURS), vmin=ABSENT, vmax=NONFINITE, aspect="auto")
    axes.set_xticks(np.arange(shape[1] + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(shape[0] + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    positive = means[means > 0]
    if not positive.size:
        return None
    high = float(positive.max())
    low = min(max(float(positive.min()), high / 10**DECADES), high / 10)
    norm = LogNorm(low, high)
    return axes.imshow(np.ma.masked_less_equal(means, 0), cmap="viridis", norm=norm, aspect="auto")


def _draw_mass(axes: Any, summary: FisherSummary, text: float) -> None:
    mass = [share.mass for share in summary.by_place().values()]
    total = sum(mass)
    bars = axes.barh(range(len(mass)), mass, color="#31688e", height=0.8)
    if total > 0:
        labels = [f"{part / total:.1%}" if part >= 0.001 * total else "<0.1%" if part else "0" for part in mass]
        axes.bar_label(bars, labels, padding=2, fontsize=0.85 * text)
    axes.set_xlim(0, 1.4 * max(mass) or 1)  # room for the labels
    axes.set_title("mass: sum of F", fontsize=10)
    axes.locator_params(axis="x", nbins=3)
    axes.xaxis.set_major_formatter("{x:.2g}")
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", which="both", left=False, labelleft=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _title(summary: FisherSummary) -> str:
    of = f" of {summary.metadata['examples']:,} examples" if "examples" in summary.metadata else ""
    return f"Diagonal Fisher{of}"


def _caption(summary: FisherSummary) -> str:
    total, about = summary.total, summary.metadata
    parts = [f"{total.parameters:,} parameters", f"mass {total.mass:.3g}", f"mean F {total.mean:.3g}"]
    parts += [f"{name} = {about[name]}" for name in ("per", "batch_size", "labels", "loss") if name in about]
    caveats = ["grey: F = 0"] if any(share.mean == 0 for share in summary.cells.values()) else []
    if total.nonfinite:
        caveats.append(f"{total.nonfinite:,} values are NaN or infinite and left out (red: all of a cell)")
    return "\n".join(["; ".join(parts), *caveats])
