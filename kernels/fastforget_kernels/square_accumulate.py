r"""The square of many gradients added to many tensors, in one launch a dtype.

    fisher = decay fisher + scale grad^2

Flops 3 an element; bytes 8 + the gradient's 2 or 4 an element.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps, which is no parameter of the kernel's Python function, and plain values for constants)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.tensor_lists import BLOCK, CHUNK, NUM_WARPS, TRITON_DTYPE, address, locate, tables

__all__ = ["square_accumulate_"]


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
    """Lists of the table: fisher, gradient."""
    tensor, start, size = locate(table_ptr, tensors, bisections, CHUNK)
    fisher_ptr = address(table_ptr, tensors, tensor, 0, tl.float32, ALIGNED) + start
    grad_ptr = address(table_ptr, tensors, tensor, 1, GRAD_DTYPE, ALIGNED) + start
    # No mask but at the end: a mask of unknown alignment would make the accesses narrow again.
    full = size // BLOCK
    for block in range(full):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        _accumulate_block(fisher_ptr + offs, grad_ptr + offs, None, scale, decay, KEEP)
    offs = full * BLOCK + tl.arange(0, BLOCK)
    _accumulate_block(fisher_ptr + offs, grad_ptr + offs, offs < size, scale, decay, KEEP)


def square_accumulate_(fishers: list[Tensor], grads: list[Tensor], scale: float, decay: float) -> None:
    """`fisher = decay fisher + scale grad^2`, elementwise in memory order; allocates the table, 32 bytes a tensor.

    Args:
        fishers: float32, dense, on one device; changed in place.
        grads: float32, bfloat16 or float16, with the same layout.
        scale: Factor of the squares.
        decay: Factor of what `fishers` hold; 0 does not read them.
    """
    for table in tables(fishers, grads):
        _square_accumulate_kernel[(table.chunks,)](
            table.entries, table.tensors, table.bisections, scale, decay, GRAD_DTYPE=TRITON_DTYPE[table.dtypes[1]],
            KEEP=decay != 0, ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK, num_warps=NUM_WARPS,
        )  # fmt: skip
