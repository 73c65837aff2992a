"""How many entries of a model a change moves, by layer and by kind of parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastforget.fisher.summary import FisherSummary, Share, kind_of, place_label, place_of

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Changes"]


@dataclass
class Changes:
    """Entries that change, of those there are.

    Attributes:
        changed: Of each tensor, by canonical name.
        entries: All of each tensor's.
        averaged: Floating-point tensors that no Fisher knows, of which a merge takes the weighted mean.
    """

    changed: dict[str, int] = field(default_factory=dict)
    entries: dict[str, int] = field(default_factory=dict)
    averaged: list[str] = field(default_factory=list)

    def tables(self, title: str) -> list[Table]:
        """The numbers as tables.

        Args:
            title: What the change is.

        Returns:
            One table by layer, one by kind.
        """
        cells: dict[tuple[int | str, str], Share] = {}
        for name, entries in self.entries.items():
            cell = place_of(name), kind_of(name)
            cells[cell] = cells.get(cell, Share()) + Share(
                entries, self.changed[name]
            )  # what a summary adds up as mass
        summary = FisherSummary(cells)
        places = {place_label(place): share for place, share in summary.by_place().items()}
        return [_table(title, "layer", places.items()), _table(title, "kind", summary.by_kind().items())]


def _table(title: str, by: str, shares: Iterable[tuple[str, Share]]) -> Table:
    from rich.table import Table

    table = Table(by, "entries", "changed", "share changed", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    total = Share()
    for name, share in shares:
        total += share
        table.add_row(name, *_cells(share))
    table.add_section()
    table.add_row("all", *_cells(total), style="bold")
    return table


def _cells(share: Share) -> list[str]:
    part = f"{share.mass / share.parameters:.2%}" if share.parameters else "-"
    return [f"{share.parameters:,}", f"{share.mass:,.0f}", part]
