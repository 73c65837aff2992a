"""One batch of upstream examples through one model, and what running out of memory looks like."""

import gc
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastforget import perplexity
from fastforget.matrix.upstream import Upstream

IGNORE = -100
# What plain RuntimeErrors say: the CPU's allocator, CUDA's driver, cuBLAS.
OUT_OF_MEMORY = ("not enough memory", "allocate memory", "out of memory", "cublas_status_alloc_failed")


@dataclass(frozen=True)
class Scores:
    """What a model says about n examples.

    Attributes:
        nll_sum: negative log-likelihood of the targets, summed, in nats, float64 `[n]`.
        tokens: number of targets, int64 `[n]`.
        exact: whether every target is the argmax, bool `[n]`.
    """

    nll_sum: np.ndarray
    tokens: np.ndarray
    exact: np.ndarray

    @property
    def log_perplexity(self) -> np.ndarray:
        """Nats per token, float64 `[n]`."""
        return self.nll_sum / self.tokens


def score(model: nn.Module, examples: Upstream, indices: np.ndarray, device: str) -> Scores:
    """Score some examples in one forward, padded on the right.

    Args:
        model: a causal language model.
        examples: the upstream examples.
        indices: which of them, int `[n]`.
        device: the model's device.

    Returns:
        Their scores, in the order of `indices`.
    """
    rows = [torch.from_numpy(examples.tokens[j].astype(np.int64)) for j in indices]
    longest = max(len(row) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    attention_mask = torch.zeros_like(input_ids)
    for b, (j, row) in enumerate(zip(indices, rows, strict=True)):
        first = int(examples.first_target[j])
        input_ids[b, : len(row)] = row
        attention_mask[b, : len(row)] = 1
        labels[b, first : len(row)] = row[first:]
    with torch.no_grad():
        scores = perplexity.score_examples(model, *(t.to(device) for t in (input_ids, attention_mask, labels)))
    return Scores(scores.nll_sum.double().cpu().numpy(), scores.tokens.cpu().numpy(), scores.exact.cpu().numpy())


def joined(parts: list[Scores]) -> Scores:
    """Scores of several batches as one.

    Args:
        parts: at least one.

    Returns:
        Their concatenation.
    """
    nll_sum, tokens, exact = zip(*((part.nll_sum, part.tokens, part.exact) for part in parts), strict=True)
    return Scores(np.concatenate(nll_sum), np.concatenate(tokens), np.concatenate(exact))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out.

    Args:
        error: what a forward raised.

    Returns:
        True if a smaller batch may help.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error).lower() for text in OUT_OF_MEMORY)


def free_memory() -> None:
    """Give back what a failed forward held; call it outside the `except`, whose traceback holds tensors."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
