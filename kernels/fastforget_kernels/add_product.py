r"""A product added to a float32 tensor in memory, which cuBLAS does not offer for 16-bit factors.

    out_mn += sum_k a_mk b_kn

Flops 2 M N K; bytes (M + N) K factors + 8 M N. Any strides of the factors, so that both dz W and dz^T x of a head's
backward are this kernel.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# (a launch passes num_warps and num_stages, which are no parameters of the kernel's Python function; and a helper of a
# kernel is called by the compiler: in Python the call raises, so that pyright sees no result)

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.arithmetic import dot, grouped_tile
from fastforget_kernels.device import cdiv, device_properties

__all__ = ["ProductSettings", "add_product_", "product_settings"]


@dataclass(frozen=True)
class ProductSettings:
    """Launch settings of `add_product_`."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


def product_settings(dtype: torch.dtype, arch: str) -> ProductSettings:
    """Launch settings of `add_product_`.

    Args:
        dtype: Of the factors.
        arch: As for `tile_settings`.

    Returns:
        The settings.
    """
    if dtype == torch.float32:
        return ProductSettings(64, 64, 32, 8, 8, 2)
    if arch.startswith("gfx"):
        return ProductSettings(128, 128, 32, 8, 8, 2)
    if arch == "sm_80":
        return ProductSettings(128, 128, 32, 8, 8, 4)  # 64 deep spills 16 bytes where the first factor is transposed
    return ProductSettings(128, 128, 64, 8, 8, 3)  # at most 255 registers; 128 x 256 spills 200 to 500 bytes


@triton.jit
def _add_product_kernel(
    out_ptr, a_ptr, b_ptr, M, N, K, stride_out_m, stride_a_m, stride_a_k, stride_b_k, stride_b_n,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    row_block, column_block = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP_M)
    m0 = row_block * BLOCK_M
    n0 = column_block * BLOCK_N
    offs_m = m0 + tl.arange(0, BLOCK_M)
    offs_n = n0 + tl.arange(0, BLOCK_N)
    rows = tl.minimum(offs_m, M - 1).to(tl.int64)
    columns = tl.minimum(offs_n, N - 1).to(tl.int64)
    offs_k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + rows[:, None] * stride_a_m + offs_k.to(tl.int64)[None, :] * stride_a_k
    b_ptrs = b_ptr + offs_k.to(tl.int64)[:, None] * stride_b_k + columns[None, :] * stride_b_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k0 in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs, mask=offs_k[None, :] < K - k0, other=0.0)
        b = tl.load(b_ptrs, mask=offs_k[:, None] < K - k0, other=0.0)
        acc = dot(a, b, acc, PRECISION)
        a_ptrs += BLOCK_K * stride_a_k
        b_ptrs += BLOCK_K * stride_b_k
    # A 64-bit start and 32-bit offsets: a tile of 64-bit pointers takes half of the registers.
    out_ptr += m0.to(tl.int64) * stride_out_m + n0
    out_ptrs = out_ptr + tl.arange(0, BLOCK_M)[:, None] * stride_out_m + tl.arange(0, BLOCK_N)[None, :]
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    tl.store(out_ptrs, tl.load(out_ptrs, mask=mask, other=0.0) + acc, mask=mask)


def add_product_(out: Tensor, a: Tensor, b: Tensor) -> None:
    """`out += a b` with a float32 accumulator in memory, which cuBLAS does not offer for 16-bit factors.

    Args:
        out: `[M, N]` float32, rows contiguous; changed in place.
        a: `[M, K]`, any strides.
        b: `[K, N]`, same dtype, any strides.
    """
    (m, k), n = a.shape, b.shape[1]
    settings = product_settings(a.dtype, device_properties(a.device)[0])
    _add_product_kernel[(cdiv(m, settings.block_m) * cdiv(n, settings.block_n),)](
        out, a, b, m, n, k, out.stride(0), *a.stride(), *b.stride(), PRECISION="ieee",
        BLOCK_M=settings.block_m, BLOCK_N=settings.block_n, BLOCK_K=settings.block_k, GROUP_M=settings.group_m,
        num_warps=settings.num_warps, num_stages=settings.num_stages,
    )  # fmt: skip
