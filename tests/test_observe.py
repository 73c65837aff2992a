"""Riding on the caller's own step: what is refused, and what may happen inside."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.layouts import packed, padded, some_examples
from fisher_oracle import assert_exact, batch_1_fisher, float64_throughout
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastforget as ff
from fastforget.fisher.passes import NonFiniteError

IGNORE = -100


@pytest.fixture(autouse=True)
def only_float64() -> Iterator[None]:
    with float64_throughout():
        yield


@pytest.fixture(scope="module")
def examples() -> list[Tensor]:
    return some_examples(lengths=(15, 12, 4, 9))


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)}


@pytest.fixture
def batch(examples: list[Tensor]) -> dict[str, Tensor]:
    return with_labels(padded(examples, "right"))


def step(model: Any, batch: dict[str, Tensor]) -> None:
    model(**batch).loss.backward()


def bits(fisher: ff.DiagonalFisher) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in fisher.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# What is refused ------------------------------------------------------------------------------------------------------


def left_padded(batch: dict[str, Tensor], examples: list[Tensor]) -> dict[str, Tensor]:
    return with_labels(padded(examples, "left"))  # the first token's loss would be that of padding


def packed_whole(batch: dict[str, Tensor], examples: list[Tensor]) -> dict[str, Tensor]:
    found = packed(examples)
    return found | {"labels": found["input_ids"]}


def at_padding(batch: dict[str, Tensor], examples: list[Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": batch["input_ids"]}


def mask_4d(batch: dict[str, Tensor], examples: list[Tensor]) -> dict[str, Tensor]:
    width = batch["input_ids"].shape[1]
    return batch | {"attention_mask": torch.ones(4, 1, width, width, dtype=torch.bool).tril()}


def unlabelled(batch: dict[str, Tensor], examples: list[Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in batch.items() if name != "labels"}


def embedded(batch: dict[str, Tensor], examples: list[Tensor]) -> dict[str, Tensor]:
    zeros = torch.zeros(*batch["input_ids"].shape, 32, dtype=torch.float64)
    return {"inputs_embeds": zeros, "labels": batch["labels"]}


def as_it_is(batch: dict[str, Tensor], examples: list[Tensor]) -> dict[str, Tensor]:
    return batch


BAD_CALLS = [
    (left_padded, {}, r"labels: expected -100 at padding and at the first token of .*got a target at row 1, token 3"),
    (packed_whole, {}, r"labels: expected -100 at padding and at the first token of .*got a target at row 0, token 15"),
    (
        at_padding,
        {},
        r"labels: expected -100 at padding .*got a target at row 1, token 12: its loss belongs to another",
    ),
    (mask_4d, {}, r"attention_mask: expected shape \[B, T\] = \(4, 15\) .*got \(4, 1, 15, 15\); .*by position_ids"),
    (unlabelled, {}, r"observe: expected labels, got a call of the model without them; pass labels to the model"),
    (
        unlabelled,
        {"labels": torch.ones(4, 15, dtype=torch.int64)},
        r"loss_denominator: expected a number with a loss that is not the model's own, got None and a call .*without labels",
    ),
    (embedded, {}, r"observe: expected the model to be called with input_ids, got a call without them"),
    (
        as_it_is,
        {"labels": torch.ones(4, 14, dtype=torch.int64)},
        r"labels: expected .* = \(4, 15\), got \(4, 14\); pass",
    ),
    (as_it_is, {"labels": [[1, 2]]}, r"labels: expected a tensor, got list"),
    (as_it_is, {"loss_denominator": 0}, r"loss_denominator: expected a finite number > 0, got 0"),
    (as_it_is, {"loss_denominator": -8.5}, r"loss_denominator: expected a finite number > 0, got -8\.5"),
    (
        as_it_is,
        {"loss_denominator": torch.tensor(torch.nan)},
        r"loss_denominator: expected a finite number > 0, got nan",
    ),
    (
        as_it_is,
        {"weights": [1.0, 2.0]},
        r"weights: expected shape \[B\] = \(4,\), got \(2,\); pass one for every example",
    ),
    (as_it_is, {"weights": [1.0, 2.0, -1.0, 0.0]}, r"weights: expected finite numbers >= 0, got others"),
    (as_it_is, {"loss_factor": 0.0}, r"loss_factor: expected a finite number other than 0, got 0"),
    (as_it_is, {"loss_factor": torch.inf}, r"loss_factor: expected a finite number other than 0, got inf"),
]


@pytest.mark.parametrize(("change", "options", "message"), BAD_CALLS)
def test_bad_calls(
    change: Callable[..., Any], options: Any, message: str, model: Any, batch: dict[str, Tensor], examples: list[Tensor]
):
    fisher = ff.DiagonalFisher(model)
    with pytest.raises((ValueError, TypeError), match=message), fisher.observe(**options):
        step(model, change(batch, examples))
    assert not any(bool(value.any()) for value in fisher.state_dict().values())
    with fisher.observe():
        step(model, batch)
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)


@pytest.mark.parametrize("options", [{"weights": [1, 2, 3, 4]}, {"loss_denominator": 3}, {"labels": torch.ones(1, 1)}])
def test_what_a_step_has_no_use_for_is_refused(options: Any, model: Any, batch: dict[str, Tensor]):
    """The square of the caller's gradient has neither examples nor a scale that could be undone."""
    fisher = ff.DiagonalFisher(model, per="batch_mean")
    name = next(iter(options))
    with pytest.raises(ValueError, match=rf'{name}: .*per="batch_mean"'), fisher.observe(**options):
        step(model, batch)


