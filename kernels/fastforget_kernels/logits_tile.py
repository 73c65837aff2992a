"""One tile of a linear head's logits: what the kernels that walk over the vocabulary share, and its launch settings.

Letters: S rows, H hidden, V vocabulary.
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

from fastforget_kernels.arithmetic import dot, tanh

__all__ = ["TileSettings", "logits_tile", "tile_options", "tile_settings", "unit_stride"]


@dataclass(frozen=True)
class TileSettings:
    """Launch settings of the kernels that compute a tile of logits."""

    block_s: int
    block_v: int
    block_h: int
    group_s: int  # row blocks that run beside each other: they share the tiles of the weight in the L2 cache
    num_warps: int
    num_stages: int


def tile_settings(
    dtype: torch.dtype,
    hidden: int,
    arch: str,
    *,
    contiguous: bool = True,
    stores_tile: bool = False,
    samples: bool = False,
) -> TileSettings:
    """Launch settings of the two kernels that compute a tile of logits.

    Args:
        dtype: Of input and weight.
        hidden: H.
        arch: "sm_80", "sm_90", "sm_100" or an AMD name such as "gfx942".
        contiguous: The rows of both have unit stride.
        stores_tile: For the kernel that writes the tile, not only sums over its rows.
        samples: For the kernel that draws labels: it has a tile of arrival times beside that of the logits.

    Returns:
        The settings. The reasons given are the compiler's reports; none is tuned on a device yet.
    """
    if dtype == torch.float32:
        return TileSettings(
            64, 64, 16, 32, 8, 3
        )  # on the ordinary cores; 32 deep, or 2 stages, spills 8 bytes somewhere
    if arch.startswith("gfx"):
        return TileSettings(128, 128, 32, 32, 8, 2)  # 64 KB of LDS
    aligned = hidden % 64 == 0 and contiguous
    if samples and not (arch == "sm_90" and aligned):
        return TileSettings(128, 64, 64 if aligned else 32, 32, 8, 3)  # 128 x 128 spills 24 to 330 bytes
    if not aligned:
        return TileSettings(128, 128, 32, 32, 8, 3)  # loads need masks or many addresses: wider tiles spill
    if arch == "sm_80":
        return TileSettings(128, 128, 64, 32, 8, 3)  # 128 x 256 spills under mma.sync
    if arch == "sm_100" or stores_tile or samples:
        return TileSettings(
            128, 128, 64, 32, 8, 4
        )  # 128 x 256 spills where the accumulator changes its layout as a whole
    return TileSettings(128, 256, 64, 32, 8, 3)  # 255 registers, no spill, 144 KB; 128 accumulators a thread


@triton.jit
def logits_tile(
    input_ptr, weight_ptr, bias_ptr, s0, v0, S, H, V,
    stride_input_s, stride_input_h, stride_weight_v, stride_weight_h, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Logits of rows s0.. and vocabulary v0..; rows and columns past the end repeat the last one."""
    # 64-bit where a tile starts, 32-bit inside it: S x H and V x H may pass 2^31, a tile does not.
    offs_s = tl.minimum(tl.arange(0, BLOCK_S), S - 1 - s0)
    offs_v = tl.minimum(tl.arange(0, BLOCK_V), V - 1 - v0)
    offs_h = tl.arange(0, BLOCK_H)
    input_ptr += s0.to(tl.int64) * stride_input_s
    weight_ptr += v0.to(tl.int64) * stride_weight_v
    input_ptrs = input_ptr + offs_s[:, None] * stride_input_s + offs_h[None, :] * stride_input_h
    weight_ptrs = weight_ptr + offs_v[None, :] * stride_weight_v + offs_h[:, None] * stride_weight_h
    z = tl.zeros((BLOCK_S, BLOCK_V), dtype=tl.float32)
    for h0 in range(0, H, BLOCK_H):
        if EVEN_H:
            x = tl.load(input_ptrs)
            w = tl.load(weight_ptrs)
        else:
            x = tl.load(input_ptrs, mask=offs_h[None, :] < H - h0, other=0.0)
            w = tl.load(weight_ptrs, mask=offs_h[:, None] < H - h0, other=0.0)
        z = dot(x, w, z, PRECISION)
        input_ptrs += BLOCK_H * stride_input_h
        weight_ptrs += BLOCK_H * stride_weight_h
    if HAS_BIAS:
        z += tl.load(bias_ptr + v0 + offs_v).to(tl.float32)[None, :]
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * tanh(z / softcap)
    return z


def unit_stride(input: Tensor, weight: Tensor) -> bool:
    """Whether the rows of both are contiguous."""
    return input.stride(1) == weight.stride(1) == 1


def tile_options(settings: TileSettings, input: Tensor, bias: Tensor | None, softcap: float) -> dict[str, object]:
    """The compile-time arguments and launch options that follow from the settings and the inputs."""
    return {
        "HAS_BIAS": bias is not None,
        "HAS_SOFTCAP": softcap > 0,
        "EVEN_H": input.shape[1] % settings.block_h == 0,
        "PRECISION": "ieee",
        "BLOCK_S": settings.block_s,
        "BLOCK_V": settings.block_v,
        "BLOCK_H": settings.block_h,
        "GROUP_S": settings.group_s,
        "num_warps": settings.num_warps,
        "num_stages": settings.num_stages,
    }
