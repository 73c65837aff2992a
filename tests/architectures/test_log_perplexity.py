"""Every family, every way to lay out a batch: the value of the example alone, through the model's own logits."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import fastforget as ff
from fastforget.perplexity import score_examples

sys.path.insert(0, str(Path(__file__).parent))
from families import FAMILIES, VOCABULARY, build

LENGTHS = (7, 12, 2, 9)


@pytest.fixture(scope="module")
def examples() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator) for n in LENGTHS]


def padded(examples: list[torch.Tensor], side: str) -> dict[str, torch.Tensor]:
    width = max(map(len, examples))
    ids = examples[0].new_full((len(examples), width), 5)
    mask = torch.zeros_like(ids)
    for row, example in enumerate(examples):
        place = slice(0, len(example)) if side == "right" else slice(width - len(example), width)
        ids[row, place], mask[row, place] = example, 1
    return {"input_ids": ids, "attention_mask": mask}


def packed(examples: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(len(example), device=example.device) for example in examples])
    return {"input_ids": torch.cat(examples)[None], "position_ids": positions[None]}


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
    for layout in (padded(examples, "right"), padded(examples, "left"), packed(examples)):
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
