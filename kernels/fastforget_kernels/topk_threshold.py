r"""Counts of one digit of the bits of all elements of many tensors: a pass of the radix selection of the k-th largest.

    counts[d] = number of elements with bits >> (shift + width) = prefix and (bits >> shift) mod 2^width = d

`bits` are those of the element in float32, with -0.0 as 0.0; among positive numbers their order is that of the values, among
negative ones the reverse. Digits have six bits, so that six passes find a float32. A histogram of 2^D bins costs 2^(D - 5)
population counts an element, at half a dozen cycles each: sm_90's assembly has 64 for eleven bits, which would take twenty
times as long as the element's way from memory, and two for six bits, which take about twice as long.

Bytes an element and pass: 4 or 2. Integers only, so that the order of additions does not matter.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps, which is no parameter of the kernel's Python function, and plain values for constants)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.tensor_lists import BLOCK, CHUNK, TRITON_DTYPE, Table, address, locate

__all__ = ["DIGITS", "count_digits_"]

DIGITS = (6, 6, 6, 6, 6, 2)  # bits of each pass, the highest first
BINS = 64
NUM_WARPS = 4  # 16 elements a thread, so that a warp's share of merging the histograms is spread over many


@triton.jit
def _count_block(counts, nans, ptrs, mask, prefix, shift, width, FIRST: tl.constexpr, BINS: tl.constexpr):
    values = tl.load(ptrs, mask=mask)
    if values.dtype == tl.bfloat16:  # as the hardware does it; the interpreter's cast loses subnormal numbers
        values = (values.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    values = values.to(tl.float32)
    bits = (values + 0.0).to(tl.uint32, bitcast=True)  # -0.0 + 0.0 = 0.0
    digits = ((bits >> shift) & ((1 << width) - 1)).to(tl.int32)
    if FIRST:
        nan = values != values
        if mask is not None:
            nan &= mask
        nans += nan.to(tl.int32)
        counts += tl.histogram(digits, BINS, mask=mask)
    else:
        candidates = (bits >> (shift + width)) == prefix
        if mask is not None:
            candidates &= mask
        if tl.max(candidates.to(tl.int32)) != 0:  # few blocks hold any in the last passes
            counts += tl.histogram(digits, BINS, mask=candidates)
    return counts, nans


@triton.jit(do_not_specialize=["tensors", "bisections", "prefix", "shift", "width"])
def _count_digits_kernel(
    counts_ptr, table_ptr, tensors, bisections, prefix, shift, width,
    DTYPE: tl.constexpr, FIRST: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
    BINS: tl.constexpr,
):  # fmt: skip
    tensor, start, size = locate(table_ptr, tensors, bisections, CHUNK)
    ptr = address(table_ptr, tensors, tensor, 0, DTYPE, ALIGNED) + start
    prefix = prefix.to(tl.uint32)
    counts = tl.zeros([BINS], tl.int32)
    nans = tl.zeros([BLOCK], tl.int32)
    full = size // BLOCK
    for block in range(full):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        counts, nans = _count_block(counts, nans, ptr + offs, None, prefix, shift, width, FIRST, BINS)
    offs = full * BLOCK + tl.arange(0, BLOCK)
    counts, nans = _count_block(counts, nans, ptr + offs, offs < size, prefix, shift, width, FIRST, BINS)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts_ptr + bins, counts.to(tl.int64), mask=counts > 0, sem="relaxed")
    if FIRST:
        found = tl.sum(nans)
        tl.atomic_add(counts_ptr + BINS, found.to(tl.int64), mask=found > 0, sem="relaxed")


def count_digits_(counts: Tensor, lists: Sequence[Table], prefix: int, shift: int, width: int) -> None:
    """Add the counts of one digit; allocates nothing.

    Args:
        counts: `[65]` int64, of each digit; the last place gets the number of NaNs where `shift + width` is 32.
        lists: Tables of one list of float32, bfloat16 or float16 tensors.
        prefix: The digits above, as one number; 0 where there are none.
        shift: Bits below the digit.
        width: Bits of the digit, at most 6.
    """
    for table in lists:
        _count_digits_kernel[(table.chunks,)](
            counts, table.entries, table.tensors, table.bisections, prefix, shift, width,
            DTYPE=TRITON_DTYPE[table.dtypes[0]], FIRST=shift + width == 32, ALIGNED=table.aligned, CHUNK=CHUNK,
            BLOCK=BLOCK, BINS=BINS, num_warps=NUM_WARPS,
        )  # fmt: skip