def test_blocks_without_a_step(model: Any, batch: dict[str, Tensor]):
    fisher = ff.DiagonalFisher(model)
    nothing_inside = r"observe: expected loss.backward\(\) of an observed forward inside the `with` block, got "
    with pytest.raises(ValueError, match=nothing_inside + "no call of the model"), fisher.observe():
        pass
    with pytest.raises(ValueError, match=nothing_inside + "no call of the model"), fisher.observe(), torch.no_grad():
        model(**batch)
    with pytest.raises(ValueError, match=nothing_inside + "no backward"), fisher.observe():
        loss = model(**batch).loss
    with pytest.raises(ValueError, match=r"observe: a backward ran after its `with` block had ended"):
        loss.backward()
    before = model(**batch).loss
    with pytest.raises(ValueError, match=nothing_inside + "no call of the model"), fisher.observe():
        before.backward()
    sampled = ff.DiagonalFisher(model, labels="sampled")
    message = r'observe: expected labels="data", got "sampled".*use update\(\)'
    with pytest.raises(ValueError, match=message), sampled.observe():
        step(model, batch)
    assert not any(bool(value.any()) for value in fisher.state_dict().values())
    step_only = ff.DiagonalFisher(model, per="batch_mean")
    model.zero_grad()
    message = r"observe: expected loss.backward\(\) inside the `with` block, got no gradient"
    with pytest.raises(ValueError, match=message), step_only.observe():
        pass


def test_one_estimator_at_a_time(model: Any, batch: dict[str, Tensor], examples: list[Tensor]):
    fisher, other = ff.DiagonalFisher(model), ff.DiagonalFisher(model, per="batch_mean")
    unlabelled_batch = {name: value for name, value in batch.items() if name != "labels"}
    with fisher.observe():
        loss = model(**batch).loss
        for way in (lambda: fisher.update(**unlabelled_batch), lambda: other.update(**unlabelled_batch)):
            with pytest.raises(
                ValueError, match=r"fisher: an estimator is active on this model already; leave its `with"
            ):
                way()
        for one in (fisher, other):
            with pytest.raises(ValueError, match=r"fisher: an estimator is active on this model"), one.observe():
                pass
        loss.backward()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)
    other.update(**unlabelled_batch)


