r"""`linear_cross_entropy` of a head whose rows are spread over the processes of a group.

Each process computes what its own classes say of every row, in one pass, and all gather these few numbers a row:

    lse = log sum_r exp(lse_r),    loss = (lse - lse_o) + loss_o,    hit = hit_o and max_o largest,

o the process that holds the label. A drawn label is the first to arrive of the processes' own first arrivals. Everyone
merges the same numbers in the same order, so that all have the same bits. The backward is that of the own rows with the
common lse; the gradients of the input are summed.
"""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from fastforget.ops._dispatch import no_autocast, tileable
from fastforget.ops._examples import accumulator
from fastforget.ops._exponential_race import row_keys
from fastforget.ops._linear_cross_entropy import (
    LinearCrossEntropy,
    _backward,
    _check_labels,
    _empty_results,
    _forward_of,
)

__all__ = ["Report", "merged", "own_report", "vocabulary_parallel"]


def vocabulary_parallel(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, *options: Any
) -> LinearCrossEntropy:
    """`linear_cross_entropy` with a group; its other arguments are checked already.

    Args:
        input: `[S, H]`, the same on every process.
        weight: `[V_r, H]`, this process's rows.
        target: `[S]`, the same on every process.
        bias: `[V_r]` or None.
        *options: softcap, scale, ignore_index, sample_seed, row_ids, impl and group.

    Returns:
        The same on every process.

    Raises:
        TypeError: group is no group.
        ValueError: This process is not in it, or a label is out of range.
    """
    *_, ignore_index, sample_seed, _, _, group = options
    _check_group(group)
    starts = _first_classes(weight.shape[0], input.device, group)
    if sample_seed is None:
        _check_labels(target, starts[-1], ignore_index)
    return LinearCrossEntropy(*_Shared.apply(input, weight, target, bias, *options, starts))  # type: ignore[misc]


class Report(NamedTuple):
    """What one process's classes say, `[S]` each."""

    lse: Tensor
    row_max: Tensor
    loss: Tensor
    """Of the label with respect to these classes alone; anything where it is not among them."""
    hit: Tensor
    """Whether the label is the argmax of these classes."""
    arrival: Tensor | None
    """Of the drawn label, relative to `row_max`; None where labels are given."""
    label: Tensor
    """In the whole vocabulary."""


def own_report(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    sample_seed: int | None,
    row_ids: Tensor | None,
    impl: str,
    first: int,
) -> Report:
    """What this process's classes say of every row.

    Args:
        input: As `linear_cross_entropy`, as all others.
        weight: This process's rows.
        target: Labels in the whole vocabulary.
        bias: Of this process's rows.
        softcap: 0 for none.
        scale: Factor of the logits.
        sample_seed: None for given labels.
        row_ids: Of the draws.
        impl: "auto", "triton" or "torch".
        first: The first of these classes.

    Returns:
        The report.
    """
    loss, hit, lse, drawn = _empty_results(input, sample_seed)
    row_max, row_best = torch.empty_like(lse), None if sample_seed is None else torch.empty_like(lse)
    if sample_seed is None:
        label, keys = target - first, None
    else:
        ids = torch.arange(len(target), device=target.device) if row_ids is None else row_ids
        label, keys = drawn.zero_(), row_keys(sample_seed, ids)
    forward_ = _forward_of(impl, input)
    with torch.cuda.device_of(input), no_autocast(input.device):
        tensors = (loss, hit, lse, tileable(input), tileable(weight), label, bias)
        forward_(*tensors, softcap, scale, keys, first, row_max, row_best)
    return Report(lse, row_max, loss, hit, row_best, label + first)


