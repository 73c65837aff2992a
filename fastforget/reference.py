"""The oracle: every operation in plain eager PyTorch, in the dtype it is given, with no trick and no chunking.

Tests compare the fast implementations with these functions in float64. They are meant to be read beside the equation,
not to be fast: `linear_cross_entropy` here builds the full `[S, V]` logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "adamw",
    "dampen",
    "example_gradients",
    "fisher_accumulate",
    "fisher_merge",
    "gradient_products",
    "gumbel_noise",
    "linear_cross_entropy",
    "sgd",
    "square_accumulate",
    "topk_threshold",
]


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Cross-entropy of a linear head, `z = softcap * tanh(scale * (x W^T + b) / softcap)`, with all logits in memory.

    Args:
        input: `[S, H]` hidden states.
        linear_weight: `[V, H]` head.
        target: `[S]` int64 labels; `ignore_index` rows give 0 and False.
        linear_bias: `[V]`.
        softcap: Bound of the logits; None for no bound.
        scale: Factor of the logits, applied before the softcap.
        ignore_index: Label that is no target.
        sample_seed: Draw the labels, `argmax_v (z_sv + gumbel_noise_sv)`; `target` then only says which rows count.
        row_ids: `[S]` int64, what identifies each row's draw; None for 0, 1, ..., S - 1.

    Returns:
        `loss` `[S]` = lse - z[target], `hit` `[S]` bool (target is the argmax, ties to the lowest index) and `lse` `[S]`,
        the log-sum-exp of every row, in the input's dtype; and the targets `[S]` that these are of.
    """
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias) * scale  # [S, V]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=1)
    valid = target != ignore_index
    if sample_seed is not None:
        ids = range(len(target)) if row_ids is None else row_ids.tolist()
        noise = gumbel_noise(sample_seed, ids, logits.shape[1]).to(logits.device)
        target = torch.where(valid, _argmax(logits.detach() + noise), ignore_index)
    label = torch.where(valid, target, 0)
    loss = torch.where(valid, lse - logits.gather(1, label[:, None])[:, 0], 0)
    return loss, valid & (_argmax(logits) == target), lse, target


def _argmax(values: Tensor) -> Tensor:
    """The lowest index of each row's maximum; torch.max leaves ties open in its contract."""
    index = torch.arange(values.shape[1], device=values.device)
    return torch.where(values == values.amax(1, keepdim=True), index, values.shape[1]).amin(1)


def gumbel_noise(seed: int, row_ids: Sequence[int], classes: int) -> Tensor:
    """Standard Gumbel noise, a function of seed, row id and class.

    A row's 64-bit key is number `row_id` of the SplitMix64 generator started at mix(seed); a class's 32 bits are Wellons'
    triple32 of the class with the key's halves xored in; the noise is `-log(-log(1 - u))`, u = (bits + 1/2) / 2^32.

    Args:
        seed: Any int64.
        row_ids: S of them, any int64.
        classes: V.

    Returns:
        `[S, V]` float64.
    """
    word, half = 2**64 - 1, 2**32 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & word
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & word
        return x ^ (x >> 31)

    keys = [mix((mix(seed & word) + (row_id + 1) * 0x9E3779B97F4A7C15) & word) for row_id in row_ids]
    low = torch.tensor([key & half for key in keys], dtype=torch.int64)[:, None]
    high = torch.tensor([key >> 32 for key in keys], dtype=torch.int64)[:, None]
    x = torch.arange(classes) ^ low
    x = ((x ^ (x >> 17)) * 0xED5AD4BB) & half
    x = ((x ^ (x >> 11) ^ high) * 0xAC4C1B51) & half
    x = ((x ^ (x >> 15)) * 0x31848BAB) & half
    u = ((x ^ (x >> 14)).double() + 0.5) / 2**32
    return -torch.log(-torch.log1p(-u))


def example_gradients(activations: Tensor, grad_outputs: Tensor, offsets: Tensor) -> Tensor:
    """Per-example gradients of a linear layer's weight, `G_b = sum_{t in b} d_t a_t^T`.

    Args:
        activations: `[S, I]`.
        grad_outputs: `[S, O]`.
        offsets: `[B + 1]`; example b is rows `offsets[b]:offsets[b + 1]`.

    Returns:
        `[B, O, I]`.
    """
    gradients = activations.new_zeros(len(offsets) - 1, grad_outputs.shape[1], activations.shape[1])
    for gradient, (start, end) in zip(gradients, itertools.pairwise(offsets.tolist()), strict=True):
        gradient += grad_outputs[start:end].T @ activations[start:end]
    return gradients


