"""Where in a model its Fisher information lies: the sum and the mean by layer and by kind of parameter."""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforget.fisher.names import as_fisher, canonical_name

if TYPE_CHECKING:
    from pathlib import Path

    from rich.table import Table

__all__ = ["FisherSummary", "Share", "kind_of", "place_of", "remarks", "summarise"]

EMBEDDING, FINAL_NORM, HEAD, OTHER = "embedding", "final norm", "head", "other"
BEFORE, AFTER = (EMBEDDING,), (FINAL_NORM, HEAD, OTHER)  # the layers stand between them

LAYER = re.compile(r"\.(?:layers|layer|h|blocks|block)\.(\d+)\.")
_EMBED = r"\.(?:embed(?!_out)\w*|\w*embed(?:ding|dings)?|wte|wpe|w)"
_HEAD = r"\.lm_head\.|\.(?:embed_out|lm_loss|output_layer)\.$|^\.(?:head|output|cls)\."
_NORM = r"\.\w*(?:norm|Norm)\w*\.$|\.(?:\w+_)?ln(?:_?\w{1,4})?\.$"
_IN_MLP = r"\.(?:mlp|ff|ffn|feed_forward|mlp_block)"
# Searched in this order in the dotted path of the module, numbers left out, with a dot at either end.
KINDS: dict[str, re.Pattern[str]] = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "experts": r"\.experts\.",
        "norm": _NORM,
        "router": r"\.(?:gate|router|\w+_router|shared_expert_gate)\.",
        HEAD: _HEAD,
        "state space": r"\.(?:mixer|mamba|linear_attn|rg_lru)\.",
        "qkv": r"\.(?:query_key_value|qkv\w*|Wqkv|W_pack|c_attn)\.$",
        "mlp gate+up": r"\.gate_up_proj\.$",
        "mlp gate": r"\.(?:gate_proj|w1)\.$",
        "mlp up": r"\.(?:up_proj|w3)\.$",
        "mlp down": r"\.(?:down_proj|w2)\.$",
        "fc in": rf"\.(?:c_fc|fc1|fc_in|dense_h_to_4h|intermediate\.dense|ff\.layer_1)\.$|{_IN_MLP}\.key\.$",
        "fc out": r"\.(?:fc2|fc_out|dense_4h_to_h|ff\.layer_2)\.$|(?<!attention)\.output\.dense\.$"
        rf"|{_IN_MLP}\.(?:c_proj|value)\.$",
        "q": r"\.(?:q\w{0,2}_proj|q_lin|query|[Ww]?q)\.$",
        "kv": r"\.kv\w*_proj\w*\.$",
        "k": r"\.(?:k_proj|k_lin|key|[Ww]?k)\.$",
        "v": r"\.(?:v_proj|v_lin|value|[Ww]?v)\.$",
        "o": r"\.(?:o_proj|out_proj|out_lin|c_proj|dense|[Ww]?o|attention\.output)\.$",
        EMBEDDING: rf"{_EMBED}\.$",
    }.items()
}
LORA = re.compile(r"\.lora_(?:embedding_)?(A|B|magnitude)")
NOT_A_MODULE = ("weight", "bias")
ROWS_SHOWN = 5


def place_of(name: str) -> int | str:
    """Where in the model a parameter stands.

    Args:
        name: its name.

    Returns:
        The index of its layer, or "embedding", "final norm", "head" or "other".
    """
    name = canonical_name(name)
    layer = LAYER.search(f".{name}")
    if layer:
        return int(layer[1])
    path = _path(name)
    for place, pattern in ((HEAD, _HEAD), (EMBEDDING, _EMBED), (FINAL_NORM, _NORM)):
        if re.search(pattern, path):
            return place
    return OTHER


def kind_of(name: str) -> str:
    """What a parameter is, from the names that the models of transformers use.

    Args:
        name: its name.

    Returns:
        A key of `KINDS`, "bias" or "other"; of an adapter the kind of what it adapts, as in "q lora_A".
    """
    name = canonical_name(name)
    lora = LORA.search(f".{name}")
    if lora:
        return f"{kind_of(name.partition('.lora_')[0] + '.weight')} lora_{lora[1]}"
    path = _path(name)
    if KINDS["experts"].search(path):
        return "experts"
    if name.endswith("bias"):
        return "bias"
    return next((kind for kind, pattern in KINDS.items() if pattern.search(path)), OTHER)


def _path(name: str) -> str:
    parts = [part for part in name.partition(".lora_")[0].split(".") if not part.isdigit()]
    return f".{'.'.join(parts[:-1] if parts[-1] in NOT_A_MODULE else parts)}."


@dataclass(frozen=True)
class Share:
    """The Fisher information of some parameters.

    Attributes:
        parameters: how many there are.
        mass: the sum of their finite F.
        nonfinite: how many F are NaN or infinite; they are in no sum.
    """

    parameters: int = 0
    mass: float = 0.0
    nonfinite: int = 0

    @property
    def mean(self) -> float:
        """The mean of the finite F; NaN where there is none."""
        finite = self.parameters - self.nonfinite
        return self.mass / finite if finite else math.nan

    def __add__(self, other: Share) -> Share:
        return Share(
            self.parameters + other.parameters,
            math.fsum((self.mass, other.mass)),
            self.nonfinite + other.nonfinite,
        )


