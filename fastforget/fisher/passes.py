"""One forward and backward of a batch: under a tape, or as the model is."""

from __future__ import annotations

import contextlib
import hashlib
import operator
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastforget._head import LogitTransform, base_linear, swapped_forward, verified_transform
from fastforget.fisher.examples import Examples
from fastforget.fisher.gradients import How
from fastforget.fisher.head import FusedHead
from fastforget.fisher.rules import module_rule
from fastforget.fisher.sums import Sums
from fastforget.fisher.tape import Tape
from fastforget.fisher.verify import Comparison, check_batch, choose_rules
from fastforget.fisher.watched import Watched, checkpointed
from fastforget.perplexity import IGNORE, PackedRows, model_forward, pack_rows

__all__ = [
    "Convention",
    "Losses",
    "NonFiniteError",
    "backward_under",
    "choose_rules_on",
    "example_weights",
    "made_up_tokens",
    "refuse_nonfinite_gradients",
    "refuse_nonfinite_losses",
    "transform_of",
]


class NonFiniteError(ValueError):
    """The loss or the gradient of some examples is NaN or infinite.

    Attributes:
        examples: Their ids: places in the batch, or the `example_ids` that were given.
    """

    def __init__(self, message: str, examples: Sequence[Any]) -> None:
        super().__init__(message)
        self.examples = list(examples)


class Losses(NamedTuple):
    """The losses of a batch's examples."""

    loss: Tensor
    """`[B]` float32, each example's own loss; NaN for an example without targets."""
    tokens: Tensor
    """`[B]` int64: number of targets."""


@dataclass(frozen=True)
class Convention:
    """Which loss an example has."""

    loss: str = "mean"
    seeds: tuple[int, ...] | None = None
    """One for every draw of sampled labels; None for the data's."""
    impl: str = "auto"


def backward_under(
    watched: Watched,
    tape: Tape,
    rows: PackedRows,
    examples: Examples,
    transform: LogitTransform,
    convention: Convention,
) -> Losses:
    """Run a batch through the model with the fused head; the pieces go to the tape.

    Args:
        watched: The model, in eval mode.
        tape: Not running yet.
        rows: The batch, one example a row.
        examples: Of these rows.
        transform: What the model does to its logits.
        convention: Which loss.

    Returns:
        The losses.

    Raises:
        NonFiniteError: Some losses are not finite; no backward ran.
        ValueError: A parameter was used in a way that its rule did not see.
    """
    tape.examples = examples
    head = FusedHead(
        watched, tape, rows.input_ids, rows.target, transform, convention.seeds, _row_ids(examples), convention.impl
    )
    choosing = tape.failures is not None  # a forward that is tried twice saves other tensors than its repetition
    checkpoints = contextlib.nullcontext() if choosing else checkpointed(watched.inner)
    with contextlib.ExitStack() as stack:
        stack.callback(head.losses.clear)  # they hold the graph, which holds the head
        stack.enter_context(watched.no_grad_written())
        with tape.running(), checkpoints, swapped_forward(watched.head, head):
            call(watched, rows)
            if not head.losses:
                raise ValueError(f"model: {type(watched.base).__name__}'s forward never called its output embedding")
            losses, objectives = _per_example(head.losses, rows, examples, convention)
            refuse_nonfinite_losses(losses, examples)
            for i, objective in enumerate(objectives):
                objective.backward(retain_graph=i + 1 < len(objectives))
                tape.flush()
        appeared = list(watched.gradients())
        tape.bypassed.update(appeared)
        if appeared and not choosing:
            raise ValueError(
                f"model: {appeared[0]} and {len(appeared) - 1} others were used in a way that no rule saw when the rules "
                "were chosen; a model whose code path changes from batch to batch is not supported"
            )
    return losses


def call(watched: Watched, rows: PackedRows) -> Any:
    """Run the model on rows of examples.

    Args:
        watched: The model.
        rows: The batch.

    Returns:
        Its output.

    Raises:
        ValueError: The rows are longer than the model's table of positions.
    """
    try:
        return model_forward(watched.inner, rows.input_ids, rows.position_ids, rows.attention_mask)
    except IndexError as error:
        limit = getattr(watched.base.config, "max_position_embeddings", "unknown")
        raise ValueError(
            f"input_ids: expected at most the model's {limit} tokens an example, got {rows.input_ids.shape[1]} "
            f"({error}); shorten them"
        ) from error


