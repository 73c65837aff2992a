"""What a diagonal Fisher counts beside its sums: examples, tokens, weights, and the examples without a target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["Counts"]


@dataclass
class Counts:
    """Of one process."""

    weight: float = 0.0
    """Sum of the weights that the estimate is divided by; with per="batch_mean" the number of steps."""
    examples: int = 0
    tokens: int = 0
    skipped: list[Any] = field(default_factory=list)
    """Ids of the examples without a target."""

    @property
    def seen(self) -> int:
        """Number of the next example."""
        return self.examples + len(self.skipped)

    def add(self, ids: Sequence[Any], weights: Tensor, tokens: Tensor, *, step: bool) -> None:
        """Count a batch.

        Args:
            ids: Of its B examples.
            weights: `[B]`.
            tokens: `[B]` targets.
            step: The batch counts once, whatever its examples weigh.
        """
        counted = tokens.to(weights.device) > 0
        total = float(weights[counted].sum(dtype=torch.float64))
        self.weight += float(total > 0) if step else total
        self.examples += int(counted.sum())
        self.tokens += int(tokens.sum())
        self.skipped += [name for name, has in zip(ids, counted.tolist(), strict=True) if not has]

    def add_step(self) -> None:
        """Count a step of the caller's as one example of weight 1."""
        self.weight += 1
        self.examples += 1

    def tensor(self) -> Tensor:
        """`[4]` float64, to continue from."""
        return torch.tensor([self.weight, self.examples, self.tokens, len(self.skipped)], dtype=torch.float64)

    @classmethod
    def of(cls, tensor: Tensor) -> Counts:
        """What `tensor()` gave.

        Args:
            tensor: `[4]`.

        Returns:
            The counts; the skipped examples have lost their names.
        """
        weight, examples, tokens, skipped = tensor.tolist()
        return cls(weight, int(examples), int(tokens), [None] * int(skipped))
