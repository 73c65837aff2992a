"""Riding on the caller's own step: which tokens of each call belong to which example, and what its loss was scaled by."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastforget._head import current_forward, swapped_forward
from fastforget.fisher.examples import Examples
from fastforget.fisher.loss import check_loss, loss_of
from fastforget.fisher.passes import NonFiniteError, example_weights
from fastforget.fisher.tape import Tape
from fastforget.fisher.watched import Watched, checkpoints_replaced
from fastforget.perplexity import IGNORE

__all__ = ["Batch", "Observer", "refuse_batch_norms"]


@dataclass
class Batch:
    """One observed call of the model."""

    examples: Examples
    weights: Tensor  # [B], the caller's
    tokens: Tensor  # [B] targets


@dataclass
class Observer:
    """Swaps the model's forward for one that reads its arguments first.

    Args:
        watched: The model.
        tape: That is running.
        labels: The caller's, or None for those of each call.
        denominator: What the loss was divided by, or None for what transformers divides by.
        factor: What it was multiplied by, besides; None with a denominator of None for what the backward shows.
        weights: Of the examples.
        loss: "mean" or "sum".
        first: Number of the first example.
    """

    watched: Watched
    tape: Tape
    labels: Tensor | None
    denominator: float | Tensor | None
    factor: float | None
    weights: Tensor | Sequence[float] | None
    loss: str
    first: int

    def __post_init__(self) -> None:
        if self.labels is not None and not isinstance(self.labels, Tensor):
            raise TypeError(f"labels: expected a tensor, got {type(self.labels).__name__}; call torch.tensor on it")
        if self.factor is not None and (not math.isfinite(self.factor) or self.factor == 0):
            raise ValueError(f"loss_factor: expected a finite number other than 0, got {self.factor}; it is divided by")
        self.batches: list[Batch] = []
        self.before = {name: _state_of(p.grad) for name, p in self.watched.wanted.items()}
        self.calls = 0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model's forward is observed inside."""
        original = current_forward(self.watched.base)

        @functools.wraps(original)  # its signature is read
        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled() or self.tape.paused:
                return original(*args, **kwargs)
            call = _arguments(original, args, kwargs)
            batch = self._read(call)
            pending = [examples for examples in self.tape.pending if examples not in self.tape.batches]
            self.tape.pending = [*pending, batch.examples]
            with self.tape.calling(batch.examples) as seen:
                output = original(*args, **kwargs)
                seen.refuse_others(output)
            self.calls += 1
            loss = loss_of(output, call)
            if loss is not None and not bool(loss.isfinite()):
                raise NonFiniteError(
                    f"loss: expected a finite loss of the observed call, got {float(loss.detach())} with examples "
                    f"{_ids(batch.examples)}; leave out those that cause it, which update() names",
                    batch.examples.ids,
                )
            log_probs = getattr(output, "log_probs", None)  # TRL's, whose trainer computes its loss from them
            if not self.watched.loss_checked and loss is not None and log_probs is None:
                with self.tape.pause():
                    self.watched.loss_checked = check_loss(self.watched, original, call, output, loss)
            if self.denominator is None and self.factor is None:
                self._find_factor(batch, loss, log_probs)
            self.batches.append(batch)
            return output

        checkpoints = checkpoints_replaced(self.watched.inner, self.tape.checkpointing)
        with checkpoints, swapped_forward(self.watched.base, forward):
            yield

    def finished(self) -> list[Batch]:
        """The calls whose backward ran.

        Raises:
            ValueError: There are none.

        Returns:
            Them.
        """
        done = [batch for batch in self.batches if batch.examples in self.tape.batches]
        if not done:
            what = "no call of the model" if not self.calls else "no backward of an observed call"
            raise ValueError(
                f"observe: expected loss.backward() of an observed forward inside the `with` block, got {what}; "
                "both have to run inside it"
            )
        for name, parameter in self.watched.wanted.items():
            seen = all(name in batch.examples.done for batch in done)
            if name in self.tape.expected and not seen and _state_of(parameter.grad) != self.before[name]:
                raise ValueError(
                    f"model: {name} was used in a way that no rule saw when it was called with labels; use update(), or "
                    "compute the loss from the logits"
                )
        return done

    def _find_factor(self, batch: Batch, loss: Tensor | None, log_probs: Any) -> None:
        """What the caller's backward multiplies the model's loss by is undone when it arrives there."""
        examples, known = batch.examples, functools.partial(_discard, self.tape.unscaled)
        self.tape.unscaled.append(examples)
        if loss is not None and loss.requires_grad:
            loss.register_hook(functools.partial(_undo, examples, known))
        if isinstance(log_probs, Tensor) and log_probs.requires_grad:
            divisor = batch.tokens.clamp(min=1) if self.loss == "mean" else torch.ones_like(batch.tokens)
            log_probs.register_hook(
                functools.partial(_undo_sum, examples, batch.weights / divisor**2, log_probs.detach() != 0, known)
            )

    def _refuse_mixed_rows(self, call: dict[str, Any]) -> None:
        """Packed rows, in which transformers lets the examples see each other unless it is told by position_ids alone."""
        config = self.watched.base.config
        if "flash" in str(getattr(config, "_attn_implementation", "")):
            return
        cached = call.get("use_cache")
        if getattr(config, "use_cache", False) if cached is None else cached:
            raise ValueError(
                "observe: expected use_cache=False with several examples in a row, got a call with a cache, which lets them "
                "see each other; pass use_cache=False to the model"
            )
        if call.get("attention_mask") is not None:
            raise ValueError(
                "attention_mask: expected None with several examples in a row, which it lets see each other; position_ids "
                "tell them apart"
            )

    def _read(self, call: dict[str, Any]) -> Batch:
        """Owners, targets and scales of one call."""
        ids = call["input_ids"]
        labels = self.labels if self.labels is not None else call.get("labels")
        if labels is None:
            raise ValueError(
                "observe: expected labels, got a call of the model without them; pass labels to the model, or "
                "observe(labels=...): the factor of each example in the loss depends on its number of targets"
            )
        if call.get("labels") is None and self.denominator is None and self.factor is None:
            raise ValueError(
                "loss_denominator: expected a number with a loss that is not the model's own, got None and a call of the model "
                "without labels; pass observe(loss_denominator=...), what the summed loss is divided by, or "
                "loss_factor=1 for its mean over the targets of a call"
            )
        if labels.shape != ids.shape:
            raise ValueError(
                f"labels: expected shape [B, T] = {tuple(ids.shape)}, got {tuple(labels.shape)}; pass unshifted labels"
            )
        config = self.watched.base.config
        router = call.get("output_router_logits")
        if getattr(config, "output_router_logits", False) if router is None else router:
            raise ValueError(
                "model: output_router_logits=True adds an auxiliary loss that couples the examples of a batch; set it to "
                "False while observing, or use update()"
            )
        owner, count = owners_of(ids, call.get("attention_mask"), call.get("position_ids"), call.get("cu_seq_lens_q"))
        target = labels[:, 1:] != IGNORE
        alien = target & (owner[:, 1:] != owner[:, :-1])
        if bool(alien.any()):
            row, column = alien.nonzero()[0].tolist()
            raise ValueError(
                f"labels: expected -100 at padding and at the first token of each packed example, got a target at row {row}, "
                f"token {column + 1}: its loss belongs to another example, or to none"
            )
        if count > len(ids):
            self._refuse_mixed_rows(call)
        counted = owner[:, 1:][target]
        tokens = torch.bincount(counted, minlength=count)
        dtype = self.tape.reductions.dtype
        weights = example_weights(self.weights, count, dtype, ids.device)
        denominator = self.denominator
        if denominator is None:
            denominator = call.get("num_items_in_batch")
        scale = torch.as_tensor(tokens.sum() if denominator is None else denominator, dtype=dtype, device=ids.device)
        if not bool(scale.isfinite() & (scale > 0)) and bool(tokens.sum()):
            raise ValueError(f"loss_denominator: expected a finite number > 0, got {float(scale)}")
        if self.factor is not None:
            scale = scale / self.factor
        factor = scale / (tokens.clamp(min=1) if self.loss == "mean" else 1)
        first = self.first + sum(len(batch.examples.ids) for batch in self.batches)
        examples = Examples(owner, count, weights * factor**2, list(range(first, first + count)))
        return Batch(examples, weights, tokens)


