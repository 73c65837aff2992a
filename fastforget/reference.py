"""The oracle: every operation in plain eager PyTorch, in the dtype it is given, with no trick and no chunking.

Tests compare the fast implementations with these functions in float64. They are meant to be read beside the equation,
not to be fast: `linear_cross_entropy` here builds the full `[S, V]` logits.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["linear_cross_entropy"]


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    ignore_index: int = -100,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Cross-entropy of a linear head, `z = softcap * tanh(scale * (x W^T + b) / softcap)`, with all logits in memory.

    Args:
        input: `[S, H]` hidden states.
        linear_weight: `[V, H]` head.
        target: `[S]` int64 labels; `ignore_index` rows give 0 and False.
        linear_bias: `[V]`.
        softcap: Bound of the logits; None for no bound.
        scale: Factor of the logits, applied before the softcap.
        ignore_index: Label that is no target.

    Returns:
        `loss` `[S]` = lse - z[target], `hit` `[S]` bool (target is the argmax, ties to the lowest index) and `lse` `[S]`,
        the log-sum-exp of every row; in the input's dtype.
    """
    logits = torch.nn.functional.linear(input, linear_weight, linear_bias) * scale  # [S, V]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, dim=1)
    valid = target != ignore_index
    label = torch.where(valid, target, 0)
    loss = torch.where(valid, lse - logits.gather(1, label[:, None])[:, 0], 0)
    # torch.max leaves ties open in its contract, so the lowest index is asked for explicitly.
    index = torch.arange(logits.shape[1], device=logits.device)
    argmax = torch.where(logits == logits.amax(1, keepdim=True), index, logits.shape[1]).amin(1)
    return loss, valid & (argmax == target), lse
