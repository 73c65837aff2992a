"""The exact Fisher of PEFT's adapters, alone and with the weights under them."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.fisher_steps import (
    DTYPES,
    gradients,
    same_bits,
    slow_rules_of,
    truth_of,
    updated,
    with_labels,
)
from architectures.layouts import layouts, padded
from fisher_oracle import assert_exact, batch_1_fisher
from torch import Tensor, nn

import fastforget as ff

ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "attention": ("Llama", {"target_modules": ["q_proj", "v_proj"]}),
    "Conv1D": ("GPT-2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "all linear": ("Qwen2", {"target_modules": "all-linear", "use_rslora": True, "bias": "all"}),
    "head": ("Llama", {"target_modules": ["q_proj", "lm_head"]}),
    "tied head": ("Llama, tied", {"target_modules": ["q_proj", "lm_head"]}),
    "LoRA on an embedding": ("Llama", {"target_modules": ["q_proj", "embed_tokens"]}),
    "LoRA on experts": ("Qwen3-MoE", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    "a trained head": ("Llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "a trained embedding and norm": (
        "Llama",
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm"]},
    ),
    "DoRA": ("Llama", {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
}


def with_adapter(kind: str, dtype: torch.dtype) -> nn.Module:
    peft = pytest.importorskip("peft")
    family, settings = ADAPTERS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on tied heads and on parameters
        defaults = {"target_modules": []} if "target_parameters" in settings else {}
        model = peft.get_peft_model(build(family), peft.LoraConfig(r=4, lora_dropout=0.0, **defaults | settings))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype)


@DTYPES
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters(kind: str, dtype: torch.dtype, examples: list[Tensor]):
    model = with_adapter(kind, dtype)
    expected, truth = batch_1_fisher(model, examples), truth_of(model, examples)
    assert any("lora_" in name for name in expected)
    for batch in layouts(examples).values():
        with slow_rules_of(kind):
            got = updated(model, batch)
        assert_exact(got, expected, dtype, truth)


@pytest.mark.usefixtures("only_float64")
@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_and_all_weights_observed(kind: str, examples: list[Tensor]):
    """Adapters while the weights under them are trained too."""
    model = with_adapter(kind, torch.float64).eval()
    for name, parameter in model.named_parameters():
        if "original_module" not in name:  # replaced by its copy
            parameter.requires_grad_(True)
    batch = with_labels(padded(examples, "right"))
    model(**batch).loss.backward()
    alone = gradients(model)
    model.zero_grad()
    fisher = ff.DiagonalFisher(model)
    if kind == "LoRA on experts":  # PEFT parametrises the weights while its forward runs
        with pytest.raises(ValueError, match=r"gate_up_proj|down_proj"), fisher.observe():
            pass
        return
    with slow_rules_of(kind):
        with fisher.observe():
            model(**batch).loss.backward()
        got = updated(model, padded(examples, "left"))
    assert not same_bits(gradients(model), alone)
    expected = batch_1_fisher(model, examples)
    assert_exact(fisher.diagonal(), expected, torch.float64)
    assert_exact(got, expected, torch.float64)
