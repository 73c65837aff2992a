r"""Selective synaptic dampening of many tensors in one launch a combination of dtypes, and the check of its inputs.

    theta = theta min(lam F_retain / F_forget, 1)   where F_forget > alpha F_retain

The ratio is tested before it is taken, so that nothing is divided by 0. Flops 5 an element; bytes 8 + twice the parameter's
4 or 2 an element, 8 where entries are only counted, 8 for the check.

References: Foster, Schoepf and Brintrup, arXiv 2308.07707.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps, which is no parameter of the kernel's Python function, and plain values for constants)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.arithmetic import cast
from fastforget_kernels.tensor_lists import (
    BLOCK,
    CHUNK,
    NUM_WARPS,
    TRITON_DTYPE,
    address,
    locate,
    place,
    tables,
)  # fmt: skip

__all__ = ["count_invalid_", "dampen_"]


@triton.jit
def _dampen_block(counts, pointers, offs, mask, alpha, lam, WRITE: tl.constexpr):
    param_ptr, forget_ptr, retain_ptr = pointers
    forget = tl.load(forget_ptr + offs, mask=mask)
    retain = tl.load(retain_ptr + offs, mask=mask)
    chosen = forget > alpha * retain
    if mask is not None:
        chosen &= mask
    if WRITE:
        param = tl.load(param_ptr + offs, mask=mask)
        factor = tl.minimum(lam * retain / tl.where(chosen, forget, 1.0), 1.0)
        # Selected in the parameter's own dtype: a masked store would be narrow.
        after = tl.where(chosen, cast(param.to(tl.float32) * factor, param.dtype), param)
        tl.store(param_ptr + offs, after, mask=mask)
    return counts + chosen.to(tl.int32)


@triton.jit(do_not_specialize=["tensors", "bisections"])
def _dampen_kernel(
    counts_ptr, table_ptr, tensors, bisections, alpha, lam,
    DTYPE: tl.constexpr, WRITE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Lists of the table: parameter, Fisher to forget, Fisher to retain."""
    tensor, start, size = locate(table_ptr, tensors, bisections, CHUNK)
    pointers = (
        address(table_ptr, tensors, tensor, 0, DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 1, tl.float32, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 2, tl.float32, ALIGNED) + start,
    )
    counts = tl.zeros([BLOCK], tl.int32)
    # No mask but at the end: a mask of unknown alignment would make the accesses narrow.
    full = size // BLOCK
    for block in range(full):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        counts = _dampen_block(counts, pointers, offs, None, alpha, lam, WRITE)
    offs = full * BLOCK + tl.arange(0, BLOCK)
    counts = _dampen_block(counts, pointers, offs, offs < size, alpha, lam, WRITE)
    tl.atomic_add(counts_ptr + place(table_ptr, tensors, tensor, 3), tl.sum(counts).to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["tensors", "bisections"])
def _count_invalid_kernel(
    counts_ptr, table_ptr, tensors, bisections, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    tensor, start, size = locate(table_ptr, tensors, bisections, CHUNK)
    ptr = address(table_ptr, tensors, tensor, 0, tl.float32, ALIGNED) + start
    counts = tl.zeros([BLOCK], tl.int32)
    full = size // BLOCK
    for block in range(full):
        values = tl.load(ptr + block * BLOCK + tl.arange(0, BLOCK))
        counts += 1 - ((values >= 0) & (values < float("inf"))).to(tl.int32)
    offs = full * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(ptr + offs, mask=offs < size, other=0.0)
    counts += 1 - ((values >= 0) & (values < float("inf"))).to(tl.int32)
    found = tl.sum(counts)
    tl.atomic_add(counts_ptr + place(table_ptr, tensors, tensor, 1), found.to(tl.int64), mask=found > 0, sem="relaxed")


def dampen_(
    counts: Tensor, params: Sequence[Tensor], forget: Sequence[Tensor], retain: Sequence[Tensor], alpha: float,
    lam: float, *, write: bool,
) -> None:  # fmt: skip
    """Dampen in place, in memory order; allocates the table, 48 bytes a tensor.

    Args:
        counts: `[n]` int64; the number of dampened entries of each tensor is added.
        params: float32, bfloat16 or float16, dense, on one device; changed in place.
        forget: float32, with the same layout.
        retain: The same.
        alpha: Least ratio of the Fishers that is dampened, exclusive.
        lam: Factor of the ratio that parameters are multiplied by.
        write: Whether parameters are read and changed; else entries are only counted.
    """
    for table in tables(params, forget, retain):
        _dampen_kernel[(table.chunks,)](
            counts, table.entries, table.tensors, table.bisections, alpha, lam, DTYPE=TRITON_DTYPE[table.dtypes[0]],
            WRITE=write, ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip


def count_invalid_(counts: Tensor, fishers: Sequence[Tensor]) -> None:
    """Add how many entries of each tensor are negative, infinite or NaN; allocates the table, 32 bytes a tensor.

    Args:
        counts: `[n]` int64.
        fishers: float32, dense, on one device.
    """
    for table in tables(fishers):
        _count_invalid_kernel[(table.chunks,)](
            counts, table.entries, table.tensors, table.bisections, ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )  # fmt: skip
