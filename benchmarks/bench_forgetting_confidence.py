"""The forgetting confidence of a batch, beside a loop of batch size 1 over the definition.

The loop is what the formula says: a forward and backward an example, and `1/2 sum F (theta - alpha g - theta_L)^2` without its
constant, by multi-tensor operations. The first result is compared with the same loop in float64, by the spread over examples.
The ceiling is an ordinary forward + backward, which scores nothing. Model and batch are those of `bench_diagonal_fisher.py`.

Units: tokens a second. Peak memory is what one call needs above the model, the Fisher and the anchor.
"""

# pyright: reportPrivateImportUsage=false
# (multi-tensor functions are exported by use)

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from bench_diagonal_fisher import CASES, random_model
from conftest import TURNS
from fisher_peers import loss_of
from torch import Tensor

import fastforget as ff

ALPHA = 1e-3
Tensors = dict[str, Tensor]


def loop(model: Any, ids: Tensor, fisher: Tensors, anchor: Tensors) -> Tensor:
    """Example by example, `[B]` float64."""
    parameters = dict(model.named_parameters())
    names = list(fisher)
    delta = torch._foreach_sub([parameters[n].detach() for n in names], [anchor[n] for n in names])
    pull = torch._foreach_mul(delta, [fisher[n] for n in names])
    results = []
    for b in range(len(ids)):
        model.zero_grad()
        loss_of(model, ids[b : b + 1]).backward()
        gradients = [parameters[n].grad for n in names]
        dot = sum(torch.vdot(p.flatten(), g.flatten()).double() for p, g in zip(pull, gradients, strict=True))
        squares = torch._foreach_mul(gradients, gradients)
        norm = sum(torch.vdot(fisher[n].flatten(), s.flatten()).double() for n, s in zip(names, squares, strict=True))
        results.append(-ALPHA * dot + ALPHA**2 / 2 * norm)
    model.zero_grad()
    return torch.stack(results)


@pytest.fixture(scope="module", params=CASES["cuda" if torch.cuda.is_available() else "cpu"], ids=str)
def problem(request: pytest.FixtureRequest, device: torch.device) -> dict[str, Any]:
    """A random model and batch, a Fisher, an anchor, and the scores in float64."""
    case = request.param
    model, ids = random_model(case, device)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    fisher = {name: torch.rand_like(p, dtype=torch.float32) for name, p in parameters.items()}
    anchor = {name: p + 0.01 * torch.randn_like(p) for name, p in parameters.items()}
    wide = copy.deepcopy(model).double()
    expected = loop(wide, ids, *({n: v.double() for n, v in tensors.items()} for tensors in (fisher, anchor)))
    return {"case": case, "model": model, "ids": ids, "fisher": fisher, "anchor": anchor, "expected": expected}


def ordinary(problem: dict[str, Any]) -> None:
    """A training step without its update."""
    loss_of(problem["model"], problem["ids"]).backward()
    problem["model"].zero_grad()


def fused(problem: dict[str, Any]) -> Tensor:
    """One forward and backward."""
    given = {name: problem[name] for name in ("fisher", "anchor")}
    return ff.forgetting_confidence(problem["model"], problem["ids"], alpha=ALPHA, **given)


def batch_1(problem: dict[str, Any]) -> Tensor:
    """The definition."""
    return loop(*(problem[name] for name in ("model", "ids", "fisher", "anchor")))


VARIANTS: dict[str, Callable[[dict[str, Any]], Tensor | None]] = {
    "ordinary forward + backward (ceiling)": ordinary,
    "fastforget": fused,
    "batch-1 loop": batch_1,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("turn", range(TURNS))
def test_forgetting_confidence(variant, turn, problem, measure):
    """One batch."""
    expected, run = problem["expected"], VARIANTS[variant]
    ceiling = variant.startswith("ordinary")

    def scored() -> Any:
        found = run(problem)
        return None if ceiling else (found - expected) / (expected.max() - expected.min())

    measure(
        f"forgetting confidence, {problem['case']}",
        variant,
        scored,
        None if ceiling else torch.zeros_like(expected),
        tolerance=1e-4 if problem["case"].dtype == torch.float32 else 5e-2,
        work=problem["ids"].numel(),
        unit="tokens/s",
    )
