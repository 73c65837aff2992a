"""`linear_cross_entropy` in PyTorch, block by block: neither path, forward nor backward, has the logits `[S, V]`."""

from __future__ import annotations

import torch
from torch import Tensor

from fastforget.ops._examples import accumulator
from fastforget.ops._exponential_race import arrival_times

__all__ = ["COLUMNS", "ROWS", "accumulator", "add_product_", "forward_", "grad_logits", "logits"]

# Rows and vocabulary entries of one block of logits: 4 MB of float32, which stays in the last-level cache between the
# product and the reductions. 512 to 2048 rows were within 5% of each other on a 2-core EPYC.
ROWS, COLUMNS = 1024, 1024


def logits(input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, scale: float) -> Tensor:
    """One block of logits `[R, C]` in the accumulator's dtype: 16-bit products are exact in float32."""
    dtype = accumulator(input.dtype)
    z = input.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        z += bias
    if scale != 1.0:
        z *= scale
    return z.div_(softcap).tanh_().mul_(softcap) if softcap else z


def forward_(
    loss: Tensor,
    hit: Tensor,
    lse: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    keys: Tensor | None,
    first_class: int = 0,
    row_max: Tensor | None = None,
    row_best: Tensor | None = None,
) -> None:
    """Write loss, hit and lse of every row, and with `keys` the drawn labels into `target`: as the kernel's launcher."""
    for s in range(0, input.shape[0], ROWS):
        r = slice(s, s + ROWS)
        input_block, label = input[r].to(loss.dtype), target[r]
        running_max = torch.full_like(loss[r], -torch.inf)  # [R]
        running_sum = torch.zeros_like(running_max)
        target_logit = torch.full_like(running_max, torch.nan)
        max_before = torch.full_like(running_max, -torch.inf)  # of the logits before the label
        earliest = torch.full_like(running_max, torch.inf)
        for v in range(0, weight.shape[0], COLUMNS):
            columns = slice(v, v + COLUMNS)
            bias_block = None if bias is None else bias[columns]
            z = logits(input_block, weight[columns].to(loss.dtype), bias_block, softcap, scale)  # [R, C]
            new_max = running_max.maximum(z.amax(1))
            shift = new_max.masked_fill(new_max == -torch.inf, 0.0)  # a row of -inf so far: exp(-inf - 0) = 0
            decay = (running_max - shift).exp_()
            if keys is None:
                here = ((label >= v) & (label < v + z.shape[1])).nonzero()[:, 0]
                _take_label(z, here, label[here] - v, running_max, target_logit, max_before)
                running_sum = running_sum * decay + z.sub_(shift[:, None]).exp_().sum(1)
            else:
                probabilities = (z - shift[:, None]).exp_()
                running_sum = running_sum * decay + probabilities.sum(1)
                earliest = earliest / decay  # inf until a logit is finite: inf / 0
                first, column = _first(arrival_times(probabilities, keys[r], first_class + v))
                here = (first < earliest).nonzero()[:, 0]
                earliest[here], label[here] = first[here], column[here] + v
                _take_label(z, here, column[here], running_max, target_logit, max_before)
            running_max = new_max
        if row_max is not None:
            row_max[r] = running_max
        if row_best is not None:
            row_best[r] = earliest
        lse[r] = running_max + running_sum.log()
        loss[r] = lse[r] - target_logit
        # As in the kernel: nothing before the label is as large, nothing anywhere larger; twice as fast as an argmax.
        hit[r] = (max_before < target_logit) & (running_max <= target_logit) & ~loss[r].isnan()


def _first(arrivals: Tensor) -> tuple[Tensor, Tensor]:
    """The earliest arrival of every row and its column, the lowest on a tie, which torch.min leaves open."""
    first = arrivals.amin(1)
    index = torch.arange(arrivals.shape[1], device=arrivals.device)
    return first, torch.where(arrivals == first[:, None], index, arrivals.shape[1]).amin(1)


def _take_label(
    logits: Tensor, here: Tensor, column: Tensor, running_max: Tensor, target_logit: Tensor, max_before: Tensor
) -> None:
    """Note the labels that this block holds: rows `here`, columns `column`."""
    labelled, column = logits[here], column[:, None]
    target_logit[here] = labelled.gather(1, column)[:, 0]
    before = torch.arange(logits.shape[1], device=column.device) < column
    max_before[here] = running_max[here].maximum(labelled.masked_fill_(~before, -torch.inf).amax(1))


def grad_logits(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    lse: Tensor,
    grad_loss: Tensor,
    grad_sum: Tensor,
    softcap: float,
    scale: float,
) -> Tensor:
    """Gradient `[R, C]` with respect to `x W^T + b` of one block; `label` is relative to the block's first column."""
    z = logits(input, weight, bias, softcap, scale)
    grad = (z - lse[:, None] if softcap else z.sub_(lse[:, None])).exp_().mul_(grad_sum[:, None])
    inside = (label >= 0) & (label < grad.shape[1])
    grad.scatter_add_(1, torch.where(inside, label, 0)[:, None], torch.where(inside, -grad_loss, 0)[:, None])
    if softcap:
        grad *= 1 - (z / softcap).square_()
    return grad.mul_(scale) if scale != 1.0 else grad


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    out.addmm_(a.to(out.dtype), b.to(out.dtype))
