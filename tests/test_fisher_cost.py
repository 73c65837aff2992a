"""What a Fisher costs in memory, and that its bits and its value do not depend on how it is computed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from architectures.families import build
from architectures.layouts import packed, padded, some_examples
from fisher_oracle import assert_exact, float64_throughout
from torch import Tensor

import fastforget as ff


@pytest.fixture(autouse=True)
def only_float64() -> Iterator[None]:
    with float64_throughout():
        yield


@pytest.fixture(scope="module")
def examples() -> list[Tensor]:
    return some_examples()


def test_the_same_bits_with_offload_and_in_another_run(examples: list[Tensor]):
    model, found = build("Llama, tied", torch.float64).eval(), []
    for offload in (False, True, False):
        fisher = ff.DiagonalFisher(copy.deepcopy(model), offload=offload)
        for batch in (padded(examples, "left"), packed(examples)):
            fisher.update(**batch)
        found.append(fisher.diagonal())
    for other in found[1:]:
        assert all(torch.equal(value, other[name]) for name, value in found[0].items())


def test_batches_may_be_split_in_any_way(examples: list[Tensor]):
    model = build("GPT-2", torch.float64)
    whole = ff.DiagonalFisher(model)
    whole.update(**padded(examples, "right"), weights=[1, 2, 3, 4])
    for groups in ([[3], [0, 2], [1]], [[2, 1, 0, 3]]):
        parts = ff.DiagonalFisher(model)
        for group in groups:
            parts.update(**padded([examples[i] for i in group], "left"), weights=[i + 1.0 for i in group])
        assert_exact(parts.diagonal(), whole.diagonal(), torch.float64)


def allocations(run: Callable[[], object]) -> tuple[int, int]:
    """Bytes of the largest tensor that is allocated, and the most that is allocated at once."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    total = peak = 0
    for size in sizes:
        total += size
        peak = max(peak, total)
    return max(sizes), peak


@pytest.mark.parametrize("family", ["Llama", "Llama, tied"])
def test_memory_does_not_grow_with_the_number_of_examples(family: str):
    """96 tokens as 3 or as 48 examples: no gradients `[B, O, I]` of any weight, nor `[B, V, H]`."""
    model = build(family, intermediate_size=2048, hidden_size=64, vocab_size=2048)
    largest_weight = max(parameter.numel() * 4 for parameter in model.parameters())
    ids = torch.randint(3, 2048, (96,), generator=torch.Generator().manual_seed(0))
    fisher = ff.DiagonalFisher(model)
    fisher.update(ids.view(3, 32))
    few, many = (allocations(lambda b=b: fisher.update(ids.view(b, -1))) for b in (3, 48))
    assert many[0] <= max(few[0], 2 * largest_weight)
    assert many[1] <= min(1.1 * few[1] + 2 * largest_weight, 48 * largest_weight / 2)


def test_experts_cost_no_host_read_each(examples: list[Tensor], monkeypatch: pytest.MonkeyPatch):
    """On a GPU a fetch of offsets waits for the device: as many for 16 experts as for 4."""
    fetches: list[str] = []
    tolist = Tensor.tolist

    def counted(tensor: Tensor) -> object:
        if tensor.dtype == torch.int32:
            fetches.append(sys._getframe(1).f_code.co_name)
        return tolist(tensor)

    monkeypatch.setattr(Tensor, "tolist", counted)
    found = []
    for experts in (4, 16):
        fisher = ff.DiagonalFisher(build("Mixtral", num_local_experts=experts))
        fisher.update(**padded(examples, "right"))
        fetches.clear()
        fisher.update(**padded(examples, "right"))
        found.append(list(fetches))
    assert found[0] == found[1]
    assert "_routes" in found[0]
