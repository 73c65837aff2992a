"""`fisher_accumulate_` and `square_accumulate_` beside what people use today.

Fisher: flop convention 2 S O I, the weight-gradient product alone; that product by the vendor's library, in the same run, is
the ceiling. Squares: bytes are one read of the gradient, one read and one write of the fisher; the ceiling is a copy of as
many bytes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import TURNS
from torch import Tensor

from fastforget import ops

# O, I of Llama 3 8B: a square projection and the way up of the multilayer perceptron. CPU: the way up of a model
# with H 256, and a part of its head.
LAYERS = {"cpu": ((688, 256), (8192, 256)), "cuda": ((4096, 4096), (14336, 4096))}
TOKENS = {"cpu": (16, 64), "cuda": (8, 1024)}  # examples, tokens an example
SHORT_TOKENS = {"cpu": (64, 16), "cuda": (64, 128)}
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
SHAPES = [(layer, tokens) for layer in range(max(map(len, LAYERS.values()))) for tokens in (TOKENS, SHORT_TOKENS)]
Variants = dict[str, Callable[[], Tensor | None]]


def materialised(fisher: Tensor, a: Tensor, d: Tensor) -> Tensor:
    """All per-example gradients `[B, O, I]` in memory, then their squares."""
    return fisher.add_(torch.bmm(d.transpose(1, 2), a).float().square().sum(0))


def fisher_variants(fisher: Tensor, a: Tensor, d: Tensor) -> Variants:
    """Tokens `[B, T, features]`; every variant adds to `fisher`, from zero, so that its result can be compared."""
    examples, length = a.shape[:2]
    flat_a, flat_d = a.flatten(0, 1), d.flatten(0, 1)
    offsets = torch.arange(0, examples * length + 1, length, dtype=torch.int32, device=a.device)
    compiled = torch.compile(materialised, dynamic=False)
    grad_weight = torch.empty_like(fisher, dtype=a.dtype)

    def loop() -> Tensor:
        fisher.zero_()
        for one_a, one_d in zip(a, d, strict=True):
            gradient = one_d.T @ one_a
            fisher.addcmul_(gradient, gradient)
        return fisher

    def fused(grad_weight: Tensor | None = None) -> Tensor:
        ops.fisher_accumulate_(fisher.zero_(), flat_a, flat_d, offsets, grad_weight=grad_weight)
        return fisher

    return {
        "weight gradient alone (ceiling)": lambda: torch.mm(flat_d.T, flat_a, out=grad_weight)[:0],
        "bmm, square, sum": lambda: materialised(fisher.zero_(), a, d),
        "torch.compile of bmm, square, sum": lambda: compiled(fisher.zero_(), a, d),
        "loop over examples": loop,
        "fastforget": fused,
        "fastforget, and the weight gradient": lambda: fused(grad_weight),
    }


FISHER_NAMES = tuple(fisher_variants(torch.empty(1, 1), torch.empty(1, 1, 1), torch.empty(1, 1, 1)))


@pytest.fixture(scope="module")
def problem(request: pytest.FixtureRequest, device: torch.device) -> tuple[Variants, Tensor, str, float]:
    """The variants of one shape, the right result, the group's title and its work."""
    layer, tokens = request.param
    if layer >= len(LAYERS[device.type]):
        pytest.skip("a shape of the other device")
    (outputs, inputs), (examples, length) = LAYERS[device.type][layer], tokens[device.type]
    dtype = DTYPE[device.type]
    torch.manual_seed(0)
    a = torch.randn(examples, length, inputs, device=device).to(dtype)
    d = torch.randn(examples, length, outputs, device=device).to(dtype)
    fisher = torch.zeros(outputs, inputs, device=device)
    right = torch.zeros_like(fisher)
    for one_a, one_d in zip(a, d, strict=True):
        right += (one_d.float().T @ one_a.float()).square()
    group = f"fisher_accumulate_, B {examples}, T {length}, O {outputs}, I {inputs}, {str(dtype)[6:]}"
    return fisher_variants(fisher, a, d), right, group, 2 * examples * length * outputs * inputs / 1e12


@pytest.mark.parametrize("problem", SHAPES, indirect=True)
@pytest.mark.parametrize("variant", FISHER_NAMES)
@pytest.mark.parametrize("turn", range(TURNS))
@torch.no_grad()
def test_fisher(variant, turn, problem, device, measure):
    """The squares of one layer's per-example gradients."""
    variants, right, group, flops = problem
    reference = None if "ceiling" in variant else right
    tolerance = float(right.max()) * (
        1e-4 if DTYPE[device.type] == torch.float32 else 0.05
    )  # gradients rounded to bfloat16
    measure(group, variant, variants[variant], reference, tolerance=tolerance, work=flops, unit="TFLOP/s")


# Parameters of one layer of Llama 3 8B, and of a small model, many times over.
PARAMETERS = {
    "cpu": [(256, 256)] * 4 + [(688, 256)] * 3 + [(256,)] * 2,
    "cuda": [(4096, 4096)] * 2 + [(1024, 4096)] * 2 + [(14336, 4096)] * 3 + [(4096,)] * 2,
}
REPEATED = {"cpu": 8, "cuda": 6}


@pytest.fixture(scope="module")
def parameters(device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Fishers, gradients, and the first of the right results."""
    shapes = PARAMETERS[device.type] * REPEATED[device.type]
    torch.manual_seed(0)
    grads = [torch.randn(shape, device=device).to(DTYPE[device.type]) for shape in shapes]
    return [torch.zeros(shape, device=device) for shape in shapes], grads, grads[0].float().square()


def square_variants(fishers: list[Tensor], grads: list[Tensor]) -> Variants:
    """Every variant has decay 0.5; started at the right result, with scale 0.5, each returns to it."""

    def foreach() -> Tensor:
        torch._foreach_mul_(fishers, 0.5)
        torch._foreach_addcmul_(fishers, grads, grads, value=0.5)
        return fishers[0]

    def eager() -> Tensor:
        for fisher, grad in zip(fishers, grads, strict=True):
            fisher.mul_(0.5).add_(grad.float().square(), alpha=0.5)
        return fishers[0]

    def fused() -> Tensor:
        ops.square_accumulate_(fishers, grads, scale=0.5, decay=0.5)
        return fishers[0]

    def copy() -> Tensor:
        torch._foreach_copy_(fishers, grads)
        return fishers[0][:0]

    return {"copy (ceiling)": copy, "eager": eager, "foreach": foreach, "fastforget": fused}


@pytest.mark.parametrize("variant", tuple(square_variants([], [])))
@pytest.mark.parametrize("turn", range(TURNS))
@torch.no_grad()
def test_squares(variant, turn, parameters, device, measure):
    """The squares of all gradients of a step, averaged over steps."""
    fishers, grads, right = parameters
    for fisher, grad in zip(fishers, grads, strict=True):
        fisher.copy_(grad).square_()
    elements = sum(fisher.numel() for fisher in fishers)
    size = grads[0].element_size()
    moved = elements * (size + 4) if "ceiling" in variant else elements * (size + 8)
    group = f"square_accumulate_, {len(fishers)} tensors, {elements / 1e6:.0f} M elements, {str(grads[0].dtype)[6:]}"
    reference = None if "ceiling" in variant else right
    function = square_variants(fishers, grads)[variant]
    measure(group, variant, function, reference, tolerance=1e-2, work=moved / 1e9, unit="GB/s")