def _per_example(
    token_losses: list[Tensor], rows: PackedRows, examples: Examples, convention: Convention
) -> tuple[Losses, list[Tensor]]:
    """Losses of the examples, and of every draw the sum over examples that is differentiated."""
    device = token_losses[0].device
    is_target = (rows.target != IGNORE).to(device)
    owner = examples.owner.to(device)[is_target]  # [S]
    tokens = is_target.sum(1)
    divisor = tokens if convention.loss == "mean" else torch.ones_like(tokens)
    objectives = [(loss / divisor[owner]).sum() for loss in token_losses]
    grid = torch.zeros(is_target.shape, dtype=torch.float64 if device.type != "mps" else torch.float32, device=device)
    for loss in token_losses:
        grid[is_target] += loss.detach() / len(token_losses)
    loss = grid.sum(1) / divisor.clamp(min=1)
    return Losses(loss.float().masked_fill(tokens == 0, torch.nan), tokens), objectives


def refuse_nonfinite_losses(losses: Losses, examples: Examples) -> None:
    """Find examples whose loss is not finite.

    Args:
        losses: Of a batch.
        examples: Of the batch.

    Raises:
        NonFiniteError: There are some.
    """
    bad = (~losses.loss.isfinite() & (losses.tokens > 0)).nonzero()[:, 0].tolist()
    if bad:
        ids = [examples.ids[b] for b in bad]
        raise NonFiniteError(
            f"loss: expected finite losses, got NaN or infinity for {_listed(ids)}; leave them out", ids
        )


def refuse_nonfinite_gradients(batches: Sequence[Examples]) -> None:
    """Find examples whose gradients were not finite when they were added.

    Args:
        batches: Whose backward has ended.

    Raises:
        NonFiniteError: There are some.
    """
    bad = [b.ids[i] for b in batches for i in b.nonfinite.nonzero()[:, 0].tolist()]
    place = "for" if bad else "in one of"  # a weight's squares show that something is not finite, not whose
    bad = bad or [i for b in batches if b.suspect for i in b.ids]
    if bad:
        raise NonFiniteError(
            f"gradient: expected finite gradients, got NaN or infinity {place} {_listed(bad)}; their squares are in the "
            "estimate, which is invalid now",
            bad,
        )


def _listed(ids: Sequence[Any]) -> str:
    shown = ", ".join(str(i) for i in ids[:8])
    return f"example{'s' * (len(ids) > 1)} {shown}" + (f" and {len(ids) - 8} others" if len(ids) > 8 else "")


def _row_ids(examples: Examples) -> Tensor:
    """`[R, T]` int64: a number of its own for every token of every example, for the draws of labels."""
    numbers = [_number_of(i) for i in examples.ids]
    first = torch.tensor(numbers, dtype=torch.int64, device=examples.owner.device)[:, None] << 24
    return first + torch.arange(examples.width, device=examples.owner.device)


def _number_of(value: Any) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        return hash_of(value)
    return number if 0 <= number < 2**38 else hash_of(number)


def hash_of(value: Any) -> int:
    """A whole number below 2^38 for an id that is none, the same in every process.

    Args:
        value: The id.

    Returns:
        The number.
    """
    return int.from_bytes(hashlib.blake2b(str(value).encode(), digest_size=8).digest(), "big") >> 26


