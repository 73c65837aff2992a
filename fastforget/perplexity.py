"""Per-example log-perplexity of any transformers causal language model, without logits in memory."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastforget._head import (
    LogitTransform,
    eval_mode,
    find_head,
    head_loss,
    head_weight,
    swapped_forward,
    unwrapped,
    verified_transform,
)

__all__ = ["ExampleScores", "log_perplexity", "score_examples"]

IGNORE = -100


class ExampleScores(NamedTuple):
    """What one forward pass says about each example."""

    nll_sum: Tensor
    """`[B]` float64 (float32 where the device has no float64): negative log-likelihood of the targets, nats, summed."""
    tokens: Tensor
    """`[B]` int64: number of targets."""
    exact: Tensor
    """`[B]` bool: there are targets, and each is the argmax, so that greedy decoding reproduces them."""


class PackedRows(NamedTuple):
    """The examples of a batch, one a row, without their padding on the left."""

    input_ids: Tensor  # [B, T]
    position_ids: Tensor | None  # [B, T]; None where they count from 0, which is every model's default
    attention_mask: Tensor | None  # [B, T] int64, what the model gets; None for causal attention to everything before
    attended: Tensor | None  # [B, T] bool; None where nothing is padded
    target: Tensor  # [B, T]: label of the next token, IGNORE where there is none
    source: Tensor | None  # flat index into the caller's [B, T] of every token here, row by row; None if unchanged


def log_perplexity(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    reduction: str = "mean",
    impl: str = "auto",
) -> Tensor:
    r"""Log-perplexity of every example: the mean negative log-likelihood of its target tokens, in nats per token.

        lp_b = -1/n_b sum_t log p(label_b,t | tokens before t)

    The value is that of the example alone, without padding: right padding, left padding and packed rows (told apart by
    `position_ids` that start again at 0) give the same. The model runs in eval mode, and its mode is restored. The head's
    logits are never built, the final softcap and logit scale of the model are honoured, and the result is differentiable:
    wrap the call in `torch.no_grad()` to measure. On the first use of a head a few tokens are checked against
    `model(...).logits`.

    Args:
        model: A transformers causal language model; PEFT, DDP and FSDP2 wrappers and a LoRA on the head are fine.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, nonzero where a token is attended; None for everywhere.
        labels: `[B, T]` int64, unshifted: `labels[b, t]` is the target for token t, -100 is no target. The default is
            every attended token. An example's first token is never a target: nothing predicts it.
        position_ids: `[B, T]`; default: counted from each example's first attended token.
        reduction: "mean" or "sum" over an example's targets, or "token".
        impl: Implementation of the head: "auto", "triton" or "torch".

    Returns:
        `[B]` float32, NaN for an example without targets, 0 with "sum". For packed input B counts the examples, row by row.
        With "token": `[B, T]` float32, the negative log-likelihood of each target token at its own place, 0 elsewhere.

    Raises:
        ValueError: An argument has a wrong shape or value, or the model does something that cannot be honoured.
    """
    if reduction not in ("mean", "sum", "token"):
        raise ValueError(f'reduction: expected "mean", "sum" or "token", got {reduction!r}')
    rows, loss, _ = _token_losses(model, input_ids, attention_mask, labels, position_ids, impl)
    if reduction == "token":
        at_label = nn.functional.pad(loss, (1, 0))[:, :-1]  # from the predicting token to the predicted one
        if rows.source is None:
            return at_label
        kept = torch.ones_like(at_label, dtype=torch.bool) if rows.attended is None else rows.attended
        result = at_label.new_zeros(input_ids.numel())
        return result.index_put((rows.source,), at_label[kept]).view(input_ids.shape)
    total = loss.to(_sum_dtype(loss)).sum(1)
    if reduction == "mean":
        total = total / (rows.target != IGNORE).sum(1)
    return total.float()


def score_examples(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    position_ids: Tensor | None = None,
    impl: str = "auto",
) -> ExampleScores:
    """Sum of negative log-likelihoods, target count and exact match of every example, from one forward pass.

    Args:
        model: As for `log_perplexity`, like the other arguments.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]` or None.
        labels: `[B, T]` int64 or None.
        position_ids: `[B, T]` or None.
        impl: "auto", "triton" or "torch".

    Returns:
        `.nll_sum`, `.tokens` and `.exact`, each `[B]`.
    """
    rows, loss, hit = _token_losses(model, input_ids, attention_mask, labels, position_ids, impl)
    is_target = rows.target != IGNORE
    tokens = is_target.sum(1)
    return ExampleScores(loss.to(_sum_dtype(loss)).sum(1), tokens, (hit | ~is_target).all(1) & (tokens > 0))


def _sum_dtype(loss: Tensor) -> torch.dtype:
    return torch.float32 if loss.device.type == "mps" else torch.float64


def _token_losses(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
    impl: str,
) -> tuple[PackedRows, Tensor, Tensor]:
    """The batch as rows, and per predicting token `[B, T]` the loss and the hit."""
    head = find_head(model)
    check_batch(model, input_ids, attention_mask, labels, position_ids)
    rows = pack_rows(input_ids, attention_mask, labels, position_ids)
    with eval_mode(model):
        transform = verified_transform(model, head, rows.input_ids, lambda *batch: model_forward(model, *batch), impl)
        capture = _HeadLoss(head, rows.target, transform, impl)
        with swapped_forward(head, capture):
            try:
                model_forward(model, rows.input_ids, rows.position_ids, rows.attention_mask)
            except IndexError as error:  # a table of learned positions that is too short
                limit = getattr(unwrapped(model).config, "max_position_embeddings", "unknown")
                raise ValueError(
                    f"input_ids: expected at most the model's {limit} tokens an example, got {rows.input_ids.shape[1]} "
                    f"({error}); shorten them"
                ) from error
    if capture.loss is None or capture.hit is None:
        raise ValueError(
            f"model: {type(model).__name__}'s forward never called its output embedding {type(head).__name__}"
        )
    return rows, capture.loss, capture.hit


class _HeadLoss:
    """Stands in for the head's forward: takes the loss of its targets, gives a token of logits that nobody reads."""

    def __init__(self, head: nn.Module, target: Tensor, transform: LogitTransform, impl: str) -> None:
        self.head, self.target, self.transform, self.impl = head, target, transform, impl
        self.loss: Tensor | None = None
        self.hit: Tensor | None = None

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        if self.loss is not None:
            raise ValueError("model: its forward calls the output embedding more than once; one call is expected")
        if hidden.shape[:-1] != self.target.shape:
            raise ValueError(
                f"model: its output embedding got hidden states of shape {tuple(hidden.shape)}, expected "
                f"{(*self.target.shape, hidden.shape[-1])}; models that add or drop positions are not supported"
            )
        target = self.target.to(hidden.device)
        is_target = target != IGNORE
        weight, bias = head_weight(self.head)
        result = head_loss(hidden[is_target], weight, bias, target[is_target], self.transform, self.impl)
        self.loss = result.loss.new_zeros(target.shape).index_put((is_target,), result.loss)  # [B, T]
        self.hit = torch.zeros_like(is_target).index_put((is_target,), result.hit)
        return hidden.new_zeros(*hidden.shape[:-1], 1)


def model_forward(
    model: Any, input_ids: Tensor, position_ids: Tensor | None = None, attention_mask: Tensor | None = None
) -> Any:
    """One call of the model, with the arguments that it takes."""
    inner = unwrapped(model)
    inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner  # PEFT's forward takes anything
    taken = inspect.signature(inner.forward).parameters
    arguments = {"attention_mask": attention_mask, "use_cache": False, "return_dict": True}
    arguments = {name: value for name, value in arguments.items() if name in taken or name == "return_dict"}
    if any(kind.kind is kind.VAR_KEYWORD for kind in taken.values()) and hasattr(inner.config, "use_cache"):
        arguments["use_cache"] = False  # passed on to the model inside
    if position_ids is not None:
        if "position_ids" not in taken:
            raise ValueError(
                f"position_ids: {type(inner).__name__} takes none, got positions that do not count from 0; leave them out"
            )
        arguments["position_ids"] = position_ids
    return model(input_ids=input_ids, **arguments)


def check_batch(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    position_ids: Tensor | None,
) -> None:
    named: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
    named["position_ids"] = position_ids
    for name, tensor in named.items():
        if name != "input_ids" and tensor is None:
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}; call torch.tensor on it")
        if name != "attention_mask" and tensor.dtype != torch.int64:
            raise TypeError(f"{name}: expected int64, got {str(tensor.dtype)[6:]}; call .long()")
        if name == "input_ids" and (tensor.ndim != 2 or 0 in tensor.shape):
            raise ValueError(f"input_ids: expected shape [B, T] with B, T >= 1, got {tuple(tensor.shape)}; add [None]")
        if tensor.shape != input_ids.shape:
            hint = "pass unshifted labels" if name == "labels" else "pass one entry a token"
            raise ValueError(f"{name}: expected shape [B, T] = {(*input_ids.shape,)}, got {(*tensor.shape,)}; {hint}")
        if tensor.device != input_ids.device:
            raise ValueError(f"{name}: expected device {input_ids.device} like input_ids, got {tensor.device}; move it")
    tokens = unwrapped(model).get_input_embeddings().weight.shape[0]
    classes = unwrapped(model).get_output_embeddings().weight.shape[0]
    together = "do model and tokenizer belong together?"
    checks = {"input_ids": ((input_ids < 0) | (input_ids >= tokens), f"in [0, {tokens})", together)}
    if attention_mask is not None:
        checks["attention_mask"] = attention_mask < 0, ">= 0", "were labels passed in its place? pass labels="
    if labels is not None:
        wrong = (labels != IGNORE) & ((labels < 0) | (labels >= classes))
        checks["labels"] = wrong, f"in [0, {classes}) or {IGNORE}", together
    if position_ids is not None:
        checks["position_ids"] = position_ids < 0, ">= 0", "count an example's tokens from 0"
    found = torch.stack([wrong.any() for wrong, _, _ in checks.values()]).tolist()  # waits for the device once
    for (name, (wrong, allowed, hint)), bad in zip(checks.items(), found, strict=True):
        if bad:
            row, column = wrong.nonzero()[0].tolist()
            place = f"{named[name][row, column].item()} at row {row}, token {column}"
            raise ValueError(f"{name}: expected values {allowed}, got {place}; {hint}")


def pack_rows(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, position_ids: Tensor | None
) -> PackedRows:
    """Move every example to the start of a row of its own, so that each sees what it would see alone."""
    labels = input_ids if labels is None else labels
    if attention_mask is None and position_ids is None:
        return PackedRows(input_ids, None, None, None, _shift(labels), None)
    attended = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask != 0
    counted = attended.cumsum(1)
    starts = attended & (counted == 1)
    if position_ids is not None:
        starts |= attended & (position_ids == 0)
    segment = starts.cumsum(1)  # 1-based within the caller's row
    examples = segment[:, -1].clamp(min=1)  # a row with no attended token is an example without targets
    example = (segment - 1 + (examples.cumsum(0) - examples)[:, None])[attended]  # [K], ascending
    source = attended.flatten().nonzero()[:, 0]
    lengths = torch.bincount(example, minlength=int(examples.sum()))
    slot = torch.arange(len(example), device=example.device) - (lengths.cumsum(0) - lengths)[example]
    shape = (len(lengths), max(int(lengths.max()), 1))

    def rows(values: Tensor, fill: int) -> Tensor:
        return values.new_full(shape, fill).index_put((example, slot), values.flatten()[source])

    own = torch.arange(shape[1], device=input_ids.device).expand(shape)
    mask = own < lengths[:, None]
    positions = None if position_ids is None else rows(position_ids, 0)
    if positions is not None and torch.equal(positions[mask], own[mask]):
        positions = None
    # No token sees the padding behind it, so that the model needs no mask, and may take its faster causal kernels. With
    # positions of the caller's it does: transformers takes a jump in them for the start of another sequence otherwise.
    given = None if positions is None else mask.long()  # some models subtract it from 1
    # Padding repeats the last token: a padding token would make transformers warn that there is no mask.
    ids = rows(input_ids, 0).gather(1, own.minimum((lengths[:, None] - 1).clamp(min=0)))
    attended = None if bool(mask.all()) else mask
    return PackedRows(ids, positions, given, attended, _shift(rows(labels, IGNORE)), source)


def _shift(labels: Tensor) -> Tensor:
    return nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)
