"""`ff.ops.sgd_` beyond the gates and what it shares with `adamw_`, which is tested there: torch's bits, first steps, checks."""

from __future__ import annotations

import math

import pytest
import torch
from test_adamw import IMPLEMENTATIONS, ONES, trajectory

from fastforget import ops

VARIANTS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.2},
    {"lr": 0.1, "momentum": 0.9},
    {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    {"lr": 0.05, "momentum": 0.8, "maximize": True, "dampening": -0.5},
]


def sgd_step(fused: bool = False, **options):
    def step(params, grads, number, states):
        buffers = None
        if options.get("momentum"):  # what the first step finds there does not count
            buffers = states.setdefault("momentum_buffer", [torch.full_like(param, torch.nan) for param in params])
        ops.sgd_(params, grads, buffers, first_steps=[number == 0] * len(params), fused=fused, **options)

    return step


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("options", VARIANTS)
def test_the_bits_are_those_of_torch(options, fused: bool):
    theirs, ours, peer_states, states = trajectory(torch.optim.SGD, sgd_step(fused, **options), fused=fused, **options)
    assert all(map(torch.equal, theirs, ours))
    for name, own in states.items():
        assert all(torch.equal(peer[name], state) for peer, state in zip(peer_states, own, strict=True)), name


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_first_steps_are_those_of_single_tensors(impl: str, fused: bool):
    params, buffers = [torch.ones(3), torch.ones(2, 4)], [torch.full((3,), torch.nan), torch.full((2, 4), 2.0)]
    options = {"lr": 0.5, "momentum": 0.5, "dampening": 0.25}
    ops.sgd_(params, ONES, buffers, first_steps=[True, False], impl=impl, fused=fused, **options)
    assert torch.equal(buffers[0], torch.ones(3))
    assert torch.equal(buffers[1], torch.full((2, 4), 1.75))
    assert torch.equal(params[0], torch.full((3,), 0.5))
    assert torch.equal(params[1], torch.full((2, 4), 0.125))


@pytest.mark.parametrize(
    ("buffers", "options", "message"),
    [
        (None, {"momentum": 0.9}, "momentum_buffers: expected tensors beside momentum 0.9, got None"),
        (ONES, {}, "momentum_buffers: expected None beside momentum 0.0, got tensors"),
        (ONES[:1], {"momentum": 0.9}, "momentum_buffers: expected 2 tensors, one for each of params, got 1"),
        (
            ONES,
            {"momentum": 0.9, "first_steps": [True]},
            "first_steps: expected 2 flags, one for each of params, got 1",
        ),
        (ONES, {"momentum": -0.9}, "momentum: expected a finite number of at least 0, got -0.9"),
        (ONES, {"momentum": 0.9, "dampening": math.nan}, "dampening: expected a finite number"),
        (
            ONES,
            {"momentum": 0.9, "weight_decay": -1.0},
            "weight_decay: expected a finite number of at least 0, got -1.0",
        ),
        (ONES, {"momentum": 0.9, "dampening": 0.1, "nesterov": True}, "nesterov: expected momentum and no dampening"),
        (None, {"nesterov": True}, "nesterov: expected momentum and no dampening"),
        (None, {"lr": math.inf}, "lr: expected a finite number"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(buffers, options, message):
    params = [t.clone() for t in ONES]
    with pytest.raises(ValueError, match=message):
        ops.sgd_(params, ONES, buffers, **{"lr": 0.1} | options)
    assert all(map(torch.equal, params, ONES))
