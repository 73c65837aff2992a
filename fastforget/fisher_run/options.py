"""What a run of `fastforget fisher` is asked for."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch

__all__ = ["Options"]

PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class Options:
    """The model, the data, the file, and which Fisher.

    Attributes:
        model: folder or hub id of a full checkpoint; its tokenizer cuts the data.
        data: as `upstream` of `forgetting_matrix`.
        out: the file, `.safetensors`.
        adapter: folder or hub id of a PEFT adapter; the Fisher is that of the adapter's parameters.
        per: "example", "position" or "batch_mean".
        batch_size: with per="batch_mean", and only there: so many consecutive examples of the data are a batch.
        labels: "data" or "sampled".
        loss: "mean" or "sum".
        samples: draws an example, with labels="sampled".
        seed: of the draws.
        parameters: patterns such as `*.mlp.*`; only parameters whose canonical name matches one are measured.
        limit: use so many of the first examples.
        max_length: examples are cut on the right to so many tokens; default: the model's limit.
        tokens_per_batch: padded tokens of a batch; default: by device and dtype. Halved by itself when memory runs out.
        dtype: of the parameters; default: as the model was saved.
        device: default: the GPU if there is one, else the CPU.
        offload: keep the sums in the CPU's memory.
        eos: append the end-of-sequence token to every `response`, as a target.
        skip_empty: leave out rows without a target token instead of refusing them.
        split: the split of a data set.
        config: the configuration of a data set.
        check_adapter_base: refuse an adapter that names another base.
        save_every: seconds between two writes of the state, more where writing takes long; 0: after every batch.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: if a number is too small, or the size of the batches is missing or has no meaning.
    """

    model: PathLike
    data: PathLike
    out: PathLike
    _: KW_ONLY
    adapter: PathLike | None = None
    per: str = "example"
    batch_size: int | None = None
    labels: str = "data"
    loss: str = "mean"
    samples: int = 1
    seed: int = 0
    parameters: Sequence[str] | None = None
    limit: int | None = None
    max_length: int | None = None
    tokens_per_batch: int | None = None
    dtype: str | torch.dtype | None = None
    device: str | torch.device | None = None
    offload: bool = False
    eos: bool = False
    skip_empty: bool = False
    split: str = "train"
    config: str | None = None
    check_adapter_base: bool = True
    save_every: float = 60.0
    progress: bool = True

    def __post_init__(self) -> None:
        self._check_count("max_length", 2, "tokens")
        self._check_count("tokens_per_batch", 1, "tokens")
        self._check_count("limit", 1, "examples")
        self._check_count("batch_size", 1, "examples")
        if self.per != "batch_mean" and self.batch_size is not None:
            raise ValueError(
                f"batch_size: expected none with per={self.per!r}, which is the same whatever the batch, got "
                f"{self.batch_size}; leave it out, or pass tokens_per_batch (--tokens-per-batch) for memory"
            )
        if self.per == "batch_mean" and self.batch_size is None:
            raise ValueError(
                "batch_size: expected the number of examples in a batch with per='batch_mean', whose value depends on "
                "it, got none; pass batch_size= (--batch-size)"
            )
        if self.per == "batch_mean" and self.tokens_per_batch is not None:
            raise ValueError(
                "tokens_per_batch: expected none with per='batch_mean', whose batches have batch_size examples, got "
                f"{self.tokens_per_batch}; leave it out"
            )

    def _check_count(self, name: str, least: int, what: str) -> None:
        value = getattr(self, name)
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: expected {least} {what} or more, got {value!r}; leave it out for the default")
