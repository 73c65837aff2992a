"""Per-example gradients on the torch path, one cache-sized block of rows at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from fastforget.ops._examples import accumulator

__all__ = ["gradient_blocks"]

# Elements of a block. CPU: 2 MB of float32, so that the product's result is still in the cache when it is squared (half
# or twice that: within 10%). Elsewhere: 64 MB, large enough for full-rate products.
_CPU_TILE, _TILE = 2**19, 2**24
_BATCH = (
    8  # whole gradients in a block, at least, for one batched product of examples of equal length: a fifth less time
)


def gradient_blocks(
    activations: Tensor, grad_outputs: Tensor, bounds: list[int], *, shortest: int = 1
) -> Iterator[tuple[slice, Iterator[tuple[int, Tensor]]]]:
    """Per-example gradients `sum_t d_t a_t^T`: one block of rows of all examples, then the next block.

    Holds one block, and a float32 copy of one example's 16-bit tokens.

    Args:
        activations: `[S, I]`.
        grad_outputs: `[S, O]`.
        bounds: The offsets.
        shortest: Fewest tokens of an example that is wanted, at least 1.

    Yields:
        The block's rows of O, and an iterator over (example, those rows of its gradient `[R, I]`). The gradient's memory
        is used again for the next one; whoever takes it may change it.
    """
    dtype = accumulator(activations.dtype)
    inputs, outputs = activations.shape[1], grad_outputs.shape[1]
    tile = _CPU_TILE if activations.device.type == "cpu" else _TILE
    lengths = [end - start for start, end in itertools.pairwise(bounds)]
    batch = tile // max(inputs * outputs, 1)
    if batch >= _BATCH and len(set(lengths)) == 1 and lengths[0] >= shortest:
        yield slice(0, outputs), _batched(activations, grad_outputs, lengths, batch, dtype)
        return
    height = min(max(tile // max(inputs, 1), 1), max(outputs, 1))
    buffer = activations.new_empty(height, inputs, dtype=dtype)
    parts_a = activations.split(lengths)

    def gradients(rows: slice) -> Iterator[tuple[int, Tensor]]:
        out = buffer[: rows.stop - rows.start]
        parts_d = grad_outputs[:, rows].T.split(lengths, 1)
        for example, (a, d) in enumerate(zip(parts_a, parts_d, strict=True)):
            if lengths[example] < shortest:
                continue
            if a.dtype != dtype:  # 16-bit products are exact in float32
                a, d = a.to(dtype), d.to(dtype)
            yield example, torch.mm(d, a, out=out)

    for o in range(0, outputs, height):
        rows = slice(o, min(o + height, outputs))
        yield rows, gradients(rows)


def _batched(
    activations: Tensor, grad_outputs: Tensor, lengths: list[int], batch: int, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """All gradients, `batch` at a time, of examples of equal length."""
    examples = len(lengths)
    a, d = (tokens.unflatten(0, (examples, lengths[0])) for tokens in (activations, grad_outputs))
    buffer = activations.new_empty(min(batch, examples), d.shape[2], a.shape[2], dtype=dtype)
    for b in range(0, examples, batch):
        part_a, part_d = (tokens[b : b + batch].to(dtype) for tokens in (a, d))
        yield from enumerate(torch.bmm(part_d.mT, part_a, out=buffer[: len(part_a)]), b)
