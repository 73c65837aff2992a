"""`gradient_products`: checks, dispatch, and the blocked PyTorch path."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
from torch import Tensor

from fastforget.ops._dispatch import no_autocast, resolve, tileable
from fastforget.ops._examples import (
    FLOATS,
    accumulator,
    capturing,
    check_examples,
    check_matrix,
    example_bounds,
    refuse_float64,
)
from fastforget.ops._gradient_blocks import gradient_blocks

__all__ = ["GradientProducts", "gradient_products"]

# Rows and columns of one block of products of tokens, or of tokens and outputs, on the torch path: 4 MB of float32.
_BLOCK = 1024


class GradientProducts(NamedTuple):
    """Result of `gradient_products`, one entry an example; None for what was not asked for."""

    dot: Tensor | None
    """`[B]` `<direction, G_b>`. float32 (float64 for float64 inputs); 0 for an example without tokens."""
    fisher_norm: Tensor | None
    """`[B]` `<fisher, G_b^2>`, likewise."""
    square_norm: Tensor | None
    """`[B]` `||G_b||^2`, likewise."""


def gradient_products(
    activations: Tensor,
    grad_outputs: Tensor,
    offsets: Tensor,
    *,
    fisher: Tensor | None = None,
    direction: Tensor | None = None,
    norm: bool = False,
    allow_tf32: bool = False,
    impl: str = "auto",
) -> GradientProducts:
    r"""Inner products of the per-example gradients of a linear layer's weight, without the gradients in memory.

    With `G_b = sum_{t in b} d_t a_t^T`, example b's gradient `[O, I]`,

        dot_b = <direction, G_b>,    fisher_norm_b = <fisher, G_b^2>,    square_norm_b = ||G_b||^2

    by tiles of G_b, as in `fisher_accumulate_`. Two cheaper forms give the same numbers. The norm alone, where it needs
    fewer operations: `sum_tu (a_t . a_u) (d_t . d_u)`. The dot alone, on the torch path: `sum_t d_t^T direction a_t`, one
    product with no tiles; on a GPU it would round that product to 16 bits, and the tiles cost the same. The same inputs on
    the same device give the same bits. Not differentiable.

    Args:
        activations: `[S, I]` inputs of the layer, float32, bfloat16 or float16 (float64 on the torch path), any strides.
        grad_outputs: `[S, O]` gradients of its outputs, same dtype and device, any strides.
        offsets: `[B + 1]` int32; example b is rows `offsets[b]:offsets[b + 1]`. Their values are checked, except while a
            CUDA graph is captured.
        fisher: `[O, I]`, any floating-point dtype (float64 for float64 inputs only) and strides.
        direction: `[O, I]`, likewise.
        norm: Also the squared norms.
        allow_tf32: Let tensor cores round float32 inputs to 10 bits of mantissa.
        impl: "auto", "triton" or "torch".

    Returns:
        `.dot`, `.fisher_norm` and `.square_norm`, see `GradientProducts`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape, device, offset or `impl` is wrong, or nothing is asked for.

    References:
        Li et al., "Large Language Models Can Be Strong Differentially Private Learners", arXiv 2110.05679 (the norm).
    """
    check_examples(activations, grad_outputs, offsets)
    allowed = FLOATS if activations.dtype == torch.float64 else FLOATS[:3]
    for name, matrix in (("fisher", fisher), ("direction", direction)):
        if matrix is not None:
            check_matrix(name, matrix, activations, grad_outputs, allowed, in_place=False)
    if fisher is None and direction is None and not norm:
        raise ValueError("fisher, direction, norm: expected at least one, got none; pass one of them")
    with torch.no_grad():
        results = _products(activations, grad_outputs, offsets, fisher, direction, norm, allow_tf32, impl)
    return _wanted(results, fisher, direction, norm)


def _wanted(
    results: tuple[Tensor, Tensor, Tensor], fisher: Tensor | None, direction: Tensor | None, norm: bool
) -> GradientProducts:
    dot, fisher_norm, square_norm = results
    return GradientProducts(
        None if direction is None else dot, None if fisher is None else fisher_norm, square_norm if norm else None
    )


def _empty_results(
    activations: Tensor, offsets: Tensor, fisher: Tensor | None, direction: Tensor | None, norm: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """A result that is not wanted is empty: a registered operation cannot return None."""
    examples, dtype = offsets.shape[0] - 1, accumulator(activations.dtype)
    dot, fisher_norm, square_norm = (
        activations.new_empty(examples if want else 0, dtype=dtype)
        for want in (direction is not None, fisher is not None, norm)
    )
    return dot, fisher_norm, square_norm


@torch.library.custom_op("fastforget::gradient_products", mutates_args=())
def _products(
    activations: Tensor,
    grad_outputs: Tensor,
    offsets: Tensor,
    fisher: Tensor | None,
    direction: Tensor | None,
    norm: bool,
    allow_tf32: bool,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    implementation, _ = resolve(impl, activations.device)
    refuse_float64(implementation, activations)
    triton = implementation == "triton"
    bounds = [] if triton and capturing(offsets) else example_bounds(offsets, activations.shape[0])
    results = _empty_results(activations, offsets, fisher, direction, norm)
    dot, _, square_norm = results
    tokens = (tileable(activations), tileable(grad_outputs))
    only_norm = fisher is None and direction is None
    with torch.cuda.device_of(activations), no_autocast(activations.device):
        if only_norm and bounds and _ghost_is_cheaper(bounds, *tokens):
            if triton:
                from fastforget_kernels.ghost_norm import ghost_norm_

                longest = max((end - start for start, end in itertools.pairwise(bounds)), default=0)
                ghost_norm_(square_norm, *tokens, offsets.contiguous(), longest, allow_tf32)
            else:
                _torch_ghost_norm_(square_norm, *tokens, bounds)
        elif triton:
            from fastforget_kernels.example_gradients import gradient_products_

            written = _wanted(results, fisher, direction, norm)
            gradient_products_(*written, *tokens, offsets.contiguous(), direction, fisher, allow_tf32)
        elif direction is not None and fisher is None and not norm:
            _torch_dot_(dot, *tokens, bounds, direction)
        else:
            _torch_products_(*results, *tokens, bounds, fisher, direction, norm)
    return results


@_products.register_fake
def _(activations, grad_outputs, offsets, fisher, direction, norm, allow_tf32, impl):
    return _empty_results(activations, offsets, fisher, direction, norm)


def _ghost_is_cheaper(bounds: list[int], activations: Tensor, grad_outputs: Tensor) -> bool:
    inputs, outputs = activations.shape[1], grad_outputs.shape[1]
    pairs = sum((end - start) ** 2 for start, end in itertools.pairwise(bounds))
    return pairs * (inputs + outputs) < bounds[-1] * inputs * outputs


def _torch_products_(
    dot: Tensor,
    fisher_norm: Tensor,
    square_norm: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    bounds: list[int],
    fisher: Tensor | None,
    direction: Tensor | None,
    norm: bool,
) -> None:
    for result in (dot, fisher_norm, square_norm):
        result.zero_()
    if activations.shape[1] > grad_outputs.shape[1]:  # tall tiles are faster on a CPU than wide ones
        activations, grad_outputs = grad_outputs, activations
        fisher, direction = (None if m is None else m.T for m in (fisher, direction))
    for rows, gradients in gradient_blocks(activations, grad_outputs, bounds):
        direction_rows, fisher_rows = (
            None if m is None else m[rows].to(dot.dtype).flatten() for m in (direction, fisher)
        )
        for example, gradient in gradients:
            entries = gradient.view(-1)
            if direction_rows is not None:
                dot[example] += torch.dot(entries, direction_rows)
            if norm:
                square_norm[example] += torch.dot(entries, entries)
            if fisher_rows is not None:
                fisher_norm[example] += torch.dot(entries.square_(), fisher_rows)


def _torch_dot_(dot: Tensor, activations: Tensor, grad_outputs: Tensor, bounds: list[int], direction: Tensor) -> None:
    """`sum_t d_t^T direction a_t`, by blocks of tokens and outputs."""
    tokens, outputs = grad_outputs.shape
    by_token = dot.new_zeros(tokens)
    for s in range(0, tokens, _BLOCK):
        a = activations[s : s + _BLOCK].to(dot.dtype)
        for o in range(0, outputs, _BLOCK):
            product = a @ direction[o : o + _BLOCK].T.to(dot.dtype)
            by_token[s : s + _BLOCK] += product.mul_(grad_outputs[s : s + _BLOCK, o : o + _BLOCK]).sum(1)
    _sum_by_example(dot, by_token, bounds)


def _torch_ghost_norm_(square_norm: Tensor, activations: Tensor, grad_outputs: Tensor, bounds: list[int]) -> None:
    """`sum_tu (a_t . a_u) (d_t . d_u)`, by blocks of tokens."""
    by_token = square_norm.new_zeros(activations.shape[0])
    for start, end in itertools.pairwise(bounds):
        a, d = (x[start:end].to(square_norm.dtype) for x in (activations, grad_outputs))
        for t in range(0, end - start, _BLOCK):
            for u in range(0, end - start, _BLOCK):
                product = (a[t : t + _BLOCK] @ a[u : u + _BLOCK].T).mul_(d[t : t + _BLOCK] @ d[u : u + _BLOCK].T)
                by_token[start + t : min(start + t + _BLOCK, end)] += product.sum(1)
    _sum_by_example(square_norm, by_token, bounds)


def _sum_by_example(out: Tensor, by_token: Tensor, bounds: list[int]) -> None:
    for example, part in enumerate(by_token.split([end - start for start, end in itertools.pairwise(bounds)])):
        out[example] = part.sum()