def example_weights(
    weights: Tensor | Sequence[float] | None, count: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Weights of the examples as a checked tensor.

    Args:
        weights: `[B]` or None for ones.
        count: B.
        dtype: Of the result.
        device: Of the result.

    Returns:
        `[B]`.

    Raises:
        ValueError: The shape is another, or a weight is negative or not finite.
    """
    if weights is None:
        return torch.ones(count, dtype=dtype, device=device)
    result = torch.as_tensor(weights, dtype=dtype, device=device)
    if result.shape != (count,):
        raise ValueError(
            f"weights: expected shape [B] = ({count},), got {tuple(result.shape)}; pass one for every example"
        )
    if not bool(((result >= 0) & result.isfinite()).all()):
        raise ValueError("weights: expected finite numbers >= 0, got others; the Fisher is a mean of squares")
    return result


def choose_rules_on(watched: Watched, sums: Sums, impl: str) -> dict[str, int]:
    """Choose the rules of a model's modules on a few tokens.

    Args:
        watched: The model, in eval mode; the owners' tiers are changed.
        sums: The accumulators, which are not touched.
        impl: "auto", "triton" or "torch".

    Returns:
        How often each parameter is used in one forward.
    """
    ids, mask = made_up_tokens(watched)
    rows = pack_rows(ids, mask, ids.masked_fill(mask == 0, IGNORE), None)
    transform = transform_of(watched, rows.input_ids, impl)
    owner = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids).masked_fill(mask == 0, -1)

    eps = _epsilon(watched, rows)

    def reference() -> dict[str, Tensor]:
        logits = call(watched, rows).logits[-1]
        valid = (rows.target[-1] != IGNORE).to(logits.device)
        logits, target = logits[valid], rows.target[-1].to(logits.device)[valid]
        _refuse_mixing(watched, ids[-1:, : len(target) + 1], logits.detach(), eps)
        return watched.gradients_of(nn.functional.cross_entropy(logits, target))

    def measure(comparison: Comparison) -> Tape:
        weights = torch.zeros(len(ids), dtype=sums.dtype, device=ids.device)
        weights[-1] = 1
        examples = Examples(owner, len(ids), weights, list(range(len(ids))))
        tape = Tape(watched.owners, comparison, watched.selected, {}, True, How(impl=impl), failures={})
        with warnings.catch_warnings():  # a module that is tried on other shapes may warn of anything
            warnings.simplefilter("ignore")
            try:
                backward_under(watched, tape, rows, examples, transform, Convention(impl=impl))
            except NonFiniteError as error:
                raise ValueError(
                    "model: its loss on made-up tokens is NaN or infinite; do its weights hold NaN?"
                ) from error
        return tape

    in_head = frozenset(name for (module, _), name in watched.names.items() if module in set(watched.head.modules()))
    modules = dict(watched.inner.named_modules())
    for module in watched.owners:
        module.tier = "uses" if module_rule(module) is None else "module"
    return choose_rules(watched.owners, sums, in_head, reference, measure, modules, eps)


def made_up_tokens(watched: Watched) -> tuple[Tensor, Tensor]:
    """Tokens that the model has both an embedding and a logit of.

    Args:
        watched: The model.

    Returns:
        `[3, 7]` int64 tokens and mask.
    """
    weight = watched.inner.get_input_embeddings().weight
    return check_batch(min(len(weight), len(base_linear(watched.head).weight)), weight.device)


def _refuse_mixing(watched: Watched, ids: Tensor, logits: Tensor, eps: float) -> None:
    """Compare logits `[T, V]` of a row among others with those of the same tokens alone."""
    with torch.no_grad():
        alone = model_forward(watched.inner, ids).logits[0, : len(logits)]
    difference = float((logits.double() - alone.double()).norm() / alone.double().norm())
    if difference > max(1e-3, 32 * eps):
        raise ValueError(
            f"model: {type(watched.base).__name__} mixes the examples of a batch: a row's logits change by {difference:.2g} of "
            "their size with other rows beside it; its examples have no gradients of their own"
        )


def _epsilon(watched: Watched, rows: PackedRows) -> float:
    """Rounding of the coarsest dtype that the model computes in; accelerate switches autocast on inside its forward."""
    dtypes = {p.dtype if p.is_floating_point() else torch.bfloat16 for p in watched.inner.parameters()}  # or quantised

    def head(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        kind = hidden.device.type
        dtypes.add(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype)
        return hidden.new_zeros(*hidden.shape[:-1], 1)

    with torch.no_grad(), swapped_forward(watched.head, head):
        call(watched, rows)
    return max(torch.finfo(dtype).eps if dtype.itemsize > 1 else 2**-7 for dtype in dtypes)


def transform_of(watched: Watched, input_ids: Tensor, impl: str) -> LogitTransform:
    """What the model does to its logits, checked once.

    Args:
        watched: The model, in eval mode.
        input_ids: `[B, T]`.
        impl: "auto", "triton" or "torch".

    Returns:
        Scale and softcap.
    """
    return verified_transform(watched.inner, watched.head, input_ids, lambda *b: model_forward(watched.inner, *b), impl)
