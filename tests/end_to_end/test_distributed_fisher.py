"""`DiagonalFisher` under DistributedDataParallel and FSDP2, in two gloo processes with different examples."""

from __future__ import annotations

from pathlib import Path

import pytest
from end_to_end.two_processes import run_in_two_processes

PROLOGUE = """
from architectures.layouts import padded, some_examples
from fisher_oracle import assert_exact, batch_1_fisher
from torch.distributed.tensor import DTensor

rank = dist.get_rank()
examples = some_examples(lengths=(7, 12, 2, 9, 5))
parts = [examples[:2], examples[2:]]  # as many examples on no two ranks
weights = [1.0, 0.5, 2.0, 1.0, 3.0]
mine = padded(parts[rank], "left")
wrap = {"DDP": DistributedDataParallel, "FSDP2": sharded}


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
            if kind == "FSDP2":
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


@pytest.mark.parametrize("script", [UPDATE, OBSERVE], ids=["update", "observe"])
def test_two_processes(script: str, tmp_path: Path):
    run_in_two_processes(PROLOGUE + script, tmp_path)
