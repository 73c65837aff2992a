r"""Reductions of the per-example gradients of a linear layer's weight, without the gradients in memory.

    G_b = sum_{t in b} d_t a_t^T                                     [O, I], for example b = rows offsets_b .. offsets_{b+1}
    fisher += sum_b w_b G_b^2,    grad_weight = sum_b G_b (or +=)    `fisher_accumulate_`
    <direction, G_b>,    <fisher, G_b^2>,    ||G_b||^2               `gradient_products_`

S tokens, B examples, O x I the weight. A program owns one tile of [O, I] and a group of examples. It walks its examples in
order, and each example's tokens in blocks; the accumulator starts from zero at each example, and the epilogue reads it in
registers. Where there are fewer tiles than fill the device, the examples are split into groups, each with float32 partial
results that are summed in order: no atomics, the same bits every run.

Flops 2 S O I and a few O I B; bytes S (O + I) per tile row or column, mostly from the L2 cache, and 8 O I for the fisher.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps and num_stages, which are no parameters of the kernel's Python function, and plain values for
# constants; and a helper of a kernel is called by the compiler: in Python the call raises, so that pyright sees no result)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.arithmetic import cast, dot, grouped_tile
from fastforget_kernels.device import cdiv, device_properties

__all__ = [
    "GradientSettings",
    "example_groups",
    "fisher_accumulate_",
    "gradient_products_",
    "gradient_settings",
]


@dataclass(frozen=True)
class GradientSettings:
    """Launch settings of the two kernels that compute a tile of an example's gradient."""

    block_o: int
    block_i: int
    block_k: int  # tokens
    group_o: int  # row blocks that run beside each other: they share the tiles of the activations in the L2 cache
    num_warps: int
    num_stages: int


MAX_PARTIALS = 2**21  # tiles x examples of one launch of `gradient_products_`: a workspace of 8 MB a product


def gradient_settings(
    dtype: torch.dtype, mean_tokens: float, arch: str, *, contiguous: bool = True, tiles: int = 2
) -> GradientSettings:
    """Launch settings of the two kernels that compute a tile of an example's gradient.

    Args:
        dtype: Of activations and output gradients.
        mean_tokens: Tokens an example, on average.
        arch: "sm_80", "sm_90", "sm_100" or an AMD name such as "gfx942".
        contiguous: The rows of both have unit stride.
        tiles: Of float32 that stay in registers: the accumulator, and one for each of squares, weight gradient,
            direction and fisher.

    Returns:
        The settings. The reasons given are the compiler's reports; none is tuned on a device yet.
    """
    if dtype == torch.float32:
        return GradientSettings(64, 64, 16, 8, 8, 3)  # on the ordinary cores; at most 182 registers
    if not contiguous:
        return GradientSettings(64, 64, 32, 8, 8, 2)  # one address an element: wider tiles spill
    # The last block of an example is padding beyond its tokens: a short example wants a short block.
    block_k = 64 if mean_tokens > 32 else 32
    if arch.startswith("gfx"):
        return GradientSettings(128, 128, 32, 8, 8, 2)  # 64 KB of LDS
    if tiles > 2:
        return GradientSettings(128, 64, block_k, 8, 8, 3)  # 128 x 128 needs 254 registers and more, and spills on some
    return GradientSettings(128, 128, block_k, 8, 8, 3)  # at most 237 registers, 96 KB


def example_groups(tiles: int, examples: int, multiprocessors: int) -> int:
    """How many groups of examples fill the device.

    Args:
        tiles: Of the weight.
        examples: B.
        multiprocessors: Of the device; one program runs on each.

    Returns:
        The number of groups. Where it is above 1, tiles x groups is less than twice the multiprocessors, which bounds the
        workspace.
    """
    return max(min(cdiv(multiprocessors, tiles), examples), 1)