def fisher_accumulate(
    fisher: Tensor, activations: Tensor, grad_outputs: Tensor, offsets: Tensor, *, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`fisher + sum_b w_b G_b^2` and `sum_b G_b`, with all per-example gradients in memory.

    Args:
        fisher: `[O, I]`.
        activations: `[S, I]`.
        grad_outputs: `[S, O]`.
        offsets: `[B + 1]`.
        weights: `[B]`; None for ones.

    Returns:
        Both `[O, I]`.
    """
    gradients = example_gradients(activations, grad_outputs, offsets)
    squares = gradients.square() if weights is None else gradients.square() * weights[:, None, None]
    return fisher + squares.sum(0), gradients.sum(0)


def gradient_products(
    activations: Tensor, grad_outputs: Tensor, offsets: Tensor, *, fisher: Tensor, direction: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`<direction, G_b>`, `<fisher, G_b^2>` and `||G_b||^2`, with all per-example gradients in memory.

    Args:
        activations: `[S, I]`.
        grad_outputs: `[S, O]`.
        offsets: `[B + 1]`.
        fisher: `[O, I]`.
        direction: `[O, I]`.

    Returns:
        Three tensors `[B]`.
    """
    gradients = example_gradients(activations, grad_outputs, offsets)
    squares = gradients.square()
    return (gradients * direction).sum((1, 2)), (squares * fisher).sum((1, 2)), squares.sum((1, 2))


def square_accumulate(
    fishers: Sequence[Tensor], grads: Sequence[Tensor], *, scale: float = 1.0, decay: float = 1.0
) -> list[Tensor]:
    """`decay * fisher + scale * grad^2` of every pair.

    Args:
        fishers: Tensors of any shape.
        grads: As many tensors of the same shapes.
        scale: Factor of the squares.
        decay: Factor of the fishers.

    Returns:
        As many tensors.
    """
    return [decay * fisher + scale * grad.square() for fisher, grad in zip(fishers, grads, strict=True)]


def topk_threshold(tensors: Sequence[Tensor], k: int, *, largest: bool = True) -> tuple[float, list[Tensor]]:
    """The k-th value of all elements by a stable sort, and which elements are the k first of it.

    Args:
        tensors: Tensors of any shapes and dtypes.
        k: How many.
        largest: Whether the largest come first.

    Returns:
        The value, and a boolean tensor for each.
    """
    values = torch.cat([tensor.flatten().double() for tensor in tensors]) + 0.0
    order = values.argsort(descending=largest, stable=True)
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[order[:k]] = True
    masks = chosen.split([tensor.numel() for tensor in tensors])
    return values[order[k - 1]].item(), [mask.view(t.shape) for mask, t in zip(masks, tensors, strict=True)]


def dampen(
    params: Sequence[Tensor], forget: Sequence[Tensor], retain: Sequence[Tensor], *, alpha: float, lam: float
) -> tuple[list[Tensor], list[Tensor]]:
    """`theta min(lam F_retain / F_forget, 1)` where `F_forget > alpha F_retain`, and where that is.

    Args:
        params: Tensors of any shape.
        forget: As many Fishers.
        retain: As many Fishers.
        alpha: Least ratio that is dampened.
        lam: Factor of the ratio.

    Returns:
        As many tensors in the parameters' dtypes, and as many boolean ones.
    """
    chosen = [f > alpha * r for f, r in zip(forget, retain, strict=True)]
    factors = [(lam * r / f).clamp(max=1.0) for f, r in zip(forget, retain, strict=True)]
    dampened = [torch.where(c, p * x, p).to(p.dtype) for p, x, c in zip(params, factors, chosen, strict=True)]
    return dampened, chosen


def fisher_merge(
    models: Sequence[Sequence[Tensor]], fishers: Sequence[Sequence[Tensor]], weights: Sequence[float], *, floor: float
) -> list[Tensor]:
    """`sum_j c_j F_j theta_j / sum_j c_j F_j`, F_j at least `floor`.

    Args:
        models: J lists of tensors.
        fishers: J lists of as many Fishers.
        weights: J factors.
        floor: Least value of a Fisher.

    Returns:
        As many tensors, in the models' dtypes.
    """
    merged = []
    for params, precisions in zip(zip(*models, strict=True), zip(*fishers, strict=True), strict=True):
        factors = torch.stack([c * f.clamp(min=floor) for c, f in zip(weights, precisions, strict=True)])
        numerator = (factors * torch.stack(params)).sum(0)
        merged.append((numerator / factors.sum(0)).to(params[0].dtype))
    return merged


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: float,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_exp_avg_sq: Tensor | None = None,
    maximize: bool = False,
    **steering: Any,
) -> dict[str, Tensor]:
    r"""One step of AdamW, `theta' = (1 - lr wd) theta - lr m_hat / (sqrt(v_hat) + eps)`, steered by a Fisher.

    Args:
        param: Of any shape.
        grad: Its gradient.
        exp_avg: m before the step.
        exp_avg_sq: v before the step.
        step: t, from 1.
        lr: Learning rate.
        betas: `m = beta1 m + (1 - beta1) g`, `v = beta2 v + (1 - beta2) g^2`.
        eps: Added to the denominator.
        weight_decay: wd.
        max_exp_avg_sq: The largest v so far, which then takes the place of v.
        maximize: Negate the gradient.
        **steering: `fisher`, `anchor` and boolean `movable` tensors; `fisher_decay`, `ewc_lambda`, `min_fisher`,
            `max_fisher`, `soft_weight`, `mean_fisher`.

    Returns:
        `param`, `exp_avg`, `exp_avg_sq`, and `max_exp_avg_sq` and `fisher` where given, each in its dtype.
    """
    g = _pulled(param, grad, maximize, **steering)
    result = {"exp_avg": betas[0] * exp_avg + (1 - betas[0]) * g}
    result["exp_avg_sq"] = v = betas[1] * exp_avg_sq + (1 - betas[1]) * g.square()
    if max_exp_avg_sq is not None:
        result["max_exp_avg_sq"] = v = torch.maximum(max_exp_avg_sq, v)
    m_hat, v_hat = result["exp_avg"] / (1 - betas[0] ** step), v / (1 - betas[1] ** step)
    new = (1 - lr * weight_decay) * param - lr * m_hat / (v_hat.sqrt() + eps)
    result = {name: value.to(exp_avg.dtype) for name, value in result.items()}
    return result | _steered(param, new, grad, **steering)


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first_step: bool = False,
    maximize: bool = False,
    **steering: Any,
) -> dict[str, Tensor]:
    r"""One step of SGD, `theta' = theta - lr b`, steered by a Fisher.

    Args:
        param: Of any shape.
        grad: Its gradient.
        momentum_buffer: b before the step; None without momentum, where b is g.
        lr: Learning rate.
        momentum: `b = momentum b + (1 - dampening) g`.
        dampening: See there.
        weight_decay: `g = grad + weight_decay theta`.
        nesterov: `g + momentum b` takes the place of b.
        first_step: `b = g`.
        maximize: Negate the gradient.
        **steering: As for `adamw`.

    Returns:
        `param`, and `momentum_buffer` and `fisher` where given, each in its dtype.
    """
    g = _pulled(param, grad, maximize, **steering) + weight_decay * param
    result = {}
    if momentum_buffer is not None:
        b = g if first_step else momentum * momentum_buffer + (1 - dampening) * g
        g = g + momentum * b if nesterov else b
        result["momentum_buffer"] = b.to(momentum_buffer.dtype)
    return result | _steered(param, param - lr * g, grad, **steering)


def _pulled(
    param: Tensor, grad: Tensor, maximize: bool, *, fisher: Any = None, anchor: Any = None, ewc_lambda: float = 0.0, **_: Any
) -> Tensor:  # fmt: skip
    grad = -grad if maximize else grad
    return grad + ewc_lambda * fisher * (param - anchor) if ewc_lambda else grad


def _steered(
    param: Tensor, new: Tensor, grad: Tensor, *, fisher: Any = None, movable: Any = None, fisher_decay: float | None = None,
    min_fisher: float | None = None, max_fisher: float | None = None, soft_weight: float = 0.0, mean_fisher: Any = None,
    **_: Any,
) -> dict[str, Tensor]:  # fmt: skip
    if soft_weight:
        new = param + (new - param) / (1 + soft_weight * fisher / mean_fisher)
    for condition in (
        movable,
        None if min_fisher is None else fisher >= min_fisher,
        None if max_fisher is None else fisher < max_fisher,
    ):
        new = new if condition is None else torch.where(condition, new, param)
    result = {"param": new.to(param.dtype)}
    if fisher is not None:
        result["fisher"] = fisher if fisher_decay is None else (fisher_decay * fisher + grad.square()).to(fisher.dtype)
    return result
