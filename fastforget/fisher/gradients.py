r"""Per-example gradients of one parameter, in forms that are never as large as `[B, *parameter]` where it matters.

A rule gives one piece for every use of a parameter. One use is squared as it is,

    F += sum_b w_b G_b^2,

and several uses are added before they are squared: `G_b = sum_u G_b^u`. With per="position" every position of every use
is squared by itself. Letters: R rows of T tokens hold B examples; a tensor of tokens is `[R, n, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from fastforget.fisher.examples import Examples
from fastforget.fisher.reductions import Reduction

__all__ = [
    "Elementwise",
    "Experts",
    "HeadRows",
    "How",
    "Lookup",
    "Looped",
    "Outer",
    "PerExample",
    "Piece",
    "PositionError",
    "reduce_",
    "segment_sums",
]


class How(NamedTuple):
    """How pieces are added up."""

    positions: bool = False
    """Every position of every use is squared by itself; nothing is added before."""
    impl: str = "auto"


class PositionError(Exception):
    """A piece that cannot tell the positions of a sequence apart."""


class Piece(Protocol):
    """The gradients of every example through one use of a parameter."""

    def reduce_(self, into: Reduction, examples: Examples, how: How) -> None:
        """Hand the gradients over."""
        ...

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """G_b of `shape`, in the accumulators' dtype."""
        ...


def reduce_(into: Reduction, pieces: Sequence[Piece], examples: Examples, how: How) -> None:
    """Hand over the gradients `G_b = sum_u G_b^u` of a parameter.

    Args:
        into: The parameter's reduction, whole.
        pieces: One for every use of the parameter in this backward.
        examples: Of the batch.
        how: See `How`.
    """
    if len(pieces) == 1 or how.positions:
        for piece in pieces:
            piece.reduce_(into, examples, how)
        return
    lookups = [piece for piece in pieces if isinstance(piece, Lookup)]
    heads = [piece for piece in pieces if isinstance(piece, HeadRows)]
    outers = [piece for piece in pieces if isinstance(piece, Outer)]
    even = len({piece.activations.shape[1] for piece in outers} | {piece.indices.shape[1] for piece in lookups}) <= 1
    if even and len(lookups) + len(heads) + len(outers) == len(pieces) and len(heads) + bool(outers) <= 1:
        # A tied head and embedding: squares of both, and twice the product on the rows of an example's own tokens.
        dense = heads[0] if heads else _joined_outer(outers) if outers else None
        if dense:
            dense.reduce_(into, examples, how)
        if lookups:
            other = (lambda b, rows: dense.rows(examples, b, rows)) if dense else None
            _joined_lookup(lookups).reduce_(into, examples, how, other)
    else:
        for b in range(examples.count):
            gradient = pieces[0].example(into.shape, examples, b)
            for piece in pieces[1:]:
                gradient = gradient + piece.example(into.shape, examples, b)
            into.one_(gradient, b, examples.weights[b])


@dataclass
class Outer:
    """A linear map's weight `[O, I]`: `G_b = sum_t d_t a_t^T`."""

    activations: Tensor  # [R, n, I]
    grad_outputs: Tensor  # [R, n, O]
    grad_weight: Tensor | None = None  # [O, I], also receives sum_b G_b

    def reduce_(self, into: Reduction, examples: Examples, how: How) -> None:
        """See `Piece`."""
        segments = examples.segments(self.activations.shape[1], positions=how.positions)
        a, d = segments.take(self.activations), segments.take(self.grad_outputs)
        into.outer_(a, d, segments.offsets, segments.weights, grad_weight=self.grad_weight, impl=how.impl)

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """See `Piece`."""
        return self.rows(examples, b, torch.arange(shape[0], device=self.grad_outputs.device))

    def rows(self, examples: Examples, b: int, rows: Tensor) -> Tensor:
        """Rows `[U]` of G_b, `[U, I]`."""
        mine = examples.owners(self.activations.shape[1]) == b
        dtype = examples.weights.dtype
        return self.grad_outputs[mine][:, rows].to(dtype).T @ self.activations[mine].to(dtype)


