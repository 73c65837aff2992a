"""`FisherCallback`: a Fisher that grows while transformers' `Trainer` trains."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from transformers import TrainerCallback

from fastforget.fisher.estimator import DiagonalFisher

__all__ = ["FisherCallback"]


class FisherCallback(TrainerCallback):
    """Observe every training step of a `Trainer` (TRL's included): `Trainer(..., callbacks=[FisherCallback(fisher)])`.

    The loss has to be the model's own token mean, which is the default. The training itself does not change.

    Args:
        fisher: An estimator of the model that is trained.
        every: Observe one optimizer step in so many.
        fuse_grad: See `DiagonalFisher.observe`.

    Raises:
        ValueError: `every` is no number >= 1.
    """

    def __init__(self, fisher: DiagonalFisher, *, every: int = 1, fuse_grad: bool = False) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {every!r}")
        self.fisher, self.every, self.fuse_grad = fisher, every, fuse_grad
        self._observed = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a step that an interrupt has left open: its examples do not count."""
        stopped = RuntimeError("the training stopped inside a step")
        with contextlib.suppress(RuntimeError):
            self._observed.__exit__(RuntimeError, stopped, None)
        if self.fisher.per == "batch_mean" and args.max_grad_norm:
            raise ValueError(
                'FisherCallback: expected max_grad_norm=0 with per="batch_mean", got clipped gradients to square'
            )
        if args.world_size > 1:
            self.fisher._watched.processes = torch.distributed.group.WORLD

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to observe."""
        if args.label_smoothing_factor:
            raise ValueError("FisherCallback: expected label_smoothing_factor=0, whose loss is no log-likelihood")
        if state.global_step % self.every:
            return
        self._observed.enter_context(self.fisher.observe(fuse_grad=self.fuse_grad))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The step's last backward has run."""
        self._observed.close()