def merged(reports: list[Report], starts: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, hit, lse and label of every row, from all processes' reports.

    Args:
        reports: In the order of ranks.
        starts: First class of each, and the number of all classes.

    Returns:
        Four tensors `[S]`.
    """
    lse_of, max_of, loss_of, hit_of, label_of = (
        torch.stack([getattr(report, name) for report in reports])
        for name in ("lse", "row_max", "loss", "hit", "label")
    )
    lse, ranks = torch.logsumexp(lse_of, 0), torch.arange(len(reports), device=lse_of.device)[:, None]
    if reports[0].arrival is None:
        bounds = torch.tensor(starts[1:-1], device=label_of.device)
        owner = torch.bucketize(label_of[0], bounds, right=True)
    else:
        arrival = torch.stack([report.arrival for report in reports])  # type: ignore[arg-type]
        perturbed = max_of - arrival.log()  # the label's logit and its Gumbel noise
        owner = torch.where(perturbed == perturbed.amax(0), ranks, len(reports) - 1).amin(0)  # ties: the lowest class
    own_lse, own_max, own_loss, own_hit, label = (
        value.gather(0, owner[None])[0] for value in (lse_of, max_of, loss_of, hit_of, label_of)
    )
    own_loss = own_loss.masked_fill(own_lse == -torch.inf, torch.inf)  # all its classes are banned, the label with them
    loss = (lse - own_lse) + own_loss
    before = (max_of < own_max) | (ranks >= owner)
    after = (max_of <= own_max) | (ranks <= owner)
    return loss, own_hit & (before & after).all(0) & ~loss.isnan(), lse, label


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, input, weight, target, bias, softcap, scale, ignore_index, seed, row_ids, impl, group, starts):
        first = starts[dist.get_rank(group)]
        own = own_report(input, weight, target, bias, softcap, scale, seed, row_ids, impl, first)
        loss, hit, lse, label = merged(_gathered(own, group), starts)
        ignored = target == ignore_index
        loss, hit = loss.masked_fill(ignored, 0.0), hit.masked_fill(ignored, False)
        targets = (
            target.clone() if seed is None else label.masked_fill(loss.isnan(), 0).masked_fill(ignored, ignore_index)
        )
        ctx.save_for_backward(input, weight, target, bias, lse, targets)
        ctx.options = (softcap, scale, impl)
        ctx.ignore_index, ctx.group, ctx.first = ignore_index, group, first
        ctx.mark_non_differentiable(hit, targets)
        return loss, hit, lse, targets

    @staticmethod
    def backward(ctx, grad_loss, _, grad_lse, __):  # type: ignore[override]
        input, weight, target, bias, lse, label = ctx.saved_tensors
        need_input, need_weight, _, need_bias = ctx.needs_input_grad[:4]
        grad_loss = torch.where(target == ctx.ignore_index, 0, grad_loss)
        tensors = (grad_loss, grad_lse, input, weight, label - ctx.first, bias, lse)
        grad_input, grad_weight, grad_bias = _backward(*tensors, *ctx.options, need_input, need_weight, need_bias)
        if need_input:
            grad_input = grad_input.to(accumulator(input.dtype))
            dist.all_reduce(grad_input, group=ctx.group)
            grad_input = grad_input.to(input.dtype)
        return (
            grad_input if need_input else None,
            grad_weight if need_weight else None,
            None,
            grad_bias if need_bias else None,
            *[None] * 8,
        )


def _first_classes(classes: int, device: torch.device, group: dist.ProcessGroup) -> list[int]:
    """Where each process's classes begin, in the order of ranks, and the number of all classes."""
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([classes], device=device), group=group)
    return [0, *itertools.accumulate(torch.cat(sizes).tolist())]


def _gathered(own: Report, group: dist.ProcessGroup) -> list[Report]:
    """The reports of all processes, in the order of ranks."""
    numbers = [own.lse, own.row_max, own.loss] + ([] if own.arrival is None else [own.arrival])
    floats, integers = torch.stack(numbers), torch.stack([own.hit.long(), own.label])
    count = dist.get_world_size(group)
    all_floats, all_integers = ([torch.empty_like(t) for _ in range(count)] for t in (floats, integers))
    dist.all_gather(all_floats, floats, group=group)
    dist.all_gather(all_integers, integers, group=group)
    return [
        Report(f[0], f[1], f[2], i[0].bool(), None if own.arrival is None else f[3], i[1])
        for f, i in zip(all_floats, all_integers, strict=True)
    ]


def _check_group(group: Any) -> None:
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError("group: expected a group that this process is in, got another; call it on the group's ranks")
    if not isinstance(group, dist.ProcessGroup):
        raise TypeError(f"group: expected a process group or None, got {type(group).__name__}; see dist.new_group()")
