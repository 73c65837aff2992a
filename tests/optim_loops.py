"""The steps of `ff.optim` as plain loops in float64, and the models that its tests move."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_registry import interpreter_problem
from torch import Tensor, nn

import fastforget as ff

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)
IMPLEMENTATIONS = ["torch", INTERPRETER]
SHAPES = {"weight": (3, 5), "bias": (5,), "table": (7, 2, 3), "scale": (1,), "empty": (0, 4), "number": ()}


class Toy(nn.Module):
    """Parameters of the given shapes."""

    def __init__(self, shapes: dict[str, tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float32, seed: int = 0):
        super().__init__()
        values = named_randn(shapes, seed)
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.to(dtype)))

    def take(self, grads: dict[str, Tensor | None]) -> None:
        """Set the gradients, None for none."""
        for name, parameter in self.named_parameters():
            grad = grads[name]
            parameter.grad = None if grad is None else grad.to(parameter).clone()

    def values(self) -> dict[str, Tensor]:
        """Copies of the parameters."""
        return {name: parameter.detach().clone() for name, parameter in self.named_parameters()}


def named_randn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def some_gradients(
    shapes: dict[str, tuple[int, ...]], steps: int, seed: int = 1, absent: float = 0.2
) -> list[dict[str, Tensor | None]]:
    """Gradients of some steps; some parameters have none at some steps."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for step in range(steps):
        grads: dict[str, Tensor | None] = dict(named_randn(shapes, seed + 1000 * (step + 1)))
        for name in shapes:
            if float(torch.rand((), generator=generator)) < absent:
                grads[name] = None
        result.append(grads)
    return result


def some_additions(shapes: dict[str, tuple[int, ...]], seed: int = 5) -> dict[str, dict[str, Tensor]]:
    """A Fisher, an anchor and a mask."""
    fisher = {name: value.square() for name, value in named_randn(shapes, seed).items()}
    mask = {name: value > -0.5 for name, value in named_randn(shapes, seed + 2).items()}
    return {"fisher": fisher, "anchor": named_randn(shapes, seed + 1), "mask": mask}


class Loop:
    """The documented step, parameter by parameter, in float64."""

    def __init__(
        self, rule: Callable[..., Tensor], values: dict[str, Tensor], options: dict[str, Any], fisher: Any = None,
        fisher_decay: float | None = None, anchor: Any = None, ewc_lambda: float = 0.0, mask: Any = None,
        min_fisher: float = -math.inf, max_fisher: float = math.inf, soft_weight: float = 0.0,
    ):  # fmt: skip
        self.theta = {name: value.double() for name, value in values.items()}
        self.fisher = {
            name: torch.zeros_like(v) if fisher is None else fisher[name].double() for name, v in self.theta.items()
        }
        self.anchor, self.mask, self.rule, self.options = anchor, mask, rule, options
        self.decay, self.pull, self.soft = fisher_decay, ewc_lambda, soft_weight
        self.low, self.high = min_fisher, max_fisher
        self.state: dict[str, dict[str, Any]] = {name: {} for name in values}

    def step(self, grads: dict[str, Tensor | None]) -> None:
        everything = torch.cat([value.flatten() for value in self.fisher.values()])
        mean = float(everything.mean())
        for name, grad in grads.items():
            if grad is None:
                continue
            theta, fisher, g = self.theta[name], self.fisher[name], grad.double()
            steered = -g if self.options.get("maximize") else g
            if self.pull:
                steered = steered + self.pull * fisher * (theta - self.anchor[name].double())
            new = self.rule(theta, steered, self.state[name], **self.options)
            if self.soft and mean:
                new = theta + (new - theta) / (1 + self.soft * fisher / mean)
            moves = (fisher >= self.low) & (fisher < self.high)
            if self.mask is not None:
                moves &= self.mask[name]
            self.theta[name] = torch.where(moves, new, theta)
            if self.decay is not None:
                self.fisher[name] = self.decay * fisher + g**2


def adamw(
    theta: Tensor, g: Tensor, state: dict[str, Any], lr: float = 1e-3, betas: Sequence[float] = (0.9, 0.999), eps: float = 1e-8,
    weight_decay: float = 1e-2, amsgrad: bool = False, maximize: bool = False,
) -> Tensor:  # fmt: skip
    t = state["t"] = state.get("t", 0) + 1
    m = state["m"] = betas[0] * state.get("m", 0.0) + (1 - betas[0]) * g
    v = state["v"] = betas[1] * state.get("v", 0.0) + (1 - betas[1]) * g**2
    if amsgrad:
        v = state["largest"] = torch.maximum(v, state.get("largest", v))
    return theta - lr * weight_decay * theta - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)


def sgd(
    theta: Tensor, g: Tensor, state: dict[str, Any], lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0,
    weight_decay: float = 0.0, nesterov: bool = False, maximize: bool = False,
) -> Tensor:  # fmt: skip
    g = g + weight_decay * theta
    if momentum:
        b = state["b"] = momentum * state["b"] + (1 - dampening) * g if "b" in state else g
        g = g + momentum * b if nesterov else b
    return theta - lr * g


PAIRS = {"AdamW": (ff.optim.AdamW, torch.optim.AdamW, adamw), "SGD": (ff.optim.SGD, torch.optim.SGD, sgd)}
NUMBERS: dict[str, dict[str, Any]] = {"AdamW": {"lr": 0.1, "amsgrad": True}, "SGD": {"lr": 0.1, "momentum": 0.9}}

STEERED: dict[str, dict[str, Any]] = {
    "pull": {"fisher": True, "anchor": True, "ewc_lambda": 0.7},
    "mask": {"mask": True},
    "range": {"fisher": True, "min_fisher": 0.1, "max_fisher": 1.5},
    "soft": {"fisher": True, "soft_weight": 3.0},
    "accumulated": {"fisher_decay": 0.9},
    "accumulated and soft": {"fisher_decay": 0.9, "soft_weight": 2.0, "max_fisher": 4.0},
    "all": {"fisher": True, "fisher_decay": 0.5, "anchor": True, "ewc_lambda": 0.3, "mask": True}
    | {"min_fisher": 0.01, "max_fisher": 6.0, "soft_weight": 1.5},
}


def resolved(additions: dict[str, Any], shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Any]:
    tensors = some_additions(shapes)
    return {name: tensors[name] if value is True else value for name, value in additions.items()}


def walk(model: Toy, optimizer: torch.optim.Optimizer, gradients: list[dict[str, Tensor | None]]) -> None:
    for grads in gradients:
        model.take(grads)
        optimizer.step()


def assert_equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name


def assert_close(model: Toy, loop: Loop, tolerance: float) -> None:
    for name, value in model.values().items():
        worst = (value.double() - loop.theta[name]).abs().max() if value.numel() else 0.0
        assert worst <= tolerance, (name, float(worst))


def stepped(model: Toy, **options: Any) -> dict[str, Tensor]:
    """The parameters after three steps of AdamW."""
    optimizer = ff.optim.AdamW(model, lr=0.1, **options)
    walk(model, optimizer, some_gradients(SHAPES, 3, absent=0.0))
    return model.values()