def test_parameters_that_change_before_the_backward(model: Any, batch: dict[str, Tensor]):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step(model, batch)
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        loss = model(**batch).loss
        optimizer.step()
        with pytest.raises(
            ValueError, match=r"model: .* was changed between the forward and the backward; step the opt"
        ):
            loss.backward()
        step(model, batch)


def test_a_module_that_draws_random_numbers(batch: dict[str, Tensor]):
    """It cannot be computed again example by example; in eval mode it can."""

    class Dropping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.dropout = nn.Parameter(torch.ones(3, 32, dtype=torch.float64)), nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + torch.einsum("bth,kh->bth", self.dropout(x), self.weight)

    model = build("Llama", torch.float64).train()
    model.model.norm = nn.Sequential(model.model.norm, Dropping())
    fisher = ff.DiagonalFisher(model)
    with pytest.warns(UserWarning, match="exact, but slow, .*Dropping"):
        fisher.update(batch["input_ids"])
    message = r"model: model.norm.1 \(Dropping\) draws random .*turn its dropout off, or use update\(\)"
    with pytest.raises(ValueError, match=message), fisher.observe():
        step(model, batch)
    model.eval()
    model.zero_grad()
    with fisher.observe():
        step(model, batch)


def test_batch_statistics_in_training_mode_are_refused(batch: dict[str, Tensor]):
    class Columns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(32, dtype=torch.float64)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x.transpose(1, 2)).transpose(1, 2)

    model = build("Llama", torch.float64).train()
    model.model.norm = nn.Sequential(model.model.norm, Columns())
    fisher = ff.DiagonalFisher(model)
    with pytest.warns(UserWarning, match="exact, but slow, .*norm.1.norm"):
        fisher.update(batch["input_ids"])
    before = [value.clone() for value in model.state_dict().values()]
    with pytest.raises(ValueError, match=r"model.*norm\.1\.norm"), fisher.observe():
        step(model, batch)
    model.model.norm[1].norm.num_batches_tracked.zero_()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before, strict=True))


@pytest.mark.parametrize("per", ["example", "batch_mean"])
def test_what_is_not_finite(per: str, model: Any, batch: dict[str, Tensor]):
    fisher = ff.DiagonalFisher(model, per=per)
    with fisher.observe():
        step(model, batch)
    before = bits(fisher)
    kept = model.model.norm.weight[3].item()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.inf
    model.zero_grad()
    message = r"expected (a finite loss of the observed call|finite gradients), got"
    with pytest.raises(NonFiniteError, match=message), fisher.observe():
        step(model, batch)
    assert same(bits(fisher), before)
    with torch.no_grad():
        model.model.norm.weight[3] = kept
    model.zero_grad()
    with fisher.observe():
        step(model, batch)
    if per == "example":
        spoil = lambda grad: grad * torch.where(torch.arange(4) == 2, torch.inf, 1.0)[:, None, None]  # noqa: E731
        handle = model.model.norm.register_forward_hook(lambda m, args, output: output.register_hook(spoil) and None)
        with pytest.raises(NonFiniteError, match=r"gradient: .*for example 10; .*invalid now"), fisher.observe():
            step(model, batch)
        handle.remove()
        with pytest.raises(ValueError, match="the estimate is invalid"), fisher.observe():
            pass


@pytest.mark.parametrize("factor", [0.0, torch.inf])
def test_a_loss_that_is_multiplied_away(factor: float, model: Any, batch: dict[str, Tensor], examples: list[Tensor]):
    """What reaches the model's loss is divided by: a caller that skips a micro-batch by a factor 0 has to leave it out."""
    fisher = ff.DiagonalFisher(model)
    message = rf"loss: expected a finite factor other than 0 .*got {factor}.*leave the call out of the observed block"
    with pytest.raises(ValueError, match=message), fisher.observe():
        (model(**batch).loss * factor).backward()
    assert not any(bool(value.any()) for value in fisher.state_dict().values())
    with fisher.observe():
        (model(**batch).loss * 1e-100).backward()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)
    with pytest.raises(ValueError, match=message), fisher.observe():
        torch.stack([model(**batch).loss * by for by in (factor, 1.0)]).sum().backward()
    with pytest.raises(ValueError, match="the estimate is invalid"):
        fisher.diagonal()


