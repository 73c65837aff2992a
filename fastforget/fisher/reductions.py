r"""What becomes of the per-example gradients of a parameter, which pieces hand over in the form that they have them in.

Squares:   F += sum_b w_b G_b^2
Products:  dot_b += <direction, G_b>,    norm_b += <fisher, G_b^2>
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from fastforget.ops import fisher_accumulate_, gradient_products

__all__ = ["Products", "Reduction", "Reductions", "Squares"]


class Reductions(Protocol):
    """Of all parameters."""

    @property
    def dtype(self) -> torch.dtype:
        """That the gradients are handed over in."""
        ...

    def reduction(self, name: str) -> AbstractContextManager[Reduction]:
        """Of one.

        Args:
            name: The parameter's.
        """
        ...


class Reduction(Protocol):
    """Of one parameter. Everything an example has must come in one call: squares do not add up."""

    @property
    def shape(self) -> torch.Size:
        """The parameter's."""
        ...

    def __getitem__(self, part: Any) -> Reduction:
        """Of a part of the parameter, such as a slice of its rows."""
        ...

    def outer_(
        self, a: Tensor, d: Tensor, offsets: Tensor, weights: Tensor, *, grad_weight: Tensor | None, impl: str
    ) -> None:
        """`G_b = sum_{t in b} d_t a_t^T`.

        Args:
            a: `[S, I]`.
            d: `[S, O]`.
            offsets: `[B + 1]` int32.
            weights: `[B]`.
            grad_weight: `[O, I]` that receives sum_b G_b, or None.
            impl: "auto", "triton" or "torch".
        """
        ...

    def dense_(self, gradients: Tensor, weights: Tensor) -> None:
        """All gradients of a small parameter.

        Args:
            gradients: `[B, elements]`.
            weights: `[B]`.
        """
        ...

    def one_(self, gradient: Tensor, example: int, weight: Tensor) -> None:
        """One example's gradient.

        Args:
            gradient: In the parameter's shape.
            example: b.
            weight: Scalar.
        """
        ...

    def rows_(self, rows: Tensor, examples: Tensor, gradient: Tensor, other: Tensor | None, weights: Tensor) -> None:
        """Some rows of some examples' gradients, which are zero elsewhere.

        Args:
            rows: `[U]` ascending.
            examples: `[U]`, each once a row.
            gradient: `[U, H]`.
            other: `[U, H]` what other uses of the parameter add there, and have handed over by themselves; or None.
            weights: `[U]` of the examples.
        """
        ...

    def edges(self) -> list[Tensor]:
        """Numbers that are not finite where something in a token's gradient or activation was not."""
        ...


class Squares:
    """Adds weighted squares.

    Args:
        fisher: The sums, changed in place.
    """

    def __init__(self, fisher: Tensor) -> None:
        self.fisher = fisher

    @property
    def shape(self) -> torch.Size:
        """See `Reduction`."""
        return self.fisher.shape

    def __getitem__(self, part: Any) -> Squares:
        return Squares(self.fisher[part])

    def outer_(
        self, a: Tensor, d: Tensor, offsets: Tensor, weights: Tensor, *, grad_weight: Tensor | None = None, impl: str
    ) -> None:
        """See `Reduction`."""
        if (
            self.fisher.dtype == torch.float64 != d.dtype
        ):  # a router that computes in float32 whatever the model's dtype
            for start, end, weight in zip(*offsets.unfold(0, 2, 1).T.tolist(), weights, strict=True):
                self.fisher.add_(weight * (d[start:end].T @ a[start:end]).double().square())
            return
        fisher_accumulate_(self.fisher, a, d, offsets, weights=weights, grad_weight=grad_weight, impl=impl)

    def dense_(self, gradients: Tensor, weights: Tensor) -> None:
        """See `Reduction`."""
        self.fisher.add_(torch.mv(gradients.square().T, weights).view(self.fisher.shape))

    def one_(self, gradient: Tensor, example: int, weight: Tensor) -> None:
        """See `Reduction`."""
        self.fisher.add_(weight * gradient.square())

    def rows_(self, rows: Tensor, examples: Tensor, gradient: Tensor, other: Tensor | None, weights: Tensor) -> None:
        """See `Reduction`."""
        square = gradient * gradient
        if other is not None:
            square += 2 * gradient * other
        square *= weights[:, None]
        touched, counts = torch.unique_consecutive(rows, return_counts=True)
        self.fisher[touched] += torch.segment_reduce(square, "sum", lengths=counts)

    def edges(self) -> list[Tensor]:
        """See `Reduction`."""
        fisher = self.fisher
        first = [fisher[..., :1].sum() if fisher.ndim else fisher.clone()]
        return [*first, fisher[..., :1, :].sum()] if fisher.ndim > 1 else first


class Products:
    """Adds inner products with a Fisher and with `fisher * (parameter - anchor)`, one an example; weights do not matter.

    Args:
        fisher: Of the parameter.
        parameter: Its present values.
        anchor: Other values of it.
        dot: `[B]`, changed in place.
        norm: `[B]`, changed in place.
    """

    def __init__(self, fisher: Tensor, parameter: Tensor, anchor: Tensor, dot: Tensor, norm: Tensor) -> None:
        self.fisher, self.parameter, self.anchor, self.dot, self.norm = fisher, parameter, anchor, dot, norm

    @property
    def shape(self) -> torch.Size:
        """See `Reduction`."""
        return self.fisher.shape

    @property
    def direction(self) -> Tensor:
        """Computed where it is needed, of a block of the head's rows at a time: as large as the parameter otherwise."""
        dtype = self.fisher.dtype
        return (self.parameter.to(dtype) - self.anchor.to(dtype)).mul_(self.fisher)

    def __getitem__(self, part: Any) -> Products:
        return Products(self.fisher[part], self.parameter[part], self.anchor[part], self.dot, self.norm)

    def outer_(
        self, a: Tensor, d: Tensor, offsets: Tensor, weights: Tensor, *, grad_weight: Tensor | None = None, impl: str
    ) -> None:
        """See `Reduction`."""
        if self.fisher.dtype == torch.float64 != d.dtype:
            a, d = a.double(), d.double()
        found = gradient_products(a, d, offsets, fisher=self.fisher, direction=self.direction, impl=impl)
        self.dot += found.dot  # type: ignore[operator]
        self.norm += found.fisher_norm  # type: ignore[operator]

    def dense_(self, gradients: Tensor, weights: Tensor) -> None:
        """See `Reduction`."""
        self.dot += gradients @ self.direction.flatten()
        self.norm += gradients.square() @ self.fisher.flatten()

    def one_(self, gradient: Tensor, example: int, weight: Tensor) -> None:
        """See `Reduction`."""
        self.dot[example] += (gradient * self.direction).sum()
        self.norm[example] += (gradient.square() * self.fisher).sum()

    def rows_(self, rows: Tensor, examples: Tensor, gradient: Tensor, other: Tensor | None, weights: Tensor) -> None:
        """See `Reduction`."""
        square = gradient * gradient
        if other is not None:
            square += 2 * gradient * other
        examples, order = torch.sort(examples, stable=True)
        touched, counts = torch.unique_consecutive(examples, return_counts=True)
        here = self[rows]
        for total, factor, values in ((self.dot, here.direction, gradient), (self.norm, here.fisher, square)):
            by_row = (values * factor).sum(1)[order]
            total[touched] += torch.segment_reduce(by_row, "sum", lengths=counts)

    def edges(self) -> list[Tensor]:
        """See `Reduction`."""
        return []
