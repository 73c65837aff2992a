"""Log-perplexity of 64 examples under a 4-layer Llama (H 256, V 32000), beside the loops that people write.

Lengths are log-normal, mean about 115 tokens. Units: tokens of real text a second; padding earns nothing. The ceiling is
the body and the head's product alone, by blocks, on the same batches: no loss, and nothing kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TURNS
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from fastforget.perplexity import score_examples

VOCABULARY = 32000
TOKEN_BUDGET = 2048  # of one batch


@pytest.fixture(scope="module")
def model(device: torch.device) -> LlamaForCausalLM:
    """A random model; float32 on a CPU, bfloat16 on a GPU."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return LlamaForCausalLM(config).to(device, dtype).eval()


@pytest.fixture(scope="module")
def examples(device: torch.device) -> list[Tensor]:
    """Token ids of 64 examples."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(np.log(115) - 0.32, 0.8, 64).round(), 8, 1024).astype(int)
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (int(n),), generator=generator).to(device) for n in lengths]


def pad(examples: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Right-padded ids and mask."""
    ids = torch.nn.utils.rnn.pad_sequence(examples, batch_first=True)
    lengths = torch.tensor([len(example) for example in examples], device=ids.device)
    return ids, (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()


def sorted_batches(examples: list[Tensor], budget: int) -> list[list[int]]:
    """Indices, longest first, cut so that rows times the longest stay within the budget."""
    order = sorted(range(len(examples)), key=lambda i: -len(examples[i]))
    batches: list[list[int]] = []
    while order:
        rows = max(1, budget // len(examples[order[0]]))
        batches, order = [*batches, order[:rows]], order[rows:]
    return batches


def batch_1(model, examples: list[Tensor]) -> Tensor:
    """One example at a time, full logits."""
    values = []
    for example in examples:
        logits = model(input_ids=example[None], use_cache=False).logits[0, :-1].float()
        values.append(F.cross_entropy(logits, example[1:]))
    return torch.stack(values)


def full_logits(model, ids: Tensor, mask: Tensor) -> Tensor:
    """Mean loss of every row of a padded batch from its full logits."""
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    log_probabilities = torch.log_softmax(logits[:, :-1], dim=-1)
    token = -log_probabilities.gather(2, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    return token.sum(1) / mask[:, 1:].sum(1)


def padded_batch_8(model, examples: list[Tensor]) -> Tensor:
    """Eight at a time as they come, padded, full logits."""
    return torch.cat([full_logits(model, *pad(examples[i : i + 8])) for i in range(0, len(examples), 8)])


def in_order(batches: list[list[int]], values: list[Tensor]) -> Tensor:
    """Values of the batches at their examples' places."""
    flat = torch.cat(values)
    return flat[torch.tensor([i for batch in batches for i in batch], device=flat.device).argsort()]


def sorted_full_logits(model, examples: list[Tensor]) -> Tensor:
    """Length-sorted batches by token budget, full logits."""
    batches = sorted_batches(examples, TOKEN_BUDGET)
    return in_order(batches, [full_logits(model, *pad([examples[i] for i in batch])) for batch in batches])


def sorted_torch_head(model, examples: list[Tensor], body: Callable[..., Any] | None = None) -> Tensor:
    """Length-sorted batches and torch's own chunked head: the honest alternative with what torch ships."""
    body = model.model if body is None else body
    batches = sorted_batches(examples, TOKEN_BUDGET)
    values = []
    for batch in batches:
        ids, mask = pad([examples[i] for i in batch])
        hidden = body(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state[:, :-1]
        target = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        weight = model.lm_head.weight
        token = F.linear_cross_entropy(hidden.flatten(0, 1), weight, target.flatten(), reduction="none")
        values.append(token.view(target.shape).float().sum(1) / (target != -100).sum(1))
    return in_order(batches, values)


def compiled_torch_head(model, examples: list[Tensor]) -> Tensor:
    """The same with a compiled body, once for all shapes."""
    if "body" not in _compiled:
        _compiled["body"] = torch.compile(model.model, dynamic=True)
    return sorted_torch_head(model, examples, _compiled["body"])


_compiled: dict[str, Callable[..., Any]] = {}


def body_and_product(model, examples: list[Tensor]) -> Tensor:
    """The ceiling: what any implementation has to compute, and nothing else."""
    for batch in sorted_batches(examples, TOKEN_BUDGET):
        ids, mask = pad([examples[i] for i in batch])
        hidden = model.model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        rows = hidden[:, :-1][mask[:, 1:] == 1]
        for block in model.lm_head.weight.split(1024):
            F.linear(rows, block)
    return ids


def fastforget(model, examples: list[Tensor]) -> Tensor:
    """Length-sorted batches and `score_examples`, which also says which examples are reproduced exactly."""
    batches = sorted_batches(examples, TOKEN_BUDGET)
    scores = [score_examples(model, *pad([examples[i] for i in batch])) for batch in batches]
    return in_order(batches, [(score.nll_sum / score.tokens).float() for score in scores])


VARIANTS: dict[str, Callable[..., Tensor]] = {
    "padded, batch 8, full logits": padded_batch_8,
    "batch 1, full logits": batch_1,
    "length-sorted, full logits": sorted_full_logits,
    "length-sorted, F.linear_cross_entropy": sorted_torch_head,
    "length-sorted, torch.compile, F.linear_cross_entropy": compiled_torch_head,
    "fastforget": fastforget,
    "body and product alone, by blocks (ceiling)": body_and_product,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("turn", range(TURNS))
@torch.no_grad()
def test_log_perplexity(variant, turn, model, examples, device, measure, unavailable):
    """64 examples, one model."""
    group = f"log-perplexity, 4-layer Llama, H 256, V 32000, 64 examples, {str(model.dtype)[6:]}"
    if "F.linear" in variant and not hasattr(F, "linear_cross_entropy"):
        unavailable(group, variant, "torch has it from 2.12 or 2.13 on")
    if "reference" not in _reference:
        _reference["reference"] = batch_1(model, examples)
    tokens = sum(len(example) for example in examples)
    tolerance = 1e-4 if device.type == "cpu" else 5e-2
    run = VARIANTS[variant]
    measure(
        group,
        variant,
        lambda: run(model, examples),
        None if "ceiling" in variant else _reference["reference"],
        tolerance=tolerance,
        work=tokens,
        unit="tokens/s",
    )


_reference: dict[str, Tensor] = {}
