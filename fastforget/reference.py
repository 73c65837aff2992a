"""The oracle: every operation in plain eager PyTorch, in the dtype it is given, with no trick and no chunking.

Tests compare the fast implementations with these functions in float64. They are meant to be read beside the equation,
not to be fast: `linear_cross_entropy` here builds the full `[S, V]` logits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "example_gradients",
    "fisher_accumulate",
    "gradient_products",
    "gumbel_noise",
    "linear_cross_entropy",
    "square_accumulate",
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
