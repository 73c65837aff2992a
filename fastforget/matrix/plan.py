"""Which examples are scored together: pure functions of the lengths, the token budget and the dtype."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

# A unit is what a kill can cost and what one file holds: a sixteenth of a row, within these bounds.
SHARDS_A_ROW = 16
TOKENS_PER_SHARD = (4096, 2**21)


@dataclass(frozen=True)
class Unit:
    """One work unit: a shard of the examples under one model.

    Attributes:
        index: position in the run's order.
        task: the model; -1 is the base.
        shard: position in the plan's shards.
    """

    index: int
    task: int
    shard: int

    @property
    def file_name(self) -> str:
        """The unit's file; the base's task is written as `base`."""
        task = "base" if self.task < 0 else f"{self.task:04d}"
        return f"task-{task}_shard-{self.shard:04d}.parquet"


def default_tokens_per_batch(device: str, dtype: torch.dtype) -> int:
    """Padded tokens that one forward takes where the caller gives no budget.

    Args:
        device: `cuda`, `cpu`, ...
        dtype: the model's dtype; wider numbers get fewer tokens.

    Returns:
        The budget in tokens.
    """
    if device == "cpu":
        return 4096  # more only leaves the caches
    return 65536 * 2 // dtype.itemsize


@dataclass(frozen=True)
class Buckets:
    """The few lengths to which batches of a compiled model are padded: 64, 96, 128, 192, 256, 384, ...

    Attributes:
        limit: the longest that the model takes; None for no limit.
    """

    limit: int | None

    def __call__(self, length: int) -> int:
        """The least bucket that holds a length: at most half as long again.

        Args:
            length: tokens of the longest example.

        Returns:
            The bucket in tokens.
        """
        power = max(64, 1 << (length - 1).bit_length())
        bucket = power * 3 // 4 if power > 64 and length <= power * 3 // 4 else power
        return bucket if self.limit is None else max(length, min(bucket, self.limit))


def length_order(lengths: np.ndarray) -> np.ndarray:
    """The examples, longest first, ties by index: what does not fit is met at once, and the ETA is honest.

    Args:
        lengths: tokens of each example, int `[N]`.

    Returns:
        Example indices, int64 `[N]`.
    """
    return np.argsort(-lengths, kind="stable")


def shards(lengths: np.ndarray) -> list[np.ndarray]:
    """Cut the length order into contiguous shards of about equal tokens; they depend on nothing but the lengths.

    Args:
        lengths: tokens of each example, int `[N]`.

    Returns:
        Example indices of each shard, in order.
    """
    order = length_order(lengths)
    low, high = TOKENS_PER_SHARD
    size = min(max(-(-int(lengths.sum()) // SHARDS_A_ROW), low), high)
    before = np.cumsum(lengths[order]) - lengths[order]  # tokens ahead of each example
    return np.split(order, np.flatnonzero(np.diff(before // size)) + 1)


def batches(lengths: np.ndarray, tokens_per_batch: int) -> Iterator[slice]:
    """Cut a shard into batches of rows x longest <= tokens_per_batch, greedily; a batch has at least one example.

    Args:
        lengths: tokens of each example of the shard, longest first, int `[n]`.
        tokens_per_batch: the budget in padded tokens.

    Yields:
        Ranges of the shard.
    """
    start = 0
    while start < len(lengths):
        stop = start + max(1, tokens_per_batch // int(lengths[start]))
        yield slice(start, min(stop, len(lengths)))
        start = stop


def units(order: list[int], n_shards: int) -> list[Unit]:
    """Every unit of a run in its fixed order: model by model, so that each is loaded once.

    Args:
        order: the tasks in the order in which they are scored, -1 for the base.
        n_shards: the number of shards.

    Returns:
        The units.
    """
    return [Unit(i * n_shards + shard, task, shard) for i, task in enumerate(order) for shard in range(n_shards)]
