r"""The square of many gradients added to many tensors, in one launch a dtype.

    fisher = decay fisher + scale grad^2

The tensors are cut into chunks, numbered through; a program owns one chunk and finds its tensor by bisecting the number of
each tensor's first chunk. Addresses, sizes and these numbers are one table of int64, made anew in every call, since storages
move; a table with an entry a chunk would take longer to make than the launch takes for a large model.

Flops 3 an element; bytes 8 + the gradient's 2 or 4 an element.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps, which is no parameter of the kernel's Python function, and plain values for constants)

from __future__ import annotations

import itertools

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.device import cdiv

__all__ = ["BLOCK", "CHUNK", "NUM_WARPS", "square_accumulate_"]

BLOCK = 2048  # elements a step: 8 a thread, two 16-byte accesses of float32
CHUNK = 16 * BLOCK  # elements of a program: the bisection is a few steps of latency against 16 of streaming
NUM_WARPS = 8
ALIGNMENT = 16  # bytes; tensors at other addresses go in a launch of their own, with narrow accesses


@triton.jit
def _accumulate_block(fisher_ptrs, grad_ptrs, mask, scale, decay, KEEP: tl.constexpr):
    grad = tl.load(grad_ptrs, mask=mask).to(tl.float32)
    squares = grad * grad * scale
    if KEEP:
        squares += tl.load(fisher_ptrs, mask=mask) * decay
    tl.store(fisher_ptrs, squares, mask=mask)


@triton.jit(do_not_specialize=["tensors", "bisections"])
def _square_accumulate_kernel(
    table_ptr, tensors, bisections, scale, decay,
    GRAD_DTYPE: tl.constexpr, KEEP: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of the table: address of fisher, address of gradient, elements, first chunk."""
    chunk = tl.program_id(0)
    low = chunk * 0
    high = low + tensors
    for _ in range(bisections):
        middle = (low + high) // 2
        here = tl.load(table_ptr + 3 * tensors + middle) <= chunk
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    fisher_address = tl.load(table_ptr + low)
    grad_address = tl.load(table_ptr + tensors + low)
    start = (chunk - tl.load(table_ptr + 3 * tensors + low)) * CHUNK  # 64-bit, since the table is
    size = tl.minimum(tl.load(table_ptr + 2 * tensors + low) - start, CHUNK).to(tl.int32)
    fisher_ptr = fisher_address.to(tl.pointer_type(tl.float32))
    grad_ptr = grad_address.to(tl.pointer_type(GRAD_DTYPE))
    if ALIGNED:  # 16-byte accesses
        fisher_ptr = tl.multiple_of(fisher_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
    fisher_ptr += start
    grad_ptr += start
    # No mask but at the end: a mask of unknown alignment would make the accesses narrow again.
    full = size // BLOCK
    for block in range(full):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        _accumulate_block(fisher_ptr + offs, grad_ptr + offs, None, scale, decay, KEEP)
    offs = full * BLOCK + tl.arange(0, BLOCK)
    _accumulate_block(fisher_ptr + offs, grad_ptr + offs, offs < size, scale, decay, KEEP)


_TRITON_DTYPE = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def square_accumulate_(fishers: list[Tensor], grads: list[Tensor], scale: float, decay: float) -> None:
    """`fisher = decay fisher + scale grad^2`, elementwise in memory order; allocates the table, 32 bytes a tensor.

    Args:
        fishers: float32, dense, on one device; changed in place.
        grads: float32, bfloat16 or float16, with the same layout.
        scale: Factor of the squares.
        decay: Factor of what `fishers` hold; 0 does not read them.
    """
    groups: dict[tuple[torch.dtype, bool], list[tuple[int, int, int]]] = {}
    for fisher, grad in zip(fishers, grads, strict=True):
        if fisher.numel():
            row = (fisher.data_ptr(), grad.data_ptr(), fisher.numel())
            aligned = row[0] % ALIGNMENT == row[1] % ALIGNMENT == 0
            groups.setdefault((grad.dtype, aligned), []).append(row)
    for (dtype, aligned), rows in groups.items():
        chunks = [0, *itertools.accumulate(cdiv(row[2], CHUNK) for row in rows)]
        table = torch.tensor([*zip(*rows, strict=True), chunks[:-1]], dtype=torch.int64)
        if fishers[0].is_cuda:
            table = table.pin_memory().to(fishers[0].device, non_blocking=True)  # does not wait for the device
        _square_accumulate_kernel[(chunks[-1],)](
            table, len(rows), len(rows).bit_length(), scale, decay, GRAD_DTYPE=_TRITON_DTYPE[dtype],
            KEEP=decay != 0, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
