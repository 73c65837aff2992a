"""Training examples with upstream examples among them, for torch's `DataLoader`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, Sampler

if TYPE_CHECKING:
    from fastforget.replay.mixer import ReplayMixer

__all__ = ["MixedDataset", "ReplaySampler"]


class MixedDataset(Dataset[Any]):
    """The training examples, and behind them the upstream examples.

    Args:
        train: Map-style.
        upstream: Map-style, of the same kind of items.
        length: What `len` says: the items of an epoch.
    """

    def __init__(self, train: Any, upstream: Any, length: int) -> None:
        self.train, self.upstream, self.length, self.offset = train, upstream, length, len(train)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.train[index] if index < self.offset else self.upstream[index - self.offset]


class ReplaySampler(Sampler[int]):
    """Indices into a `MixedDataset`: those of another sampler in its order, and replayed ones among them.

    It runs in the main process, whatever the number of workers. Where in the common order of draws an epoch begins is told by
    its number, so an epoch that is begun again, to skip what was trained on, gives the same indices again.

    Args:
        base: Sampler of the training examples.
        mixer: Where the replayed ones come from.
        offset: Number of training examples in the data set.
        rank: Of this process, where `base` gives each its own share.
        world_size: Number of such processes.
    """

    def __init__(self, base: Any, mixer: ReplayMixer, offset: int, *, rank: int = 0, world_size: int = 1) -> None:
        self.base, self.mixer, self.offset, self.rank, self.world_size = base, mixer, offset, rank, world_size
        self.epoch = 0
        self.replayed = self._due(len(base))
        if not self.replayed:
            raise ValueError(
                f"ratio: expected at least one replayed example in an epoch of {len(base)} training examples, got "
                f"{mixer.ratio}; raise it to 1/{len(base)} or more"
            )

    @property
    def generator(self) -> Any:
        """The other sampler's, if it has one: accelerate makes it the same in all processes."""
        return self.base.generator

    @generator.setter
    def generator(self, generator: Any) -> None:
        self.base.generator = generator

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is; without it each is the next one.

        Args:
            epoch: Counted from 0.
        """
        self.epoch = epoch
        if hasattr(self.base, "set_epoch"):
            self.base.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.base) + self.replayed

    def __iter__(self) -> Iterator[int]:
        position, done = self.epoch * self.replayed * self.world_size, 0
        self.epoch += 1
        for seen, index in enumerate(self.base, 1):
            yield index
            count = self._due(seen) - done
            if count:
                draws = self.mixer.draw(position + done * self.world_size, count, self.rank, self.world_size)
                yield from (self.offset + draws).tolist()
                done += count

    def _due(self, seen: int) -> int:
        return seen * self.mixer.ratio.numerator // self.mixer.ratio.denominator
