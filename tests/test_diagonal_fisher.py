"""`DiagonalFisher`: which Fisher it is, what it refuses, and that `update` leaves the model as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.fisher_steps import IGNORE, bits, same, with_labels
from architectures.layouts import padded
from fisher_oracle import assert_exact, batch_1_fisher, batch_1_gradients
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSeq2SeqLM, BartConfig

import fastforget as ff
from fastforget.fisher.passes import NonFiniteError

pytestmark = pytest.mark.usefixtures("only_float64")


# Which Fisher ---------------------------------------------------------------------------------------------------------


def each_position_squared(model: Any, batch: dict[str, Tensor], weights: Tensor, loss: str) -> dict[str, Tensor]:
    """The squared contribution of every position of every use of a parameter, from hooks on an ordinary backward."""
    mask = batch["attention_mask"].bool()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    fisher = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}

    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach()

        def square(d: Tensor) -> None:
            for b, t in mask.nonzero().tolist():
                total = fisher[names[id(module.weight)]]
                if isinstance(module, nn.Linear):
                    total += weights[b] * torch.outer(d[b, t], x[b, t]).square()
                elif isinstance(module, nn.Embedding):
                    total[x[b, t]] += weights[b] * d[b, t].square()
                else:
                    normalised = x[b, t] * (x[b, t].square().mean() + module.variance_epsilon).rsqrt()
                    total += weights[b] * (d[b, t] * normalised).square()

        output.register_hook(square)

    handles = [module.register_forward_hook(hook) for module in model.modules() if hasattr(module, "weight")]
    target = batch["input_ids"].masked_fill(~mask, IGNORE)[:, 1:]
    logits = model(**batch).logits[:, :-1]
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
    (losses.sum(1) / ((target != IGNORE).sum(1) if loss == "mean" else 1)).sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {name: value / weights.sum() for name, value in fisher.items()}


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("family", ["Llama", "Llama, tied"])
def test_every_position_squared(family: str, loss: str, batch: dict[str, Tensor]):
    model = build(family, torch.float64).eval()
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    expected = each_position_squared(model, batch, weights, loss)
    fisher = ff.DiagonalFisher(model, per="position", loss=loss)
    fisher.update(**batch, weights=weights)
    assert_exact(fisher.diagonal(), expected, torch.float64)
    observed = ff.DiagonalFisher(model, per="position", loss=loss)
    with observed.observe(weights=weights):
        model(**with_labels(batch)).loss.backward()
    assert_exact(observed.diagonal(), expected, torch.float64)


def test_a_rule_without_positions_is_refused_by_name(batch: dict[str, Tensor]):
    model = build("Qwen3", torch.float64)
    fisher = ff.DiagonalFisher(model, per="position", parameters="*.q_norm.weight")
    with pytest.raises(ValueError, match=r'per: "position" is not defined for .*q_norm.weight.*per="example"'):
        fisher.update(**batch)


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_the_square_of_the_mean_gradient(loss: str, model: Any, examples: list[Tensor]):
    groups, weights = (examples[:3], examples[1:]), torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    expected: dict[str, Any] = {}
    for group in groups:
        gradients = [batch_1_gradients(model, example, loss=loss) for example in group]
        for name in gradients[0]:
            mean = sum(w * g[name] for w, g in zip(weights, gradients, strict=True)) / weights.sum()
            expected[name] = expected.get(name, 0) + mean.square() / len(groups)
    fisher = ff.DiagonalFisher(model, per="batch_mean", loss=loss)
    for group in groups:
        fisher.update(**padded(group, "left"), weights=weights)
    assert_exact(fisher.diagonal(), expected, torch.float64)
    empty = padded(groups[0], "left")
    fisher.update(**empty, labels=torch.full_like(empty["input_ids"], IGNORE))  # no gradient, so no step
    assert_exact(fisher.diagonal(), expected, torch.float64)
    assert fisher.metadata["weight_sum"] == 2
    assert fisher.skipped == [6, 7, 8]


@pytest.mark.parametrize("per", ["example", "position", "batch_mean"])
def test_an_example_of_no_weight_changes_nothing(per: str, model: Any, examples: list[Tensor]):
    with_it, without = ff.DiagonalFisher(model, per=per), ff.DiagonalFisher(model, per=per)
    with_it.update(**padded(examples, "right"), weights=[1, 0, 2, 1])
    without.update(**padded([examples[i] for i in (0, 2, 3)], "right"), weights=[1, 2, 1])
    assert_exact(with_it.diagonal(), without.diagonal(), torch.float64)
    none = ff.DiagonalFisher(model, per=per)
    none.update(**padded(examples, "right"), weights=[0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"fisher: expected at least one example with a target and a weight > 0"):
        none.diagonal()


@pytest.mark.parametrize("per", ["example", "position", "batch_mean"])
def test_a_first_batch_without_targets(per: str, model: Any, batch: dict[str, Tensor]):
    """A token alone, nothing but padding, and labels that are all ignored: skipped, and counted."""
    fisher, other = ff.DiagonalFisher(model, per=per), ff.DiagonalFisher(model, per=per)
    ids = batch["input_ids"]
    fisher.update(ids[:, :1], example_ids=list("abcd"))
    fisher.update(ids, torch.zeros_like(ids), example_ids=list("efgh"))
    losses = fisher.update(**batch, labels=torch.full_like(ids, IGNORE), example_ids=list("ijkl"))
    assert losses.loss.isnan().all()
    assert not losses.tokens.any()
    assert fisher.skipped == list("abcdefghijkl")
    assert fisher.metadata["examples"] == 0
    for one in (fisher, other):
        one.update(**batch)
    assert_exact(fisher.diagonal(), other.diagonal(), torch.float64)


# Bad input ------------------------------------------------------------------------------------------------------------

BAD_SETTINGS = [
    ({"per": "token"}, r"per: expected 'example' or 'position' or 'batch_mean', got 'token'"),
    ({"labels": "true"}, r"labels: expected 'data' or 'sampled', got 'true'"),
    ({"loss": "token"}, r"loss: expected 'mean' or 'sum', got 'token'"),
    ({"impl": "cuda"}, r"impl: expected 'auto' or 'triton' or 'torch', got 'cuda'"),
    ({"per": "batch_mean", "labels": "sampled"}, r'labels: expected "data" with per="batch_mean".*use per="example"'),
    ({"samples": 3}, r'samples: expected an integer >= 1, and 1 with labels="data", got 3'),
    ({"samples": 0, "labels": "sampled"}, r"samples: expected an integer >= 1.*got 0"),
    ({"samples": 2.0, "labels": "sampled"}, r"samples: expected an integer >= 1.*got 2\.0"),
    ({"seed": -1, "labels": "sampled"}, r"seed: expected an integer in \[0, 2\^31\), got -1"),
    ({"seed": 0.5}, r"seed: expected an integer .*got 0\.5"),
    (
        {"parameters": "*.attention.*"},
        r"parameters: .*got none: '\*\.attention\.\*' matches none of 20 names such as 'mo",
    ),
    ({"parameters": []}, r"parameters: expected at least one trainable parameter, got none"),
    ({"parameters": lambda name: False}, r"parameters: expected at least one trainable parameter, got none"),
]


@pytest.mark.parametrize(("settings", "message"), BAD_SETTINGS)
def test_bad_settings(settings: dict[str, Any], message: str, model: Any):
    with pytest.raises(ValueError, match=message):
        ff.DiagonalFisher(model, **settings)


def test_models_that_have_no_fisher(model: Any):
    with pytest.raises(ValueError, match=r"parameters: .*got none: all have requires_grad=False"):
        ff.DiagonalFisher(model.requires_grad_(False))
    config = BartConfig(vocab_size=50, d_model=16, encoder_layers=1, decoder_layers=1)
    with pytest.raises(ValueError, match=r"model: expected a causal language model, got the encoder-decoder Bart"):
        ff.DiagonalFisher(AutoModelForSeq2SeqLM.from_config(config))
    with pytest.raises(
        ValueError, match=r"model: expected a causal language model with an output embedding, got Linear"
    ):
        ff.DiagonalFisher(nn.Linear(2, 2))


ONES = torch.ones(4, 12, dtype=torch.int64)
BAD_BATCHES = [
    ({"input_ids": [[1, 2]]}, TypeError, r"input_ids: expected a tensor, got list; call torch.tensor"),
    ({"input_ids": ONES[0]}, ValueError, r"input_ids: expected shape \[B, T\].*got \(12,\); add \[None\]"),
    ({"input_ids": ONES * 131}, ValueError, r"input_ids: expected values in \[0, 131\), got 131 at row 0, token 0"),
    (
        {"labels": ONES[:, 1:]},
        ValueError,
        r"labels: expected shape \[B, T\] = \(4, 12\), got \(4, 11\); pass unshifted",
    ),
    ({"labels": ONES * -1}, ValueError, r"labels: expected values in \[0, 131\) or -100, got -1 at row 0"),
    ({"labels": ONES.float()}, TypeError, r"labels: expected int64, got float32; call .long\(\)"),
    ({"attention_mask": ONES[:3]}, ValueError, r"attention_mask: expected shape \[B, T\] = \(4, 12\), got \(3, 12\)"),
    ({"attention_mask": ONES[:, None, None]}, ValueError, r"attention_mask: expected shape .*got \(4, 1, 1, 12\)"),
    ({"position_ids": ONES[:1]}, ValueError, r"position_ids: expected shape \[B, T\] = \(4, 12\), got \(1, 12\)"),
    ({"position_ids": ONES * -1}, ValueError, r"position_ids: expected values >= 0, got -1 at row 0, token 0; count"),
    ({"input_ids": torch.ones(1, 80, dtype=torch.int64)}, None, ""),  # rotary positions have no table that ends
    ({"weights": [1, 1, 1]}, ValueError, r"weights: expected shape \[B\] = \(4,\), got \(3,\); pass one for every"),
    ({"weights": [1, 1, -1, 1]}, ValueError, r"weights: expected finite numbers >= 0, got others"),
    ({"weights": [1, 1, float("nan"), 1]}, ValueError, r"weights: expected finite numbers >= 0, got others"),
    ({"example_ids": ["a", "b"]}, ValueError, r"example_ids: expected 4, one an example, got 2"),
]


@pytest.mark.parametrize(("changes", "kind", "message"), BAD_BATCHES)
def test_bad_batches(
    changes: dict[str, Any], kind: type[Exception] | None, message: str, model: Any, batch: dict[str, Tensor]
):
    fisher = ff.DiagonalFisher(model)
    fisher.update(**batch)
    before = bits(fisher)
    if kind is None:
        fisher.update(**changes)
        return
    with pytest.raises(kind, match=message):
        fisher.update(**({} if "input_ids" in changes else batch) | changes)
    assert same(bits(fisher), before)
    fisher.update(**batch)


def test_nothing_to_read_before_an_update(model: Any, tmp_path: Any):
    fisher = ff.DiagonalFisher(model)
    for read in (fisher.diagonal, lambda: fisher.save(tmp_path / "f.safetensors")):
        with pytest.raises(ValueError, match=r"fisher: expected at least one example .*call update\(\) first"):
            read()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("per", ["example", "position", "batch_mean"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_loss_that_is_not_finite(per: str, first: bool, batch: dict[str, Tensor]):
    model = build("Llama", torch.float64).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = torch.nan
    fisher = ff.DiagonalFisher(model, per=per)
    if not first:
        fisher.update(**batch)
    before = bits(fisher)
    bad = batch | {"input_ids": batch["input_ids"].clone()}
    bad["input_ids"][[0, 3], 2] = 1
    with pytest.raises(NonFiniteError, match=r"loss: expected finite .* for examples a, d; leave them out") as raised:
        fisher.update(**bad, example_ids=list("abcd"))
    assert raised.value.examples == ["a", "d"]
    assert same(bits(fisher), before)
    fisher.update(**batch)
    other = ff.DiagonalFisher(model, per=per)
    for _ in range(1 if first else 2):
        other.update(**batch)
    assert same(bits(fisher), bits(other))


class Exploding(torch.autograd.Function):
    """The value of its input; a gradient of one row that is infinite."""

    row: int | None = None

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[override]
        grad = grad.clone()
        if Exploding.row is not None:
            grad[Exploding.row, 1] = torch.inf
        return grad


@pytest.mark.parametrize("parameters", [None, "*layers.1.mlp.*", "*layernorm*", "*embed*"])
@pytest.mark.parametrize("per", ["example", "position", "batch_mean"])
def test_a_gradient_that_is_not_finite(
    per: str, parameters: str | None, batch: dict[str, Tensor], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
):
    model = build("Llama", torch.float64, hidden_size=96, intermediate_size=96)
    model.model.norm.register_forward_hook(lambda module, args, output: Exploding.apply(output))
    fisher = ff.DiagonalFisher(model, per=per, parameters=parameters)
    fisher.update(**batch)
    monkeypatch.setattr(Exploding, "row", 1)
    with pytest.raises(NonFiniteError, match=r"gradient: expected finite gradients, got NaN or infinity") as raised:
        fisher.update(**batch, example_ids=list("abcd"))
    monkeypatch.setattr(Exploding, "row", None)
    if per == "batch_mean":  # found before anything was added
        assert all(value.isfinite().all() for value in fisher.diagonal().values())
        return
    told_apart = parameters == "*embed*" or (per == "example" and parameters != "*layers.1.mlp.*")
    assert raised.value.examples == (["b"] if told_apart or parameters is None else list("abcd"))
    for use in (fisher.diagonal, lambda: fisher.save(tmp_path / "f.safetensors"), lambda: fisher.update(**batch)):
        with pytest.raises(
            ValueError, match=r"fisher: the estimate is invalid: .*start again with a new DiagonalFisher"
        ):
            use()
    assert not list(tmp_path.iterdir())


# Models ---------------------------------------------------------------------------------------------------------------


def test_an_embedding_with_more_rows_than_the_head(model: Any, batch: dict[str, Tensor], examples: list[Tensor]):
    """The tokens that the rules are chosen on have a logit."""
    model.model.embed_tokens = nn.Embedding(8000, 32, dtype=torch.float64)
    fisher = ff.DiagonalFisher(model)
    fisher.update(**batch)
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)


def test_no_cache_by_keyword_arguments(model: Any, batch: dict[str, Tensor]):
    """Some classes pass `use_cache` on without naming it."""
    original, caches = model.forward, []

    def forward(input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        caches.append(kwargs.get("use_cache"))
        return original(input_ids, attention_mask, **kwargs)

    model.forward = forward
    ff.DiagonalFisher(model).update(**batch)
    assert set(caches) == {False}


def test_trained_rows_of_a_tied_embedding_are_refused():
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[3, 5])
    model = get_peft_model(build("Llama, tied", torch.float64), config)
    with pytest.raises(ValueError, match=r"model: PEFT's trainable_token_indices on an output embedding that is tied"):
        ff.DiagonalFisher(model)


# Its state ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["example", "position", "batch_mean"])
def test_continuing_from_a_state_gives_the_same_bits(per: str, model: Any, examples: list[Tensor]):
    batches = [padded(examples[:2], "left"), padded(examples[1:], "right"), padded(examples, "right")]
    batches[1]["labels"] = batches[1]["input_ids"].clone()
    batches[1]["labels"][0] = IGNORE
    whole, first, second = (ff.DiagonalFisher(model, per=per) for _ in range(3))
    for one in batches:
        whole.update(**one)
    first.update(**batches[0])
    first.update(**batches[1])
    second.load_state_dict(bits(first))
    second.update(**batches[2])
    assert same(bits(second), bits(whole))
    assert same(second.diagonal(), whole.diagonal())
    assert second.metadata == whole.metadata


def test_a_state_of_something_else(model: Any, batch: dict[str, Tensor]):
    fisher = ff.DiagonalFisher(model)
    fisher.update(**batch)
    before, state = bits(fisher), bits(fisher)
    name = "sum.model.norm.weight"
    for wrong in (
        {key: value for key, value in state.items() if key != name},
        state | {name: state[name][:5]},
        state | {"sum.other": state[name]},
        {},
    ):
        with pytest.raises(ValueError, match=r"state: expected the names and shapes of this model, got others for "):
            fisher.load_state_dict(wrong)
    assert same(bits(fisher), before)


def test_a_state_of_another_quantity(model: Any, batch: dict[str, Tensor]):
    """Named by what differs; states of older versions, which do not say what they are, are taken."""
    fisher = ff.DiagonalFisher(model, labels="sampled", samples=2)
    fisher.update(**batch)
    state = bits(fisher)
    for options, names in (
        ({"labels": "sampled"}, "samples"),
        ({"per": "position", "loss": "sum"}, "per, labels, loss, samples"),
        ({"labels": "sampled", "samples": 2, "loss": "sum"}, "loss"),
    ):
        other = ff.DiagonalFisher(model, **options)
        with pytest.raises(ValueError, match=rf"state: expected .* convention, .*got others by {names}; make"):
            other.load_state_dict(state)
        assert not bool(other.state_dict()["counters"].any())
    del state["convention"]
    fresh = ff.DiagonalFisher(model, labels="sampled", samples=2)
    fresh.load_state_dict(state)
    assert same(fresh.diagonal(), fisher.diagonal())


def test_a_state_of_an_invalid_estimate_is_refused(
    model: Any, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
):
    """Loading it would make the estimate valid again."""
    fisher = ff.DiagonalFisher(model)
    fisher.update(**batch)

    def fail(*_: Any) -> None:
        raise RuntimeError("on purpose")

    monkeypatch.setattr("fastforget.fisher.gradients.Elementwise.reduce_", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        fisher.update(**batch)
    with pytest.raises(ValueError, match="the estimate is invalid"):
        fisher.state_dict()
