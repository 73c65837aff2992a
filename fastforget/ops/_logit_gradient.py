"""The gradient of the logits, block by block of the vocabulary, for whatever is summed from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastforget.ops import _linear_cross_entropy_torch as head
from fastforget.ops._dispatch import resolve

__all__ = ["logit_gradient_blocks"]

# Elements of one block: 8 MB of float32 on a CPU, 128 MB of bfloat16 on a GPU.
_TORCH_ELEMENTS, _TRITON_ELEMENTS = 2**21, 2**26
_FEWEST, _TORCH_MOST, _TRITON_MOST = 128, 1024, 8192  # columns


def logit_gradient_blocks(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    label: Tensor,
    lse: Tensor,
    grad_loss: Tensor,
    softcap: float,
    scale: float,
    impl: str,
    grad_input: Tensor,
) -> Iterator[tuple[slice, Tensor]]:
    """`dz_sv = g_s (exp(z_sv - lse_s) - [v = label_s]) dz/d(x W^T + b)`, for blocks of v.

    Args:
        input: `[S, H]`.
        weight: `[V, H]`.
        bias: `[V]` or None.
        label: `[S]` int64 in `[0, V)`.
        lse: `[S]`.
        grad_loss: `[S]`.
        softcap: 0 for none.
        scale: Factor of the logits.
        impl: "auto", "triton" or "torch".
        grad_input: `[S, H]` in the accumulators' dtype; `dz W` of every block is added.

    Yields:
        The block's columns and dz `[S, C]` of all rows, in the input's dtype (float32 on the torch path for lower ones).
    """
    rows = input.shape[0]
    triton = resolve(impl, input.device)[0] == "triton"
    if triton:
        from fastforget_kernels.add_product import add_product_
        from fastforget_kernels.linear_cross_entropy import linear_cross_entropy_grad_logits as grad_logits

        elements, most, row_block = _TRITON_ELEMENTS, _TRITON_MOST, max(rows, 1)
    else:
        grad_logits, add_product_ = head.grad_logits, head.add_product_
        elements, most, row_block = _TORCH_ELEMENTS, _TORCH_MOST, 1024
    width = min(most, max(_FEWEST, elements // max(rows, 1) // _FEWEST * _FEWEST))
    for v in range(0, weight.shape[0], width):
        columns = slice(v, min(v + width, weight.shape[0]))
        weight_block, bias_block = weight[columns], None if bias is None else bias[columns]
        parts = []
        for s in range(0, rows, row_block):
            r = slice(s, s + row_block)
            block = (label[r] - v, lse[r], grad_loss[r], grad_loss[r])
            with torch.cuda.device_of(input):
                part = grad_logits(input[r], weight_block, bias_block, *block, softcap, scale)  # [R, C]
                add_product_(grad_input[r], part, weight_block)
            parts.append(part)
        yield columns, (parts[0] if len(parts) == 1 else torch.cat(parts)).to(input.dtype)
