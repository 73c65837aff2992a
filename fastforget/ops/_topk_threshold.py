"""`topk_threshold`: checks, dispatch, the radix selection, its PyTorch path, and masks of what was chosen."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastforget.ops._dispatch import resolve
from fastforget.ops._tensor_lists import Rule, check_lists, chunk_elements, memory_order, pack_bits

__all__ = ["TopK", "topk_threshold"]

Count = Callable[[int, int, int], list[int]]
"""Prefix, shift, width -> how many of the elements with that prefix above the digit have each value of the digit."""


class TopK(NamedTuple):
    """The k largest or smallest of many tensors' elements.

    An element is chosen where it lies beyond the threshold, or equals it at a place before `cut`.
    """

    threshold: float
    """The k-th value."""
    k: int
    """How many elements are chosen."""
    largest: bool
    """Whether they are the largest."""
    cut: tuple[int, int]
    """Number of a tensor, and of an element in its row-major order: of ties, those before this place are chosen."""

    def mask(self, tensor: Tensor, index: int, *, packed: bool = False) -> Tensor:
        """Which elements of a tensor are chosen.

        Works in chunks; a packed mask of the one tensor that the ties end in, if it is not contiguous, is made of a
        boolean one.

        Args:
            tensor: The tensor that was number `index` of the call, unchanged.
            index: Its number.
            packed: Eight elements a byte: bit j, the lowest first, of byte i is element 8 i + j in memory order.

        Returns:
            bool of the tensor's shape and strides, or uint8 `[ceil(n / 8)]`; bits after the last element are 0.

        Raises:
            ValueError: The tensor is not dense.
        """
        check_lists({"tensor": Rule([tensor])})
        n = tensor.numel()
        limit = self.cut[1] if index == self.cut[0] else n if index < self.cut[0] else 0
        mixed = 0 < limit < n and not tensor.is_contiguous()
        with torch.no_grad():
            if packed and not mixed:
                bits = [pack_bits(part) for part in self._chosen(memory_order(tensor), limit)]
                return torch.cat(bits) if bits else tensor.new_empty(0, dtype=torch.uint8)
            mask = torch.empty_like(tensor, dtype=torch.bool)
            source, target = (tensor, mask) if mixed else (memory_order(tensor), memory_order(mask))
            for part, chosen in zip(_boxes(target), self._chosen(source, limit), strict=True):
                part.copy_(chosen)
            return pack_bits(mask) if packed else mask

    def _chosen(self, tensor: Tensor, limit: int) -> Iterator[Tensor]:
        """Masks of the boxes of a tensor whose first `limit` elements are chosen where they equal the threshold."""
        threshold = _as_tensor(self.threshold, tensor.device)
        beyond, reached = (torch.gt, torch.ge) if self.largest else (torch.lt, torch.le)
        start = 0
        for box in _boxes(tensor):
            end = start + box.numel()
            chosen = (reached if end <= limit else beyond)(box, threshold)
            if start < limit < end:
                before = torch.arange(start, end, device=box.device).view(box.shape) < limit
                chosen |= before & (box == threshold)
            yield chosen
            start = end


def topk_threshold(
    tensors: Sequence[Tensor],
    fraction: float | None = None,
    *,
    k: int | None = None,
    largest: bool = True,
    impl: str = "auto",
) -> TopK:
    """The exact k-th largest of all elements of many tensors, and which elements are the k largest.

    A radix selection on the bits: a few passes over the data that count, with no sort, no copy and no concatenation.
    Elements are compared by value, in float32 (float64 where a tensor is). Of equal elements those of the first tensor come
    first, and in a tensor the first in row-major order, so that exactly k are chosen; 0.0 and -0.0 are equal.

    Args:
        tensors: float32, bfloat16 or float16 (float64 on the torch path), mixed as you like, each dense, on one device.
        fraction: Of the N elements that are chosen, in (0, 1]: k = max(1, round(fraction N)).
        k: The number itself, instead.
        largest: False for the smallest.
        impl: "auto", "triton" or "torch".

    Returns:
        The threshold; its `mask` tells for each tensor which elements are chosen.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: There is no element, one is NaN, a tensor is not dense or on another device, not just one of `fraction`
            and `k` is given or it is out of range, or `impl` is wrong.
    """
    tensors = list(tensors)
    check_lists({"tensors": Rule(tensors)})
    k = _number(sum(tensor.numel() for tensor in tensors), fraction, k)
    implementation, _ = resolve(impl, tensors[0].device)
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    if double and implementation == "triton":
        raise TypeError('tensors: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"')
    with torch.no_grad(), torch.cuda.device_of(tensors[0]):
        if implementation == "triton":
            count, widths = _triton_count(tensors)
        else:
            count, widths = _torch_count(tensors, torch.float64 if double else torch.float32)
        bits, wanted, ties = _select(count, widths, k, largest)
        value = struct.unpack("<d" if double else "<f", bits.to_bytes(8 if double else 4, "little"))[0]
        return TopK(value, k, largest, _cut(tensors, value, wanted) if wanted < ties else (len(tensors), 0))


def _number(n: int, fraction: float | None, k: int | None) -> int:
    if not n:
        raise ValueError("tensors: expected at least one element, got none")
    if (fraction is None) == (k is None):
        raise ValueError(f"fraction: expected either fraction or k, got fraction={fraction} and k={k}")
    if fraction is not None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction: expected a number in (0, 1], got {fraction}")
        return max(1, round(fraction * n))
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= n:
        raise ValueError(f"k: expected 1 to {n}, the number of elements, got {k}")
    return k


def _select(count: Count, widths: Sequence[int], k: int, largest: bool) -> tuple[int, int, int]:
    """Bits of the k-th element, how many elements with these bits are among the k, and how many there are."""
    prefix, shift, counts, digit = 0, sum(widths), [0], 0
    for i, width in enumerate(widths):
        shift -= width
        counts = count(prefix, shift, width)
        # Bits are ordered as the values are, but negative numbers: these have the top bit, and the reverse order.
        digits = list(range(2**width))
        if i == 0:
            digits = digits[: -len(digits) // 2 - 1 : -1] + digits[: len(digits) // 2]
        elif prefix >> (sum(widths[:i]) - 1):
            digits.reverse()
        for digit in reversed(digits) if largest else digits:
            if k <= counts[digit]:
                break
            k -= counts[digit]
        prefix = prefix << width | digit
    return prefix, k, counts[digit]


def _triton_count(tensors: list[Tensor]) -> tuple[Count, Sequence[int]]:
    from fastforget_kernels.tensor_lists import tables
    from fastforget_kernels.topk_threshold import DIGITS, count_digits_

    lists = tables(tensors)

    def count(prefix: int, shift: int, width: int) -> list[int]:
        counts = torch.zeros(65, dtype=torch.int64, device=tensors[0].device)
        count_digits_(counts, lists, prefix, shift, width)
        *found, nans = counts.tolist()
        if nans:
            _refuse_nan(tensors)
        return found

    return count, DIGITS


def _torch_count(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Count, Sequence[int]]:
    widths = (11, 11, 10) if dtype == torch.float32 else (11, 11, 11, 11, 11, 9)
    integer = torch.int32 if dtype == torch.float32 else torch.int64
    kept: list[Tensor] = []  # the elements that are left, once they are few
    found = [sum(tensor.numel() for tensor in tensors)]  # by the last pass

    def elements() -> Iterator[Tensor]:
        if kept:
            yield kept.pop()
            return
        for tensor in tensors:
            for part in _boxes(memory_order(tensor)):
                yield (part.to(dtype) + 0.0).view(integer)  # -0.0 + 0.0 = 0.0

    def count(prefix: int, shift: int, width: int) -> list[int]:
        nonlocal found
        above, first = shift + width, shift + width == sum(widths)
        few = found[prefix % len(found)] <= 16 * _box_elements(tensors[0].device)
        counts = torch.zeros(2**width, dtype=torch.int64, device=tensors[0].device)
        matching = []
        signed = prefix - (prefix >> (sum(widths) - above - 1) << (sum(widths) - above)) if prefix else 0
        for bits in elements():
            if not first:
                bits = bits[bits >> above == signed]
                if few:
                    matching.append(bits)
            counts += torch.bincount((bits >> shift).bitwise_and_(2**width - 1), minlength=2**width)
        if matching:
            kept.append(torch.cat(matching))
        found = counts.tolist()
        if first and sum(found[1020:1024]) + sum(found[2044:]):  # infinite or NaN; or large, in float64
            _refuse_nan(tensors)
        return found

    return count, widths


def _refuse_nan(tensors: Sequence[Tensor]) -> None:
    for i, tensor in enumerate(tensors):
        nans = sum(int(part.isnan().sum()) for part in _boxes(memory_order(tensor)))
        if nans:
            raise ValueError(f"tensors[{i}]: expected numbers, got {nans} NaN of {tensor.numel()}; NaN has no rank")


def _cut(tensors: Sequence[Tensor], threshold: float, wanted: int) -> tuple[int, int]:
    """The place after the last of the first `wanted` elements that equal the threshold."""
    value = _as_tensor(threshold, tensors[0].device)
    boxes = [(i, box) for i, tensor in enumerate(tensors) for box in _boxes(tensor)]
    counts = torch.stack([(box == value).sum() for _, box in boxes]).tolist()
    starts = [0] * len(tensors)
    for (i, box), count in zip(boxes, counts, strict=True):
        if wanted <= count:
            places = (box == value).reshape(-1).nonzero()
            return i, starts[i] + int(places[wanted - 1]) + 1
        wanted -= count
        starts[i] += box.numel()
    raise AssertionError("fewer ties than were counted")


def _as_tensor(threshold: float, device: torch.device) -> Tensor:
    """`[1]`, so that a comparison happens in float32 or float64: a number would be rounded to the other side's dtype."""
    value = torch.tensor([threshold], dtype=torch.float64)
    single = value.float()
    return (single if torch.equal(single.double(), value) else value).to(device)


def _box_elements(device: torch.device) -> int:
    return chunk_elements(2) if device.type == "cpu" else 2**24  # a multiple of 8: pieces are packed one by one


def _boxes(tensor: Tensor) -> Iterator[Tensor]:
    """Views of consecutive elements in row-major order, which together are the tensor."""
    size = _box_elements(tensor.device)
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(size) if tensor.numel() else ()
    elif tensor[0].numel() <= size:
        yield from tensor.split(size // tensor[0].numel())
    else:
        for row in tensor:
            yield from _boxes(row)