@dataclass(frozen=True, repr=False)
class FisherSummary:
    """A Fisher by place and kind; rich prints it as tables.

    Attributes:
        cells: the share of every place (layer index, "embedding", ...) and kind that occur together.
        metadata: the Fisher's.
    """

    cells: dict[tuple[int | str, str], Share]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def places(self) -> list[int | str]:
        """The places in the order in which the model computes them."""
        found = {place for place, _ in self.cells}
        layers = sorted(place for place in found if isinstance(place, int))
        return [*(p for p in BEFORE if p in found), *layers, *(p for p in AFTER if p in found)]

    @property
    def kinds(self) -> list[str]:
        """The kinds: attention, feed-forward, the rest."""
        attention, mlp = ["q", "k", "v", "kv", "qkv", "o"], [kind for kind in KINDS if kind.startswith(("mlp", "fc"))]
        order = [*attention, *mlp, "router", "experts", "state space", "norm", "bias", EMBEDDING, HEAD, OTHER]
        return sorted(
            {kind for _, kind in self.cells}, key=lambda kind: (order.index(kind.partition(" lora_")[0]), kind)
        )

    @property
    def total(self) -> Share:
        """All parameters."""
        return _sum(self.cells.values())

    def by_place(self) -> dict[int | str, Share]:
        """Shares by layer, and of what belongs to no layer.

        Returns:
            Shares in the model's order.
        """
        return {at: _sum(s for (place, _), s in self.cells.items() if place == at) for at in self.places}

    def by_kind(self) -> dict[str, Share]:
        """Shares by kind of parameter.

        Returns:
            Shares in the order of `kinds`.
        """
        return {of: _sum(s for (_, kind), s in self.cells.items() if kind == of) for of in self.kinds}

    @property
    def unit(self) -> str:
        """The unit of F: squared gradients of an example's loss."""
        loss = {"mean": "nats per token", "sum": "nats"}.get(self.metadata.get("loss", ""), "loss")
        return f"({loss} / parameter)²"

    def tables(self) -> list[Table]:
        """The shares as tables.

        Returns:
            One table by layer, one by kind.
        """
        return [
            _table("layer", {place_label(place): share for place, share in self.by_place().items()}, self),
            _table("kind", self.by_kind(), self),
        ]

    def remarks(self) -> list[str]:
        """What a reader has to know before believing the numbers.

        Returns:
            Sentences.
        """
        bad = self.total.nonfinite
        return ([f"{bad:,} values are NaN or infinite and are in no sum"] if bad else []) + remarks(self.metadata)

    def __rich_console__(self, *_: Any) -> Iterator[Any]:
        yield from self.tables()
        yield from self.remarks()

    def __repr__(self) -> str:
        """One line: the tables are for rich."""
        total = self.total
        return f"FisherSummary({total.parameters:,} parameters, mass {total.mass:.4g}, mean {total.mean:.4g})"

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the mean F by layer and kind, and the mass of every layer.

        Args:
            path: the file, ending in `.png`.

        Returns:
            The path.
        """
        from fastforget.fisher.plot import plot_summary

        return plot_summary(self, path)


def summarise(fisher: Any) -> FisherSummary:
    """Sum a Fisher by layer and by kind of parameter.

    Args:
        fisher: an estimator, a `{name: tensor}` or the path of a saved file.

    Returns:
        The summary.

    Raises:
        ValueError: if there is no tensor.
    """
    fisher = as_fisher(fisher)
    if not fisher:
        raise ValueError("fisher: expected at least one tensor, got none; does any parameter require a gradient?")
    cells: dict[tuple[int | str, str], Share] = {}
    for name, tensor in fisher.items():
        cell = place_of(name), kind_of(name)
        cells[cell] = cells.get(cell, Share()) + _share(tensor)
    return FisherSummary(cells, fisher.metadata)


def remarks(metadata: Mapping[str, Any]) -> list[str]:
    """What a Fisher's metadata says that its examples lack.

    Args:
        metadata: the Fisher's.

    Returns:
        Sentences.
    """
    found, failed = [], metadata.get("failed") or []
    if failed:
        first = ", ".join(f"{row['where']} (id {row['id']})" for row in failed[:ROWS_SHOWN])
        found.append(f"{len(failed)} rows without a finite loss or gradient were left out, first {first}")
    if metadata.get("truncated"):
        found.append(f"{metadata['truncated']} examples of the data were truncated to the maximal length")
    if metadata.get("skipped"):
        found.append(f"{metadata['skipped']} rows without a target token were left out")
    return found


def place_label(place: int | str) -> str:
    """How reports call a place.

    Args:
        place: a layer's index or a name.

    Returns:
        The label.
    """
    return f"layer {place}" if isinstance(place, int) else place


def _share(tensor: Tensor) -> Share:
    tensor = tensor.detach()
    mass = float(tensor.sum(dtype=torch.float64))
    if math.isfinite(mass):
        return Share(tensor.numel(), mass)
    finite = tensor[tensor.isfinite()]
    return Share(tensor.numel(), float(finite.sum(dtype=torch.float64)), tensor.numel() - finite.numel())


def _sum(shares: Iterable[Share]) -> Share:
    return functools.reduce(Share.__add__, shares, Share())


def _table(title: str, shares: dict[str, Share], summary: FisherSummary) -> Table:
    from rich.table import Table

    about, total = summary.metadata, summary.total
    of = f" of {about['examples']:,} examples" if "examples" in about else ""
    table = Table(title, "parameters", "mass", "share of mass", "mean F", title=f"Diagonal Fisher{of}, {summary.unit}")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, share in shares.items():
        table.add_row(name, *_cells(share, total))
    table.add_section()
    table.add_row("all", *_cells(total, total), style="bold")
    return table


def _cells(share: Share, total: Share) -> list[str]:
    part = f"{share.mass / total.mass:.1%}" if total.mass else "-"
    mean = "-" if math.isnan(share.mean) else f"{share.mean:.3e}"
    return [f"{share.parameters:,}", f"{share.mass:.3e}", part, mean]
