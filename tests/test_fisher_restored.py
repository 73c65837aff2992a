"""The model after `update` and `observe`, whatever happened inside: the same objects with the same bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.fisher_steps import with_labels
from torch import Tensor, nn

import fastforget as ff

pytestmark = pytest.mark.usefixtures("only_float64")


TROUBLES = {
    "none": contextlib.nullcontext,
    "bad argument": lambda: pytest.raises(ValueError, match="weights: "),
    "forward": lambda: pytest.raises(RuntimeError, match="on purpose"),
    "interrupt": lambda: pytest.raises(KeyboardInterrupt),
    "loss": lambda: pytest.raises(ValueError, match=r"loss|gradient"),
    "backward": lambda: pytest.raises(RuntimeError, match="on purpose"),
}


class Trouble:
    """A forward hook that makes what was asked for."""

    kind = "none"

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        if self.kind == "interrupt":
            raise KeyboardInterrupt
        if self.kind == "forward":
            self.fail()
        if self.kind == "backward" and output.requires_grad:
            output.register_hook(self.fail)
        return output * torch.nan if self.kind == "loss" else None

    def fail(self, *_: Any) -> None:
        raise RuntimeError("on purpose")


def contents(value: Any) -> Any:
    """What a module's attribute holds, one level down, by identity."""
    if isinstance(value, dict):
        return {key: id(item) for key, item in value.items()}
    return [id(item) for item in value] if isinstance(value, list | set) else None


@contextlib.contextmanager
def as_before(model: nn.Module, gradients: bool = True) -> Iterator[None]:
    """Nothing that belongs to the model is another object or has other bits afterwards."""

    def everything() -> list[Any]:
        attributes = [
            (key, id(v), contents(v)) for m in model.modules() for key, v in vars(m).items() if key != "training"
        ]
        flags = [(p.requires_grad, p._version, id(p.grad) if gradients else None) for p in model.parameters()]
        return [attributes, flags, [m.training for m in model.modules()], model.training, torch.is_grad_enabled()]

    def values() -> list[Tensor]:
        grads = [p.grad for p in model.parameters() if p.grad is not None and gradients]
        return [t.clone() for t in (*model.state_dict().values(), *grads, torch.get_rng_state())]

    kept = [parameter.grad for parameter in model.parameters()]  # held, so that no other object gets their ids
    objects, tensors = everything(), values()
    yield
    assert everything() == objects
    assert all(torch.equal(a, b) for a, b in zip(values(), tensors, strict=True))
    del kept


@pytest.mark.parametrize("way", ["update", "observe"])
@pytest.mark.parametrize("per", ["example", "batch_mean"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
@pytest.mark.parametrize("kind", TROUBLES)
def test_the_model_is_as_before(kind: str, first: bool, per: str, way: str, batch: dict[str, Tensor]):
    if kind == "bad argument" and (way, per) == ("observe", "batch_mean"):
        pytest.skip("takes no weights")
    model, trouble = build("GPT-2", torch.float64).train(), Trouble()
    model.transformer.h[0].mlp.dropout.eval()  # not every module in the same mode
    model.transformer.h[1].mlp.register_forward_hook(trouble)
    fisher = ff.DiagonalFisher(model, per=per)
    weights = {"weights": [1]} if kind == "bad argument" else {}

    def run() -> None:
        if way == "update":
            fisher.update(**batch, **weights)
            return
        with fisher.observe(**weights):
            torch.manual_seed(2)  # dropout
            model(**with_labels(batch)).loss.backward()

    if way == "update":
        for parameter in list(model.parameters())[::2]:
            parameter.grad = torch.randn_like(parameter)
    if not first:
        fisher.update(**batch)
    trouble.kind = kind
    gradients_remain = way == "update" or kind in ("forward", "interrupt", "bad argument", "loss")
    random = torch.get_rng_state()
    with as_before(model, gradients_remain) if way == "update" else unchanged(model), TROUBLES[kind]():
        run()
    if way == "observe":
        torch.set_rng_state(random)
    trouble.kind, weights = "none", {}
    if kind != "backward" or per == "batch_mean":
        model.zero_grad()
        run()
        assert fisher.metadata["examples"] > 0


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Attributes, flags and weights: the gradients and the random state are the caller's own step's."""
    attributes = [(key, id(v), contents(v)) for m in model.modules() for key, v in vars(m).items()]
    weights = [value.clone() for value in model.state_dict().values()]
    yield
    assert [(key, id(v), contents(v)) for m in model.modules() for key, v in vars(m).items()] == attributes
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), weights, strict=True))


# What `update` leaves alone -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["example", "batch_mean"])
def test_hooks_of_gradients_do_not_run(per: str, model: Any, batch: dict[str, Tensor]):
    """An optimizer that steps in such a hook would train the model."""
    fired = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    ff.DiagonalFisher(model, per=per).update(**batch)
    assert not fired


def test_a_parameter_that_is_trainable_since(batch: dict[str, Tensor]):
    """It is not watched, but its gradient is not left behind either."""
    model = build("Llama", torch.float64).eval()
    model.model.layers[0].requires_grad_(False)
    fisher = ff.DiagonalFisher(model)
    model.requires_grad_(True)
    with contextlib.suppress(ValueError):
        fisher.update(**batch)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("last", [1, 4], ids=["head", "body"])
def test_an_interrupt_while_squares_are_added(last: int, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch):
    """What was added before it makes the estimate invalid."""
    fisher = ff.DiagonalFisher(build("Llama", torch.float64))
    fisher.update(**batch)
    before = {name: value.clone() for name, value in fisher._sums.tensors.items()}

    calls = []

    def interrupt(*args: Any, **kwargs: Any) -> None:
        ff.ops.fisher_accumulate_(*args, **kwargs)
        calls.append(args)
        if len(calls) == last:
            raise KeyboardInterrupt

    monkeypatch.setattr("fastforget.fisher.reductions.fisher_accumulate_", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fisher.update(**batch)
    assert any(not torch.equal(value, before[name]) for name, value in fisher._sums.tensors.items())
    with pytest.raises(ValueError, match="the estimate is invalid"):
        fisher.diagonal()
