"""What the elementwise operations on lists of tensors share: their checks, and chunks for the PyTorch paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "FLOATS",
    "Rule",
    "check_lists",
    "chunk_elements",
    "chunks",
    "dense",
    "is_dense",
    "memory_order",
    "pack_bits",
    "refuse_impossible",
    "refuse_twice",
    "same_order",
    "unpack_bits",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Rule(NamedTuple):
    """What a list of tensors has to be."""

    tensors: Sequence[Tensor]
    dtypes: tuple[torch.dtype, ...] = FLOATS


def check_lists(lists: Mapping[str, Rule]) -> None:
    """Refuse lists whose tensors do not correspond, element by element in memory, to those of the first list.

    Args:
        lists: By the argument's name.

    Raises:
        TypeError: A dtype is not among the allowed ones.
        ValueError: Lengths, shapes, devices or memory layouts differ.
    """
    (model, first), *others = lists.items()
    for name, rule in lists.items():
        if len(rule.tensors) != len(first.tensors):
            raise ValueError(
                f"{name}: expected {len(first.tensors)} tensors, one for each of {model}, got {len(rule.tensors)}"
            )
        for i, tensor in enumerate(rule.tensors):
            if tensor.dtype not in rule.dtypes:
                expected = " or ".join(str(dtype)[6:] for dtype in rule.dtypes)
                raise TypeError(f"{name}[{i}]: expected {expected}, got {tensor.dtype}")
            if tensor.device != first.tensors[0].device:
                raise ValueError(
                    f"{name}[{i}]: expected device {first.tensors[0].device} like {model}[0], got {tensor.device}; call "
                    "once for each device"
                )
    for i, tensor in enumerate(first.tensors):
        if not is_dense(tensor):
            raise ValueError(
                f"{model}[{i}]: expected a dense tensor, got strides {tensor.stride()} for shape {tuple(tensor.shape)}"
            )
    for name, rule in others:
        for i, (like, tensor) in enumerate(zip(first.tensors, rule.tensors, strict=True)):
            _check_like(f"{name}[{i}]", tensor, f"{model}[{i}]", like)


def _check_like(name: str, tensor: Tensor, model: str, like: Tensor) -> None:
    if tensor.shape != like.shape:
        raise ValueError(f"{name}: expected shape {tuple(like.shape)} like {model}, got {tuple(tensor.shape)}")
    if not same_order(like, tensor):
        raise ValueError(
            f"{name}: expected strides {like.stride()} like {model}, got {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; copy it with torch.empty_like({model}).copy_({name})"
        )


def refuse_twice(name: str, tensors: Sequence[Tensor]) -> None:
    """Refuse a list to be written in which a tensor occurs twice; reads addresses, which `torch.compile` cannot trace.

    Args:
        name: Of the argument.
        tensors: The list.

    Raises:
        ValueError: A tensor occurs twice.
    """
    places: dict[int, int] = {}
    for i, tensor in enumerate(tensors):
        if tensor.numel() and places.setdefault(tensor.data_ptr(), i) != i:
            raise ValueError(f"{name}[{i}]: expected every tensor once, got {name}[{places[tensor.data_ptr()]}] again")


def refuse_impossible(name: str, low: float, high: float, dtype: torch.dtype) -> None:
    """Refuse a Fisher by its least and its largest entry.

    Args:
        name: Of the Fisher.
        low: The least entry, or NaN if there is one.
        high: The largest, or NaN.
        dtype: In which it is used.

    Raises:
        ValueError: An entry is negative or not finite, or is not any more in that dtype.
    """
    if not (low >= 0 and high <= torch.finfo(dtype).max):
        raise ValueError(
            f"{name}: expected finite values >= 0, got {low:.3g} to {high:.3g} for {str(dtype)[6:]}; a mean of squares is "
            "neither negative nor infinite"
        )


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in some order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def dense(tensor: Tensor) -> Tensor:
    """A tensor that fills one piece of memory: itself, or a copy that lies as `torch.empty_like` of it does."""
    return tensor if is_dense(tensor) else torch.empty_like(tensor).copy_(tensor)


def memory_order(tensor: Tensor) -> Tensor:
    """The elements of a dense tensor as they lie in memory.

    Args:
        tensor: Of any layout without gaps and overlaps.

    Returns:
        A flat view.

    Raises:
        ValueError: The tensor is not dense, so that the view would be of other memory.
    """
    if not is_dense(tensor):
        raise ValueError(
            f"tensor: expected a dense one, got strides {tensor.stride()} for shape {tuple(tensor.shape)}; copy it with "
            "torch.empty_like(tensor).copy_(tensor)"
        )
    return tensor.as_strided((tensor.numel(),), (1,))


def same_order(first: Tensor, second: Tensor) -> bool:
    """Whether equal places in memory hold equal places of two dense tensors of one shape."""
    if first.is_contiguous() and second.is_contiguous():
        return True
    return all(n == 1 or a == b for n, a, b in zip(first.shape, first.stride(), second.stride(), strict=True))


def chunk_elements(tensors: int) -> int:
    """Elements that a PyTorch path takes at once on the CPU, so that several passes over them stay in a core's L2 cache.

    Args:
        tensors: How many tensors a pass touches, scratch included.

    Returns:
        2^18 float32 values, 1 MB, a thread and in all; at least the 2^15 elements that torch gives a thread, and at most the
        2^24 that float32 can count. Whole bytes of a mask with a bit an element.
    """
    return min(max(2**18 // tensors // 8 * 8, 2**15) * torch.get_num_threads(), 2**24)


def chunks(tensors: Sequence[Tensor], scratch: int = 0) -> Iterator[tuple[Tensor, ...]]:
    """Corresponding flat pieces of dense tensors of one layout, in memory order.

    Args:
        tensors: Those of one parameter.
        scratch: Buffers as large as a piece that the caller works with besides.

    Yields:
        A flat view of each.

    Raises:
        ValueError: One is not dense, or lies otherwise than the first.
    """
    flat = [memory_order(tensors[0])]
    for tensor in tensors[1:]:
        if not same_order(tensors[0], tensor):
            raise ValueError(f"tensors: expected strides {tensors[0].stride()} like the first's, got {tensor.stride()}")
        flat.append(tensor.as_strided((tensor.numel(),), (1,)))
    size = chunk_elements(len(tensors) + scratch)
    if len(flat[0]) <= size:
        yield tuple(flat)  # a split takes as long as the arithmetic of a norm's few weights
    else:
        yield from zip(*(tensor.split(size) for tensor in flat), strict=True)


def pack_bits(mask: Tensor) -> Tensor:
    """A boolean mask, eight entries a byte: bit j, the lowest first, of byte i is entry 8 i + j in memory order.

    Args:
        mask: bool, dense.

    Returns:
        uint8 `[ceil(n / 8)]`; bits after the last entry are 0.

    Raises:
        ValueError: The mask is not dense.
    """
    flat = memory_order(mask)
    flat = flat.clone() if flat.storage_offset() % 8 else flat  # eight entries are read as one integer
    parts = [torch.nn.functional.pad(part, (0, -len(part) % 8)).view(torch.int64) for part in flat.split(2**20)]
    # Byte i of a word, 0 or 1, moves to bit 56 + i: the factor has bits 56 - 7 i, and no two products meet in a bit.
    packed = [(words * 0x0102040810204080 >> 56).to(torch.uint8) for words in parts]
    return torch.cat(packed) if packed else mask.new_empty(0, dtype=torch.uint8)


def unpack_bits(packed: Tensor, entries: int) -> Tensor:
    """The mask of `pack_bits`.

    Args:
        packed: uint8 `[ceil(n / 8)]`.
        entries: n.

    Returns:
        bool `[n]`.
    """
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    parts = [(part[:, None] >> places & 1).bool().view(-1) for part in packed.split(2**17)]
    return torch.cat(parts)[:entries] if parts else packed.new_empty(0, dtype=torch.bool)
