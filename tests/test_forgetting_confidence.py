"""`ff.forgetting_confidence` against its definition: one gradient step an example, in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from architectures.families import build
from fisher_oracle import batch_1_gradients, canonical
from peft import LoraConfig, get_peft_model

import fastforget as ff

ALPHA = 0.03
# Conv1D, biases and a tied head; experts; a softcap; LayerNorm and learned positions; a mixer that has no rule of its own.
FAMILIES = ["Llama", "GPT-2", "OLMoE", "Mixtral", "Gemma 2", "OPT", "Mamba"]


def problem(family="Llama", dtype=torch.float64, wrap=None):
    """A model, a batch with padding and prompts, a Fisher and an anchor of its trainable parameters."""
    torch.manual_seed(0)
    model = build(family, dtype)
    model = wrap(model) if wrap else model
    ids = torch.randint(1, 60, (4, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[2, :4] = -100
    parameters = {canonical(n): p for n, p in model.named_parameters() if p.requires_grad}
    fisher = {name: torch.rand_like(p) for name, p in parameters.items()}
    anchor = {name: p.detach() + 0.1 * torch.randn_like(p) for name, p in parameters.items()}
    return model, {"input_ids": ids, "attention_mask": mask, "labels": labels}, fisher, anchor


def brute_force(model, batch, fisher, anchor, alpha, *, constant=True):
    """1/2 sum F (theta - alpha g - anchor)^2, example by example."""
    model.eval()
    parameters = {canonical(n): p.detach() for n, p in model.named_parameters() if p.requires_grad}
    results = []
    for ids, mask, labels in zip(*batch.values(), strict=True):
        gradients = batch_1_gradients(model, ids[mask > 0], labels[mask > 0])
        total = 0.0
        for name, f in fisher.items():
            delta = (parameters[name] - anchor[name]).double()
            whole = 0.5 * (f.double() * (delta - alpha * gradients[name].double()).square()).sum()
            total += whole if constant else whole - 0.5 * (f.double() * delta.square()).sum()
        results.append(total)
    return torch.stack(results)


def spread_error(found, expected):
    """Largest difference over the examples' spread."""
    return float((found - expected).abs().max() / (expected.max() - expected.min()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:DiagonalFisher. exact, but slow")
def test_it_is_the_formula(family):
    """Every kind of parameter that the Fisher is exact for."""
    model, batch, fisher, anchor = problem(family)
    expected = brute_force(model, batch, fisher, anchor, ALPHA)
    found = ff.forgetting_confidence(model, batch, fisher=fisher, anchor=anchor, alpha=ALPHA, constant=True)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    without = ff.forgetting_confidence(model, batch, fisher=fisher, anchor=anchor, alpha=ALPHA)
    assert spread_error(without - without.mean(), expected - expected.mean()) < 1e-6
    assert all(p.grad is None for p in model.parameters())


def test_in_float32_at_a_small_step_it_still_ranks():
    """Where the constant is a million times as large as what tells examples apart."""
    model, batch, fisher, anchor = problem("Llama", torch.float32)
    wide = copy.deepcopy(model).double()
    expected = brute_force(wide, batch, fisher, anchor, 1e-5, constant=False)
    found = ff.forgetting_confidence(model, batch, fisher=fisher, anchor=anchor, alpha=1e-5)
    assert found.dtype == torch.float64
    assert spread_error(found, expected) < 1e-4


def test_a_lora_by_its_own_parameters():
    """The Fisher and the anchor hold the adapter alone."""
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model, batch, fisher, anchor = problem(wrap=lambda model: get_peft_model(model, config))
    expected = brute_force(model, batch, fisher, anchor, ALPHA)
    found = ff.forgetting_confidence(model, batch, fisher=fisher, anchor=anchor, alpha=ALPHA, constant=True)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)


def test_some_parameters_and_the_estimator_itself():
    """What the Fisher has not does not count; an estimator stands for its Fisher, a model for the anchor."""
    model, batch, _, _ = problem(dtype=torch.float32)
    learnt = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in learnt.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    estimator = ff.DiagonalFisher(learnt, parameters="*.mlp.*")
    estimator.update(**batch)
    found = ff.forgetting_confidence(model, batch, fisher=estimator, anchor=learnt, alpha=ALPHA)
    fisher = estimator.diagonal()
    anchor = {name: dict(learnt.named_parameters())[name].detach() for name in fisher}
    expected = brute_force(copy.deepcopy(model).double(), batch, fisher, anchor, ALPHA, constant=False)
    assert spread_error(found, expected) < 1e-4


def test_rules_are_chosen_once_and_a_deleted_model_is_freed(monkeypatch):
    """The second batch costs one forward and backward."""
    import gc
    import weakref

    from fastforget.graceful import confidence

    model, batch, fisher, anchor = problem()
    calls = []
    choose = confidence.choose_rules_on
    monkeypatch.setattr(confidence, "choose_rules_on", lambda *a: calls.append(1) or choose(*a))
    first = ff.forgetting_confidence(model, batch, fisher=fisher, anchor=anchor, alpha=ALPHA)
    second = ff.forgetting_confidence(model, batch, fisher=fisher, anchor=anchor, alpha=ALPHA)
    assert torch.equal(first, second)
    assert len(calls) == 1
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), True, "1"])
def test_a_step_has_a_size(alpha):
    """By name."""
    model, batch, fisher, anchor = problem(dtype=torch.float32)
    with pytest.raises(ValueError, match="alpha: expected a number > 0"):
        ff.forgetting_confidence(model, batch, fisher=fisher, anchor=anchor, alpha=alpha)


def test_bad_input_is_named():
    """Prompts without a response, another model's Fisher or anchor, the model as its own anchor, what is no batch."""
    model, batch, fisher, anchor = problem(dtype=torch.float32)

    def refused(message, error=ValueError, **changes):
        given = {"batch": batch, "fisher": fisher, "anchor": anchor, "alpha": ALPHA} | changes
        with pytest.raises(error, match=message):
            ff.forgetting_confidence(model, given.pop("batch"), **given)

    labels = batch["labels"].clone()
    labels[1], labels[3] = -100, -100
    refused("labels: .*none for examples 1, 3; leave out prompts without a response", batch=batch | {"labels": labels})
    name = next(iter(fisher))
    refused("fisher: expected names of the model's trainable", fisher={**fisher, "other.weight": torch.ones(2)})
    refused(r"fisher\[.*shape", fisher=fisher | {name: torch.ones(3, 3)})
    refused(r"fisher\[.*negative", fisher=fisher | {name: -fisher[name]})
    refused("anchor: expected a tensor for every parameter", anchor={name: anchor[name]})
    refused("got the parameter itself", anchor=model)
    refused("batch: expected input_ids", TypeError, batch={"labels": labels})
    with torch.no_grad():
        next(model.parameters())[batch["input_ids"][2, 5]] = torch.nan
    refused("examples? .*2", batch=batch)
