"""`linear_cross_entropy`: checks, dispatch and autograd."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from fastforget.ops import _linear_cross_entropy_torch as torch_path
from fastforget.ops._dispatch import no_autocast, resolve, tileable
from fastforget.ops._examples import FLOATS, accumulator, capturing
from fastforget.ops._exponential_race import row_keys

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["LinearCrossEntropy", "linear_cross_entropy"]

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
    targets: Tensor
    """`[S]` int64: the labels that were drawn with `sample_seed`, else `target`; `ignore_index` for ignored rows."""


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
    sample_seed: int | None = None,
    row_ids: Tensor | None = None,
    group: ProcessGroup | None = None,
    impl: str = "auto",
) -> LinearCrossEntropy:
    r"""Per-row cross-entropy of a linear head without the logits in memory.

    With `z = softcap * tanh(scale * (x W^T + b) / softcap)`, or `z = scale * (x W^T + b)` without a softcap,

        loss_s = logsumexp_v z_sv - z_s,target(s)

    by an online log-sum-exp over blocks of the vocabulary. The workspace is bounded whatever S and V. Differentiable in
    `input`, `linear_weight` and `linear_bias` through `loss` and `lse`; the backward recomputes the logits in blocks, and
    needs, for 16-bit inputs, one float32 copy of the input's gradient. Under autocast the inputs are cast as
    `torch.nn.functional.linear` casts them.

    With `sample_seed`, the labels are drawn from the model's own distribution, softmax(z_s), in the same pass:

        y_s = argmax_v (z_sv + g(sample_seed, row_ids_s, v)),    g standard Gumbel noise

    The noise is a function of these three numbers alone, so that a row gets the same label in any batch, order, tiling and
    implementation (logits that tie within rounding aside). Other seeds or row ids draw independently.

    Args:
        input: `[S, H]` hidden states, float32, bfloat16 or float16 (float64 on the torch path), any strides.
        linear_weight: `[V, H]` head, same dtype and device.
        target: `[S]` int64 labels in `[0, V)`, or `ignore_index`. With `sample_seed` it only says which rows count.
        linear_bias: `[V]`, same dtype and device.
        softcap: Bound of the logits, > 0, as in Gemma 2; None for no bound.
        scale: Factor of the logits, as Cohere's logit scale.
        ignore_index: Label of rows that are no target.
        sample_seed: Draw the labels with this seed, any int64; None for the labels of `target`.
        row_ids: `[S]` int64, what identifies each row's draw; None for 0, 1, ..., S - 1. Only with `sample_seed`.
        group: Of processes that share the vocabulary: `linear_weight` and `linear_bias` are this process's rows of the head,
            the first process's first, as many as each has. All else is the same on every process, and so are the results
            and the gradient of `input`, which is summed over them. Not under `torch.compile`.
        impl: "auto", "triton" or "torch".

    Returns:
        `.loss`, `.hit`, `.lse` and `.targets`, see `LinearCrossEntropy`. A row whose logits have no softmax (NaN, +inf or
        nothing but -inf) has loss NaN; where it counts, the label 0 stands for its draw.

    Raises:
        TypeError: A tensor has the wrong dtype, or `sample_seed` is no int.
        ValueError: A shape, device, label, softcap, `sample_seed`, `row_ids` or `impl` is wrong.

    References:
        Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv 2411.09009; Milakov and Gimelshein,
        "Online normalizer calculation for softmax", arXiv 1805.02867; Maddison, Tarlow and Minka, "A* Sampling", arXiv
        1411.0030 (Gumbel-max).
    """
    _check_kinds(input, linear_weight, target, linear_bias)
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = _autocast(input, dtype), _autocast(linear_weight, dtype)
        linear_bias = None if linear_bias is None else _autocast(linear_bias, dtype)
    _check(input, linear_weight, target, linear_bias, softcap, scale)
    _check_sampling(input, sample_seed, row_ids)
    linear_bias = None if linear_bias is None else linear_bias.contiguous()  # the kernels take no stride of it
    options = (softcap or 0.0, float(scale), ignore_index, sample_seed, row_ids, impl)
    if group is not None:
        from fastforget.ops._vocabulary_parallel import vocabulary_parallel

        return vocabulary_parallel(input, linear_weight, target, linear_bias, *options, group)
    loss, hit, lse, drawn = _forward(input, linear_weight, target, linear_bias, *options)
    return LinearCrossEntropy(loss, hit, lse, target if sample_seed is None else drawn)


def _check_kinds(input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("input", input), ("linear_weight", weight), ("target", target), ("linear_bias", bias)):
        if not (isinstance(tensor, Tensor) or (name == "linear_bias" and tensor is None)):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}; call torch.tensor()")


def _autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """What autocast leaves alone, float64 and integers, stays for the checks to see."""
    return tensor.to(dtype) if tensor.dtype in FLOATS[:3] else tensor


def _check(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None, softcap: float | None, scale: float
) -> None:
    if input.ndim != 2:
        raise ValueError(f"input: expected shape [S, H], got {tuple(input.shape)}; flatten the leading dimensions")
    if input.dtype not in FLOATS:
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


def _check_sampling(input: Tensor, sample_seed: int | None, row_ids: Tensor | None) -> None:
    if sample_seed is None:
        if row_ids is not None:
            raise ValueError(
                "row_ids: expected None without sample_seed, got a tensor; pass sample_seed, or leave it out"
            )
        return
    if not isinstance(sample_seed, int) or isinstance(sample_seed, bool):
        raise TypeError(f"sample_seed: expected an int or None, got {type(sample_seed).__name__}; call int()")
    if not -(2**63) <= sample_seed < 2**63:
        raise ValueError(f"sample_seed: expected an int in [-2^63, 2^63), got {sample_seed}; reduce it modulo 2^63")
    if row_ids is None:
        return
    if not isinstance(row_ids, Tensor):
        raise TypeError(f"row_ids: expected a tensor [S], got {type(row_ids).__name__}; call torch.tensor()")
    if row_ids.shape != input.shape[:1]:
        raise ValueError(f"row_ids: expected shape [S] = ({input.shape[0]},), got {tuple(row_ids.shape)}; one id a row")
    if row_ids.dtype != torch.int64:
        raise TypeError(f"row_ids: expected int64, got {row_ids.dtype}; call .long()")
    if row_ids.device != input.device:
        raise ValueError(f"row_ids: expected device {input.device} like input, got {row_ids.device}; move it there")


def _implementation(impl: str, input: Tensor) -> str:
    """Settled inside the operation, where `torch.compile` does not trace."""
    implementation, _ = resolve(impl, input.device)
    if implementation == "triton" and input.dtype == torch.float64:
        raise TypeError('input: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"')
    return implementation


def _forward_of(impl: str, input: Tensor) -> Callable[..., None]:
    """The launcher of the kernel, or what takes its place."""
    if _implementation(impl, input) == "torch":
        return torch_path.forward_
    from fastforget_kernels.linear_cross_entropy import linear_cross_entropy_forward_

    return linear_cross_entropy_forward_


def _check_labels(target: Tensor, classes: int, ignore_index: int) -> None:
    """Refuse labels out of range; not while a CUDA graph is captured, where such a row becomes NaN."""
    if capturing(target):
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
    sample_seed: int | None,
    row_ids: Tensor | None,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, hit, lse, drawn = _empty_results(input, sample_seed)
    if sample_seed is None:
        label, keys = target, None
        _check_labels(target, weight.shape[0], ignore_index)
    else:
        ids = torch.arange(len(target), device=target.device) if row_ids is None else row_ids
        label, keys = drawn.zero_(), row_keys(sample_seed, ids)
    forward_ = _forward_of(impl, input)
    # The inputs are cast already; sums stay in float32.
    with torch.cuda.device_of(input), no_autocast(input.device):
        forward_(loss, hit, lse, tileable(input), tileable(weight), label, bias, softcap, scale, keys)
    ignored = target == ignore_index
    loss.masked_fill_(ignored, 0.0)
    hit.masked_fill_(ignored, False)  # ignore_index may be a class
    if sample_seed is not None:
        drawn.masked_fill_(loss.isnan(), 0).masked_fill_(ignored, ignore_index)
    return loss, hit, lse, drawn


def _empty_results(input: Tensor, sample_seed: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype, rows = accumulator(input.dtype), input.shape[0]
    return (
        input.new_empty(rows, dtype=dtype),
        input.new_empty(rows, dtype=torch.bool),
        input.new_empty(rows, dtype=dtype),
        input.new_empty(0 if sample_seed is None else rows, dtype=torch.int64),
    )


@_forward.register_fake
def _(input, weight, target, bias, softcap, scale, ignore_index, sample_seed, row_ids, impl):
    return _empty_results(input, sample_seed)


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
    impl: str,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    # dL/dz_sv = (grad_loss + grad_lse) p_sv - grad_loss [v = target]
    if _implementation(impl, input) == "triton":
        from fastforget_kernels.add_product import add_product_
        from fastforget_kernels.linear_cross_entropy import linear_cross_entropy_grad_logits as grad_logits

        input, weight = tileable(input), tileable(weight)
        block = _TRITON_ROWS, _TRITON_COLUMNS
    else:
        block = torch_path.ROWS, torch_path.COLUMNS
        grad_logits, add_product_ = torch_path.grad_logits, torch_path.add_product_
    rows, classes, dtype = input.shape[0], weight.shape[0], accumulator(input.dtype)
    grad_input = input.new_zeros(input.shape if need_input else 0, dtype=dtype)
    grad_weight = weight.new_empty(weight.shape if need_weight else 0)
    grad_bias = weight.new_empty(classes if need_bias else 0)
    with torch.cuda.device_of(input), no_autocast(input.device):
        for v in range(0, classes, block[1]):
            columns = slice(v, v + block[1])
            weight_block = weight[columns]  # [C, H]
            bias_block = None if bias is None else bias[columns]
            weight_sum = weight.new_zeros(weight_block.shape if need_weight else 0, dtype=dtype)
            bias_sum = weight.new_zeros(weight_block.shape[0], dtype=dtype)
            for s in range(0, rows, block[0]):
                r = slice(s, s + block[0])
                row_block = (target[r] - v, lse[r], grad_loss[r], grad_loss[r] + grad_lse[r])
                grad = grad_logits(input[r], weight_block, bias_block, *row_block, softcap, scale)  # [R, C]
                if need_input:
                    add_product_(grad_input[r], grad, weight_block)
                if need_weight:
                    add_product_(weight_sum, grad.T, input[r])
                if need_bias:
                    bias_sum += grad.sum(0, dtype=dtype)
            if need_weight:
                grad_weight[columns] = weight_sum
            if need_bias:
                grad_bias[columns] = bias_sum
    return grad_input.to(input.dtype), grad_weight, grad_bias


@_backward.register_fake
def _(grad_loss, grad_lse, input, weight, target, bias, lse, softcap, scale, impl, need_input, need_weight, need_bias):
    return (
        input.new_empty(input.shape if need_input else 0),
        weight.new_empty(weight.shape if need_weight else 0),
        weight.new_empty(weight.shape[0] if need_bias else 0),
    )


def _setup_context(ctx, inputs, output):
    input, weight, target, bias, ctx.softcap, ctx.scale, ctx.ignore_index, ctx.sample_seed, _, ctx.impl = inputs
    _, hit, lse, drawn = output
    ctx.mark_non_differentiable(hit, drawn)
    ctx.save_for_backward(input, weight, target, bias, lse, drawn)


def _autograd_backward(ctx, grad_loss, _, grad_lse, __):
    input, weight, target, bias, lse, drawn = ctx.saved_tensors
    need_input, need_weight, _, need_bias = ctx.needs_input_grad[:4]
    # An ignored row has no loss, but it has an lse. `drawn` does not say which rows count: ignore_index may be a class.
    grad_loss = torch.where(target == ctx.ignore_index, 0, grad_loss)
    label = target if ctx.sample_seed is None else drawn
    tensors = (grad_loss, grad_lse, input, weight, label, bias, lse)
    grads = _backward(*tensors, ctx.softcap, ctx.scale, ctx.impl, need_input, need_weight, need_bias)
    grad_input, grad_weight, grad_bias = (
        grad if need else None for grad, need in zip(grads, (need_input, need_weight, need_bias), strict=True)
    )
    return grad_input, grad_weight, None, grad_bias, *[None] * 6


_forward.register_autograd(_autograd_backward, setup_context=_setup_context)
