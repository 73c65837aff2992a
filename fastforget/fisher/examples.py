"""Which tokens of a batch belong to which example, and how much each example counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fastforget.perplexity import PackedRows

__all__ = ["Examples", "LayoutError", "Segments"]


class LayoutError(Exception):
    """A tensor whose leading dimensions are not those of the batch: its tokens cannot be told apart."""


class Segments(NamedTuple):
    """Tokens of a flattened `[R * n]` layout, sorted by example."""

    places: Tensor | None  # [S] which of the R * n tokens, in order; None for all of them as they are
    offsets: Tensor  # int32 [B + 1]
    weights: Tensor  # [B] factor of each example's squared gradient

    def take(self, tokens: Tensor) -> Tensor:
        """`[R, n, C]` to `[S, C]`."""
        flat = tokens.reshape(-1, tokens.shape[-1])
        return flat if self.places is None else flat[self.places]


class Examples:
    """The examples of one batch of R rows of T tokens.

    Args:
        owner: `[R, T]` int64, the example of every token in `[0, B)`, ascending in row-major order, or -1 for padding.
        count: B.
        weights: `[B]` factor of each example's squared gradient, in the accumulators' dtype.
        ids: B names for error messages and counts; anything hashable.
    """

    def __init__(self, owner: Tensor, count: int, weights: Tensor, ids: list[object]) -> None:
        self.owner, self.count, self.weights, self.ids = owner, count, weights, ids
        self.rows, self.width = owner.shape
        expected = torch.arange(self.rows, device=owner.device)[:, None]
        # One example a row: then a whole row belongs to it, since the gradient at its padding is zero.
        self.one_a_row = count == self.rows and bool(((owner == expected) | (owner < 0)).all())
        self.nonfinite = torch.zeros(count, dtype=torch.bool, device=owner.device)
        self.edges: list[Tensor] = []  # numbers that show whether what was added is finite, not whose
        self.waiting: dict[str, list[Any]] = {}  # pieces of parameters that are used several times, by name
        self.done: set[str] = set()  # parameters whose pieces are accumulated
        self._segments: dict[tuple[int, bool], Segments] = {}

    @classmethod
    def of_rows(cls, rows: PackedRows, weights: Tensor, ids: list[object]) -> Examples:
        """One example a row.

        Args:
            rows: Of the batch.
            weights: `[B]`.
            ids: B names.

        Returns:
            The examples.
        """
        count = len(rows.input_ids)
        owner = torch.arange(count, device=rows.input_ids.device)[:, None].expand_as(rows.input_ids)
        if rows.attended is not None:
            owner = owner.masked_fill(~rows.attended, -1)
        return cls(owner, count, weights, ids)

    @property
    def suspect(self) -> bool:
        """Whether something that was added is not finite, unknown for which example."""
        edges = [edge.to(self.owner.device) for edge in self.edges]
        return bool(edges) and not bool(torch.stack(edges).isfinite().all())

    def tokens(self, tensor: Tensor, features: int = 1) -> Tensor:
        """View a module's input or output as rows of tokens.

        Args:
            tensor: `[R, ..., *features]` or `[R * T, *features]`.
            features: How many trailing dimensions are features.

        Returns:
            `[R, n, *features]`.

        Raises:
            LayoutError: The leading dimension is neither R nor R * T, or several examples share a row whose tokens are
                not in dimension 1.
        """
        shape = tensor.shape
        lead, trail = shape[: len(shape) - features], shape[len(shape) - features :]
        if lead and lead[0] in (self.rows, self.rows * self.width):
            result = tensor.reshape(self.rows, -1, *trail)
            if self.one_a_row or lead == (self.rows, self.width) or lead == (self.rows * self.width,):
                return result
            if lead[:2] == (self.rows, self.width) and self.width not in lead[2:]:
                return result
        raise LayoutError(f"shape {tuple(shape)} for {self.rows} rows of {self.width} tokens")

    def owners(self, per_row: int) -> Tensor:
        """Example of every one of `per_row` tokens of every row, `[R, n]`; -1 for padding."""
        if per_row == self.width:
            return self.owner
        if self.one_a_row:  # perhaps heads before tokens: whole rows, whose gradient at padding is zero
            return torch.arange(self.rows, device=self.owner.device)[:, None].expand(self.rows, per_row)
        return self.owner.repeat_interleave(per_row // self.width, 1)  # a token has several vectors, one a head

    def segments(self, per_row: int, *, positions: bool = False) -> Segments:
        """Segments of `[R, n]` tokens.

        Args:
            per_row: n.
            positions: Every token is a segment of its own.

        Returns:
            The segments, made once.
        """
        key = (per_row, positions)
        if key not in self._segments:
            self._segments[key] = self._make_segments(per_row, positions)
        return self._segments[key]

    def _make_segments(self, per_row: int, positions: bool) -> Segments:
        owner, index = self.owners(per_row).flatten(), None
        if bool((owner < 0).any()):
            index = (owner >= 0).nonzero()[:, 0]
            owner = owner[index]
        if positions:
            offsets = torch.arange(len(owner) + 1, dtype=torch.int32, device=owner.device)
            return Segments(index, offsets, self.weights[owner])
        return Segments(index, offsets_of(owner, self.count), self.weights)


def offsets_of(owner: Tensor, count: int) -> Tensor:
    """`[B + 1]` int32 offsets of tokens that are sorted by example.

    Args:
        owner: `[S]` int64, ascending, in `[0, B)`.
        count: B.

    Returns:
        The offsets.
    """
    return torch.searchsorted(owner.contiguous(), torch.arange(count + 1, device=owner.device)).int()