@triton.jit
def _example_gradient(
    a_ptr, d_ptr, start, end, o0, i0, outputs, inputs, stride_a_s, stride_a_i, stride_d_s, stride_d_o,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of one example's gradient; zero where the example has no token or the tile ends."""
    # 64-bit where a block starts, 32-bit inside it: the tokens may pass 2^31 elements, a block does not. The starts
    # advance, as scalars: advancing a tile of pointers instead takes 60 registers more, and spills.
    offs_o = tl.arange(0, BLOCK_O)
    offs_i = tl.arange(0, BLOCK_I)
    offs_k = tl.arange(0, BLOCK_K)
    d_ptr += start.to(tl.int64) * stride_d_s + o0.to(tl.int64) * stride_d_o
    a_ptr += start.to(tl.int64) * stride_a_s + i0.to(tl.int64) * stride_a_i
    offs_d = offs_o[:, None] * stride_d_o + offs_k[None, :] * stride_d_s
    offs_a = offs_k[:, None] * stride_a_s + offs_i[None, :] * stride_a_i
    acc = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for k0 in range(0, end - start, BLOCK_K):
        mask_k = offs_k < end - start - k0
        d = tl.load(d_ptr + offs_d, mask=mask_k[None, :] & (offs_o[:, None] < outputs - o0), other=0.0)
        a = tl.load(a_ptr + offs_a, mask=mask_k[:, None] & (offs_i[None, :] < inputs - i0), other=0.0)
        acc = dot(d, a, acc, PRECISION)
        d_ptr += BLOCK_K * stride_d_s
        a_ptr += BLOCK_K * stride_a_s
    return acc


@triton.jit
def _load_tile(ptr, o0, i0, stride_o, stride_i, mask, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    ptr += o0.to(tl.int64) * stride_o + i0.to(tl.int64) * stride_i
    return tl.load(
        ptr + tl.arange(0, BLOCK_O)[:, None] * stride_o + tl.arange(0, BLOCK_I)[None, :] * stride_i,
        mask=mask,
        other=0.0,
    )


@triton.jit
def _store_tile(ptr, tile, o0, i0, stride_o, mask, ADD: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr):
    ptr += o0.to(tl.int64) * stride_o + i0
    ptrs = ptr + tl.arange(0, BLOCK_O)[:, None] * stride_o + tl.arange(0, BLOCK_I)[None, :]
    if ADD:
        tile += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    tl.store(ptrs, cast(tile, ptr.dtype.element_ty), mask=mask)


# A constant in place of 1 example, or 1 example a group, saves nothing and compiles once more.
@triton.jit(do_not_specialize=["examples", "examples_a_group"])
def _fisher_kernel(
    fisher_ptr, grad_weight_ptr, a_ptr, d_ptr, offsets_ptr, weights_ptr, outputs, inputs, examples, examples_a_group,
    stride_fisher_g, stride_fisher_o, stride_grad_weight_g, stride_grad_weight_o,
    stride_a_s, stride_a_i, stride_d_s, stride_d_o,
    HAS_WEIGHTS: tl.constexpr, HAS_GRAD_WEIGHT: tl.constexpr, ADD_FISHER: tl.constexpr, ADD_GRAD_WEIGHT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    row_block, column_block = grouped_tile(
        tl.program_id(0), tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I), GROUP_O
    )
    o0 = row_block * BLOCK_O
    i0 = column_block * BLOCK_I
    group = tl.program_id(1)
    first = group * examples_a_group
    squares = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    total = tl.zeros((BLOCK_O, BLOCK_I), dtype=tl.float32)
    for b in range(first, tl.minimum(first + examples_a_group, examples)):
        start = tl.load(offsets_ptr + b)
        end = tl.load(offsets_ptr + b + 1)
        gradient = _example_gradient(
            a_ptr, d_ptr, start, end, o0, i0, outputs, inputs, stride_a_s, stride_a_i, stride_d_s, stride_d_o,
            PRECISION, BLOCK_O, BLOCK_I, BLOCK_K,
        )  # fmt: skip
        if HAS_GRAD_WEIGHT:
            total += gradient
        if HAS_WEIGHTS:
            squares += gradient * gradient * tl.load(weights_ptr + b).to(tl.float32)
        else:
            squares += gradient * gradient
    mask = (o0 + tl.arange(0, BLOCK_O)[:, None] < outputs) & (i0 + tl.arange(0, BLOCK_I)[None, :] < inputs)
    fisher_ptr += group.to(tl.int64) * stride_fisher_g
    _store_tile(fisher_ptr, squares, o0, i0, stride_fisher_o, mask, ADD_FISHER, BLOCK_O, BLOCK_I)
    if HAS_GRAD_WEIGHT:
        grad_weight_ptr += group.to(tl.int64) * stride_grad_weight_g
        _store_tile(grad_weight_ptr, total, o0, i0, stride_grad_weight_o, mask, ADD_GRAD_WEIGHT, BLOCK_O, BLOCK_I)


@triton.jit(do_not_specialize=["examples", "examples_a_group"])
def _products_kernel(
    dot_ptr, fisher_norm_ptr, square_norm_ptr, direction_ptr, fisher_ptr, a_ptr, d_ptr, offsets_ptr,
    outputs, inputs, examples, examples_a_group, stride_direction_o, stride_direction_i, stride_fisher_o, stride_fisher_i,
    stride_a_s, stride_a_i, stride_d_s, stride_d_o,
    HAS_DIRECTION: tl.constexpr, HAS_FISHER: tl.constexpr, HAS_NORM: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_O: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row_block, column_block = grouped_tile(tile, tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I), GROUP_O)
    o0 = row_block * BLOCK_O
    i0 = column_block * BLOCK_I
    mask = (o0 + tl.arange(0, BLOCK_O)[:, None] < outputs) & (i0 + tl.arange(0, BLOCK_I)[None, :] < inputs)
    if HAS_DIRECTION:
        direction = _load_tile(direction_ptr, o0, i0, stride_direction_o, stride_direction_i, mask, BLOCK_O, BLOCK_I)
    if HAS_FISHER:
        fisher = _load_tile(fisher_ptr, o0, i0, stride_fisher_o, stride_fisher_i, mask, BLOCK_O, BLOCK_I)
    first = tl.program_id(1) * examples_a_group
    for b in range(first, tl.minimum(first + examples_a_group, examples)):
        start = tl.load(offsets_ptr + b)
        end = tl.load(offsets_ptr + b + 1)
        gradient = _example_gradient(
            a_ptr, d_ptr, start, end, o0, i0, outputs, inputs, stride_a_s, stride_a_i, stride_d_s, stride_d_o,
            PRECISION, BLOCK_O, BLOCK_I, BLOCK_K,
        )  # fmt: skip
        offs_partial = tile.to(tl.int64) * examples + b
        if HAS_DIRECTION:
            tl.store(dot_ptr + offs_partial, tl.sum(gradient * direction))
        if HAS_FISHER:
            tl.store(fisher_norm_ptr + offs_partial, tl.sum(gradient * gradient * fisher))
        if HAS_NORM:
            tl.store(square_norm_ptr + offs_partial, tl.sum(gradient * gradient))


def fisher_accumulate_(
    fisher: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    grad_weight: Tensor | None,
    accumulate_grad_weight: bool,
    allow_tf32: bool,
) -> None:
    """`fisher += sum_b w_b G_b^2`; where tiles are few, allocates at most two tiles a multiprocessor for each result.

    Args:
        fisher: `[O, I]` float32, rows contiguous; changed in place.
        activations: `[S, I]` float32, bfloat16 or float16, any strides.
        grad_outputs: `[S, O]`, same dtype.
        offsets: `[B + 1]` int32.
        weights: `[B]` float32 or float64, or None for ones.
        grad_weight: `[O, I]`, rows contiguous; written, or added to. None if it is not wanted.
        accumulate_grad_weight: Add to it.
        allow_tf32: For float32.
    """
    (outputs, inputs), examples = fisher.shape, offsets.shape[0] - 1
    if fisher.numel() == 0:
        return
    settings, options = _launch_options(activations, grad_outputs, offsets, allow_tf32, 2 + (grad_weight is not None))
    multiprocessors = device_properties(fisher.device)[1]
    tiles = cdiv(outputs, settings.block_o) * cdiv(inputs, settings.block_i)
    groups = example_groups(tiles, examples, multiprocessors)
    examples_a_group = max(cdiv(examples, groups), 1)
    groups = max(cdiv(examples, examples_a_group), 1)
    squares, total = fisher, grad_weight
    if groups > 1:
        squares = fisher.new_empty(groups, outputs, inputs)
        total = None if grad_weight is None else torch.empty_like(squares)
    _fisher_kernel[(tiles, groups)](
        squares, total, activations, grad_outputs, offsets, weights, outputs, inputs, examples, examples_a_group,
        *_group_strides(squares), *_group_strides(total), *activations.stride(), *grad_outputs.stride(),
        HAS_WEIGHTS=weights is not None, HAS_GRAD_WEIGHT=grad_weight is not None,
        ADD_FISHER=groups == 1, ADD_GRAD_WEIGHT=groups == 1 and accumulate_grad_weight, **options,
    )  # fmt: skip
    if groups > 1:
        fisher += squares.sum(0)
        if grad_weight is not None and total is not None:
            total = total.sum(0)
            grad_weight.copy_(grad_weight + total if accumulate_grad_weight else total)


def gradient_products_(
    dot: Tensor | None,
    fisher_norm: Tensor | None,
    square_norm: Tensor | None,
    activations: Tensor,
    grad_outputs: Tensor,
    offsets: Tensor,
    direction: Tensor | None,
    fisher: Tensor | None,
    allow_tf32: bool,
) -> None:
    """Write `<direction, G_b>`, `<fisher, G_b^2>` and `||G_b||^2`; allocates at most MAX_PARTIALS for each.

    Args:
        dot: `[B]` float32, written; None without a direction.
        fisher_norm: `[B]` float32, written; None without a fisher.
        square_norm: `[B]` float32, written; None if it is not wanted.
        activations: `[S, I]` float32, bfloat16 or float16, any strides.
        grad_outputs: `[S, O]`, same dtype.
        offsets: `[B + 1]` int32.
        direction: `[O, I]` of any floating-point dtype up to float32, any strides.
        fisher: Likewise.
        allow_tf32: For float32.
    """
    (inputs, outputs), examples = (activations.shape[1], grad_outputs.shape[1]), offsets.shape[0] - 1
    wanted = [result.zero_() for result in (dot, fisher_norm, square_norm) if result is not None]
    if not (wanted and examples and inputs and outputs):
        return
    kept = 1 + (direction is not None) + (fisher is not None)
    settings, options = _launch_options(activations, grad_outputs, offsets, allow_tf32, kept)
    columns = cdiv(inputs, settings.block_i)
    height = max(MAX_PARTIALS // (columns * min(examples, MAX_PARTIALS)), 1)  # rows of tiles in one launch
    width = max(MAX_PARTIALS // (columns * height), 1)  # examples in one launch
    multiprocessors = device_properties(activations.device)[1]
    for o in range(0, outputs, height * settings.block_o):
        rows = slice(o, min(o + height * settings.block_o, outputs))
        tiles = cdiv(rows.stop - o, settings.block_o) * columns
        d, direction_rows, fisher_rows = (None if t is None else t[rows] for t in (grad_outputs.T, direction, fisher))
        for b in range(0, examples, width):
            part = slice(b, min(b + width, examples))
            size = part.stop - b
            examples_a_group = cdiv(size, example_groups(tiles, size, multiprocessors))
            partials = [None if r is None else r.new_empty(tiles, size) for r in (dot, fisher_norm, square_norm)]
            _products_kernel[(tiles, cdiv(size, examples_a_group))](
                *partials, direction_rows, fisher_rows, activations, d, offsets[b : part.stop + 1],
                rows.stop - o, inputs, size, examples_a_group, *_strides(direction), *_strides(fisher),
                *activations.stride(), *grad_outputs.stride(),
                HAS_DIRECTION=dot is not None, HAS_FISHER=fisher_norm is not None, HAS_NORM=square_norm is not None,
                **options,
            )  # fmt: skip
            for result, partial in zip(wanted, [p for p in partials if p is not None], strict=True):
                result[part] += partial.sum(0)


def _launch_options(
    activations: Tensor, grad_outputs: Tensor, offsets: Tensor, allow_tf32: bool, tiles: int
) -> tuple[GradientSettings, dict[str, object]]:
    mean_tokens = activations.shape[0] / max(offsets.shape[0] - 1, 1)
    arch = device_properties(activations.device)[0]
    contiguous = activations.stride(1) == grad_outputs.stride(1) == 1
    settings = gradient_settings(activations.dtype, mean_tokens, arch, contiguous=contiguous, tiles=tiles)
    return settings, {
        "PRECISION": "tf32" if allow_tf32 else "ieee",
        "BLOCK_O": settings.block_o,
        "BLOCK_I": settings.block_i,
        "BLOCK_K": settings.block_k,
        "GROUP_O": settings.group_o,
        "num_warps": settings.num_warps,
        "num_stages": settings.num_stages,
    }


def _strides(matrix: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if matrix is None else matrix.stride()


def _group_strides(result: Tensor | None) -> tuple[int, int]:
    """From one group's partial result to the next, and from one row to the next."""
    return (0, 0) if result is None else (result.stride(0) if result.ndim == 3 else 0, result.stride(-2))
