"""The oracle against another way to the same numbers, and what its comparison has to find."""

from __future__ import annotations

import contextlib

import pytest
import torch
from architectures.families import build
from architectures.layouts import padded, some_examples
from fisher_oracle import BAR, assert_as_accurate, assert_exact, batch_1_fisher, canonical
from torch import Tensor

F64 = torch.float64


@pytest.mark.parametrize("family", ["Llama", "Llama, tied"])
def test_equals_vectorised_gradients(family: str):
    model = build(family, F64, attn_implementation="eager").eval()
    ids = torch.stack(some_examples(lengths=(8, 8, 8)))
    weights = torch.tensor([0.5, 2.0, 1.0], dtype=F64)

    def loss(parameters: dict[str, Tensor], example: Tensor) -> Tensor:
        logits = torch.func.functional_call(model, parameters, (example[None],), {"use_cache": False}).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, example[1:])

    parameters = {name: p.detach() for name, p in model.named_parameters()}
    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, ids)
    expected = {n: torch.einsum("b,b...->...", weights, g.square()) / weights.sum() for n, g in gradients.items()}
    assert_exact(batch_1_fisher(model, list(ids), weights=weights.tolist()), expected, F64)


def changed(fisher: dict[str, Tensor], name: str, place: tuple, factor: float) -> dict[str, Tensor]:
    value = fisher[name].clone()
    value[place] *= factor
    return fisher | {name: value}


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=["float32", "float64"])
def test_finds_what_is_wrong(dtype: torch.dtype):
    model = build("GPT-2", dtype).eval()
    examples = some_examples()
    right = batch_1_fisher(model, examples)
    assert_exact(right, right, dtype, lambda: right)

    def loss_of(logits: Tensor, example: Tensor, tokens: int | None = None) -> Tensor:
        total = torch.nn.functional.cross_entropy(logits[: len(example) - 1], example[1:], reduction="sum")
        return total / (tokens or len(example) - 1)

    def squared(*losses: Tensor, names: tuple[str, ...] = tuple(right)) -> dict[str, Tensor]:
        parameters = dict(model.named_parameters())
        fisher = {name: torch.zeros_like(parameters[name]) for name in names}
        for loss in losses:
            gradients = torch.autograd.grad(loss, [parameters[name] for name in names], retain_graph=True)
            for name, gradient in zip(names, gradients, strict=True):
                fisher[name] += gradient.square() / len(losses)
        return fisher

    logits = model(**padded(examples, "right")).logits
    assert_exact(squared(*map(loss_of, logits, examples)), right, dtype)
    wrong = {
        "batch mean": squared(sum(map(loss_of, logits, examples)) / len(examples)),
        "padding counted": squared(
            *(loss_of(row, e, logits.shape[1]) for row, e in zip(logits, examples, strict=True))
        ),
        "token mean": squared(*(loss_of(row, e, 8) for row, e in zip(logits, examples, strict=True))),
        "an example is missing": squared(*map(loss_of, logits[:3], examples[:3])),
    }
    embedding = model.transformer.wte.weight
    apart = torch.zeros_like(embedding)
    for example in examples:
        inputs = model.transformer.wte(example[None])
        hidden = model.transformer(inputs_embeds=inputs).last_hidden_state[0]
        loss = loss_of(hidden @ embedding.detach().clone().T, example)
        direct = torch.autograd.grad(loss, embedding, retain_graph=True)[0]
        head = embedding.detach().clone().requires_grad_()
        through_head = torch.autograd.grad(loss_of(hidden.detach() @ head.T, example), head)[0]
        apart += (direct.square() + through_head.square()) / len(examples)
    wrong["no cross term of tied weights"] = right | {"transformer.wte.weight": apart}
    queries, values = (slice(None), slice(0, 24)), (slice(None), slice(72, 96))
    wrong["a slice of values"] = changed(right, "transformer.h.0.attn.c_attn.weight", values, 1 + 20 * BAR[dtype])
    wrong["a slice of queries"] = changed(right, "transformer.h.1.attn.c_attn.weight", queries, 1 + 20 * BAR[dtype])
    wrong["a bias"] = changed(right, "transformer.h.1.mlp.c_proj.bias", (...,), 1 + 2 * BAR[dtype])
    missed = []
    for what, fisher in wrong.items():
        with contextlib.suppress(AssertionError):
            assert_exact(fisher, right, dtype, lambda: right)
            missed.append(what)
        if not what.startswith("a "):
            with contextlib.suppress(AssertionError):
                assert_as_accurate(fisher, right, right, torch.bfloat16, 2e-2)
                missed.append(f"{what}, in bfloat16")
    assert not missed
    with pytest.raises(AssertionError, match="names differ"):
        assert_exact({name: value for name, value in right.items() if "wpe" not in name}, right, dtype)
    half = {name: value.half() for name, value in right.items()}
    with pytest.raises(AssertionError, match="float16"):
        assert_exact(half, right, dtype)


def test_finds_one_wrong_expert():
    right = batch_1_fisher(build("Qwen3-MoE"), some_examples())
    wrong = changed(right, "model.layers.0.mlp.experts.down_proj", (3,), 1.001)
    with pytest.raises(AssertionError, match="1 of 25 tensors are off"):
        assert_exact(wrong, right, torch.float32)


def test_a_gradient_that_is_zero_in_theory_may_be_noise():
    model = build("GPT-2").eval()
    right = batch_1_fisher(model, some_examples())
    keys = right["transformer.h.0.attn.c_attn.bias"][32:64]
    assert keys.max() < 1e-9 * right["transformer.wte.weight"].max()
    assert_exact(changed(right, "transformer.h.0.attn.c_attn.bias", (slice(32, 64),), 3.0), right, torch.float32)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lm_head.weight", "lm_head.weight"),
        ("module.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.model.norm.weight", "model.norm.weight"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.model.layers.0.q_proj.lora_A.default.weight", "model.layers.0.q_proj.lora_A.default.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
    ],
)
def test_canonical_names(name: str, expected: str):
    assert canonical(name) == expected
