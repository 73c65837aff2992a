r"""Cross-entropy of a linear head, row by row, without the logits in memory.

    z_sv   = softcap tanh(scale (sum_h x_sh w_vh + b_v) / softcap)       (or scale (...) where there is no softcap)
    lse_s  = log sum_v exp z_sv,    loss_s = lse_s - z_s,target(s),    hit_s = [target(s) = argmax_v z_sv]

S rows, H hidden, V vocabulary. A program owns BLOCK_S rows and one split of the vocabulary; it walks the split tile by
tile and keeps per row the running maximum and the sum of exp(z - maximum). The tile that holds a row's label also takes
its logit, and whether a logit before it in the split is at least as large. A second kernel merges the splits in ascending
order: no atomics, the same bits every run. The label is the argmax, ties to the lowest index, if nothing before it is at
least as large and nothing after it is larger; so no index has to travel with the maximum.

With SAMPLE a row's label is drawn from softmax(z_s), by `exponential_race`. Every split then has a candidate, and keeps of
it what a tile keeps of a given label; the earliest arrival is rescaled with the sum, and wins in the merge.

Flops 2 S H V; bytes at least (S + V) H inputs + 9 S outputs; workspace 8 bytes x splits x rows, rows in blocks; with
SAMPLE some 50 operations a logit, 8 S more outputs and 24 bytes of workspace.

Of a vocabulary that several devices share, each takes its classes `[first_class, first_class + V)`; what another merge needs
of it besides, the largest logit and the arrival of the label that was drawn, comes out too.

Backward: dz_sv = g_s (exp(z_sv - lse_s) - [v = target(s)]) (1 - (z_sv / softcap)^2) scale, recomputed one block
`[R, C]` at a time, then dx += dz W and dW += dz^T x by `add_product`: 2 S H V flops each, and 2 S H V to recompute.

References: Milakov and Gimelshein, arXiv 1805.02867 (online normaliser); Wijmans et al., arXiv 2411.09009.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch passes num_warps and num_stages, which are no parameters of the kernel's Python function; and a helper of a
# kernel is called by the compiler: in Python the call raises, so that pyright sees no result)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.arithmetic import LOG2_E, cast, grouped_tile
from fastforget_kernels.device import cdiv, device_properties
from fastforget_kernels.exponential_race import arrival_times
from fastforget_kernels.logits_tile import logits_tile, tile_options, tile_settings, unit_stride

__all__ = [
    "linear_cross_entropy_forward_",
    "linear_cross_entropy_grad_logits",
    "vocabulary_splits",
]


MAX_ROWS = 16384  # rows of one launch; bounds the workspace
MAX_SPLITS = 64  # with MAX_ROWS: 8 MB of partial results


def vocabulary_splits(row_blocks: int, vocabulary_tiles: int, multiprocessors: int, group_s: int) -> int:
    """How many splits fill the device with the fewest idle multiprocessors in the last wave.

    Args:
        row_blocks: Blocks of rows.
        vocabulary_tiles: Tiles of the vocabulary.
        multiprocessors: Of the device; one program runs on each.
        group_s: Row blocks that run together. Fewer splits than fill the device from one group would let the next group
            in, and its rows push the first group's out of the L2 cache.

    Returns:
        The number of splits, at most MAX_SPLITS.
    """
    fewest = min(cdiv(multiprocessors, min(row_blocks, group_s)), vocabulary_tiles, MAX_SPLITS)

    def time(splits: int) -> int:
        waves = cdiv(row_blocks * splits, multiprocessors)
        return waves * cdiv(vocabulary_tiles, splits)

    return min(range(fewest, min(vocabulary_tiles, MAX_SPLITS) + 1), key=lambda splits: (time(splits), splits))


@triton.jit
def _at_label(z, label, BLOCK_V: tl.constexpr):
    """Logit of each row's label, and the largest before it, in this tile."""
    columns = tl.arange(0, BLOCK_V)
    label_z = tl.max(tl.where(columns[None, :] == label[:, None], z, float("-inf")), axis=1)
    earlier_z = tl.max(tl.where(columns[None, :] < label[:, None], z, float("-inf")), axis=1)
    return label_z, earlier_z


