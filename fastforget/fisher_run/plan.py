"""The plan of a run: its options resolved into files, examples, batches and a record, before anything is computed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastforget.fisher.files import check_path
from fastforget.fisher_run.options import Options, PathLike
from fastforget.matrix.checkpoints import Checkpoint, find_checkpoint, load_config, load_tokenizer
from fastforget.matrix.plan import batches, default_tokens_per_batch, length_order
from fastforget.matrix.rows import read_rows, row_ids
from fastforget.matrix.runner import check_vocabulary, choose_device, choose_dtype, choose_max_length
from fastforget.matrix.scoring import IGNORE
from fastforget.matrix.upstream import Upstream, load_upstream, tokenizer_fingerprint

__all__ = ["Plan", "make_plan"]

BACKWARD = 8  # a token's activations for the backward take so many times the memory of a forward alone, or more
DECIDING = ("per", "batch_size", "labels", "loss", "samples", "seed", "limit", "eos", "skip_empty")


@dataclass(frozen=True)
class Plan:
    """What a run works on.

    Attributes:
        options: what was asked for.
        out: the result.
        base: the model.
        adapter: the adapter, if there is one.
        examples: those that are used.
        device: the device.
        dtype: the parameters'.
        inputs: what has to be the same to continue the run; it is recorded in its files.
    """

    options: Options
    out: Path
    base: Checkpoint
    adapter: Checkpoint | None
    examples: Upstream
    device: str
    dtype: torch.dtype
    inputs: dict[str, Any]

    @cached_property
    def order(self) -> np.ndarray:
        """The examples as they are computed, `[N]`: longest first, or as they stand where the batch matters."""
        return np.arange(len(self.lengths)) if self.options.batch_size else length_order(self.lengths)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, `[N]`."""
        return self.examples.lengths

    def batch_end(self, start: int, tokens: int) -> int:
        """Where in the order the batch that begins at `start` ends.

        Args:
            start: a position in the order.
            tokens: the budget, which a given number of examples overrides.

        Returns:
            The position after the batch.
        """
        if self.options.batch_size:
            return min(start + self.options.batch_size, len(self.order))
        return start + next(batches(self.lengths[self.order[start:]], tokens)).stop

    def batch(self, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Some examples, padded on the right.

        Args:
            rows: B of them.

        Returns:
            Tokens, mask and labels, `[B, T]` int64 each.
        """
        longest = int(self.lengths[rows].max())
        input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE)
        for b, j in enumerate(rows):
            tokens = torch.from_numpy(self.examples.tokens[j].astype(np.int64))
            first = int(self.examples.first_target[j])
            input_ids[b, : len(tokens)] = tokens
            mask[b, : len(tokens)] = 1
            labels[b, first : len(tokens)] = tokens[first:]
        return input_ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def where(self, rows: Sequence[int]) -> list[dict[str, str]]:
        """The ids of some examples, and their places in the data.

        Args:
            rows: the examples.

        Returns:
            `id` and `where` of each.
        """
        if not rows:
            return []
        read = read_rows(os.fspath(self.options.data), split=self.options.split, config=self.options.config)
        places = dict(zip(row_ids(read), (row.where for row in read), strict=True))
        ids = [self.examples.ids[j] for j in rows]
        return [{"id": name, "where": places.get(name, "no longer in the data")} for name in ids]


def make_plan(options: Options) -> Plan:
    """Find the files, read the data, choose what was left open.

    Args:
        options: what is asked for.

    Returns:
        The plan.

    Raises:
        ValueError: if an input is wrong.
    """
    out = check_path(options.out)
    device = choose_device(options.device)
    base = _find_model(options.model)
    adapter = None if options.adapter is None else _find_adapter(options.adapter)
    model_config = load_config(base)
    dtype = choose_dtype(options.dtype, model_config)
    tokenizer = load_tokenizer(base)
    max_length = choose_max_length(options.max_length, model_config)
    examples = load_upstream(
        os.fspath(options.data),
        tokenizer,
        max_length=max_length,
        eos=options.eos,
        skip_empty=options.skip_empty,
        split=options.split,
        config=options.config,
    )
    check_vocabulary(examples, model_config)
    inputs = {
        "model": {"weights": base.fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer)},
        "adapter": adapter and adapter.fingerprint,
        "data": {"content": examples.fingerprint, "examples": len(examples.ids)},
        "settings": {name: getattr(options, name) for name in DECIDING}
        | {
            "parameters": list(options.parameters or []),
            "max_length": max_length,
            "device": torch.device(device).type,
            "dtype": str(dtype).removeprefix("torch."),
            "tokens_per_batch": None if options.batch_size else options.tokens_per_batch or _budget(device, dtype),
        },
    }
    return Plan(options, out, base, adapter, _first(examples, options.limit), device, dtype, inputs)


def _find_model(path: PathLike) -> Checkpoint:
    found = find_checkpoint("model", os.fspath(path))
    if found.kind == "adapter":
        raise ValueError(
            f"model: expected a full checkpoint, got the PEFT adapter {path}; pass it by adapter= (--adapter), and the "
            "model that it was trained on as the model"
        )
    return replace(found, kind="base")


def _find_adapter(path: PathLike) -> Checkpoint:
    found = find_checkpoint("adapter", os.fspath(path))
    if found.kind != "adapter":
        raise ValueError(f"adapter: expected a PEFT adapter, got the full checkpoint {path}; pass it as the model")
    return found


def _budget(device: str, dtype: torch.dtype) -> int:
    kind = torch.device(device).type
    tokens = default_tokens_per_batch(kind, dtype)
    return tokens if kind == "cpu" else tokens // BACKWARD


def _first(examples: Upstream, limit: int | None) -> Upstream:
    parts = {name: getattr(examples, name)[:limit] for name in ("ids", "texts", "tokens", "first_target")}
    return replace(examples, **parts)
