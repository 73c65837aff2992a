"""Every family, every way to lay out a batch: the value of the example alone, through the model's own logits."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures.families import FAMILIES, VOCABULARY, build
from architectures.layouts import layouts

import fastforget as ff
from fastforget.perplexity import score_examples


@torch.no_grad()
def alone(model: torch.nn.Module, examples: list[torch.Tensor]) -> torch.Tensor:
    """Log-perplexity of every example from the unpadded example's own full logits."""
    values = []
    for example in examples:
        logits = model.eval()(input_ids=example[None], use_cache=False).logits[0, :-1].double()
        values.append(torch.nn.functional.cross_entropy(logits, example[1:]))
    return torch.stack(values)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_equal_the_example_alone(family: str, dtype: torch.dtype, device: str, examples: list[torch.Tensor]):
    model = build(family, dtype).to(device)
    examples = [example.to(device) for example in examples]
    oracle = alone(copy.deepcopy(model).double(), examples)
    eager = alone(model, examples)
    allowed = (eager - oracle).abs().max() + (1e-5 if dtype == torch.float32 else 2e-2)
    for layout in layouts(examples).values():
        with torch.no_grad():
            got = ff.log_perplexity(model, **layout)
        assert got.dtype == torch.float32
        error = (got.double() - oracle).abs().max()
        assert error <= allowed, f"{family}: {float(error):.2g} nats off, {float(allowed):.2g} allowed"


@pytest.mark.parametrize("family", ["Llama", "Gemma 2", "GPT-2", "Granite"])
def test_exact_match_is_greedy_decoding(family: str, examples: list[torch.Tensor]):
    model = build(family).eval()
    greedy = model.generate(examples[0][None], do_sample=False, min_new_tokens=5, max_new_tokens=5, eos_token_id=None)
    changed = greedy.clone()
    changed[0, -1] = (changed[0, -1] + 1) % VOCABULARY
    ids = torch.cat([greedy, changed])
    labels = ids.clone()
    labels[:, : len(examples[0])] = -100
    with torch.no_grad():
        scores = score_examples(model, ids, labels=labels)
    assert scores.exact.tolist() == [True, False]
    assert scores.tokens.tolist() == [5, 5]
