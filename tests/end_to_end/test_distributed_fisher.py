"""`DiagonalFisher` under DistributedDataParallel and FSDP2, in two gloo processes with different examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from end_to_end.two_processes import run_in_two_processes

PROLOGUE = """
from architectures.layouts import padded, some_examples
from fisher_oracle import assert_exact, batch_1_fisher
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

rank = dist.get_rank()
examples = some_examples(lengths=(7, 12, 2, 9, 5))
parts = [examples[:2], examples[2:]]  # as many examples on no two ranks
weights = [1.0, 0.5, 2.0, 1.0, 3.0]
mine = padded(parts[rank], "left")
wrap = {"DDP": DistributedDataParallel, "FSDP2": sharded}
for shape in ((2, 1), (1, 2)):  # hybrid: copies over the first dimension, shards over the second
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    wrap[f"FSDP2 over {shape}"] = lambda model, mesh=mesh: sharded(model, mesh=mesh)


def whole(fisher):
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in fisher.items()}


def gradients(model):
    return [p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in model.parameters()]
"""

UPDATE = """
for family in ("Llama", "Llama, tied", "Qwen3-MoE"):
    for dtype in (torch.float32, torch.float64):
        alone = build(family, dtype)
        expected = batch_1_fisher(alone, examples, weights=weights)
        truth = lambda: batch_1_fisher(alone.double(), examples, weights=weights)
        for kind, wrapper in wrap.items():
            model = wrapper(build(family, dtype))
            fisher = ff.DiagonalFisher(model)
            for b in range(2):  # in two batches, the second of another size
                examples_of_rank = [parts[rank][:1], parts[rank][1:]][b]
                w = torch.tensor(weights[:2] if rank == 0 else weights[2:])
                fisher.update(**padded(examples_of_rank, "left"), weights=w[:1] if b == 0 else w[1:])
            for _ in range(2):  # asking twice changes nothing
                got = fisher.diagonal()
                assert_exact(whole(got), expected, dtype, truth)
            assert all(p.grad is None for p in model.parameters()), kind
            if "FSDP2" in kind:
                parameters = dict(model.named_parameters())
                for name, value in got.items():
                    assert isinstance(value, DTensor), name
                    assert value.placements == parameters[name].placements, name
                    assert value.to_local().shape == parameters[name].to_local().shape, name
"""

OBSERVE = """
for family in ("Llama", "Llama, tied"):
    alone = build(family).eval()
    expected = batch_1_fisher(alone, examples)
    batch = padded(parts[rank], "right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    truth = lambda: batch_1_fisher(alone.double(), examples)
    for kind, wrapper in wrap.items():
        plain, model = (wrapper(build(family).eval()) for _ in range(2))
        plain(**batch).loss.backward()
        fisher = ff.DiagonalFisher(model)
        with fisher.observe():
            model(**batch).loss.backward()
        for grad, other in zip(gradients(model), gradients(plain), strict=True):
            assert torch.equal(grad, other), kind
        assert_exact(whole(fisher.diagonal()), expected, torch.float32, truth)
"""

BATCH_MEAN = """
model = build("Llama", torch.float64)
squares = []
for part in parts:
    model.zero_grad()
    ff.log_perplexity(model, **padded(part, "right")).mean().backward()
    squares.append({name: p.grad.clone() for name, p in model.named_parameters()})
own = {name: (squares[0][name].square() + squares[1][name].square()) / 2 for name in squares[0]}
averaged = {name: ((squares[0][name] + squares[1][name]) / 2).square() for name in squares[0]}
for kind, wrapper in wrap.items():
    for way in ("update", "observe"):
        wrapped = wrapper(build("Llama", torch.float64))
        fisher = ff.DiagonalFisher(wrapped, per="batch_mean")
        batch = padded(parts[rank], "right")
        if way == "update":
            fisher.update(**batch)
        else:
            with fisher.observe():
                logits = wrapped(**batch).logits
                targets = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)[:, 1:]
                each = torch.nn.functional.cross_entropy(logits[:, :-1].mT, targets, reduction="none").sum(1)
                (each / (targets != -100).sum(1)).mean().backward()
        expected = own if (kind, way) == ("DDP", "update") else averaged
        found = whole(fisher.diagonal())
        for name, value in expected.items():  # Llama computes norms in float32
            assert torch.allclose(found[name], value, rtol=1e-3, atol=1e-9), (kind, way, name)
"""

REFUSED = """
def refused(model, message):
    try:
        ff.DiagonalFisher(model)
    except ValueError as error:
        assert message in str(error), error
    else:
        raise AssertionError("not refused: " + message)


from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("data", "other"))
refused(sharded(build("Llama"), mesh=mesh["other"]), "over one mesh of all 2 processes, got model.embed_tokens.weight as")
plan = {"model.layers.*.mlp.up_proj": ColwiseParallel()}
parallel = parallelize_module(build("Llama"), mesh["data"], plan)
refused(parallel, "got model.layers.0.mlp.up_proj.weight as (Shard(dim=0),) over (2,) processes; leave tensor parallelism out")
mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data", "tensor"))
parallel = parallelize_module(build("Llama"), mesh["tensor"], plan)
refused(sharded(parallel, mesh=mesh["data"]), "leave tensor parallelism out, and shard over all")
"""

BORROWED = """
class Borrowing(torch.nn.Module):
    def __init__(self, owner):
        super().__init__()
        self.owner = owner  # a function: not registered

    def forward(self, x):
        if x.shape[1] <= 10:
            return x
        weight = self.owner().weight
        return x * weight if weight.ndim == 1 else x @ weight.T @ weight


ids = torch.randint(3, 131, (2, 12))
for path in ("model.embed_tokens", "model.layers.1.input_layernorm"):
    model = build("Llama")
    borrowing = Borrowing(lambda: model.get_submodule(path))
    model.model.layers[1].mlp = torch.nn.Sequential(model.model.layers[1].mlp, borrowing)
    model = sharded(model)
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        model(input_ids=ids[:, :6], labels=ids[:, :6]).loss.backward()
    try:
        with fisher.observe():
            model(input_ids=ids, labels=ids).loss.backward()
    except ValueError as error:
        assert f"{path}.weight was used where no rule sees it" in str(error), error
    else:
        raise AssertionError(path)
"""


@pytest.mark.parametrize(
    "script",
    [UPDATE, OBSERVE, BATCH_MEAN, REFUSED, BORROWED],
    ids=["update", "observe", "batch mean", "refused", "borrowed"],
)
def test_two_processes(script: str, tmp_path: Path):
    run_in_two_processes(PROLOGUE + script, tmp_path)
