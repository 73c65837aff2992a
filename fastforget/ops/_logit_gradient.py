"""The gradient of the logits, block by block of the vocabulary, for whatever is summed from it.

Either from the exponentials that the forward kept, where these are few (`ExponentialBlocks`), or recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastforget.ops import _linear_cross_entropy_torch as head
from fastforget.ops._dispatch import resolve

__all__ = ["ExponentialBlocks", "logit_gradient_blocks"]

# Elements of one block: 8 MB of float32 on a CPU, 128 MB of bfloat16 on a GPU.
_TORCH_ELEMENTS, _TRITON_ELEMENTS = 2**21, 2**26
_KEPT_BYTES = 2**26  # of exponentials on the torch path
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


class ExponentialBlocks:
    """A head's loss with `exp(z - max)` of every block kept, so that its backward needs neither product nor exponential.

    Args:
        input: `[S, H]`.
        weight: `[V, H]`.
        bias: `[V]` or None.
        label: `[S]` int64 in `[0, V)`.
        scale: Factor of the logits.
    """

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, label: Tensor, scale: float) -> None:
        self.label, self.scale = label, scale
        self.input_dtype = input.dtype
        x = input.to(head.accumulator(input.dtype))
        running_max = x.new_full((len(x),), -torch.inf)  # [S]
        running_sum, target_logit = torch.zeros_like(running_max), torch.full_like(running_max, torch.nan)
        self.blocks: list[tuple[int, Tensor, Tensor]] = []
        """First column, exponentials `[S, C]`, and the maximum `[S]` that was subtracted before."""
        for v in range(0, weight.shape[0], _TORCH_MOST):
            columns = slice(v, v + _TORCH_MOST)
            z = head.logits(x, weight[columns], None if bias is None else bias[columns], 0.0, scale)
            here = ((label >= v) & (label < v + z.shape[1])).nonzero()[:, 0]
            target_logit[here] = z[here, label[here] - v]
            new_max = running_max.maximum(z.amax(1))
            shift = new_max.masked_fill(new_max == -torch.inf, 0.0)  # a row of -inf so far: exp(-inf - 0) = 0
            z.sub_(shift[:, None]).exp_()
            running_sum = running_sum * (running_max - shift).exp_() + z.sum(1)
            running_max = new_max
            self.blocks.append((v, z, shift))
        self.lse = running_max + running_sum.log()
        self.loss = self.lse - target_logit

    @staticmethod
    def fit(input: Tensor, weight: Tensor, softcap: float | None, impl: str) -> bool:
        """Whether the exponentials are few enough to be kept."""
        few = input.shape[0] * weight.shape[0] * head.accumulator(input.dtype).itemsize <= _KEPT_BYTES
        return few and not softcap and resolve(impl, input.device)[0] == "torch"

    def gradients(self, weight: Tensor, grad_loss: Tensor, grad_input: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """As `logit_gradient_blocks`, once: the exponentials become the gradients."""
        rows = torch.arange(len(self.label), device=self.label.device)
        while self.blocks:
            v, dz, shift = self.blocks.pop(0)
            columns = slice(v, v + dz.shape[1])
            dz *= ((shift - self.lse).exp_() * grad_loss)[:, None]
            here = (self.label >= v) & (self.label < columns.stop)
            dz[rows[here], self.label[here] - v] -= grad_loss[here]
            if self.scale != 1.0:
                dz *= self.scale
            head.add_product_(grad_input, dz, weight[columns])
            yield columns, dz.to(self.input_dtype)
