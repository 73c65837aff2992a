"""Examples, and the ways to lay them out as one batch."""

from __future__ import annotations

import torch
from architectures.families import VOCABULARY
from torch import Tensor

LENGTHS = (7, 12, 2, 9)


def some_examples(seed: int = 3, lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """Random examples, without the tokens that mean something."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in lengths]


def padded(examples: list[Tensor], side: str) -> dict[str, Tensor]:
    """One example a row, padded on the side, with tokens in the padding that are no padding tokens."""
    width = max(map(len, examples))
    ids = examples[0].new_full((len(examples), width), 5)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        place = slice(0, len(example)) if side == "right" else slice(width - len(example), width)
        ids[row, place], mask[row, place] = example, 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(examples: list[Tensor]) -> dict[str, Tensor]:
    """All examples in one row, told apart by positions that start again."""
    positions = torch.cat([torch.arange(len(example), device=example.device) for example in examples])
    return {"input_ids": torch.cat(examples)[None], "position_ids": positions[None]}


def layouts(examples: list[Tensor]) -> dict[str, dict[str, Tensor]]:
    """Every way."""
    return {"right": padded(examples, "right"), "left": padded(examples, "left"), "packed": packed(examples)}
