"""The order in which upstream examples are replayed: a pure function of the seed, the weights and the number of the draw.

Sequential sampling without replacement, each draw among those left in proportion to their weights, has the same law as sorting
the examples by `log w_j + Gumbel noise`, largest first. So a pass over the pool is one sort, and any draw of it can be
asked for again: what was skipped, prefetched or interrupted needs no state but the number of the draw.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

import numpy as np

__all__ = ["ReplayOrder"]


class Stretch(NamedTuple):
    """Draws with the same weights."""

    start: int  # the first draw
    log_weights: np.ndarray  # [N] float64
    drawn: np.ndarray  # [D] int64: drawn before, in the pass over the pool that is under way at `start`


class ReplayOrder:
    """All draws, in passes over the pool; each pass takes every example once that has a weight.

    Args:
        log_weights: `[N]` float64, -inf is never drawn.
        seed: At least 0.
    """

    def __init__(self, log_weights: np.ndarray, seed: int) -> None:
        self.seed = seed
        self.stretches = [Stretch(0, log_weights, np.zeros(0, np.int64))]
        self._sorted: tuple[tuple[int, int], np.ndarray] | None = None  # the pass that was asked for last

    def replace(self, log_weights: np.ndarray, position: int) -> None:
        """Use other weights from a draw on; what the pass under way has drawn before is not drawn in it again.

        Args:
            log_weights: `[N]` float64.
            position: Number of the first draw with the new weights.

        Raises:
            ValueError: The weights have been replaced at a later draw already.
        """
        last = self.stretches[-1]
        if position < last.start:
            raise ValueError(f"position: expected at least {last.start}, where the weights changed, got {position}")
        if position == last.start:
            self.stretches[-1] = last._replace(log_weights=log_weights)
        else:
            number, offset = self._place(len(self.stretches) - 1, position - last.start)
            drawn = self._pass(len(self.stretches) - 1, number)[:offset]
            if number == 0:
                drawn = np.concatenate([last.drawn, drawn])
            self.stretches.append(Stretch(position, log_weights, drawn))
        self._sorted = None

    def draws(self, start: int, count: int) -> np.ndarray:
        """The draws `start` to `start + count - 1`.

        Args:
            start: Number of the first.
            count: How many.

        Returns:
            `[count]` int64 indices of examples.
        """
        found = [np.zeros(0, np.int64)]
        starts = [stretch.start for stretch in self.stretches]
        while count > 0:
            k = bisect_right(starts, start) - 1
            here = count if k + 1 == len(starts) else min(count, starts[k + 1] - start)
            number, offset = self._place(k, start - starts[k])
            found.append(self._pass(k, number)[offset : offset + here])
            start, count = start + len(found[-1]), count - len(found[-1])
        return np.concatenate(found)

    def _place(self, k: int, draw: int) -> tuple[int, int]:
        """Of a draw of stretch k: the number of its pass, and its place in it. Pass 0 is what an earlier stretch left."""
        weighted = np.isfinite(self.stretches[k].log_weights)
        size = int(weighted.sum())
        left = size - int(weighted[self.stretches[k].drawn].sum())
        return (0, draw) if draw < left else (1 + (draw - left) // size, (draw - left) % size)

    def _pass(self, k: int, number: int) -> np.ndarray:
        if self._sorted is None or self._sorted[0] != (k, number):
            stretch = self.stretches[k]
            pool = np.isfinite(stretch.log_weights)
            if number == 0:
                pool[stretch.drawn] = False
            examples = np.flatnonzero(pool)
            noise = np.random.default_rng([self.seed, k, number]).gumbel(size=len(examples))
            order = np.argsort(-(stretch.log_weights[examples] + noise), kind="stable")
            self._sorted = (k, number), examples[order]
        return self._sorted[1]