@triton.jit
def _race(
    z, shift, tile_max, running_max, key, v0, first_class, best, target, target_logit, max_before,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Let this tile's classes race with the earliest arrival so far, `best`, which is relative to `running_max`."""
    columns = tl.arange(0, BLOCK_V)
    arrival = arrival_times(z - shift[:, None], key[:, None], first_class + v0 + columns[None, :])
    earliest = tl.min(arrival, axis=1)
    label = tl.min(tl.where(arrival == earliest[:, None], columns[None, :], BLOCK_V), axis=1)
    best *= tl.exp2(tl.minimum((shift - running_max) * LOG2_E, 120.0))
    here = (earliest < best) & (tile_max > float("-inf"))  # not on a tie: the lowest index stays
    label_z, earlier_z = _at_label(z, label, BLOCK_V)
    best = tl.where(here, earliest, best)
    target = tl.where(here, v0 + label, target)
    target_logit = tl.where(here, label_z, target_logit)
    max_before = tl.where(here, tl.maximum(running_max, earlier_z), max_before)
    return best, target, target_logit, max_before


# A constant in place of 1 split or 1 tile a split saves nothing, compiles once more, and spills on sm_90.
@triton.jit(do_not_specialize=["splits", "tiles_per_split", "first_class"])
def _forward_kernel(
    input_ptr, weight_ptr, bias_ptr, target_ptr, key_ptr, max_ptr, sum_ptr, target_logit_ptr, max_before_ptr,
    best_ptr, label_ptr, S, H, V, splits, tiles_per_split, first_class,
    stride_input_s, stride_input_h, stride_weight_v, stride_weight_h, scale, softcap, SAMPLE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_S: tl.constexpr,
):  # fmt: skip
    row_block, split = grouped_tile(tl.program_id(0), tl.cdiv(S, BLOCK_S), splits, GROUP_S)
    s0 = row_block * BLOCK_S
    offs_s = s0 + tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    if SAMPLE:
        key = tl.load(key_ptr + offs_s, mask=mask_s, other=0)
        best = tl.full((BLOCK_S,), float("inf"), dtype=tl.float32)
        target = tl.zeros((BLOCK_S,), dtype=tl.int32)
    else:
        target = tl.load(target_ptr + offs_s, mask=mask_s, other=-1)
    running_max = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_S,), dtype=tl.float32)
    target_logit = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
    max_before = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
    first = split * tiles_per_split
    for tile in range(tl.minimum(tiles_per_split, tl.cdiv(V, BLOCK_V) - first)):
        v0 = (first + tile) * BLOCK_V
        z = logits_tile(
            input_ptr, weight_ptr, bias_ptr, s0, v0, S, H, V,
            stride_input_s, stride_input_h, stride_weight_v, stride_weight_h, scale, softcap,
            HAS_BIAS, HAS_SOFTCAP, EVEN_H, PRECISION, BLOCK_S, BLOCK_V, BLOCK_H,
        )  # fmt: skip
        offs_v = v0 + tl.arange(0, BLOCK_V)
        z = tl.where(offs_v[None, :] < V, z, float("-inf"))
        # Few tiles hold a label: skip two reductions over the tile where none does.
        if not SAMPLE:
            label = (target - v0).to(tl.int32)
            here = (label >= 0) & (label < BLOCK_V)
            if tl.max(here.to(tl.int32), axis=0) > 0:
                label_z, earlier_z = _at_label(z, label, BLOCK_V)
                target_logit = tl.where(here, label_z, target_logit)
                max_before = tl.where(here, tl.maximum(running_max, earlier_z), max_before)
        tile_max = tl.max(z, axis=1)
        new_max = tl.maximum(running_max, tile_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # nothing but -inf so far: exp(-inf - 0) = 0
        running_sum *= tl.exp2((running_max - shift) * LOG2_E)
        running_sum += tl.sum(tl.exp2((z - shift[:, None]) * LOG2_E), axis=1)
        if SAMPLE:  # last: the arrival times take the registers of the exponentials
            best, target, target_logit, max_before = _race(
                z, shift, tile_max, running_max, key, v0, first_class, best, target, target_logit, max_before, BLOCK_V
            )
        running_max = new_max
    offs_partial = split.to(tl.int64) * S + offs_s
    tl.store(max_ptr + offs_partial, running_max, mask=mask_s)
    tl.store(sum_ptr + offs_partial, running_sum, mask=mask_s)
    if SAMPLE:  # every split has a candidate
        tl.store(best_ptr + offs_partial, best, mask=mask_s)
        tl.store(label_ptr + offs_partial, target, mask=mask_s)
        tl.store(target_logit_ptr + offs_partial, target_logit, mask=mask_s)
        tl.store(max_before_ptr + offs_partial, max_before, mask=mask_s)
    else:
        end = tl.minimum((first + tiles_per_split) * BLOCK_V, V)
        in_split = mask_s & (target >= first * BLOCK_V) & (target < end)
        tl.store(target_logit_ptr + offs_s, target_logit, mask=in_split)
        tl.store(max_before_ptr + offs_s, max_before, mask=in_split)


@triton.jit
def _merge_kernel(
    loss_ptr, hit_ptr, lse_ptr, target_ptr, max_ptr, sum_ptr, target_logit_ptr, max_before_ptr, best_ptr, label_ptr,
    row_max_ptr, row_best_ptr, S, splits, split_width, SAMPLE: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < S
    if SAMPLE:
        best = tl.full((BLOCK_S,), float("inf"), dtype=tl.float32)
        target = tl.zeros((BLOCK_S,), dtype=tl.int32)
        target_logit = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
        max_before = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
    else:
        target = tl.load(target_ptr + offs_s, mask=mask_s, other=0)
        target_logit = tl.load(target_logit_ptr + offs_s, mask=mask_s, other=0.0)
        max_before = tl.load(max_before_ptr + offs_s, mask=mask_s, other=0.0)
    total_max = tl.full((BLOCK_S,), float("-inf"), dtype=tl.float32)
    total_sum = tl.zeros((BLOCK_S,), dtype=tl.float32)
    offs_partial = offs_s.to(tl.int64)
    for split in range(splits):
        split_max = tl.load(max_ptr + offs_partial, mask=mask_s, other=0.0)
        split_sum = tl.load(sum_ptr + offs_partial, mask=mask_s, other=1.0)
        new_max = tl.maximum(total_max, split_max)
        shift = tl.where(new_max == float("-inf"), 0.0, new_max)
        if SAMPLE:
            best *= tl.exp2(tl.minimum((shift - total_max) * LOG2_E, 120.0))
            split_best = tl.load(best_ptr + offs_partial, mask=mask_s, other=0.0)
            split_best *= tl.exp2(tl.minimum((shift - split_max) * LOG2_E, 120.0))
            better = split_best < best  # not on a tie: the lowest index stays
            best = tl.where(better, split_best, best)
            target = tl.where(better, tl.load(label_ptr + offs_partial, mask=mask_s, other=0), target)
            split_logit = tl.load(target_logit_ptr + offs_partial, mask=mask_s, other=0.0)
            target_logit = tl.where(better, split_logit, target_logit)
            split_before = tl.load(max_before_ptr + offs_partial, mask=mask_s, other=0.0)
            max_before = tl.where(better, tl.maximum(total_max, split_before), max_before)
        else:
            before_label = target >= (split + 1) * split_width
            max_before = tl.where(before_label, tl.maximum(max_before, split_max), max_before)
        total_sum *= tl.exp2((total_max - shift) * LOG2_E)
        total_sum += split_sum * tl.exp2((split_max - shift) * LOG2_E)
        total_max = new_max
        offs_partial += S
    lse = total_max + tl.log2(total_sum) / LOG2_E
    loss = lse - target_logit
    hit = (max_before < target_logit) & (total_max <= target_logit) & (loss == loss)
    tl.store(lse_ptr + offs_s, lse, mask=mask_s)
    tl.store(loss_ptr + offs_s, loss, mask=mask_s)
    tl.store(hit_ptr + offs_s, hit, mask=mask_s)
    if row_max_ptr is not None:
        tl.store(row_max_ptr + offs_s, total_max, mask=mask_s)
    if SAMPLE:
        tl.store(target_ptr + offs_s, target.to(tl.int64), mask=mask_s)
        if row_best_ptr is not None:
            tl.store(row_best_ptr + offs_s, best, mask=mask_s)


@triton.jit
def _grad_logits_kernel(
    grad_ptr, input_ptr, weight_ptr, bias_ptr, label_ptr, lse_ptr, grad_loss_ptr, grad_sum_ptr, S, H, V,
    stride_grad_s, stride_input_s, stride_input_h, stride_weight_v, stride_weight_h, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_S: tl.constexpr,
):  # fmt: skip
    row_block, tile = grouped_tile(tl.program_id(0), tl.cdiv(S, BLOCK_S), tl.cdiv(V, BLOCK_V), GROUP_S)
    s0 = row_block * BLOCK_S
    v0 = tile * BLOCK_V
    z = logits_tile(
        input_ptr, weight_ptr, bias_ptr, s0, v0, S, H, V,
        stride_input_s, stride_input_h, stride_weight_v, stride_weight_h, scale, softcap,
        HAS_BIAS, HAS_SOFTCAP, EVEN_H, PRECISION, BLOCK_S, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    offs_s = s0 + tl.arange(0, BLOCK_S)
    offs_v = v0 + tl.arange(0, BLOCK_V)
    mask_s = offs_s < S
    label = tl.load(label_ptr + offs_s, mask=mask_s, other=-1)
    lse = tl.load(lse_ptr + offs_s, mask=mask_s, other=float("inf"))
    grad_loss = tl.load(grad_loss_ptr + offs_s, mask=mask_s, other=0.0)
    grad_sum = tl.load(grad_sum_ptr + offs_s, mask=mask_s, other=0.0)
    grad = grad_sum[:, None] * tl.exp2((z - lse[:, None]) * LOG2_E)
    grad -= tl.where(offs_v[None, :] == label[:, None], grad_loss[:, None], 0.0)
    if HAS_SOFTCAP:
        grad *= 1.0 - (z / softcap) * (z / softcap)
    grad *= scale
    # A 64-bit start and 32-bit offsets: a tile of 64-bit pointers takes half of the registers.
    grad_ptr += s0.to(tl.int64) * stride_grad_s + v0
    grad_ptrs = grad_ptr + tl.arange(0, BLOCK_S)[:, None] * stride_grad_s + tl.arange(0, BLOCK_V)[None, :]
    tl.store(grad_ptrs, cast(grad, grad_ptr.dtype.element_ty), mask=mask_s[:, None] & (offs_v[None, :] < V))


def linear_cross_entropy_forward_(
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
    """Write loss, hit and lse of every row; allocates its workspace, at most 9 MB, or 25 MB where labels are drawn.

    Args:
        loss: `[S]` float32, written; NaN where the label is outside `[0, V)`.
        hit: `[S]` bool, written.
        lse: `[S]` float32, written.
        input: `[S, H]` float32, bfloat16 or float16, any strides.
        weight: `[V, H]`, same dtype.
        target: `[S]` int64; contiguous and written where labels are drawn.
        bias: `[V]` or None.
        softcap: 0 for none.
        scale: Factor of the logits.
        keys: `[S]` int64, contiguous: draw the labels from the softmax of the logits, with these keys; or None.
        first_class: What the draws call the first class; labels stay relative to it.
        row_max: `[S]` float32 or None, written: the largest logit.
        row_best: `[S]` float32 or None, written where labels are drawn: the label's arrival, relative to `row_max`.
    """
    (rows, hidden), vocabulary = input.shape, weight.shape[0]
    if rows == 0:
        return
    arch, multiprocessors = device_properties(input.device)
    sample = keys is not None
    settings = tile_settings(input.dtype, hidden, arch, contiguous=unit_stride(input, weight), samples=sample)
    block = min(rows, MAX_ROWS)
    tiles = cdiv(vocabulary, settings.block_v)
    splits = vocabulary_splits(cdiv(block, settings.block_s), tiles, multiprocessors, settings.group_s)
    tiles_per_split = cdiv(tiles, splits)
    splits = cdiv(tiles, tiles_per_split)
    partial = input.new_empty((5 if sample else 2, splits, block), dtype=torch.float32)
    at_label = input.new_empty((2, 0 if sample else block), dtype=torch.float32)
    # Of the split that holds the label: its logit, the maximum before it. Of every split that draws one: maximum, sum, the
    # label's logit, the maximum before it, its arrival, the label.
    label_of_split = input.new_empty((splits, block if sample else 0), dtype=torch.int32)
    partials = (*partial, label_of_split) if sample else (*partial, *at_label, None, None)
    for s in range(0, rows, block):
        r = slice(s, min(s + block, rows))
        size = r.stop - s
        label = target[r].contiguous()
        at_label.fill_(torch.nan)
        _forward_kernel[(cdiv(size, settings.block_s) * splits,)](
            input[r], weight, bias, label, None if keys is None else keys[r], *partials, size, hidden, vocabulary,
            splits, tiles_per_split, first_class, *input.stride(), *weight.stride(), scale, softcap, sample,
            **tile_options(settings, input, bias, softcap),
        )  # fmt: skip
        _merge_kernel[(cdiv(size, 128),)](
            loss[r], hit[r], lse[r], label, *partials, None if row_max is None else row_max[r],
            None if row_best is None else row_best[r], size, splits, tiles_per_split * settings.block_v, sample,
            BLOCK_S=128, num_warps=4,
        )  # fmt: skip


def linear_cross_entropy_grad_logits(
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
    """Gradient with respect to `x W^T + b` of one block of rows and columns, allocated here.

    Args:
        input: `[R, H]`.
        weight: `[C, H]`, the block's columns.
        bias: `[C]` or None.
        label: `[R]` int64, relative to the block's first column.
        lse: `[R]` float32.
        grad_loss: `[R]` float32, gradient of the loss.
        grad_sum: `[R]` float32, gradient of the loss plus that of the log-sum-exp.
        softcap: 0 for none.
        scale: Factor of the logits.

    Returns:
        `[R, C]` in the input's dtype.
    """
    (rows, hidden), columns = input.shape, weight.shape[0]
    grad = input.new_empty(rows, columns)
    arch = device_properties(input.device)[0]
    settings = tile_settings(input.dtype, hidden, arch, contiguous=unit_stride(input, weight), stores_tile=True)
    _grad_logits_kernel[(cdiv(rows, settings.block_s) * cdiv(columns, settings.block_v),)](
        grad, input, weight, bias, label, lse, grad_loss.contiguous(), grad_sum.contiguous(), rows, hidden, columns,
        columns, *input.stride(), *weight.stride(), scale, softcap, **tile_options(settings, input, bias, softcap),
    )  # fmt: skip
    return grad
