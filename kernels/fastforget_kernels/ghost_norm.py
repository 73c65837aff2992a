r"""Norms of the per-example gradients of a linear layer's weight from products of tokens: cheap where tokens are few.

    ||sum_{t in b} d_t a_t^T||^2 = sum_{t, u in b} (a_t . a_u) (d_t . d_u)

S tokens, B examples, O x I the weight, n_b tokens in example b. A program owns a block of an example's tokens and walks over
the blocks at and after it; the tile of products of activations and that of output gradients meet in registers.

Flops sum_b n_b^2 (I + O), about; `example_gradients` needs 2 S O I.

References: Goodfellow, arXiv 1510.01799; Li et al., arXiv 2110.05679, section 4 (ghost clipping).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps and num_stages, which are no parameters of the kernel's Python function, and plain values for
# constants; and a helper of a kernel is called by the compiler: in Python the call raises, so that pyright sees no result)

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.arithmetic import dot
from fastforget_kernels.device import cdiv

__all__ = ["ghost_norm_", "ghost_settings"]


@triton.jit
def _gram(
    x_ptr, start_t, start_u, tokens_t, tokens_u, features, stride_x_s, stride_x_f,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Products of BLOCK_T tokens with BLOCK_T tokens over all features; zero past the last token."""
    offs_t = tl.arange(0, BLOCK_T)
    offs_f = tl.arange(0, BLOCK_F)
    t_ptr = x_ptr + start_t.to(tl.int64) * stride_x_s
    u_ptr = x_ptr + start_u.to(tl.int64) * stride_x_s
    acc = tl.zeros((BLOCK_T, BLOCK_T), dtype=tl.float32)
    for f0 in range(0, features, BLOCK_F):
        mask_f = offs_f < features - f0
        t_mask = (offs_t[:, None] < tokens_t) & mask_f[None, :]
        u_mask = (offs_t[None, :] < tokens_u) & mask_f[:, None]
        t = tl.load(t_ptr + offs_t[:, None] * stride_x_s + offs_f[None, :] * stride_x_f, mask=t_mask, other=0.0)
        u = tl.load(u_ptr + offs_t[None, :] * stride_x_s + offs_f[:, None] * stride_x_f, mask=u_mask, other=0.0)
        acc = dot(t, u, acc, PRECISION)
        t_ptr += BLOCK_F * stride_x_f
        u_ptr += BLOCK_F * stride_x_f
    return acc


@triton.jit(do_not_specialize=["examples"])
def _ghost_norm_kernel(
    square_norm_ptr, a_ptr, d_ptr, offsets_ptr, outputs, inputs, examples, stride_a_s, stride_a_i, stride_d_s, stride_d_o,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    start = tl.load(offsets_ptr + b)
    end = tl.load(offsets_ptr + b + 1)
    first = start + tl.program_id(1) * BLOCK_T
    total = 0.0
    for block in range(tl.cdiv(tl.maximum(end - first, 0), BLOCK_T)):
        other = first + block * BLOCK_T
        gram_a = _gram(
            a_ptr, first, other, end - first, end - other, inputs, stride_a_s, stride_a_i, PRECISION, BLOCK_T, BLOCK_F
        )  # fmt: skip
        gram_d = _gram(
            d_ptr, first, other, end - first, end - other, outputs, stride_d_s, stride_d_o, PRECISION, BLOCK_T, BLOCK_F
        )  # fmt: skip
        total += tl.sum(gram_a * gram_d) * tl.where(other == first, 1.0, 2.0)  # symmetric: each pair of blocks once
    tl.store(square_norm_ptr + tl.program_id(1).to(tl.int64) * examples + b, total)


def ghost_settings(dtype: torch.dtype, allow_tf32: bool, *, contiguous: bool = True) -> dict[str, Any]:
    """Constants and launch options of `ghost_norm_`; the compiler reports no spill on any architecture.

    Args:
        dtype: Of activations and output gradients.
        allow_tf32: For float32.
        contiguous: The rows of both have unit stride.

    Returns:
        PRECISION, BLOCK_T tokens a side, BLOCK_F features a step, num_warps and num_stages.
    """
    # One address an element, where rows are not contiguous: wider blocks spill.
    block = 32 if dtype == torch.float32 and not contiguous else 64
    depth = 16 if dtype == torch.float32 else 64 if contiguous else 32
    stages = 3 if contiguous else 2  # 2 spills with float32 on sm_80 under Triton 3.6, 3 with strides on sm_100
    precision = "tf32" if allow_tf32 else "ieee"
    return {"PRECISION": precision, "BLOCK_T": block, "BLOCK_F": depth, "num_warps": 8, "num_stages": stages}


def ghost_norm_(
    square_norm: Tensor, activations: Tensor, grad_outputs: Tensor, offsets: Tensor, longest: int, allow_tf32: bool
) -> None:
    """Write `||G_b||^2 = sum_tu (a_t . a_u) (d_t . d_u)`; flops about sum_b n_b^2 (I + O).

    Args:
        square_norm: `[B]` float32, written.
        activations: `[S, I]` float32, bfloat16 or float16, any strides.
        grad_outputs: `[S, O]`, same dtype.
        offsets: `[B + 1]` int32.
        longest: Most tokens of an example.
        allow_tf32: For float32.
    """
    contiguous = activations.stride(1) == grad_outputs.stride(1) == 1
    settings = ghost_settings(activations.dtype, allow_tf32, contiguous=contiguous)
    examples, blocks = square_norm.shape[0], cdiv(longest, settings["BLOCK_T"])
    if not (examples and blocks):
        square_norm.zero_()
        return
    partial = square_norm.new_empty(blocks, examples)
    _ghost_norm_kernel[(examples, blocks)](
        partial, activations, grad_outputs, offsets, grad_outputs.shape[1], activations.shape[1], examples,
        *activations.stride(), *grad_outputs.stride(), **settings,
    )  # fmt: skip
    torch.sum(partial, 0, out=square_norm)
