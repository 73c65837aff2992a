"""Rules that users register for modules of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.layouts import layouts, padded, some_examples
from fisher_oracle import assert_exact, batch_1_fisher, float64_throughout
from torch import Tensor, nn
from torch.nn import functional as F

import fastforget as ff
from fastforget.fisher import rules
from fastforget.fisher.gradients import Outer

H = 32


def randn(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3)


@pytest.fixture(autouse=True)
def only_float64() -> Iterator[None]:
    with float64_throughout():
        yield


@pytest.fixture(scope="module")
def examples() -> list[Tensor]:
    return some_examples(lengths=(15, 12, 2, 9))


def llama_with(module: nn.Module) -> Any:
    """A tiny Llama whose last hidden states go through the module."""
    model = build("Llama", torch.float64)
    model.model.norm = nn.Sequential(model.model.norm, module)
    return model.eval()


class Bilinear(nn.Module):
    """A product of two linear maps of the same weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = randn(H, H), randn(H)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + torch.einsum("bti,oi->bto", hidden, self.weight) + self.bias.square()


Rule = Callable[..., Mapping[str, Any]]


@pytest.fixture
def register() -> Iterator[Callable[[Rule], list[int]]]:
    """Register a rule for this test; the list grows with its calls."""

    def add(rule: Rule) -> list[int]:
        calls: list[int] = []

        @ff.fisher_rule(Bilinear)
        def counted(*args: Any) -> Mapping[str, Any]:
            calls.append(1)
            return rule(*args)

        return calls

    yield add
    del rules.MODULES[Bilinear.forward]


def right_rule(module: Bilinear, examples: Any, inputs: Mapping[str, Tensor], grads: tuple[Tensor, ...]) -> Any:
    d = examples.tokens(grads[0])
    one_hot = F.one_hot(examples.owners(d.shape[1]) + 1, examples.count + 1)[..., 1:].to(d.dtype)  # [R, n, B]
    bias = 2 * module.bias.detach() * torch.einsum("rnb,rno->bo", one_hot, d)
    return {"weight": Outer(examples.tokens(inputs["hidden"]), d), "bias": bias}


def test_a_rule_of_ones_own(register: Any, examples: list[Tensor]):
    calls = register(right_rule)
    model = llama_with(Bilinear())
    for batch in layouts(examples).values():
        fisher = ff.DiagonalFisher(model)
        fisher.update(**batch)  # and no warning
        assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)
    assert len(calls) == 6  # once to check it, and once a batch
    before = len(calls)

    class Child(Bilinear):
        def forward(self, hidden: Tensor) -> Tensor:
            return super().forward(hidden * 2)

    fisher = ff.DiagonalFisher(llama_with(Child()))
    with pytest.warns(UserWarning, match="exact, but slow, .*Child"):
        fisher.update(**padded(examples, "right"))
    assert len(calls) == before  # another forward, which the rule is not for
    assert_exact(fisher.diagonal(), batch_1_fisher(llama_with(Child()), examples), torch.float64)


def test_a_rule_without_positions(register: Any, examples: list[Tensor]):
    register(right_rule)
    fisher = ff.DiagonalFisher(llama_with(Bilinear()), per="position")
    with pytest.raises(ValueError, match=r'per: "position" is not defined for model.norm.1.bias.*per="example"'):
        fisher.update(**padded(examples, "right"))


def wrong_scale(*args: Any) -> Any:
    found = right_rule(*args)
    return found | {"bias": found["bias"] * 1.01}


def of_the_batch(*args: Any) -> Any:
    found = right_rule(*args)
    return found | {"bias": found["bias"].mean(0, keepdim=True).expand_as(found["bias"])}


def other_shape(*args: Any) -> Any:
    return right_rule(*args) | {"bias": torch.zeros(3, 7, dtype=torch.float64)}


def without_one(*args: Any) -> Any:
    return {"weight": right_rule(*args)["weight"]}


@pytest.mark.parametrize("rule", [wrong_scale, of_the_batch, other_shape, without_one])
def test_a_wrong_rule_is_found(rule: Rule, register: Any, examples: list[Tensor]):
    calls = register(rule)
    fisher = ff.DiagonalFisher(llama_with(Bilinear()))
    with pytest.raises(ValueError, match=r"fisher_rule: the rule of Bilinear .*model.norm.1: .*; correct it"):
        fisher.update(**padded(examples, "right"))
    assert calls
    assert not any(bool(value.any()) for value in fisher.state_dict().values())