def test_a_part_of_the_model_with_gradients(model: Any, batch: dict[str, Tensor]):
    """Its gradients would be taken for the last call's."""
    fisher = ff.DiagonalFisher(model)
    message = r"observe: model.norm was called with gradients, but not in a call of the model; .*torch.no_grad\(\)"
    with fisher.observe():
        hidden = model(**batch, output_hidden_states=True).hidden_states[-1]
        with pytest.raises(ValueError, match=message):
            model.model.norm(hidden)
        step(model, batch)


# The loss that is differentiated --------------------------------------------------------------------------------------


def from_logits(model: Any, batch: dict[str, Tensor], divisor: float) -> Tensor:
    logits, labels = model(**batch).logits[:, :-1], batch["labels"][:, 1:]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / divisor


def test_a_loss_from_the_logits_has_to_say_its_denominator(
    model: Any, batch: dict[str, Tensor], examples: list[Tensor]
):
    fisher, expected = ff.DiagonalFisher(model), batch_1_fisher(model, examples)
    message = r"loss_denominator: .*does not pass through the loss of the model's output; .*loss_factor=1 for its mean"
    with pytest.raises(ValueError, match=message), fisher.observe():
        from_logits(model, batch, 3.0).backward()
    assert not any(bool(value.any()) for value in fisher.state_dict().values())
    targets = int((batch["labels"][:, 1:] != IGNORE).sum())
    known: list[tuple[float, dict[str, Any]]] = [(3.0, {"loss_denominator": 3.0}), (targets, {"loss_factor": 1})]
    for divisor, options in known:
        fisher = ff.DiagonalFisher(model)
        with fisher.observe(**options):
            from_logits(model, batch, divisor).backward()
        assert_exact(fisher.diagonal(), expected, torch.float64)


def test_the_factor_of_a_tuples_loss_is_found(model: Any, batch: dict[str, Tensor], examples: list[Tensor]):
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        (model(**batch, return_dict=False)[0] / 3).backward()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)


class Hidden(dict):
    """An output of a fused loss: attributes without logits."""

    __getattr__ = dict.get


def with_log_probs(model: Any) -> None:
    """A forward that gives the targets' log-likelihoods, as TRL's."""
    original = model.forward

    @functools.wraps(original)
    def forward(*args: Any, labels: Tensor | None = None, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        if labels is None:
            return output
        target = labels[:, 1:]
        picked = output.logits[:, :-1].log_softmax(-1).gather(2, target.clamp(min=0)[..., None])[..., 0]
        log_probs = picked.masked_fill(target == IGNORE, 0)
        return Hidden(loss=-log_probs.sum() / (target != IGNORE).sum(), log_probs=log_probs)

    model.forward = forward


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_the_factor_of_a_sum_of_log_likelihoods_is_found(
    loss: str, model: Any, batch: dict[str, Tensor], examples: list[Tensor]
):
    expected = batch_1_fisher(model, examples, None, [0.5, 0.0, 2.0, 1.0], loss)
    with_log_probs(model)
    for objective in (lambda output: -output.log_probs.sum() / 7, lambda output: output.loss / 3):
        fisher = ff.DiagonalFisher(model, loss=loss)
        with fisher.observe(weights=[0.5, 0.0, 2.0, 1.0]):
            objective(model(**batch)).backward()
        assert_exact(fisher.diagonal(), expected, torch.float64)
    fisher = ff.DiagonalFisher(model)
    message = r"loss: expected the same factor for the log-likelihood of every target, got -"
    with pytest.raises(ValueError, match=message), fisher.observe():
        model(**batch).log_probs.exp().sum().neg().backward()  # weighted by the probabilities
    assert not any(bool(value.any()) for value in fisher.state_dict().values())


def unshifted(logits: Tensor, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def shifted(logits: Tensor, labels: Tensor, **options: Any) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), **options)


