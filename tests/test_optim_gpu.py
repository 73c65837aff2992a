"""`ff.optim` on a GPU: the documented step, numbers on the device, CUDA graphs, memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from optim_loops import (
    NUMBERS,
    PAIRS,
    SHAPES,
    STEERED,
    Loop,
    Toy,
    adamw,
    assert_close,
    resolved,
    some_additions,
    some_gradients,
    stepped,
    walk,
)
from safetensors.torch import save_file
from torch import Tensor

import fastforget as ff
from fastforget.fisher.files import save_fisher


@pytest.mark.gpu
@pytest.mark.parametrize("additions", [{}, *STEERED.values()], ids=["plain", *STEERED])
@pytest.mark.parametrize("kind", PAIRS)
def test_gpu(kind: str, additions: dict[str, Any]):
    """Moved there after the optimizer was made, and what it was given with it."""
    ours, _, rule = PAIRS[kind]
    options, given = NUMBERS[kind], resolved(additions)
    model = Toy()
    optimizer, loop = ours(model, **options, **given), Loop(rule, model.values(), options, **given)
    model.cuda()
    gradients = some_gradients(SHAPES, 20)
    walk(model, optimizer, gradients)
    for grads in gradients:
        loop.step(grads)
    assert_close(model.cpu(), loop, 1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"capturable": True, "lr": torch.tensor(0.05)}])
def test_steps_and_rates_on_the_device(options: dict[str, Any]):
    numbers: dict[str, Any] = {"lr": 0.05} | {
        k: v.clone().cuda() if isinstance(v, Tensor) else v for k, v in options.items()
    }
    given = resolved(STEERED["all"])
    model = Toy()
    loop = Loop(adamw, model.values(), {"lr": 0.05}, **given)
    model.cuda()
    given = {k: {n: t.cuda() for n, t in v.items()} if isinstance(v, dict) else v for k, v in given.items()}
    optimizer = ff.optim.AdamW(model, **numbers, **given)
    gradients = some_gradients(SHAPES, 10, absent=0.0)
    walk(model, optimizer, gradients)
    for grads in gradients:
        loop.step(grads)
    assert_close(model.cpu(), loop, 1e-4)


@pytest.mark.gpu
def test_files_are_taken_to_the_gpu(tmp_path: Path):
    given = some_additions(SHAPES)
    save_fisher(tmp_path / "fisher.safetensors", given["fisher"], {})
    ff.save_mask(given["mask"], tmp_path / "mask.safetensors")
    save_file(given["anchor"], tmp_path / "model.safetensors")
    files: dict[str, Any] = {"fisher": tmp_path / "fisher.safetensors", "mask": tmp_path / "mask.safetensors"}
    model = Toy().cuda()
    optimizer = ff.optim.AdamW(model, lr=0.1, anchor=tmp_path, ewc_lambda=1.0, soft_weight=1.0, **files)
    walk(model, optimizer, some_gradients(SHAPES, 3, absent=0.0))
    expected = stepped(Toy(), ewc_lambda=1.0, soft_weight=1.0, **given)
    assert all(torch.allclose(value.cpu(), expected[name], atol=1e-5) for name, value in model.values().items())


@pytest.mark.gpu
def test_float64_on_a_gpu_is_torchs_work():
    model, other = Toy(dtype=torch.float64).cuda(), Toy(dtype=torch.float64)
    gradients = some_gradients(SHAPES, 5)
    for each in (model, other):
        walk(each, ff.optim.AdamW(each, fisher_decay=0.9, soft_weight=1.0), gradients)
    assert all(torch.allclose(value.cpu(), other.values()[name]) for name, value in model.values().items())


@pytest.mark.gpu
def test_the_mean_takes_no_memory_on_a_gpu():
    size = 2**26
    model = Toy({"large": (size,)}).cuda()
    optimizer = ff.optim.SGD(model, fisher_decay=0.9, soft_weight=1.0)
    for _ in range(2):
        model.large.grad = torch.ones_like(model.large)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        optimizer.step()
    assert torch.cuda.max_memory_allocated() - before < size


@pytest.mark.gpu
def test_cuda_graph():
    """Replays take new gradients, count steps, and read a learning rate that changes; other tables are made meanwhile."""
    shapes = {name: shape for name, shape in SHAPES.items() if name != "empty"}
    given = resolved({k: v for k, v in STEERED["all"].items() if k not in ("min_fisher", "max_fisher")}, shapes)
    model = Toy(shapes)
    loop = Loop(adamw, model.values(), {"lr": 0.05}, **given)
    model.cuda()
    lr = torch.tensor(0.05, device="cuda")
    given = {k: {n: t.cuda() for n, t in v.items()} if isinstance(v, dict) else v for k, v in given.items()}
    optimizer = ff.optim.AdamW(model, lr=lr, capturable=True, **given)
    gradients = some_gradients(shapes, 8, absent=0.0)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        walk(model, optimizer, gradients[:3])
    torch.cuda.current_stream().wait_stream(side)
    static = {name: torch.zeros(shape, device="cuda") for name, shape in shapes.items()}
    for name, parameter in model.named_parameters():
        parameter.grad = static[name]  # at new addresses: the tables are made while the graph is captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for step, grads in enumerate(gradients[3:]):
        for name, value in static.items():
            value.copy_(grads[name])
        if step == 2:
            lr.fill_(0.01)
        graph.replay()
        torch.empty(1000).pin_memory()
    for step, grads in enumerate(gradients):
        loop.options["lr"] = 0.05 if step < 5 else 0.01
        loop.step(grads)
    assert_close(model.cpu(), loop, 1e-4)