def refuse_batch_norms(model: nn.Module) -> None:
    """A norm over the examples of a batch has no gradient of one example.

    Args:
        model: In the caller's mode.

    Raises:
        ValueError: It has such a norm, in training mode.
    """
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.training:
            raise ValueError(
                f"model: {name} normalises over the examples of a batch; call model.eval(), or use update()"
            )


def owners_of(
    input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, boundaries: Tensor | None
) -> tuple[Tensor, int]:
    """The example of every token of a call.

    Args:
        input_ids: `[R, T]`.
        attention_mask: `[R, T]` or None.
        position_ids: `[R, T]` or `[1, T]` or None; 0 starts an example.
        boundaries: `[B + 1]` cumulative lengths of a packed row, as flash attention takes them, or None.

    Returns:
        `[R, T]` int64, -1 for padding, and B.

    Raises:
        ValueError: The mask has more than two dimensions.
    """
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask: expected shape [B, T] = {tuple(input_ids.shape)} while observing, got "
            f"{tuple(attention_mask.shape)}; tell packed examples apart by position_ids"
        )
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    starts = attended & (attended.cumsum(1) == 1)
    if position_ids is not None:
        starts |= attended & (position_ids == 0)
    if boundaries is not None:
        inner = boundaries[:-1].long()
        starts.view(-1)[inner[inner < starts.numel()]] = True
    per_row = starts.sum(1).clamp(min=1)  # a row without attended tokens is an example without targets
    before = per_row.cumsum(0) - per_row
    owner = before[:, None] + starts.cumsum(1) - 1
    return owner.masked_fill(~attended, -1), int(per_row.sum())