def smoothed(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted(logits, labels, label_smoothing=0.1)


def by_class(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted(logits, labels, weight=torch.linspace(0.5, 1.5, logits.shape[-1], dtype=logits.dtype))


def mean_of_means(logits: Tensor, labels: Tensor) -> Tensor:
    each = nn.functional.cross_entropy(logits[:, :-1].mT, labels[:, 1:], reduction="none")
    return (each.sum(1) / (labels[:, 1:] != IGNORE).sum(1)).mean()


def with_a_constant(logits: Tensor, labels: Tensor) -> Tensor:
    return shifted(logits, labels) + 0.01  # as an auxiliary loss, which does not depend on the logits


@pytest.mark.parametrize("way", ["logits", "tuple", "fused"])
@pytest.mark.parametrize("loss", [unshifted, smoothed, by_class, mean_of_means, with_a_constant, shifted])
def test_another_loss_of_the_model_is_refused(
    loss: Callable[..., Tensor], way: str, model: Any, batch: dict[str, Tensor], examples: list[Tensor]
):
    """By its gradient at the logits; where there are none, by its values. Nothing else of the caller's step changes."""
    model.loss_function = lambda logits, labels, vocab_size, **_: loss(logits, labels)
    expected = batch_1_fisher(model, examples)  # of the logits' own loss
    options = {"return_dict": False} if way == "tuple" else {}
    if way == "fused":
        original = model.forward

        @functools.wraps(original)
        def fused(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            return output if kwargs.get("labels") is None else Hidden(loss=output.loss)

        model.forward = fused
    fisher = ff.DiagonalFisher(model)
    if loss is not shifted:
        message = r"model: its loss is another than the mean negative log-likelihood of the shifted labels"
        with pytest.raises(ValueError, match=message), fisher.observe():
            model(**batch, **options)
        return
    model.train()
    step(model, batch)
    alone = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    with fisher.observe():
        output = model(**batch, **options)
        assert all(parameter.grad is None for parameter in model.parameters())
        (output[0] if way == "tuple" else output.loss).backward()
    assert all(torch.equal(parameter.grad, alone[name]) for name, parameter in model.named_parameters())
    assert_exact(fisher.diagonal(), expected, torch.float64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_models_own_loss_in_sixteen_bits(dtype: torch.dtype, batch: dict[str, Tensor]):
    model = build("Llama", dtype)
    step_of = ff.DiagonalFisher(model)
    with step_of.observe():
        step(model, batch)
    assert step_of._watched.loss_checked
    model.loss_function = lambda logits, labels, vocab_size, **_: mean_of_means(logits.float(), labels)
    with pytest.raises(ValueError, match="model: its loss is another"), ff.DiagonalFisher(model).observe():
        step(model, batch)


def test_a_model_that_computes_otherwise_in_training(batch: dict[str, Tensor]):
    """Its rules are chosen in eval mode."""
    model = build("Gemma 3n", torch.float64).train()
    message = r"model: .*altup.* was used where no rule sees it .*call model.eval\(\) if training is what changes them"
    with pytest.raises(ValueError, match=message), ff.DiagonalFisher(model).observe():
        step(model, batch)


# What is allowed inside -----------------------------------------------------------------------------------------------


def test_an_evaluation_inside(model: Any, batch: dict[str, Tensor], examples: list[Tensor]):
    """Calls without gradients are the caller's own business, whatever their shape; rules stay as they were chosen."""
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        loss = model(**batch).loss
        tiers = [owner.tier for owner in fisher._watched.owners]
        with torch.no_grad():
            model(input_ids=batch["input_ids"][:3, :5])
            model.model(input_ids=batch["input_ids"][:2, :5])
            model.generate(batch["input_ids"][:1, :4], max_new_tokens=2, do_sample=False)
        loss.backward()
    assert [owner.tier for owner in fisher._watched.owners] == tiers
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)


@pytest.mark.parametrize("loss", ["mean", "sum"])
def test_packed_rows_weights_and_several_calls_before_the_backward(loss: str, model: Any, examples: list[Tensor]):
    rows, weights = packed(examples), [0.5, 0.0, 2.0, 1.0]
    labels = rows["input_ids"].masked_fill(rows["position_ids"] == 0, IGNORE)
    fisher = ff.DiagonalFisher(model, loss=loss)
    with fisher.observe(weights=weights, loss_denominator=2 * int((labels != IGNORE).sum())):
        together = [model(**rows, labels=labels, use_cache=False).loss / 2 for _ in range(2)]
        (together[0] + together[1]).backward()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples, None, weights, loss), torch.float64)
    assert fisher.metadata["examples"] == 8


def test_the_square_of_a_step(model: Any, batch: dict[str, Tensor]):
    """Micro-batches add up to one step, once a block; an old gradient has to be gone."""
    fisher = ff.DiagonalFisher(model, per="batch_mean")
    squares = []
    for count in (1, 2):
        model.zero_grad()
        with fisher.observe():
            for _ in range(count):
                step(model, batch)
        squares.append({name: p.grad.square() for name, p in model.named_parameters()})
    expected = {name: (squares[0][name] + squares[1][name]) / 2 for name in squares[0]}
    assert_exact(fisher.diagonal(), expected, torch.float64)
    before = bits(fisher)
    message = r'observe: with per="batch_mean" .*call optimizer.zero_grad\(\) before it'
    with pytest.raises(ValueError, match=message), fisher.observe():
        step(model, batch)
    assert same(bits(fisher), before)
    model.zero_grad(set_to_none=False)
    with fisher.observe():
        step(model, batch)


# Checkpoints ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def micro_batches(examples: list[Tensor]) -> list[dict[str, Tensor]]:
    return [with_labels(padded(examples[:2], "right")), with_labels(padded(examples[1:], "right"))]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["Llama, tied", "GPT-2"])
