"""Sampled labels: which Fisher the draws give, and which labels are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.fisher_steps import IGNORE
from architectures.layouts import padded
from fisher_oracle import assert_exact
from torch import Tensor

import fastforget as ff
from fastforget.ops import LinearCrossEntropy, linear_cross_entropy

pytestmark = pytest.mark.usefixtures("only_float64")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The labels that the head draws, one tensor a draw of a batch."""
    seen: list[Tensor] = []

    def spied(*args: Any, **kwargs: Any) -> LinearCrossEntropy:
        result = linear_cross_entropy(*args, **kwargs)
        if "sample_seed" in kwargs:
            seen.append(result.targets)
        return result

    monkeypatch.setattr("fastforget.fisher.head.linear_cross_entropy", spied)
    return seen


@pytest.mark.parametrize("per", ["example", "position"])
@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("family", ["Llama, tied", "Gemma 2"])
def test_the_mean_over_draws_of_the_fisher_with_these_labels(
    family: str, loss: str, per: str, batch: dict[str, Tensor], drawn: list[Tensor]
):
    model, weights = build(family, torch.float64).eval(), [1.0, 0.5, 2.0, 0.0]
    labels = batch["input_ids"].clone()
    labels[:, :4] = IGNORE  # a prompt; the third example has no target
    fisher = ff.DiagonalFisher(model, per=per, labels="sampled", loss=loss, samples=3, seed=5)
    losses = fisher.update(**batch, labels=labels, weights=weights)
    draws = drawn[-3:]
    assert not torch.equal(draws[0], draws[1])
    given = []
    for draw in draws:
        sampled = labels.masked_fill(batch["attention_mask"] == 0, IGNORE)
        sampled[sampled != IGNORE] = draw
        given.append(ff.DiagonalFisher(model, per=per, loss=loss))
        given[-1].update(**batch, labels=sampled, weights=weights)
    expected = {name: sum(f.diagonal()[name] for f in given) / 3 for name in fisher.diagonal()}
    assert_exact(fisher.diagonal(), expected, torch.float64)
    assert losses.tokens.tolist() == [3, 8, 0, 5]
    assert fisher.metadata["examples"] == 3
    assert fisher.metadata["samples"] == 3


def test_draws_are_those_of_an_example_whatever_its_batch(model: Any, examples: list[Tensor]):
    names = ["one", "two", 3, ("four", 4)]
    options: dict[str, Any] = {"labels": "sampled", "samples": 2}
    whole, parts, other, unnamed = (ff.DiagonalFisher(model, **options, seed=seed) for seed in (1, 1, 2, 1))
    whole.update(**padded(examples, "left"), example_ids=names)
    for some in ([3, 0], [2], [1]):
        parts.update(**padded([examples[i] for i in some], "right"), example_ids=[names[i] for i in some])
    assert_exact(parts.diagonal(), whole.diagonal(), torch.float64)
    other.update(**padded(examples, "left"), example_ids=names)
    unnamed.update(**padded(examples, "left"))
    for fisher in (other, unnamed):
        with pytest.raises(AssertionError, match="tensors are off"):
            assert_exact(fisher.diagonal(), whole.diagonal(), torch.float64)


def test_draws_do_not_touch_the_generator_and_differ_between_equal_examples(model: Any, drawn: list[Tensor]):
    batch = {"input_ids": torch.arange(3, 40).repeat(6, 1)}
    state = torch.get_rng_state()
    ff.DiagonalFisher(model, labels="sampled").update(**batch)
    assert torch.equal(torch.get_rng_state(), state)
    labels = drawn[-1].view(6, -1)
    assert len(labels.unique(dim=0)) == 6
    assert (labels[:, :-1] != labels[:, 1:]).any(1).all()


def true_fisher(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Of one example: the expectation over labels, which are independent and have a score of mean zero."""
    logits = model(input_ids=ids[None]).logits[0, :-1]
    log_p = logits.log_softmax(1)
    parameters = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    for t in range(len(log_p)):
        for y in range(log_p.shape[1]):
            found = torch.autograd.grad(log_p[t, y], list(parameters.values()), retain_graph=True)
            for name, gradient in zip(parameters, found, strict=True):
                fisher[name] += log_p[t, y].detach().exp() * gradient.square() / len(log_p) ** 2
    return fisher


def test_draws_converge_to_the_true_fisher():
    """Of every tensor's trace, the mean of independent estimates is within 4.5 standard errors of the expectation."""
    model = build("Llama, tied", torch.float64, vocab_size=5, pad_token_id=None).eval()
    ids = torch.tensor([3, 0, 4, 1, 2])
    expected = true_fisher(model, ids)
    estimates = []
    for seed in range(12):
        fisher = ff.DiagonalFisher(model, labels="sampled", samples=2, seed=seed)
        fisher.update(ids.repeat(64, 1))
        estimates.append(fisher.diagonal())
    for name, value in expected.items():
        traces = torch.stack([estimate[name].sum() for estimate in estimates])
        error = traces.std() / len(traces) ** 0.5
        assert error < 0.03 * value.sum(), f"{name}: the test sees nothing"
        assert (traces.mean() - value.sum()).abs() < 4.5 * error, name
