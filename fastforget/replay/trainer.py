"""Replay in transformers' `Trainer`.

A callback cannot add examples to a batch, a collator runs in the workers, and an iterable data set hides its length from the
`Trainer` and new weights from its workers. So the trainer's own loader is made over the mixed data set with the mixed sampler,
by its own `get_train_dataloader`; everything behind that (accelerate's sharding, gradient accumulation, skipping batches
to resume) sees an ordinary loader. A callback says which epoch begins and keeps the state in `trainer_state.json`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import BatchSampler, IterableDataset, RandomSampler
from transformers import Trainer, TrainerCallback

if TYPE_CHECKING:
    from fastforget.replay.mixer import ReplayMixer
    from fastforget.replay.online import OnlineReplay
    from fastforget.replay.sampler import ReplaySampler

__all__ = ["attach"]

KEY = "fastforget.replay"  # in trainer_state.json


def attach(mixer: ReplayMixer, trainer: Any, online: OnlineReplay | None) -> Any:
    """See `ReplayMixer.attach`.

    Args:
        mixer: Where replayed examples come from.
        trainer: Changed in place.
        online: Gets the forecast during the training, or None.

    Returns:
        The trainer.

    Raises:
        TypeError: It is no `Trainer`.
        ValueError: It has a mixer already, or `online` is one of another mixer.
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(f"trainer: expected a transformers Trainer, got {type(trainer).__name__}")
    if any(isinstance(callback, ReplayCallback) for callback in trainer.callback_handler.callbacks):
        raise ValueError("trainer: expected one without replay, got one that a mixer is attached to; make a new one")
    if online is not None and online.mixer is not mixer:
        raise ValueError("online: expected one of this mixer, got one of another; make it by OnlineReplay(mixer, ...)")
    callback = ReplayCallback(mixer, online)
    original: Any = trainer.get_train_dataloader

    def get_train_dataloader() -> Any:
        return _mixed_dataloader(trainer, original, callback)

    trainer.get_train_dataloader = get_train_dataloader
    trainer.add_callback(callback)
    return trainer


def _mixed_dataloader(trainer: Any, original: Any, callback: ReplayCallback) -> Any:
    """What the trainer's own method makes of the mixed data set."""
    train = trainer.train_dataset
    if isinstance(train, IterableDataset) or not hasattr(train, "__len__"):
        raise TypeError(
            f"trainer: expected a map-style train_dataset, got {type(train).__name__}; mix the examples into the stream by "
            "ReplayMixer.next"
        )
    base = trainer._get_train_sampler(train)
    if isinstance(base, BatchSampler) or getattr(trainer.args, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            f"trainer: expected a sampler of examples, got {type(base).__name__}; choose another train_sampling_strategy"
        )
    if isinstance(base, RandomSampler) and trainer.args.accelerator_config.use_seedable_sampler:
        # What accelerate does with one that it sees: the training examples keep the order that they have without replay.
        base = SeedableRandomSampler(train, generator=base.generator, data_seed=trainer.args.data_seed)
    dataset, sampler = callback.mixer.mixed(train, base)
    callback.sampler = sampler
    trainer.train_dataset, trainer._get_train_sampler = dataset, lambda _=None: sampler
    try:
        return original()
    finally:
        trainer.train_dataset = train
        del trainer._get_train_sampler


class ReplayCallback(TrainerCallback):
    """Tells the sampler its epoch, keeps the state, and updates an online forecast.

    Args:
        mixer: Of the trainer.
        online: Or None.
    """

    def __init__(self, mixer: ReplayMixer, online: OnlineReplay | None) -> None:
        self.mixer, self.online = mixer, online
        self.sampler: ReplaySampler | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin, or continue where the checkpoint was."""
        kept = state.stateful_callbacks.get(KEY)
        if kept is not None:
            self.mixer.load_state_dict(kept["mixer"])
        else:
            self.mixer.reset()
        if self.online is not None:
            if kept is not None and kept["online"] is not None:
                self.online.load_state_dict(kept["online"])
            elif state.global_step and self.online.given is None:
                raise ValueError(
                    "base: expected in the checkpoint, got one of a training without online replay; give OnlineReplay the "
                    "base's log-perplexities"
                )
            else:
                self.online.begin(kwargs["model"])
        self._keep(state)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Accelerate does not always find the sampler: not behind skipped batches of several processes."""
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch + 1e-6))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """After the first steps, replay by prediction."""
        online = self.online
        if online is None or online.values is not None or state.global_step < math.ceil(online.start * state.max_steps):
            return
        online.update(kwargs["model"])
        self._keep(state)

    def _keep(self, state: Any) -> None:
        online = None if self.online is None else self.online.state_dict()
        state.stateful_callbacks[KEY] = {"mixer": self.mixer.state_dict(), "online": online}
