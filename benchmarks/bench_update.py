"""What uses a Fisher, over all parameters of a model: optimizer steps, dampening, top-k thresholds, merging.

Bytes are those that an operation has to move: each tensor that it needs read once, each that it changes written once. The
ceiling is a copy, which moves as many bytes in the same run. Every variant is compared with a reference on a small model
first, and then timed on the large one, whose tensors all variants share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from conftest import TURNS
from torch import Tensor

import fastforget as ff
from fastforget import ops

# Parameters of one layer, and how many layers: 201 million in float32, and 1.2 billion in bfloat16.
LAYER = {
    "cpu": [(1024, 1024)] * 4 + [(2816, 1024)] * 3 + [(1024,)] * 2,
    "cuda": [(2048, 2048)] * 4 + [(8192, 2048)] * 3 + [(2048,)] * 2,
}
LAYERS = {"cpu": 16, "cuda": 18}
SMALL = [(40, 30), (7,), (300, 70)]
DTYPE = {"cpu": torch.float32, "cuda": torch.bfloat16}
LR, DECAY, LAMBDA, ALPHA, TOP = 1e-3, 0.9, 10.0, 10.0, 0.005
Variants = dict[str, Callable[[], Tensor | None]]


class Model(NamedTuple):
    """Tensors of all parameters."""

    params: list[Tensor]
    grads: list[Tensor]
    fishers: list[Tensor]
    retain: list[Tensor]
    anchors: list[Tensor]

    @staticmethod
    def of(shapes: list[tuple[int, ...]], device: torch.device) -> Model:
        """Random ones, the same in every call."""
        generator = torch.Generator(device).manual_seed(0)

        def make(dtype: torch.dtype, square: bool = False) -> list[Tensor]:
            values = [torch.randn(shape, device=device, generator=generator) for shape in shapes]
            return [(value.square_() if square else value).to(dtype) for value in values]

        dtype = DTYPE[device.type]
        params, grads = ([t.requires_grad_() for t in make(dtype)], make(dtype))
        for parameter, grad in zip(params, grads, strict=True):
            parameter.grad = grad
        return Model(params, grads, make(torch.float32, True), make(torch.float32, True), make(dtype))

    def named(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        """By name."""
        return {f"layer{i}": tensor for i, tensor in enumerate(tensors)}


def stepped(model: Model, optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
    """A step of an optimizer."""

    def step() -> Tensor:
        optimizer.step()
        return model.params[0].detach()

    return step


def adamw_variants(model: Model) -> Variants:
    """AdamW as it is, weight decay included."""
    return {
        "torch, default": stepped(model, torch.optim.AdamW(model.params, LR, foreach=False)),
        "torch, foreach": stepped(model, torch.optim.AdamW(model.params, LR, foreach=True)),
        "torch, fused": stepped(model, torch.optim.AdamW(model.params, LR, fused=True)),
        "fastforget, the bits of torch's default": stepped(model, ff.optim.AdamW(model.params, LR)),
        "fastforget": stepped(model, ff.optim.AdamW(model.params, LR, fused=True)),
    }


def sgd_variants(model: Model) -> Variants:
    """SGD with momentum and weight decay."""
    params, options = model.params, {"lr": LR, "momentum": 0.9, "weight_decay": 1e-2}
    return {
        "torch, default": stepped(model, torch.optim.SGD(params, foreach=False, **options)),
        "torch, foreach": stepped(model, torch.optim.SGD(params, foreach=True, **options)),
        "torch, fused": stepped(model, torch.optim.SGD(params, fused=True, **options)),
        "fastforget, the bits of torch's default": stepped(model, ff.optim.SGD(params, **options)),
        "fastforget": stepped(model, ff.optim.SGD(params, fused=True, **options)),
    }


def masked_variants(model: Model) -> Variants:
    """AdamW in which the half of the entries with the larger Fisher may not move."""
    params, names = model.params, model.named(model.params)
    frozen = [fisher >= fisher.median() for fisher in model.fishers]
    optimizer = torch.optim.AdamW(params, LR, fused=True)

    @torch.no_grad()
    def eager() -> Tensor:
        before = torch._foreach_mul(params, 1.0)
        optimizer.step()
        for param, old, mask in zip(params, before, frozen, strict=True):
            param.copy_(torch.where(mask, old, param))
        return params[0].detach()

    mask = {name: ~own for name, own in zip(names, frozen, strict=True)}
    masked = ff.optim.AdamW(list(names.items()), LR, fused=True, mask=mask)
    return {"torch fused, a copy, and where": eager, "fastforget": stepped(model, masked)}


def steered_variants(model: Model) -> Variants:
    """AdamW, the Fisher riding along, and the pull of elastic weight consolidation."""
    params, grads, fishers, anchors = model.params, model.grads, model.fishers, model.anchors
    optimizer = torch.optim.AdamW(params, LR, fused=True)

    @torch.no_grad()
    def foreach() -> Tensor:
        raw = [grad.clone() for grad in grads]  # the gradients are the caller's, and stay
        pull = torch._foreach_mul(fishers, torch._foreach_sub(params, anchors))
        torch._foreach_mul_(fishers, DECAY)
        torch._foreach_addcmul_(fishers, raw, raw)
        torch._foreach_add_(grads, pull, alpha=LAMBDA)
        optimizer.step()
        torch._foreach_copy_(grads, raw)
        return params[0].detach()

    steered = ff.optim.AdamW(
        list(model.named(params).items()),
        LR,
        fused=True,
        fisher=model.named(fishers),
        fisher_decay=DECAY,
        anchor=model.named(anchors),
        ewc_lambda=LAMBDA,
    )
    return {"torch fused, and foreach": foreach, "fastforget": stepped(model, steered)}


def eager_dampen(param: Tensor, forget: Tensor, retain: Tensor) -> None:
    """Selective dampening of one tensor, as its authors write it."""
    chosen = forget > ALPHA * retain
    factor = (retain / forget).clamp(max=1)
    param.mul_(torch.where(chosen, factor, 1).to(param.dtype))


def dampen_variants(model: Model) -> Variants:
    """Selective dampening; the parameters shrink from call to call, which costs the same."""
    lists = [p.detach() for p in model.params], model.fishers, model.retain
    compiled = torch.compile(eager_dampen, dynamic=True)

    def loop(one: Callable[..., None]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            for tensors in zip(*lists, strict=True):
                one(*tensors)
            return lists[0][0]

        return run

    def fused() -> Tensor:
        ops.dampen_(*lists, alpha=ALPHA, check=False)
        return lists[0][0]

    return {"eager": loop(eager_dampen), "torch.compile": loop(compiled), "fastforget": fused}


def topk_variants(model: Model) -> Variants:
    """The threshold of the largest 0.5% of all entries."""
    fishers = model.fishers
    k = max(1, round(TOP * sum(f.numel() for f in fishers)))

    def topk() -> Tensor:
        return torch.topk(torch.cat([f.flatten() for f in fishers]), k, sorted=False).values.min().view(1)

    def bisection() -> Tensor:
        bits = [0, int(torch.tensor(torch.finfo(torch.float32).max).view(torch.int32))]
        while bits[1] - bits[0] > 1:  # 31 halvings of the integers that order positive floats
            middle = sum(bits) // 2
            value = float(torch.tensor(middle, dtype=torch.int32).view(torch.float32))
            count = sum(int((f >= value).sum()) for f in fishers)
            bits[count < k] = middle
        return torch.tensor([bits[0]], dtype=torch.int32).view(torch.float32)

    return {
        "torch.topk of a concatenation": topk,
        "bisection on counts": bisection,
        "fastforget": lambda: torch.tensor([ops.topk_threshold(fishers, TOP).threshold]),
    }


def merge_variants(model: Model) -> Variants:
    """Two models, weighted by their Fishers, into a third."""
    models = [[p.detach() for p in model.params], model.anchors]
    fishers = [model.fishers, model.retain]
    outs = model.grads

    def foreach() -> Tensor:
        floored = [torch._foreach_maximum(f, 1e-6) for f in fishers]
        above = torch._foreach_mul(floored[0], models[0])
        torch._foreach_addcmul_(above, floored[1], models[1])
        torch._foreach_add_(floored[0], floored[1])
        torch._foreach_div_(above, floored[0])
        torch._foreach_copy_(outs, above)
        return outs[0]

    def fused() -> Tensor:
        ops.fisher_merge_(outs, models, fishers, [1.0, 1.0])
        return outs[0]

    return {"foreach": foreach, "fastforget": fused}


# Group: variants, and bytes an entry of p bytes has to move.
GROUPS: dict[str, tuple[Callable[[Model], Variants], Callable[[int], float]]] = {
    "AdamW": (adamw_variants, lambda p: 3 * p + 4 * p),
    "SGD with momentum": (sgd_variants, lambda p: 3 * p + 2 * p),
    "AdamW, masked": (masked_variants, lambda p: 3 * p + 4 * p + 1 / 8),
    "AdamW, Fisher and EWC": (steered_variants, lambda p: 3 * p + 4 * p + 8 + p),
    "selective dampening": (dampen_variants, lambda p: 2 * p + 8),
    "top-k threshold": (topk_variants, lambda p: 4),
    "Fisher merging": (merge_variants, lambda p: 3 * p + 8),
}
COPY = "copy of as many bytes (ceiling)"
CASES = [
    (group, name)
    for group, (variants, _) in GROUPS.items()
    for name in (COPY, *variants(Model.of(SMALL, torch.device("cpu"))))
]


@pytest.fixture(scope="module")
def large(device: torch.device) -> Model:
    """The large model."""
    return Model.of(LAYER[device.type] * LAYERS[device.type], device)


@pytest.fixture(scope="module")
def built(request: pytest.FixtureRequest, device: torch.device, large: Model) -> dict[str, Any]:
    """The variants of a group, on the large model and, each on a model of its own, on the small one."""
    variants, bytes_of = GROUPS[request.param]
    right = variants(Model.of(SMALL, torch.device("cpu")))
    reference = next(iter(right.values()))().clone()  # type: ignore[union-attr]
    for name in variants(Model.of(SMALL, device)):
        got = variants(Model.of(SMALL, device))[name]()
        assert got is not None
        tolerance = 1e-5 if DTYPE[device.type] == torch.float32 else 0.02
        torch.testing.assert_close(got.cpu().float(), reference.float(), rtol=tolerance, atol=tolerance)
    entries = sum(p.numel() for p in large.params)
    size = int(entries * bytes_of(DTYPE[device.type].itemsize))
    half = size // 8  # float32 values that are read, and as many that are written
    block = torch.zeros(min(half, 2**26), device=device)
    copied = torch.empty_like(block)

    def copy() -> Tensor:
        for _ in range(half // len(block)):
            copied.copy_(block)
        rest = half % len(block)
        copied[:rest].copy_(block[:rest])
        return copied[:0]

    return {COPY: copy, **variants(large), "entries": entries, "size": size}


@pytest.mark.parametrize(("built", "variant"), CASES, indirect=["built"])
@pytest.mark.parametrize("turn", range(TURNS))
def test_update(variant, turn, built, device, measure, request):
    """One pass over all parameters."""
    group = request.node.callspec.params["built"]
    title = f"{group}, {built['entries'] / 1e6:,.0f} million parameters, {str(DTYPE[device.type])[6:]}"
    measure(
        title, variant, built[variant], None, tolerance=math.inf, work=built["size"] / 1e9, unit="GB/s", warm_up=True
    )
