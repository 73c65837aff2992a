"""`ReplayMixer`: upstream examples among the training examples of any loop.

Replayed examples come into the stream of training examples, not into finished batches: one after every `1 / ratio` training
examples. So batches keep their size, the collator sees what it always sees, and everything that shards, skips or counts batches
(workers, gradient accumulation, DDP, resuming) works unchanged. What is mixed are the *indices*, by a sampler: samplers run in
the main process, where new weights are seen, while data sets and collators are copied into the workers.
"""

from __future__ import annotations

import base64
import hashlib
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from fastforget.replay.order import ReplayOrder
from fastforget.replay.sampler import MixedDataset, ReplaySampler
from fastforget.replay.weights import log_weights

if TYPE_CHECKING:
    from fastforget.replay.online import OnlineReplay

__all__ = ["ReplayMixer"]


class ReplayMixer:
    """Replay upstream examples while training on others: `for batch in mixer(dataloader)`, or `mixer.attach(trainer)`.

    They are drawn without replacement, with probabilities that `replay_weights` gives; when all have been drawn, the pool is
    full again. The draws depend on the seed, the forecast and their number alone: a resumed training continues exactly.

    Args:
        upstream: The examples, map-style: items of the same kind as those of the training data set. `range(N)` where only
            indices are wanted.
        forecast: `[N]` predicted forgetting, -inf for examples that are never replayed; None: all are equally probable.
        temperature: tau of `replay_weights`.
        ratio: Replayed examples for each training example.
        seed: Of the draws.

    Raises:
        ValueError: A value is outside its range, or there is not one forecast an example.
        TypeError: A value is of the wrong type.
    """

    def __init__(
        self,
        upstream: Any,
        forecast: Any = None,
        *,
        temperature: float = 0.1,
        ratio: float | Fraction = Fraction(1, 32),
        seed: int = 0,
    ) -> None:
        if not hasattr(upstream, "__len__") or not hasattr(upstream, "__getitem__"):
            raise TypeError(
                f"upstream: expected a map-style data set, got {type(upstream).__name__}; it needs __len__ and __getitem__"
            )
        if not len(upstream):
            raise ValueError("upstream: expected at least one example, got none")
        if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
            raise TypeError(f"seed: expected an integer, got {type(seed).__name__}")
        if seed < 0:
            raise ValueError(f"seed: expected an integer >= 0, got {seed}")
        self.upstream, self.temperature, self.seed = upstream, temperature, int(seed)
        self.ratio = _ratio(ratio)
        self._initial = self._log_weights(forecast)
        self.reset()

    def reset(self) -> None:
        """Back to the first draw and the first forecast."""
        self.order, self.position = ReplayOrder(self._initial, self.seed), 0

    def set_forecast(self, forecast: Any) -> None:
        """Draw by another forecast from now on; what was drawn in this pass over the pool is not drawn in it again.

        What a `DataLoader` has prefetched was drawn before.

        Args:
            forecast: `[N]`, as for the constructor.

        Raises:
            ValueError: There is not one forecast an example, or one is NaN or infinite.
        """
        self.order.replace(self._log_weights(forecast), self.position)

    def next(self, count: int, *, rank: int | None = None, world_size: int | None = None) -> np.ndarray:
        """The next examples to replay, for loops that collate by themselves.

        Args:
            count: How many; with several processes, for each of them.
            rank: Of this process; default: that of `torch.distributed` where it is initialised.
            world_size: Number of processes that share the draws; default: as `rank`.

        Returns:
            `[count]` int64 indices into `upstream`.

        Raises:
            ValueError: A number is outside its range.
        """
        if isinstance(count, bool) or not isinstance(count, int | np.integer) or count < 0:
            raise ValueError(f"count: expected an integer >= 0, got {count!r}")
        if (rank is None) != (world_size is None):
            raise ValueError(f"rank, world_size: expected both or none, got {rank} and {world_size}")
        if rank is None or world_size is None:
            rank, world_size = _process()
        if not 0 <= rank < world_size:
            raise ValueError(f"rank: expected an integer in [0, {world_size}), got {rank}")
        return self.draw(self.position, int(count), rank, world_size)

    def draw(self, position: int, count: int, rank: int, world_size: int) -> np.ndarray:
        """A process's share of the draws from a position on; the next ones begin behind those of all processes.

        Args:
            position: Number of the first draw of all processes.
            count: Of a process.
            rank: Of this process.
            world_size: Number of processes.

        Returns:
            `[count]` int64 indices into `upstream`.
        """
        self.position = position + count * world_size
        return self.order.draws(position, count * world_size)[rank::world_size]

    def __call__(self, dataloader: DataLoader[Any]) -> DataLoader[Any]:
        """A loader like the one given, with replayed examples among its own.

        Its sampler's order of the training examples is kept. Each iteration is the next epoch, unless
        `loader.sampler.set_epoch` says which one it is; to resume inside an epoch, skip what was trained on. With a
        `DistributedSampler` each process gets its own share of the draws.

        Args:
            dataloader: Over a map-style data set, with a batch size.

        Returns:
            A new loader; its `len` counts the batches with the replayed examples.

        Raises:
            TypeError: It is no `DataLoader`, or its data set is iterable-style.
            ValueError: It has a batch sampler of its own, or is too short for a replayed example.
        """
        if not isinstance(dataloader, DataLoader):
            raise TypeError(
                f"dataloader: expected a torch DataLoader, got {type(dataloader).__name__}; use next() for other loops"
            )
        if isinstance(dataloader.dataset, IterableDataset):
            raise TypeError(
                f"dataloader: expected a map-style data set, got {type(dataloader.dataset).__name__}; use next() for streams"
            )
        if type(dataloader.batch_sampler) is not BatchSampler:
            raise ValueError(
                f"dataloader: expected a batch_size, got {type(dataloader.batch_sampler).__name__}; pass sampler= in its place"
            )
        base: Any = dataloader.sampler
        share = {"rank": base.rank, "world_size": base.num_replicas} if hasattr(base, "num_replicas") else {}
        dataset, sampler = self.mixed(dataloader.dataset, base, **share)
        kept = ("batch_size", "num_workers", "collate_fn", "pin_memory", "drop_last", "timeout", "worker_init_fn")
        kept += ("multiprocessing_context", "generator", "prefetch_factor", "persistent_workers", "pin_memory_device")
        return DataLoader(dataset, sampler=sampler, **{name: getattr(dataloader, name) for name in kept})

    def mixed(self, train: Any, base: Any, **share: int) -> tuple[MixedDataset, ReplaySampler]:
        """The data set and the sampler of a mixed loader.

        Args:
            train: The training data set.
            base: Its sampler.
            **share: `rank` and `world_size`, where `base` gives each process its own share.

        Returns:
            Both.
        """
        sampler = ReplaySampler(base, self, len(train), **share)
        return MixedDataset(train, self.upstream, len(sampler)), sampler

    def attach(self, trainer: Any, online: OnlineReplay | None = None) -> Any:
        """Let a transformers `Trainer`, or a class made of it, replay.

        An epoch has `ratio` more examples; the training examples come in the order in which they come without replay. What
        is needed to resume is in the checkpoint's `trainer_state.json`.

        Args:
            trainer: Any `Trainer` whose training data set is map-style.
            online: Gets the forecast during the training; None: the mixer's own forecast stays.

        Returns:
            The trainer.

        Raises:
            TypeError: It is no `Trainer`.
            ValueError: It has a mixer already, or `online` is one of another mixer.
        """
        from fastforget.replay.trainer import attach

        return attach(self, trainer, online)

    def state_dict(self) -> dict[str, Any]:
        """What another mixer of the same arguments needs to continue; plain values that JSON can hold.

        Returns:
            The position, and each forecast that was set.
        """
        return {
            **self._identity(),
            "position": self.position,
            "changes": [
                {"start": stretch.start, "log_weights": base64.b64encode(stretch.log_weights.tobytes()).decode()}
                for stretch in self.order.stretches
                if stretch.log_weights is not self._initial
            ],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another mixer was.

        Args:
            state: Its `state_dict()`.

        Raises:
            ValueError: That mixer had other arguments.
        """
        for name, here in self._identity().items():
            if state.get(name) != here:
                raise ValueError(
                    f"state: expected one of a mixer with {name} {here}, got {state.get(name)}; make the mixer as that one was"
                )
        self.reset()
        for change in state["changes"]:
            self.order.replace(np.frombuffer(base64.b64decode(change["log_weights"]), "<f8"), change["start"])
        self.position = state["position"]

    def _identity(self) -> dict[str, Any]:
        """What two mixers with the same draws have in common."""
        digest = hashlib.sha256(self._initial.tobytes()).hexdigest()[:16]
        return {"examples": len(self.upstream), "seed": self.seed, "ratio": str(self.ratio), "forecast": digest}

    def _log_weights(self, forecast: Any) -> np.ndarray:
        total = len(self.upstream)
        result = log_weights(np.zeros(total) if forecast is None else forecast, self.temperature)
        if len(result) != total:
            raise ValueError(f"forecast: expected shape [N] = ({total},) like upstream, got ({len(result)},)")
        return result


def _ratio(ratio: Any) -> Fraction:
    if isinstance(ratio, bool) or not isinstance(ratio, int | float | Fraction | np.number):
        raise TypeError(f"ratio: expected a number, got {type(ratio).__name__}; 1/32 is one in 32 training examples")
    if not 0 < ratio < float("inf"):
        raise ValueError(f"ratio: expected a finite number > 0, got {ratio}; 1/32 is one in 32 training examples")
    return Fraction(float(ratio)).limit_denominator(1_000_000)  # 1 / 3 is a third


def _process() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
