"""One batch of upstream examples through one model, and what running out of memory looks like."""

import gc
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fastforget import perplexity
from fastforget.matrix import plan
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


def score(
    model: nn.Module, examples: Upstream, indices: np.ndarray, device: str, buckets: plan.Buckets | None = None
) -> Scores:
    """Score some examples in one forward, padded on the right.

    Args:
        model: a causal language model.
        examples: the upstream examples.
        indices: which of them, int `[n]`.
        device: the model's device.
        buckets: of a compiled model, to which the batch is padded.

    Returns:
        Their scores, in the order of `indices`.
    """
    rows = [torch.from_numpy(examples.tokens[j].astype(np.int64)) for j in indices]
    longest = max(len(row) for row in rows)
    if buckets is not None:
        return _score_padded(model, rows, examples.first_target[indices], buckets(longest), device)
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
    return _as_arrays(scores)


def _score_padded(
    model: nn.Module, rows: list[torch.Tensor], first_target: np.ndarray, length: int, device: str
) -> Scores:
    # Two rows at least: a batch of one would be a graph of its own. Without a mask nothing takes the padding out again;
    # no token sees what is behind it, and the padding repeats the last token, as a padding token would cause warnings.
    input_ids = torch.zeros(max(2, len(rows)), length, dtype=torch.int64)
    labels = torch.full_like(input_ids, IGNORE)
    for b, (row, first) in enumerate(zip(rows, first_target, strict=True)):
        input_ids[b, : len(row)], input_ids[b, len(row) :] = row, row[-1]
        labels[b, first : len(row)] = row[first:]
    input_ids = input_ids.to(device)
    torch._dynamo.mark_dynamic(input_ids, 0)
    with torch.no_grad():
        scores = perplexity.score_examples(model, input_ids, None, labels.to(device))
    return _as_arrays(scores, len(rows))


def _as_arrays(scores: perplexity.ExampleScores, n: int | None = None) -> Scores:
    nll_sum, tokens, exact = scores.nll_sum.double(), scores.tokens, scores.exact
    return Scores(*(values[:n].cpu().numpy() for values in (nll_sum, tokens, exact)))


def score_unit(
    model: nn.Module,
    examples: Upstream,
    shard: np.ndarray,
    budget: int,
    device: str,
    buckets: plan.Buckets | None = None,
    *,
    advance: Callable[[int, int], object],
    reduced: Callable[[int, int], object],
) -> Scores:
    """Score a shard of the examples; where memory runs out, all of it again with a smaller budget.

    Its batches depend on the lengths and the budget alone, so that values do not depend on what happened before.

    Args:
        model: a causal language model.
        examples: the upstream examples.
        shard: which of them, longest first, int `[n]`.
        budget: padded tokens that one forward takes.
        device: the model's device.
        buckets: of a compiled model.
        advance: told the examples and tokens of every batch; negative where the shard begins again.
        reduced: told the budget with which memory ran out, and the next one, before that is tried.

    Returns:
        The scores, in the order of `shard`.

    Raises:
        ValueError: if one example does not fit alone.
    """
    lengths = np.array([len(examples.tokens[j]) for j in shard])
    padded = lengths if buckets is None else np.array([buckets(int(length)) for length in lengths])

    def scored(rows: slice) -> Scores:
        return score(model, examples, shard[rows], device, buckets)

    while True:
        parts, failed = _score_batches(scored, plan.batches(padded, budget), lengths, advance)
        if failed is None:
            return joined(parts)
        free_memory()
        advance(-failed.start, -int(lengths[: failed.start].sum()))
        before, n, longest = budget, failed.stop - failed.start, int(padded[failed.start])
        if n == 1:
            raise ValueError(
                f"upstream: expected every example to fit in memory, got {examples.ids[shard[failed.start]]!r} of "
                f"{longest} tokens, which does not fit alone on {device}; choose a smaller max_length or dtype, "
                "or another device, and another out folder"
            )
        while budget >= n * longest:  # a halving that leaves the batch as it was does not help
            budget //= 2
        reduced(before, budget)


def _score_batches(
    scored: Callable[[slice], Scores],
    batches: Iterable[slice],
    lengths: np.ndarray,
    advance: Callable[[int, int], object],
) -> tuple[list[Scores], slice | None]:
    # The scores, and the batch for which there was no memory.
    parts: list[Scores] = []
    for rows in batches:
        try:
            parts.append(scored(rows))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return parts, rows
        advance(rows.stop - rows.start, int(lengths[rows].sum()))
    return parts, None


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
