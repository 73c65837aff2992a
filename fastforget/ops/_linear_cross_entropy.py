"""`linear_cross_entropy`: checks, dispatch, autograd, and the chunked PyTorch path."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastforget.ops._dispatch import resolve

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]

# Rows and vocabulary entries of one block of logits on the torch path: 4 MB of float32, which stays in the last-level
# cache between the product and the reductions. 512 to 2048 rows were within 5% of each other on a 2-core EPYC.
_TORCH_ROWS, _TORCH_COLUMNS = 1024, 1024
# Backward on Triton: one block of logit gradients, 64 MB in bfloat16; large enough for full-rate products.
_TRITON_ROWS, _TRITON_COLUMNS = 8192, 4096


class LinearCrossEntropy(NamedTuple):
    """Result of `linear_cross_entropy`, one entry a row."""

    loss: Tensor
    """`[S]` negative log-likelihood of the target, nats; 0 for ignored rows. float32 (float64 for float64 input)."""
    hit: Tensor
    """`[S]` bool: the target is the argmax of the logits, ties to the lowest index; False for ignored rows."""
    lse: Tensor
    """`[S]` log-sum-exp of the logits, for every row, ignored ones included; the dtype of `loss`."""


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    impl: str = "auto",
) -> LinearCrossEntropy:
    r"""Per-row cross-entropy of a linear head without the logits in memory.

    With `z = softcap * tanh(scale * (x W^T + b) / softcap)`, or `z = scale * (x W^T + b)` without a softcap,

        loss_s = logsumexp_v z_sv - z_s,target(s)

    by an online log-sum-exp over blocks of the vocabulary. The workspace is bounded whatever S and V. Differentiable in
    `input`, `linear_weight` and `linear_bias` through `loss` and `lse`; the backward recomputes the logits in blocks, and
    needs, for 16-bit inputs, one float32 copy of the input's gradient. Under autocast the inputs are cast as
    `torch.nn.functional.linear` casts them.

    Args:
        input: `[S, H]` hidden states, float32, bfloat16 or float16 (float64 on the torch path), any strides.
        linear_weight: `[V, H]` head, same dtype and device.
        target: `[S]` int64 labels in `[0, V)`, or `ignore_index`.
        linear_bias: `[V]`, same dtype and device.
        softcap: Bound of the logits, > 0, as in Gemma 2; None for no bound.
        scale: Factor of the logits, as Cohere's logit scale.
        ignore_index: Label of rows that are no target.
        impl: "auto", "triton" or "torch".

    Returns:
        `.loss`, `.hit` and `.lse`, see `LinearCrossEntropy`.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: A shape, device, label, softcap or `impl` is wrong.

    References:
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009; Milakov and Gimelshein,
        "Online normalizer calculation for softmax", arXiv 1805.02867.
    """
    if torch.is_autocast_enabled(input.device.type) and input.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    _check(input, linear_weight, target, linear_bias, softcap, scale)
    options = (softcap or 0.0, float(scale), ignore_index, impl)
    return LinearCrossEntropy(*_forward(input, linear_weight, target, linear_bias, *options))


def _check(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> None:
    if input.ndim != 2:
        raise ValueError(f"input: expected shape [S, H], got {tuple(input.shape)}; flatten the leading dimensions")
    if input.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise TypeError(f"input: expected float32, bfloat16, float16 or float64, got {input.dtype}")
    if weight.ndim != 2 or weight.shape[1] != input.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"linear_weight: expected shape [V, H] = (V, {input.shape[1]}), got {tuple(weight.shape)}")
    if target.shape != input.shape[:1]:
        raise ValueError(f"target: expected shape [S] = ({input.shape[0]},), got {tuple(target.shape)}")
    if target.dtype != torch.int64:
        raise TypeError(f"target: expected int64, got {target.dtype}; call .long()")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_bias: expected shape [V] = ({weight.shape[0]},), got {tuple(bias.shape)}")
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias), ("target", target)):
        if tensor is not None and tensor.device != input.device:
            raise ValueError(f"{name}: expected device {input.device} like input, got {tensor.device}")
        if tensor is not None and name != "target" and tensor.dtype != input.dtype:
            raise TypeError(f"{name}: expected {input.dtype} like input, got {tensor.dtype}; cast one of them")
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise ValueError(f"softcap: expected a finite number > 0 or None, got {softcap}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")


def _implementation(impl: str, input: Tensor) -> str:
    """Settled inside the operation, where `torch.compile` does not trace."""
    implementation, _ = resolve(impl, input.device)
    if implementation == "triton" and input.dtype == torch.float64:
        raise TypeError('input: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"')
    return implementation


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Refuse labels out of range; not while a CUDA graph is captured, where such a row becomes NaN."""
    if target.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    wrong = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(wrong.any()):
        row = int(wrong.nonzero()[0])
        raise ValueError(
            f"target: expected labels in [0, {classes}) or ignore_index = {ignore_index}, got {int(target[row])} at row {row}"
        )


