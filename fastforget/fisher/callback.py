"""`FisherCallback`: a Fisher that grows while transformers' `Trainer` trains."""

from __future__ import annotations

import contextlib
import weakref
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
        every: Observe one optimizer step in so many, beginning with the first; the others cost nothing.
        fuse_grad: See `DiagonalFisher.observe`.

    Raises:
        TypeError: `fisher` is no estimator.
        ValueError: `every` is no number >= 1.
    """

    def __init__(self, fisher: DiagonalFisher, *, every: int = 1, fuse_grad: bool = False) -> None:
        if not isinstance(fisher, DiagonalFisher):
            raise TypeError(
                f"fisher: expected a DiagonalFisher, got {type(fisher).__name__}; write "
                "FisherCallback(DiagonalFisher(model)) with the Trainer's model"
            )
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"every: expected an integer >= 1, got {every!r}")
        self.fisher, self.every, self.fuse_grad = fisher, every, fuse_grad
        self._observed = contextlib.ExitStack()
        weakref.finalize(self, _leave, self._observed)  # of a training that failed, at the end of Python at the latest

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave a step that an interrupt has left open: its examples do not count. Refuse another model's estimator.

        Args:
            args: The Trainer's.
            state: The Trainer's.
            control: The Trainer's.
            **kwargs: `model`, and what is not used.

        Raises:
            ValueError: The estimator is of another model, or the gradients are clipped before they are squared.
        """
        trained, watched = kwargs.get("model"), self.fisher._watched
        if trained is not None and all(watched.base is not module for module in trained.modules()):
            raise ValueError(
                f"fisher: expected a DiagonalFisher of the model that the Trainer trains, got one of another "
                f"{type(watched.base).__name__}; make it from trainer.model"
            )
        _leave(self._observed)
        if self.fisher.per == "batch_mean" and args.max_grad_norm:
            raise ValueError(
                'FisherCallback: expected max_grad_norm=0 with per="batch_mean", got clipped gradients to square'
            )
        if args.world_size > 1:
            watched.processes = torch.distributed.group.WORLD

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


def _leave(observed: contextlib.ExitStack) -> None:
    """Out of a step that did not come to its end."""
    stopped = RuntimeError("the training stopped inside a step")
    with contextlib.suppress(RuntimeError):
        observed.__exit__(RuntimeError, stopped, None)
