r"""Elementwise work over many lists of tensors in one launch: a table of addresses, and the chunk that a program owns.

Tensor i of every list has the same elements in the same memory order. Tensors are cut into chunks, numbered through; a
program owns one chunk and finds its tensor by bisecting the number of each tensor's first chunk. Rows of the table `[3 + L,
n]`, all int64: first chunk, elements, one row of addresses a list, places in the lists. It is small and made anew when
storages move; a table with an entry a chunk would take longer to make than the launch takes for a large model.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false
# (a helper of a kernel is called by the compiler: in Python the call raises, so that pyright sees no result)

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.device import cdiv

__all__ = ["ALIGNMENT", "BLOCK", "CHUNK", "NUM_WARPS", "TRITON_DTYPE", "Table", "address", "locate", "place", "tables"]

BLOCK = 2048  # elements a step: 8 a thread, two 16-byte accesses of float32
CHUNK = 16 * BLOCK  # elements of a program: the bisection is a few steps of latency against 16 of streaming
NUM_WARPS = 8
ALIGNMENT = 16  # bytes; tensors at other addresses go in a launch of their own, with narrow accesses
TRITON_DTYPE = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.uint8: tl.uint8,
}


@dataclass(frozen=True)
class Table:
    """The tensors of one launch."""

    entries: Tensor  # int64 [3 + L, n] on the device
    host: Tensor  # the same in (pinned) memory: a captured copy reads it again at every replay
    chunks: int
    dtypes: tuple[torch.dtype, ...]  # of every list
    aligned: bool
    members: tuple[int, ...]  # places of these tensors in the lists

    @property
    def tensors(self) -> int:
        """Their number."""
        return len(self.members)

    @property
    def bisections(self) -> int:
        """Steps that find one of n."""
        return len(self.members).bit_length()


def tables(*lists: Sequence[Tensor], chunk: int = CHUNK) -> list[Table]:
    """Tables for lists of tensors, one for every combination of dtypes that occurs and of aligned addresses.

    Args:
        lists: L lists of as many tensors, on one device; empty tensors are left out.
        chunk: Elements of a program.

    Returns:
        The tables, in the order of first occurrence.
    """
    groups: dict[tuple[tuple[torch.dtype, ...], bool], list[tuple[int, ...]]] = {}
    for i, tensors in enumerate(zip(*lists, strict=True)):
        if tensors[0].numel():
            addresses = [tensor.data_ptr() for tensor in tensors]
            aligned = not any(address % ALIGNMENT for address in addresses)
            key = tuple(tensor.dtype for tensor in tensors), aligned
            groups.setdefault(key, []).append((i, tensors[0].numel(), *addresses))
    found = []
    for (dtypes, aligned), rows in groups.items():
        members, sizes, *addresses = zip(*rows, strict=True)
        first = [0, *itertools.accumulate(cdiv(size, chunk) for size in sizes)]
        host = torch.tensor([first[:-1], sizes, *addresses, members], dtype=torch.int64, device="cpu")
        device = lists[0][members[0]].device
        if device.type == "cuda":
            host = host.pin_memory()
        found.append(Table(host.to(device, non_blocking=True), host, first[-1], dtypes, aligned, members))
    return found


@triton.jit
def locate(table_ptr, tensors, bisections, CHUNK: tl.constexpr):
    """The tensor of this program, its first element and its number of elements there: int32 or int64, int64, int32."""
    chunk = tl.program_id(0)
    low = chunk * 0
    high = low + tensors
    for _ in range(bisections):
        middle = (low + high) // 2
        here = tl.load(table_ptr + middle) <= chunk
        low = tl.where(here, middle, low)
        high = tl.where(here, high, middle)
    start = (chunk - tl.load(table_ptr + low)) * CHUNK  # 64-bit, since the table is
    return low, start, tl.minimum(tl.load(table_ptr + tensors + low) - start, CHUNK).to(tl.int32)


@triton.jit
def address(table_ptr, tensors, tensor, LIST: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to the first element of a tensor of list number LIST."""
    pointer = tl.load(table_ptr + (2 + LIST) * tensors + tensor).to(tl.pointer_type(DTYPE))
    if ALIGNED:  # 16-byte accesses
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def place(table_ptr, tensors, tensor, LISTS: tl.constexpr):
    """Place of a tensor in the lists that the table was made of, LISTS of them: int64."""
    return tl.load(table_ptr + (2 + LISTS) * tensors + tensor)