def _undo(examples: Examples, known: Callable[[Examples], None], grad: Tensor) -> None:
    """The gradient that arrives at the model's loss is what the caller multiplied it by: accumulation, a loss scaler."""
    known(examples)
    _divide(examples, examples.weights, grad.detach())


def _undo_sum(
    examples: Examples, weights: Tensor, counted: Tensor, known: Callable[[Examples], None], grad: Tensor
) -> None:
    """The gradient that arrives at the log-likelihoods is one number where the caller's loss is a multiple of their sum."""
    known(examples)
    factors = grad.detach()[counted]
    if not factors.numel():
        return
    if not bool(torch.isclose(factors, factors[0], rtol=1e-4, atol=0.0).all()):
        raise ValueError(
            f"loss: expected the same factor for the log-likelihood of every target, got {float(factors.min()):.4g} to "
            f"{float(factors.max()):.4g}; a loss that weights its targets (loss_type, a mask of the caller's) cannot be "
            "undone: use update()"
        )
    _divide(examples, weights, factors[0])


def _divide(examples: Examples, weights: Tensor, factor: Tensor) -> None:
    factor = factor.to(weights)
    divided = weights / factor**2
    if not bool(factor.isfinite() & divided.isfinite().all()):
        raise ValueError(
            "loss: expected a finite factor other than 0 between the model's loss and the backward, got "
            f"{float(factor)}, which cannot be undone; leave the call out of the observed block, or run it under "
            "torch.no_grad()"
        )
    examples.weights = divided


def _ids(examples: Examples) -> str:
    """Of a call, which are consecutive."""
    first, last = examples.ids[0], examples.ids[-1]
    return f"{first}" if first == last else f"{first} to {last}"


def _discard(found: list[Examples], examples: Examples) -> None:
    found[:] = [other for other in found if other is not examples]


def _state_of(grad: Tensor | None) -> tuple[int, int] | None:
    """What changes when a gradient is accumulated."""
    return None if grad is None else (id(grad), grad._version)


def _arguments(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The call's arguments by name."""
    bound = inspect.signature(forward).bind(*args, **kwargs).arguments
    call = {name: value for name, value in bound.items() if name not in ("args", "kwargs")} | bound.get("kwargs", {})
    if call.get("input_ids") is None:
        raise ValueError("observe: expected the model to be called with input_ids, got a call without them")
    return call
