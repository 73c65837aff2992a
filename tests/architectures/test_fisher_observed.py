"""The exact Fisher of a caller's own step: the batch-size-1 loop's, and gradients that are bit for bit the step's own."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures.families import FAMILIES, build
from architectures.fisher_steps import (
    COVERED,
    DTYPES,
    IGNORE,
    UNSHIFTED,
    gradients,
    mean_loss,
    same_bits,
    slow_rules_of,
    truth_of,
    updated,
    with_labels,
    without_dropout,
)
from architectures.layouts import padded
from fisher_oracle import assert_as_accurate, assert_exact, batch_1_fisher, float64_throughout
from torch import Tensor, nn

import fastforget as ff


@pytest.mark.usefixtures("only_float64")
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in UNSHIFTED])
def test_observed_step(family: str, examples: list[Tensor]):
    """Two micro-batches of a caller's own step: the same Fisher, and the same gradients bit for bit."""
    model = build(family, torch.float64).eval()
    batches = [with_labels(padded(examples[:3], "right")), with_labels(padded(examples[2:], "right"))]
    expected = batch_1_fisher(model, [*examples[:3], *examples[2:]])
    for batch in batches:
        model(**batch, use_cache=False).loss.backward()
    alone = gradients(model)
    model.zero_grad()
    fisher = ff.DiagonalFisher(model)
    with slow_rules_of(family), fisher.observe():
        for batch in batches:
            model(**batch, use_cache=False).loss.backward()
    assert not same_bits(gradients(model), alone)
    assert_exact(fisher.diagonal(), expected, torch.float64)


@pytest.mark.usefixtures("only_float64")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("family", [*COVERED, "Mamba", "OPT"])
def test_gradient_checkpointing(family: str, use_reentrant: bool, examples: list[Tensor]):
    model = without_dropout(build(family, torch.float64)).train()  # checkpointing is off in eval mode
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    batch = with_labels(padded(examples, "right"))
    labels = batch.pop("labels")
    expected = batch_1_fisher(model, examples)
    mean_loss(model, batch, labels).backward()
    alone = gradients(model)
    model.zero_grad()
    fisher = ff.DiagonalFisher(model)
    with slow_rules_of(family):
        with fisher.observe(labels=labels, loss_factor=1):
            mean_loss(model, batch, labels).backward()
        got = updated(model, padded(examples, "left"))
    assert not same_bits(gradients(model), alone)
    assert_exact(fisher.diagonal(), expected, torch.float64)
    assert_exact(got, expected, torch.float64)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # dynamo's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("family", ["Llama, tied", "GPT-2"])
def test_compiled(family: str, backend: str, examples: list[Tensor]):
    dtype = torch.float64 if family == "GPT-2" else torch.float32  # Llama has float32 inside
    model = build(family, dtype).eval()
    expected, truth = batch_1_fisher(model, examples), truth_of(model, examples)
    compiled = torch.compile(model, backend=backend)
    batch = with_labels(padded(examples, "right"))
    labels = batch.pop("labels")

    mean_loss(compiled, batch, labels).backward()
    alone = gradients(model)
    model.zero_grad()
    assert_exact(updated(compiled, padded(examples, "left")), expected, dtype, truth)
    fisher = ff.DiagonalFisher(compiled)
    with fisher.observe(labels=labels, loss_factor=1):
        mean_loss(compiled, batch, labels).backward()
    assert_exact(fisher.diagonal(), expected, dtype, truth)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, alone[name])
    torch._dynamo.reset()


@DTYPES
@pytest.mark.parametrize("family", [*COVERED, "Mixtral", "OPT"])
def test_fused_gradients(family: str, dtype: torch.dtype, examples: list[Tensor], request: pytest.FixtureRequest):
    if dtype == torch.float64:
        request.getfixturevalue("only_float64")
    model = build(family, dtype).eval()
    batch = with_labels(padded(examples, "right"))
    model(**batch).loss.backward()
    alone = gradients(model)
    precise = copy.deepcopy(model).double()
    precise.zero_grad()
    with float64_throughout():
        precise(**batch).loss.backward()
    model.zero_grad()
    fisher = ff.DiagonalFisher(model)
    with fisher.observe(fuse_grad=True):
        model(**batch).loss.backward()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), dtype, truth_of(model, examples))
    slack = 1e-6 if dtype == torch.float32 else 1e-12
    assert_as_accurate(gradients(model), alone, gradients(precise), dtype, slack)


@pytest.mark.usefixtures("only_float64")
@pytest.mark.parametrize("family", ["Llama, tied", *UNSHIFTED])
def test_observed_labels_and_denominators(family: str, examples: list[Tensor]):
    """The caller's own loss from logits, over the tokens of all micro-batches."""
    model = build(family, torch.float64).eval()
    batches = [padded(examples[:2], "right"), padded(examples[2:], "right")]
    labels = [with_labels(batch)["labels"] for batch in batches]
    tokens = sum(int((label[:, 1:] != IGNORE).sum()) for label in labels)
    expected = batch_1_fisher(model, examples)

    fisher = ff.DiagonalFisher(model)
    for batch, label in zip(batches, labels, strict=True):
        with fisher.observe(labels=label, loss_denominator=tokens):
            logits = model(**batch).logits[:, :-1].flatten(0, 1)
            (nn.functional.cross_entropy(logits, label[:, 1:].flatten(), reduction="sum") / tokens).backward()
    assert_exact(fisher.diagonal(), expected, torch.float64)

    if family in UNSHIFTED:
        return
    fisher = ff.DiagonalFisher(model)
    with fisher.observe(loss_denominator=tokens):  # as Trainer does
        for batch, label in zip(batches, labels, strict=True):
            model(**batch, labels=label, num_items_in_batch=tokens).loss.backward()
    assert_exact(fisher.diagonal(), expected, torch.float64)


def test_a_backward_without_an_observed_forward(examples: list[Tensor]):
    model = build("Llama").eval()
    loss = model(**with_labels(padded(examples, "right"))).loss
    with pytest.raises(ValueError, match="forward"), ff.DiagonalFisher(model).observe():
        loss.backward()


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3-MoE", "gpt-oss", "OLMoE"])
def test_a_router_loss_couples_examples(family: str, examples: list[Tensor]):
    model = build(family).eval()
    fisher = ff.DiagonalFisher(model)
    with slow_rules_of(family), pytest.raises(ValueError, match=r"rout|aux"), fisher.observe():
        model(**with_labels(padded(examples, "right")), output_router_logits=True).loss.backward()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("way", ["update", "observe"])
def test_everything_is_as_before_after_an_error(way: str, examples: list[Tensor]):
    model = build("Llama, tied").train()
    batch = with_labels(padded(examples, "right"))
    before = [dict(vars(module)) for module in model.modules()]
    fisher = ff.DiagonalFisher(model)

    def broken(*_: Any) -> None:
        raise RuntimeError("on purpose")

    def step() -> None:
        with fisher.observe():
            model(**batch).loss.backward()

    handle = model.model.layers[1].mlp.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="on purpose"):
        step() if way == "observe" else fisher.update(**batch)
    handle.remove()
    assert [vars(module).keys() for module in model.modules()] == [old.keys() for old in before]
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    fisher.update(**batch)
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float32, truth_of(model, examples))