@torch.library.custom_op("fastforget::linear_cross_entropy", mutates_args=())
def _forward(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    ignore_index: int,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_labels(target, weight.shape[0], ignore_index)
    loss, hit, lse = _empty_results(input)
    if _implementation(impl, input) == "triton":
        from fastforget_kernels.linear_cross_entropy import linear_cross_entropy_forward_ as forward_
    else:
        forward_ = _torch_forward_
    with (
        torch.cuda.device_of(input),
        torch.autocast(input.device.type, enabled=False),
    ):  # the inputs are cast already; sums stay in float32
        forward_(loss, hit, lse, input, weight, target, bias, softcap, scale)
    ignored = target == ignore_index
    loss.masked_fill_(ignored, 0.0)
    hit.masked_fill_(ignored, False)  # ignore_index may be a class
    return loss, hit, lse


def _empty_results(input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    dtype = _accumulator(input.dtype)
    rows = input.shape[0]
    return (
        input.new_empty(rows, dtype=dtype),
        input.new_empty(rows, dtype=torch.bool),
        input.new_empty(rows, dtype=dtype),
    )


@_forward.register_fake
def _(input, weight, target, bias, softcap, scale, ignore_index, impl):
    return _empty_results(input)


@torch.library.custom_op("fastforget::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    grad_lse: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    lse: Tensor,
    softcap: float,
    scale: float,
    ignore_index: int,
    impl: str,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # dL/dz_sv = (grad_loss + grad_lse) p_sv - grad_loss [v = target]; an ignored row has no loss, but it has an lse.
    grad_loss = torch.where(target == ignore_index, 0, grad_loss)
    if _implementation(impl, input) == "triton":
        from fastforget_kernels.add_product import add_product_
        from fastforget_kernels.linear_cross_entropy import linear_cross_entropy_grad_logits as grad_logits

        block = _TRITON_ROWS, _TRITON_COLUMNS
    else:
        block, grad_logits, add_product_ = (_TORCH_ROWS, _TORCH_COLUMNS), _torch_grad_logits, _torch_add_product_
    rows, classes = input.shape[0], weight.shape[0]
    accumulator = _accumulator(input.dtype)
    grad_input = input.new_zeros(input.shape if need_input else 0, dtype=accumulator)
    grad_weight = (
        torch.empty_like(weight, memory_format=torch.contiguous_format) if need_weight else weight.new_empty(0)
    )
    grad_bias = weight.new_empty(classes if need_bias else 0)
    with torch.cuda.device_of(input), torch.autocast(input.device.type, enabled=False):
        for v in range(0, classes, block[1]):
            columns = slice(v, v + block[1])
            weight_block = weight[columns]  # [C, H]
            bias_block = None if bias is None else bias[columns]
            weight_sum = weight.new_zeros(weight_block.shape if need_weight else 0, dtype=accumulator)
            bias_sum = weight.new_zeros(weight_block.shape[0], dtype=accumulator)
            for s in range(0, rows, block[0]):
                r = slice(s, s + block[0])
                row_block = (target[r] - v, lse[r], grad_loss[r], grad_loss[r] + grad_lse[r])
                grad = grad_logits(input[r], weight_block, bias_block, *row_block, softcap, scale)  # [R, C]
                if need_input:
                    add_product_(grad_input[r], grad, weight_block)
                if need_weight:
                    add_product_(weight_sum, grad.T, input[r])
                if need_bias:
                    bias_sum += grad.sum(0, dtype=accumulator)
            if need_weight:
                grad_weight[columns] = weight_sum
            if need_bias:
                grad_bias[columns] = bias_sum
    return grad_input.to(input.dtype), grad_weight, grad_bias


@_backward.register_fake
def _(
    grad_loss,
    grad_lse,
    input,
    weight,
    target,
    bias,
    lse,
    softcap,
    scale,
    ignore_index,
    impl,
    need_input,
    need_weight,
    need_bias,
):
    return (
        input.new_empty(input.shape if need_input else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    input, weight, target, bias, *ctx.options = inputs
    _, hit, lse = output
    ctx.mark_non_differentiable(hit)
    ctx.save_for_backward(input, weight, target, bias, lse)


def _autograd_backward(ctx, grad_loss, _, grad_lse):
    input, weight, target, bias, lse = ctx.saved_tensors
    need_input, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    grads = _backward(
        grad_loss, grad_lse, input, weight, target, bias, lse, *ctx.options, need_input, need_weight, need_bias
    )
    grad_input, grad_weight, grad_bias = (
        grad if need else None for grad, need in zip(grads, (need_input, need_weight, need_bias), strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, None, None, None, None


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _torch_logits(input: Tensor, weight: Tensor, bias: Tensor | None, softcap: float, scale: float) -> Tensor:
    """One block of logits `[R, C]` in the accumulator's dtype: 16-bit products are exact in float32."""
    dtype = _accumulator(input.dtype)
    logits = input.to(dtype) @ weight.to(dtype).T
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _torch_forward_(
    loss: Tensor,
    hit: Tensor,
    lse: Tensor,
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None,
    softcap: float,
    scale: float,
) -> None:
    for s in range(0, input.shape[0], _TORCH_ROWS):
        r = slice(s, s + _TORCH_ROWS)
        input_block, target_block = input[r].to(loss.dtype), target[r]
        running_max = torch.full_like(loss[r], -torch.inf)  # [R]
        running_sum = torch.zeros_like(running_max)
        target_logit = torch.full_like(running_max, torch.nan)
        max_before = torch.full_like(running_max, -torch.inf)  # of the logits before the label
        for v in range(0, weight.shape[0], _TORCH_COLUMNS):
            columns = slice(v, v + _TORCH_COLUMNS)
            bias_block = None if bias is None else bias[columns]
            logits = _torch_logits(input_block, weight[columns].to(loss.dtype), bias_block, softcap, scale)  # [R, C]
            label = target_block - v
            here = ((label >= 0) & (label < logits.shape[1])).nonzero()[:, 0]
            label, labelled = label[here, None], logits[here]
            target_logit[here] = labelled.gather(1, label)[:, 0]
            before = torch.arange(logits.shape[1], device=label.device) < label
            max_before[here] = running_max[here].maximum(labelled.masked_fill_(~before, -torch.inf).amax(1))
            new_max = running_max.maximum(logits.amax(1))
            shift = new_max.masked_fill(new_max == -torch.inf, 0.0)  # a row of -inf so far: exp(-inf - 0) = 0
            running_sum = running_sum * (running_max - shift).exp_() + logits.sub_(shift[:, None]).exp_().sum(1)
            running_max = new_max
        lse[r] = running_max + running_sum.log()
        loss[r] = lse[r] - target_logit
        # As in the kernel: nothing before the label is as large, nothing anywhere larger; twice as fast as an argmax.
        hit[r] = (max_before < target_logit) & (running_max <= target_logit) & ~loss[r].isnan()


def _torch_grad_logits(
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
    logits = _torch_logits(input, weight, bias, softcap, scale)
    grad = (logits - lse[:, None]).exp_().mul_(grad_sum[:, None])
    inside = (label >= 0) & (label < grad.shape[1])
    grad.scatter_add_(1, torch.where(inside, label, 0)[:, None], torch.where(inside, -grad_loss, 0)[:, None])
    if softcap:
        grad *= 1 - (logits / softcap).square_()
    return grad.mul_(scale) if scale != 1.0 else grad


def _torch_add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    out.addmm_(a.to(out.dtype), b.to(out.dtype))
