"""Whether the model's own loss is the one that `observe` undoes: the mean negative log-likelihood of the shifted labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from fastforget._head import eval_mode
from fastforget.fisher.passes import made_up_tokens
from fastforget.fisher.watched import Watched
from fastforget.perplexity import IGNORE

__all__ = ["check_loss", "loss_of"]

_CHUNK = 1024  # tokens whose probabilities are in memory at a time


def loss_of(output: Any, call: dict[str, Any]) -> Tensor | None:
    """The loss that a model computed.

    Args:
        output: Of the model: a `ModelOutput`, or a tuple, as with `return_dict=False`.
        call: Its arguments by name.

    Returns:
        The loss or None.
    """
    if call.get("labels") is None:
        return None
    loss = output[0] if isinstance(output, tuple) and output else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def check_loss(watched: Watched, original: Callable[..., Any], call: dict[str, Any], output: Any, loss: Tensor) -> bool:
    """Compare the loss, and its gradient at the logits, with those of the token mean.

    Where the loss does not go through the logits of the output, its values on made-up tokens are compared instead: rows
    with unequally many targets, so that a mean of the rows' means shows.

    Args:
        watched: The model.
        original: Its forward.
        call: Arguments of the observed call, labels among them.
        output: Of the call, whose graph stays as it is.
        loss: Of the call.

    Returns:
        Whether there was something to compare.

    Raises:
        ValueError: It is another loss.
    """
    labels = call["labels"]
    logits = output[1] if isinstance(output, tuple) and len(output) > 1 else getattr(output, "logits", None)
    count = int((labels[:, 1:] != IGNORE).sum())
    if not count or not loss.requires_grad:
        return False
    if isinstance(logits, Tensor) and logits.shape[:2] == labels.shape and logits.requires_grad:
        divisor = float(call.get("num_items_in_batch") or count)
        gradient = _gradient_at(logits, loss, divisor)
        if gradient is not None:
            _compare(float(loss.detach()) * divisor, logits.detach(), labels, gradient, gradient.dtype)
            return True
    if not watched.sharded:  # a second forward inside the first would gather what the first one still needs
        _check_on_made_up_tokens(watched, original)
    return True


def _gradient_at(logits: Tensor, loss: Tensor, factor: float) -> Tensor | None:
    """Gradient of a multiple of the loss: at the logits, or at what they are a cast of; None if it does not depend on them."""
    scaled = torch.full_like(loss, factor)  # so that float16 holds the gradient of a mean over many tokens
    (gradient,) = torch.autograd.grad(loss, logits, scaled, retain_graph=True, allow_unused=True)
    node: Any = logits.grad_fn
    if gradient is None and node is not None and node.name() == "ToCopyBackward0":  # accelerate's, of the output
        before = GradientEdge(*node.next_functions[0])
        (gradient,) = torch.autograd.grad(loss, before, scaled, retain_graph=True, allow_unused=True)
    return gradient


@torch.no_grad()
def _compare(total: float, logits: Tensor, labels: Tensor, gradient: Tensor | None, dtype: torch.dtype) -> None:
    """A sum of the targets' losses and its gradient `[R, T, V]`, with what the logits `[R, T, V]` of a dtype give.

    Raises:
        ValueError: They differ by more than rounding.
    """
    coarse = dtype.itemsize < 4
    target = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE).to(logits.device).flatten()
    expected = torch.zeros((), dtype=torch.float64, device="cpu")
    error = 0.0
    gradients = [None] * len(target) if gradient is None else gradient.flatten(0, 1).split(_CHUNK)
    for part, label, grad in zip(logits.flatten(0, 1).split(_CHUNK), target.split(_CHUNK), gradients, strict=False):
        part = part.to(torch.promote_types(part.dtype, torch.float32))
        expected += nn.functional.cross_entropy(part, label, ignore_index=IGNORE, reduction="sum").double().cpu()
        if grad is not None:
            kept = label != IGNORE
            due = part.softmax(-1) * kept[:, None]
            due[kept, label[kept]] -= 1
            error = max(error, float((grad - due).norm(dim=-1).max()))
    count = int((target != IGNORE).sum())
    allowed = (2e-2 if coarse else 1e-4) * (abs(float(expected)) + count)
    if not abs(total - float(expected)) <= allowed or not error <= (1e-2 if coarse else 1e-4):
        raise ValueError(
            f"model: its loss is another than the mean negative log-likelihood of the shifted labels: {total / count:.6g} "
            f"instead of {float(expected) / count:.6g} a target, with gradients at the logits {error:.2g} apart; observe() "
            "cannot undo it. Compute the loss from the logits with observe(labels=..., loss_denominator=...), or use update()"
        )


@torch.no_grad()
def _check_on_made_up_tokens(watched: Watched, original: Callable[..., Any]) -> None:
    """In eval mode inside, which draws nothing; the model itself in its own, which may decide how it computes the loss."""
    ids, _ = made_up_tokens(watched)
    training, dtypes = watched.base.training, []
    with eval_mode(watched.inner):
        # accelerate makes logits of 16 bits float32 in the output, which the loss is not computed from
        handle = watched.head.register_forward_hook(lambda _module, _inputs, output: dtypes.append(output.dtype))
        try:
            logits = getattr(original(input_ids=ids, return_dict=True), "logits", None)
        finally:
            handle.remove()
        if not isinstance(logits, Tensor) or logits.shape[:2] != ids.shape:
            return
        coarsest = min([logits.dtype, *dtypes], key=lambda dtype: dtype.itemsize)
        for row in range(2):
            labels = ids.clone()
            labels[row, 2:] = IGNORE
            watched.base.training = training
            loss = original(input_ids=ids, labels=labels, return_dict=True).loss
            watched.base.training = False
            _compare(float(loss) * int((labels[:, 1:] != IGNORE).sum()), logits, labels, None, coarsest)