def test_gradient_checkpointing_of_two_calls_before_the_backward(
    family: str, use_reentrant: bool, micro_batches: list[dict[str, Tensor]], examples: list[Tensor]
):
    """What the backward computes again belongs to the call that it was computed in."""
    model = build(family, torch.float64).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    before = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        first, second = (model(**batch).loss for batch in micro_batches)
        (first / 2 + second).backward()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, [*examples[:2], *examples[1:]]), torch.float64)
    with pytest.raises(RuntimeError, match="on purpose"), fisher.observe():
        raise RuntimeError("on purpose")
    assert [vars(module).get("_gradient_checkpointing_func") for module in model.modules()] == before


class Checkpointed(nn.Module):
    """A checkpoint of the model's own code, in training."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.linear, self.use_reentrant = nn.Linear(32, 32, dtype=torch.float64), use_reentrant

    def forward(self, x: Tensor) -> Any:
        y = checkpoint(self.linear, x, use_reentrant=self.use_reentrant) if self.training else self.linear(x)
        return x + y


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_of_the_models_own(
    use_reentrant: bool, micro_batches: list[dict[str, Tensor]], examples: list[Tensor]
):
    """Only one call can be meant where each call's backward comes before the next call."""
    model = build("Llama", torch.float64)
    model.model.norm = nn.Sequential(model.model.norm, Checkpointed(use_reentrant))
    model.train()
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        for batch in micro_batches:
            step(model, batch)
    assert_exact(fisher.diagonal(), batch_1_fisher(model, [*examples[:2], *examples[1:]]), torch.float64)
    message = r"model: a checkpoint of its own computes model.norm.1.linear again, for one of 2 calls; run every call's"
    with pytest.raises(ValueError, match=message), fisher.observe():
        torch.stack([model(**batch).loss for batch in micro_batches]).sum().backward()
