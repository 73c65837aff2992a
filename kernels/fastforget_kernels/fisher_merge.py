r"""Many models merged into one with weights by their Fishers, in one launch a combination of dtypes.

    out = sum_j c_j F_j theta_j / sum_j c_j F_j,   F_j at least `floor`,   j = 1 .. J models

Flops 5 J an element; bytes J (4 + the parameter's 4 or 2) + the parameter's 4 or 2 an element.

References: Matena and Raffel, arXiv 2111.09832.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps, which is no parameter of the kernel's Python function, and plain values for constants)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.arithmetic import cast
from fastforget_kernels.tensor_lists import BLOCK, CHUNK, NUM_WARPS, TRITON_DTYPE, address, locate, tables

__all__ = ["fisher_merge_"]


@triton.jit
def _merge_block(
    table_ptr, tensors, tensor, weights_ptr, models, floor, start, offs, mask,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    numerator = tl.zeros([BLOCK], tl.float32)
    denominator = tl.zeros([BLOCK], tl.float32)
    for j in range(models):  # not unrolled: so many loads in flight need more registers than there are
        param_ptr = address(table_ptr + j * tensors, tensors, tensor, 1, DTYPE, ALIGNED) + start
        fisher_ptr = address(table_ptr + (models + j) * tensors, tensors, tensor, 1, tl.float32, ALIGNED) + start
        fisher = tl.maximum(tl.load(fisher_ptr + offs, mask=mask), floor, tl.PropagateNan.ALL)
        weight = tl.load(weights_ptr + j) * fisher
        denominator += weight
        numerator += weight * tl.load(param_ptr + offs, mask=mask).to(tl.float32)
    out_ptr = address(table_ptr, tensors, tensor, 0, DTYPE, ALIGNED) + start
    if mask is not None:
        denominator = tl.where(mask, denominator, 1.0)
    tl.store(out_ptr + offs, cast(numerator / denominator, DTYPE), mask=mask)


@triton.jit(do_not_specialize=["tensors", "bisections", "models"])
def _fisher_merge_kernel(
    table_ptr, tensors, bisections, weights_ptr, models, floor,
    DTYPE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists of the table: out, J models, J Fishers."""
    tensor, start, size = locate(table_ptr, tensors, bisections, CHUNK)
    # No mask but at the end: a mask of unknown alignment would make the accesses narrow.
    full = size // BLOCK
    for block in range(full):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        _merge_block(table_ptr, tensors, tensor, weights_ptr, models, floor, start, offs, None, DTYPE, ALIGNED, BLOCK)
    offs = full * BLOCK + tl.arange(0, BLOCK)
    _merge_block(
        table_ptr, tensors, tensor, weights_ptr, models, floor, start, offs, offs < size, DTYPE, ALIGNED, BLOCK
    )  # fmt: skip


def fisher_merge_(
    outs: Sequence[Tensor], models: Sequence[Sequence[Tensor]], fishers: Sequence[Sequence[Tensor]], weights: Tensor,
    floor: float,
) -> None:  # fmt: skip
    """Merge, elementwise in memory order; allocates the table, 32 + 16 J bytes a tensor.

    Args:
        outs: float32, bfloat16 or float16, dense, on one device; overwritten. May be one of the models' lists.
        models: J lists of tensors of the same dtypes and layouts.
        fishers: J lists of float32 tensors of the same layouts.
        weights: `[J]` float32, the c_j, on that device.
        floor: Least value of a Fisher.
    """
    for table in tables(outs, *models, *fishers):
        _fisher_merge_kernel[(table.chunks,)](
            table.entries, table.tensors, table.bisections, weights, len(models), floor,
            DTYPE=TRITON_DTYPE[table.dtypes[0]], ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
