"""`fisher_accumulate_`: checks, dispatch, and the blocked PyTorch path."""

from __future__ import annotations

import torch
from torch import Tensor

from fastforget.ops._dispatch import no_autocast, resolve, tileable
from fastforget.ops._examples import (
    accumulator,
    capturing,
    check_examples,
    check_matrix,
    example_bounds,
    refuse_float64,
    refuse_others,
)
from fastforget.ops._gradient_blocks import gradient_blocks

__all__ = ["fisher_accumulate_"]


def fisher_accumulate_(
    fisher: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    offsets: Tensor,
    *,
    weights: Tensor | None = None,
    grad_weight: Tensor | None = None,
    accumulate_grad_weight: bool = False,
    allow_tf32: bool = False,
    impl: str = "auto",
) -> None:
    r"""Add the squared per-example gradients of a linear layer's weight to `fisher`, without the gradients in memory.

    With `G_b = sum_{t in b} d_t a_t^T`, example b's gradient `[O, I]`,

        fisher += sum_b w_b G_b^2,    grad_weight = sum_b G_b  (or +=)

    by tiles of G_b that never leave the registers (the cache, on the torch path). It costs what the weight-gradient
    product `d^T a` costs. Examples are summed in order: the same inputs on the same device give the same bits. Not
    differentiable: inputs that require a gradient are used as they are.

    Args:
        fisher: `[O, I]` float32 (float64 for float64 inputs), contiguous rows; changed in place.
        activations: `[S, I]` inputs of the layer, float32, bfloat16 or float16 (float64 on the torch path), any strides.
        grad_outputs: `[S, O]` gradients of its outputs, same dtype and device, any strides.
        offsets: `[B + 1]` int32; example b is rows `offsets[b]:offsets[b + 1]`. Their values are checked, except while a
            CUDA graph is captured.
        weights: `[B]` float32 or float64 factors of the examples; None for ones.
        grad_weight: `[O, I]` in fisher's or the inputs' dtype, contiguous rows; also written, unweighted, in the same pass.
        accumulate_grad_weight: Add to `grad_weight` in place of writing it.
        allow_tf32: Let tensor cores round float32 inputs to 10 bits of mantissa.
        impl: "auto", "triton" or "torch".

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape, device, stride, offset or `impl` is wrong. Nothing was written then.
    """
    check_examples(activations, grad_outputs, offsets)
    dtype = accumulator(activations.dtype)
    check_matrix("fisher", fisher, activations, grad_outputs, (dtype,), in_place=True)
    if grad_weight is not None:
        allowed = (dtype, activations.dtype)
        check_matrix("grad_weight", grad_weight, activations, grad_outputs, allowed, in_place=True)
    if weights is not None:
        _check_weights(weights, offsets)
    # The registered operation is for the compiler; outside of it, registration costs some 100 us a call.
    run = _accumulate if torch.compiler.is_compiling() else _run
    with torch.no_grad():
        run(fisher, grad_weight, activations, grad_outputs, offsets, weights, accumulate_grad_weight, allow_tf32, impl)


def _check_weights(weights: Tensor, offsets: Tensor) -> None:
    refuse_others(weights=weights)
    examples = offsets.shape[0] - 1
    if weights.shape != (examples,):
        raise ValueError(f"weights: expected shape [B] = ({examples},), got {tuple(weights.shape)}")
    if weights.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"weights: expected float32 or float64, got {weights.dtype}; call .float()")
    if weights.device != offsets.device:
        raise ValueError(f"weights: expected device {offsets.device} like activations, got {weights.device}")


def _run(
    fisher: Tensor,
    grad_weight: Tensor | None,
    activations: Tensor,
    grad_outputs: Tensor,
    offsets: Tensor,
    weights: Tensor | None,
    accumulate: bool,
    allow_tf32: bool,
    impl: str,
) -> None:
    implementation, _ = resolve(impl, activations.device)
    refuse_float64(implementation, activations)
    bounds = [] if implementation == "triton" and capturing(offsets) else example_bounds(offsets, activations.shape[0])
    with torch.cuda.device_of(activations), no_autocast(activations.device):
        if implementation == "triton":
            from fastforget_kernels.example_gradients import fisher_accumulate_ as kernel_

            tokens = tileable(activations), tileable(grad_outputs)
            weights = None if weights is None else weights.contiguous()
            kernel_(fisher, *tokens, offsets.contiguous(), weights, grad_weight, accumulate, allow_tf32)
        else:
            _torch_accumulate_(fisher, activations, grad_outputs, bounds, weights, grad_weight, accumulate)


_accumulate = torch.library.custom_op("fastforget::fisher_accumulate_", _run, mutates_args=("fisher", "grad_weight"))


@_accumulate.register_fake
def _(fisher, grad_weight, activations, grad_outputs, offsets, weights, accumulate, allow_tf32, impl):
    return None


def _torch_accumulate_(
    fisher: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    bounds: list[int],
    weights: Tensor | None,
    grad_weight: Tensor | None,
    accumulate: bool,
) -> None:
    values = [1.0] * (len(bounds) - 1) if weights is None else weights.tolist()
    if grad_weight is not None and not accumulate:
        grad_weight.zero_()
    # Tall tiles are twice as fast as wide ones on a CPU: a wide gradient is squared as its transpose.
    transposed = activations.shape[1] > grad_outputs.shape[1]
    if transposed:
        activations, grad_outputs, fisher = grad_outputs, activations, fisher.T
        grad_weight = None if grad_weight is None else grad_weight.T
    # An example of one token is a rank-1 gradient: the sum of all their squares is one product.
    single = [example for example, start in enumerate(bounds[:-1]) if bounds[example + 1] - start == 1]
    single_rows = [bounds[example] for example in single]
    single_a = activations[single_rows].to(fisher.dtype) if single else None  # [K, I]
    for rows, gradients in gradient_blocks(activations, grad_outputs, bounds, shortest=2):
        target = fisher[rows]
        squares = target.new_zeros(target.shape) if transposed else target
        total = None if grad_weight is None else target.new_zeros(target.shape)
        if single_a is not None:
            d = grad_outputs[single_rows, rows].to(fisher.dtype)  # [K, R]
            weighted = d.square() if weights is None else d.square() * weights[single, None].to(fisher.dtype)
            squares.addmm_(weighted.T, single_a.square())
            if total is not None:
                total.addmm_(d.T, single_a)
        for example, gradient in gradients:
            squares.addcmul_(gradient, gradient, value=values[example])
            if total is not None:
                total += gradient
        if transposed:
            target += squares
        if grad_weight is not None and total is not None:
            grad_weight[rows] += total
