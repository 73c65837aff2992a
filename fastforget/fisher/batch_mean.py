"""per="batch_mean": the square of a step's gradient, which most EWC code takes for the Fisher."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fastforget.fisher.examples import Examples
from fastforget.fisher.passes import Losses, NonFiniteError, refuse_nonfinite_losses
from fastforget.fisher.sums import Sums
from fastforget.fisher.watched import Watched
from fastforget.perplexity import log_perplexity

__all__ = ["add_squares_", "losses_and_gradient", "one_step", "refuse_given"]


def refuse_given(**arguments: Any) -> None:
    """The square of a step's gradient takes it as it comes.

    Args:
        **arguments: Of `observe`, that mean something for each example only.

    Raises:
        ValueError: One is not None.
    """
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(
                f'{name}: expected None with per="batch_mean", whose square is the step\'s own; leave it out'
            )


def losses_and_gradient(
    watched: Watched, batch: dict[str, Any], examples: Examples, tokens: Tensor, reduction: str, impl: str
) -> tuple[Losses, dict[str, Tensor]]:
    """The gradient of the weighted mean of a batch's losses.

    Args:
        watched: The model.
        batch: `input_ids` and the other arguments of `log_perplexity` that tell what a batch is.
        examples: Of the batch.
        tokens: `[B]` targets; an example without one does not count.
        reduction: "mean" or "sum", over an example's targets.
        impl: "auto", "triton" or "torch".

    Returns:
        The losses, and the gradient by parameter, empty where no example counts.

    Raises:
        NonFiniteError: Some losses are not finite.
    """
    loss = log_perplexity(watched.model, **batch, reduction=reduction, impl=impl)
    losses = Losses(loss.detach().masked_fill(tokens == 0, torch.nan), tokens)
    refuse_nonfinite_losses(losses, examples)
    counts = (tokens > 0) & (examples.weights > 0)
    if not bool(counts.any()):
        return losses, {}
    weights = examples.weights[counts].to(loss.dtype)
    return losses, watched.gradients_of((loss[counts] * weights).sum() / weights.sum())


def one_step(watched: Watched, sums: Sums, impl: str) -> Iterator[None]:
    """One optimizer step of the caller's runs while this yields; then its `.grad` is squared.

    Args:
        watched: The model.
        sums: Changed in place.
        impl: "auto", "triton" or "torch".

    Yields:
        Nothing, once.

    Raises:
        NonFiniteError: A gradient is not finite.
        ValueError: There is a `.grad` before the step, or none after it.
    """
    if any(bool(grad.any()) for grad in watched.gradients().values()):
        raise ValueError(
            'observe: with per="batch_mean" the block is one optimizer step, but a .grad is there already; call '
            "optimizer.zero_grad() before it"
        )
    yield
    gradients = watched.gradients()
    if not gradients:
        raise ValueError("observe: expected loss.backward() inside the `with` block, got no gradient")
    add_squares_(sums, gradients, impl)


def add_squares_(sums: Sums, gradients: dict[str, Tensor], impl: str) -> None:
    """Add a step's squares to the sums.

    Args:
        sums: Changed in place.
        gradients: By name.
        impl: "auto", "triton" or "torch".

    Raises:
        NonFiniteError: A gradient is not finite; nothing was added.
    """
    bad = [name for name, grad in gradients.items() if not bool(grad.isfinite().all())]
    if bad:
        raise NonFiniteError(f"gradient: expected finite gradients, got NaN or infinity in {bad[0]}; skip it", [])
    sums.add_squares(gradients, impl)