@dataclass
class HeadRows:
    """The fused head's weight, whose squares were added block by block while its gradient was recomputed."""

    rows_of: Callable[[int, Tensor], Tensor] | None = None
    """Of a tied weight."""

    def reduce_(self, into: Reduction, examples: Examples, how: How) -> None:
        """Nothing is left to hand over."""

    def rows(self, examples: Examples, b: int, rows: Tensor) -> Tensor:
        """Rows `[U]` of G_b, `[U, H]`."""
        assert self.rows_of is not None, "only a tied weight has other uses"
        return self.rows_of(b, rows)

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """Refused: its squares are added already."""
        raise ValueError("model: its head's weight is used by something else than an embedding, which is not supported")


@dataclass
class Lookup:
    """An embedding's weight `[V, H]`: `G_b[v]` is the sum of d_t over the tokens t of b with index v."""

    indices: Tensor  # [R, n] int64
    grad_outputs: Tensor  # [R, n, H]
    padding_idx: int | None = None  # its row has no gradient

    def reduce_(
        self,
        into: Reduction,
        examples: Examples,
        how: How,
        other: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        """See `Piece`; `other(b, rows)` gives those rows of what other uses have handed over."""
        owner, index, d = self._tokens(examples)
        segment = torch.arange(len(owner), device=owner.device) if how.positions else owner
        bound = len(owner) if how.positions else examples.count
        # One entry for every (index, segment): sort by both, add up its tokens, square, add up the segments of an index.
        pairs, order = torch.sort(index * max(bound, 1) + segment, stable=True)
        pair, counts = torch.unique_consecutive(pairs, return_counts=True)
        if not len(pair):
            return
        gradient = torch.segment_reduce(d[order], "sum", lengths=counts)  # [U, H]
        row, example = pair // bound, owner[order][counts.cumsum(0) - 1]
        others = torch.zeros_like(gradient) if other else None
        for b in example.unique().tolist() if other else ():
            here = (example == b).nonzero()[:, 0]
            others[here] = other(b, row[here])  # type: ignore[misc, index]
        into.rows_(row, example, gradient, others, examples.weights[example])
        examples.nonfinite[example[~gradient.isfinite().all(1)]] = True

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """See `Piece`."""
        owner, index, d = self._tokens(examples)
        mine = (owner == b).nonzero()[:, 0]
        index, order = torch.sort(index[mine], stable=True)
        touched, counts = torch.unique_consecutive(index, return_counts=True)
        gradient = d.new_zeros(shape)
        if len(touched):
            gradient[touched] = torch.segment_reduce(d[mine][order], "sum", lengths=counts)
        return gradient

    def _tokens(self, examples: Examples) -> tuple[Tensor, Tensor, Tensor]:
        """Owner `[S]`, index `[S]` and output gradient `[S, H]` of every token that counts."""
        owner, index = examples.owners(self.indices.shape[1]).flatten(), self.indices.flatten()
        keep = owner >= 0
        if self.padding_idx is not None:
            keep &= index != self.padding_idx
        kept = keep.nonzero()[:, 0]
        d = self.grad_outputs.reshape(-1, self.grad_outputs.shape[-1])[kept].to(examples.weights.dtype)
        return owner[kept], index[kept], d


@dataclass
class Elementwise:
    """A bias or a norm's weight: `G_b = sum_t g_t`."""

    gradients: Tensor  # in the layout of the module's output: [R, ..., *parameter] or [R * T, ..., *parameter]
    features: int = 1  # dimensions of the parameter

    def reduce_(self, into: Reduction, examples: Examples, how: How) -> None:
        """See `Piece`."""
        gradient, weights = self._per_segment(examples, how.positions)  # [segments, parameter's elements]
        into.dense_(gradient, weights)
        if how.positions:
            examples.edges.append(gradient.sum())
        else:
            examples.nonfinite |= ~gradient.isfinite().all(1)

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """See `Piece`."""
        return self._per_segment(examples, False)[0][b].view(shape)

    def _per_segment(self, examples: Examples, positions: bool) -> tuple[Tensor, Tensor]:
        """Gradient `[segments, parameter's elements]` and weight `[segments]`."""
        g, dtype = self.gradients, examples.weights.dtype
        exact = torch.promote_types(g.dtype, torch.float32)  # autograd's own precision, but not below float32
        if examples.one_a_row and not positions:
            # Over the dimensions as they are, not flattened: the same order of summation as autograd's.
            rows = g if g.shape[0] == examples.rows else examples.tokens(g, self.features)
            lead = tuple(range(1, rows.ndim - self.features))
            sums = rows.sum(lead, dtype=exact) if lead else rows.to(exact)
            return sums.reshape(examples.count, -1).to(dtype), examples.weights
        tokens = examples.tokens(g, self.features)
        if positions and tokens.shape[1] != examples.width:
            raise PositionError
        segments = examples.segments(tokens.shape[1], positions=positions)
        flat = segments.take(tokens.reshape(*tokens.shape[:2], -1)).to(exact)
        return (flat if positions else segment_sums(flat, segments.offsets)).to(dtype), segments.weights


@dataclass
class PerExample:
    """The gradients of a small parameter, one an example."""

    gradients: Tensor  # [B, *parameter]

    def reduce_(self, into: Reduction, examples: Examples, how: How) -> None:
        """See `Piece`."""
        if how.positions:
            raise PositionError
        gradients = self.gradients.reshape(examples.count, -1).to(examples.weights.dtype)
        into.dense_(gradients, examples.weights)
        examples.nonfinite |= ~gradients.isfinite().all(1)

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """See `Piece`."""
        return self.gradients[b].to(examples.weights.dtype).view(shape)


@dataclass
class Looped:
    """Gradients that the generic rule computes example by example; none is kept."""

    compute: Callable[[int], Tensor]

    def reduce_(self, into: Reduction, examples: Examples, how: How) -> None:
        """See `Piece`."""
        if how.positions:
            raise PositionError
        for b in range(examples.count):
            gradient = self.example(into.shape, examples, b)
            into.one_(gradient, b, examples.weights[b])
            examples.nonfinite[b] |= ~gradient.sum().isfinite()

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """See `Piece`."""
        return self.compute(b).to(examples.weights.dtype).view(shape)


@dataclass
class Experts:
    """3-D expert weights `[E, O, I]`: an outer piece for every expert over the tokens that were routed to it."""

    experts: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = field(default_factory=list)
    """Expert, activations `[K, I]`, output gradients `[K, O]`, owners `[K]` ascending and >= 0, their offsets `[B + 1]`."""
    transposed: bool = False
    """The weights are `[E, I, O]`."""

    def reduce_(self, into: Reduction, examples: Examples, how: How) -> None:
        """See `Piece`."""
        for expert, a, d, owner, offsets in self.experts:
            a, d = (d, a) if self.transposed else (a, d)
            weights = examples.weights
            if how.positions:
                offsets = torch.arange(len(owner) + 1, dtype=torch.int32, device=owner.device)
                weights = weights[owner]
            into[expert].outer_(a, d, offsets, weights, grad_weight=None, impl=how.impl)

    def example(self, shape: torch.Size, examples: Examples, b: int) -> Tensor:
        """See `Piece`."""
        gradient = torch.zeros(shape, dtype=examples.weights.dtype, device=examples.owner.device)
        for expert, a, d, owner, _ in self.experts:
            a, d = a[owner == b].to(gradient.dtype), d[owner == b].to(gradient.dtype)
            gradient[expert] = a.T @ d if self.transposed else d.T @ a
        return gradient


def segment_sums(tokens: Tensor, offsets: Tensor) -> Tensor:
    """Sums of tokens by segment, in a fixed order.

    Args:
        tokens: `[S, C]`.
        offsets: `[B + 1]`.

    Returns:
        `[B, C]`.
    """
    lengths = offsets.diff().long()
    if not len(tokens):
        return tokens.new_zeros(len(lengths), tokens.shape[1])
    return torch.segment_reduce(tokens, "sum", lengths=lengths, unsafe=True)


def _joined_outer(pieces: Sequence[Outer]) -> Outer:
    """The tokens of several uses beside each other, so that one example's are one segment."""
    return Outer(_beside([p.activations for p in pieces]), _beside([p.grad_outputs for p in pieces]))


def _joined_lookup(pieces: Sequence[Lookup]) -> Lookup:
    indices = _beside([piece.indices[..., None] for piece in pieces])[..., 0]
    return Lookup(indices, _beside([piece.grad_outputs for piece in pieces]), pieces[0].padding_idx)


def _beside(tensors: Sequence[Tensor]) -> Tensor:
    """Several `[R, n, C]` as one `[R, k n, C]`: all uses of a token, then those of the next, so that owners stay sorted."""
    return torch.stack(tuple(tensors), 2).flatten(1, 2)
