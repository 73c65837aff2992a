r"""What a model makes of an example: the mean of its last hidden states.

h_j = 1/T_j sum_t x_jt,      x the input of the model's head, over the T_j attended tokens of example j
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastforget._head import eval_mode, find_head, swapped_forward, verified_transform
from fastforget.perplexity import check_batch, model_forward, pack_rows

__all__ = ["example_representations"]


class _HeadInput:
    """Stands in for the head's forward: keeps its input, gives a token of logits that nobody reads."""

    hidden: Tensor | None = None

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.hidden = hidden
        return hidden.new_zeros(*hidden.shape[:-1], 1)


@torch.no_grad()
def example_representations(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None, *, batch_size: int = 32
) -> Tensor:
    """The mean over attended tokens of a causal language model's last hidden state, before its head.

    The value is that of the example alone: padding on either side changes nothing. The model runs in eval mode, and its mode
    is restored; logits are never built.

    Args:
        model: As for `log_perplexity`; PEFT's adapters are applied, where they are enabled.
        input_ids: `[N, T]` int64, on any device.
        attention_mask: `[N, T]`, nonzero where a token is attended; None for everywhere.
        batch_size: Examples of one forward pass.

    Returns:
        `[N, H]` float32 on the CPU; zeros for an example without tokens.

    Raises:
        ValueError: An argument has a wrong shape or value, or the model is not supported by `log_perplexity` either.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}; leave it at its default")
    head = find_head(model)
    check_batch(model, input_ids, attention_mask, None, None)
    device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)  # offloaded ones are
    means = []
    with eval_mode(model):
        for start in range(0, len(input_ids), batch_size):
            ids = input_ids[start : start + batch_size].to(device)
            mask = torch.ones_like(ids) if attention_mask is None else attention_mask[start : start + batch_size]
            means.append(_means(model, head, ids, mask.to(device) != 0).cpu())
    return torch.cat(means)


def _means(model: nn.Module, head: nn.Module, input_ids: Tensor, attended: Tensor) -> Tensor:
    """`[B, H]` float32 of a batch `[B, T]`."""
    rows = pack_rows(input_ids, attended, None, None)
    verified_transform(
        model, head, rows.input_ids, lambda *batch: model_forward(model, *batch), "torch"
    )  # it is causal
    capture = _HeadInput()
    with swapped_forward(head, capture):
        model_forward(model, rows.input_ids)
    hidden = capture.hidden
    if hidden is None or hidden.shape[:-1] != rows.input_ids.shape:
        raise ValueError(
            f"model: expected {type(model).__name__}'s forward to call its output embedding on hidden states of shape "
            f"{(*rows.input_ids.shape, 'H')}, got {None if hidden is None else tuple(hidden.shape)}; use another model"
        )
    counts = attended.sum(1, keepdim=True).to(hidden.device)
    own = torch.arange(hidden.shape[1], device=hidden.device) < counts  # [B, T]
    return hidden.float().masked_fill(~own[:, :, None], 0.0).sum(1) / counts.clamp(min=1)
