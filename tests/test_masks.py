"""Masks: chosen by a Fisher, saved bit-packed, and kept by any optimizer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor, nn

from fastforget import load_mask, mask_updates, save_mask, trainable_mask
from fastforget.fisher.files import save_fisher, write_tensors
from fastforget.fisher.names import Fisher
from fastforget.ops._tensor_lists import pack_bits, unpack_bits
from fastforget.update import masks


def some_fisher(model: nn.Module) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {n: torch.rand(p.shape, generator=generator).square() for n, p in model.named_parameters()}


def bits_of(mask: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten() for value in mask.values()])


# Choice


@pytest.mark.parametrize("scope", ["global", "tensor"])
@pytest.mark.parametrize("choice", [{"top": 0.005}, {"bottom": 0.99}, {"top": 1.0}, {"bottom": 0.3}])
def test_exactly_the_fraction_is_chosen(scope: str, choice: dict[str, float]):
    fisher = some_fisher(tiny_model())
    mask = trainable_mask(fisher, **choice, scope=scope)
    assert mask.keys() == fisher.keys()
    assert all(value.dtype == torch.bool and value.shape == fisher[name].shape for name, value in mask.items())
    groups = [list(fisher)] if scope == "global" else [[name] for name in fisher]
    for names in groups:
        values = torch.cat([fisher[name].flatten() for name in names])
        k = max(1, round(next(iter(choice.values())) * len(values)))
        order = values.argsort(stable=True, descending="top" in choice)
        expected = torch.zeros_like(values, dtype=torch.bool)
        expected[order[:k]] = True
        assert torch.equal(bits_of({name: mask[name] for name in names}), expected)


def test_ties_are_chosen_in_order():
    mask = trainable_mask({"a": torch.ones(3), "b": torch.ones(2, 2)}, top=5 / 7)
    assert mask["a"].tolist() == [True] * 3
    assert mask["b"].tolist() == [[True, True], [False, False]]


def test_ties_do_not_depend_on_where_the_fisher_comes_from(tmp_path):
    fisher = {"last": torch.ones(3), "first": torch.ones(4)}
    save_fisher(tmp_path / "fisher.safetensors", fisher, {})
    mask, other = (trainable_mask(given, top=3 / 7) for given in (fisher, tmp_path / "fisher.safetensors"))
    assert list(mask) == list(other) == ["last", "first"]
    assert all(mask[name].equal(other[name]) for name in mask)
    assert mask["last"].all()


def test_fishers_of_any_layout_and_without_entries():
    wide = torch.rand(4, 10, generator=torch.Generator().manual_seed(0))
    fisher = {"empty": torch.ones(0, 3), "gaps": wide[:, :5], "row": wide[:1].expand(3, 10)}
    for scope in ("tensor", "global"):
        mask = trainable_mask(fisher, top=0.3, scope=scope)
        expected = trainable_mask({name: value.contiguous() for name, value in fisher.items()}, top=0.3, scope=scope)
        assert list(mask) == list(fisher)
        assert all(mask[name].equal(expected[name]) for name in mask)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": True}, r"top: expected a fraction in \(0, 1\], got True"),
        ({}, "top: expected one of top= and bottom=, got top=None and bottom=None"),
        ({"top": 0.1, "bottom": 0.1}, "top: expected one of top= and bottom=, got top=0.1 and bottom=0.1"),
        ({"top": 0.0}, r"top: expected a fraction in \(0, 1\], got 0.0"),
        ({"bottom": 1.5}, r"bottom: expected a fraction in \(0, 1\], got 1.5"),
        ({"top": 0.1, "scope": "layer"}, "scope: expected 'global' or 'tensor', got 'layer'"),
    ],
)
def test_bad_choices(options, message):
    with pytest.raises(ValueError, match=message):
        trainable_mask({"a": torch.ones(3)}, **options)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_fisher_that_is_none(value: float):
    with pytest.raises(ValueError, match=r"fisher\['a'\]: expected finite values >= 0"):
        trainable_mask({"a": torch.tensor([1.0, value])}, top=0.5)


@pytest.mark.parametrize(
    ("fisher", "error", "message"),
    [
        ({"a": torch.ones(2).int()}, TypeError, r"fisher\['a'\]: expected float32, .* or float64, got torch.int32"),
        ({"a": torch.ones(2) * 1j}, TypeError, r"fisher\['a'\]: expected float32, .* or float64, got torch.complex64"),
        (
            {"a": torch.ones(2, device="meta")},
            ValueError,
            r"fisher\['a'\]: expected a tensor with values, got one on the",
        ),
        ({"a": torch.ones(0)}, ValueError, "fisher: expected at least one entry, got none"),
        ({}, ValueError, "fisher: expected at least one entry, got none"),
    ],
)
def test_fishers_without_numbers_are_refused(fisher, error, message):
    with pytest.raises(error, match=message):
        trainable_mask(fisher, top=0.5)


# Files


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), max_size=70))
def test_bits_come_back(values):
    mask = torch.tensor(values, dtype=torch.bool)
    packed = pack_bits(mask)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-len(values) // 8)
    assert all((int(packed[i // 8]) >> i % 8) & 1 == value for i, value in enumerate(values))
    assert torch.equal(unpack_bits(packed, len(values)), mask)


@pytest.mark.parametrize("start", [0, 3])
def test_many_bits_come_back(start: int):
    mask = (torch.rand(3 * 2**20 + 8, generator=torch.Generator().manual_seed(0)) < 0.3)[start : 3 * 2**20 + start]
    assert torch.equal(unpack_bits(pack_bits(mask), len(mask)), mask)


def test_a_saved_mask_comes_back_an_eighth_as_large(tmp_path):
    mask = trainable_mask({"a": torch.rand(300, 100), "b": torch.rand(7), "module.c": torch.rand(2, 3, 5)}, top=0.3)
    mask["a"] = mask["a"].T.contiguous().T  # of other strides
    save_mask(mask, tmp_path / "mask.safetensors", {"chosen": "top 30%"})
    loaded = load_mask(tmp_path / "mask.safetensors")
    assert loaded.keys() == {"a", "b", "c"}
    assert all(torch.equal(loaded[name.removeprefix("module.")], value) for name, value in mask.items())
    assert loaded.metadata == {"chosen": "top 30%"}
    save_mask(loaded, tmp_path / "again.safetensors", loaded.metadata)
    assert load_mask(tmp_path / "again.safetensors").metadata == loaded.metadata
    assert (tmp_path / "mask.safetensors").stat().st_size < 30_037 / 8 + 1000
    save_fisher(tmp_path / "fisher.safetensors", {"a": torch.ones(2)}, {})
    with pytest.raises(ValueError, match="expected a file that fastforget wrote for a parameter mask"):
        load_mask(tmp_path / "fisher.safetensors")
    with pytest.raises(
        TypeError, match=r"mask\['a'\]: expected a bool tensor, True where the entry may move, got torch.float32"
    ):
        save_mask({"a": torch.ones(2)}, tmp_path / "mask.safetensors")
    with pytest.raises(ValueError, match=r"path: expected a file ending in .safetensors"):
        save_mask(mask, tmp_path / "mask.pt")
    with pytest.raises(ValueError, match="metadata: expected other keys than shapes, entries, free, got 'free'"):
        save_mask(mask, tmp_path / "mask.safetensors", {"free": 3})


@pytest.mark.parametrize(
    ("packed", "shapes"),
    [
        ({"a": torch.zeros(1, dtype=torch.uint8)}, {"a": [9]}),
        ({"a": torch.zeros(2, dtype=torch.uint8)}, {"a": [8]}),
        ({"a": torch.zeros(1)}, {"a": [8]}),
        ({}, {"a": [8]}),
        ({"a": torch.zeros(1, dtype=torch.uint8)}, {}),
    ],
)
def test_a_damaged_mask_is_refused(tmp_path, packed, shapes):
    write_tensors(tmp_path / "mask.safetensors", packed, {"shapes": shapes}, kind=masks.KIND)
    with pytest.raises(
        ValueError, match=r"path: expected eight entries of 'a' a byte, got others in .*mask.safetensors"
    ):
        load_mask(tmp_path / "mask.safetensors")


# Any optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)

        def closure() -> float:
            return 0.0

        optimizer.step(closure)


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5, nesterov=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.1, momentum=0.5),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_entries_stay_and_the_others_move_as_ever(name: str, dtype: torch.dtype):
    """Of an optimizer whose entries do not depend on each other, the others move as without a mask."""
    model = tiny_model().to(dtype)
    free, before = copy.deepcopy(model), copy.deepcopy(model)
    mask = trainable_mask(some_fisher(model), top=0.4)
    optimizer, ordinary = (OPTIMIZERS[name](m.parameters()) for m in (model, free))
    handle = mask_updates(optimizer, mask, model)
    train(model, optimizer)
    train(free, ordinary)
    for (key, moved), other, old in zip(model.named_parameters(), free.parameters(), before.parameters(), strict=True):
        kept = ~mask[key]
        assert torch.equal(moved[kept], old[kept])
        assert not torch.equal(moved[mask[key]], old[mask[key]])
        if name != "Adafactor":
            assert torch.equal(moved[mask[key]], other[mask[key]])
    handle.remove()
    train(model, optimizer, 1)
    assert all(
        bool((p != o).float().mean() > 0.9) for p, o in zip(model.parameters(), before.parameters(), strict=True)
    )


def test_the_state_is_the_optimizers_own():
    """After the handle is gone, training goes on with the moments of an ordinary run of the same gradients."""
    model = tiny_model()
    other = copy.deepcopy(model)
    optimizer, ordinary = (OPTIMIZERS["AdamW"](m.parameters()) for m in (model, other))
    with mask_updates(
        optimizer, {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}, model
    ):
        train(model, optimizer)
    train(other, ordinary)
    states = zip(optimizer.state.values(), ordinary.state.values(), strict=True)
    assert all(torch.equal(a[key], b[key]) for a, b in states for key in a)


def test_what_others_write_between_the_steps_stays():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    mask_updates(
        optimizer, {"weight": torch.zeros(2, 3, dtype=torch.bool), "bias": torch.ones(2, dtype=torch.bool)}, model
    )
    with torch.no_grad():
        model.weight.fill_(7)
    train(model, optimizer, 1)
    assert torch.equal(model.weight, torch.full((2, 3), 7.0))


def test_a_saved_mask_and_an_accelerated_optimizer(tmp_path):
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    model = nn.Linear(3, 2)
    save_mask(
        {"weight": torch.tensor([[True, False, True]] * 2), "bias": torch.zeros(2, dtype=torch.bool)},
        tmp_path / "m.safetensors",
    )
    prepared, optimizer = accelerate.Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
    mask_updates(optimizer, tmp_path / "m.safetensors", prepared)
    before = copy.deepcopy(model)
    prepared(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert torch.equal(model.bias, before.bias)
    assert (model.weight != before.weight).tolist() == [[True, False, True]] * 2


@pytest.mark.parametrize("device", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_masks_follow_a_model_that_moves(device: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)  # meta parameters stay themselves
    model = nn.Linear(3, 2)
    before = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    mask_updates(optimizer, frozen, model)
    model.to(device)
    train(model, optimizer, 1)
    assert model.weight.device.type == device
    assert device == "meta" or torch.equal(model.weight.cpu(), before.weight)


@pytest.mark.parametrize("removed", [False, True])
def test_a_step_that_raises_moves_no_masked_entry_for_good(removed: bool):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    frozen = {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}
    handle = mask_updates(optimizer, frozen, model)
    before = copy.deepcopy(model)

    def closure() -> float:
        with torch.no_grad():
            model.weight.add_(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    if removed:
        handle.remove()
    else:
        train(model, optimizer, 1)
    assert torch.equal(model.weight, before.weight)


def test_parameters_that_came_later_are_not_passed_over():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    mask_updates(optimizer, {n: torch.zeros_like(p, dtype=torch.bool) for n, p in model.named_parameters()}, model)
    optimizer.add_param_group({"params": list(model[1].parameters())})
    with pytest.raises(ValueError, match="optimizer: expected the parameters that it had when mask_updates was called"):
        train(model, optimizer, 1)


def test_frozen_parameters_need_no_mask():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    mask_updates(
        torch.optim.SGD(model.parameters(), lr=0.1),
        {"1.weight": torch.ones(2, 2).bool(), "1.bias": FREE["bias"]},
        model,
    )


def test_a_line_search_is_refused():
    with pytest.raises(ValueError, match="optimizer: expected one that moves the parameters once a step, got LBFGS"):
        mask_updates(torch.optim.LBFGS(LINEAR.parameters()), FREE, LINEAR)


LINEAR = nn.Linear(3, 2)
FREE = {"weight": torch.ones(2, 3, dtype=torch.bool), "bias": torch.ones(2, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("mask", "model", "error", "message"),
    [
        (
            {"weight": FREE["weight"]},
            LINEAR,
            ValueError,
            "mask: expected a tensor for every parameter, got none for bias",
        ),
        (
            FREE | {"wight": FREE["bias"]},
            LINEAR,
            ValueError,
            "mask: expected names of the model's parameters, got 'wight'",
        ),
        (
            FREE | {"bias": torch.ones(3).bool()},
            LINEAR,
            ValueError,
            r"mask\['bias'\]: expected shape \(2,\) .*, got \(3,\)",
        ),
        (FREE | {"bias": torch.ones(2)}, LINEAR, TypeError, r"mask\['bias'\]: expected a bool tensor"),
        (
            FREE | {"bias": FREE["bias"].to("meta")},
            LINEAR,
            ValueError,
            r"mask\['bias'\]: expected device cpu .*, got meta",
        ),
        (
            FREE | {"module.bias": FREE["bias"]},
            LINEAR,
            ValueError,
            "mask: expected one tensor a parameter, got a second for 'bias'",
        ),
        ([FREE], LINEAR, TypeError, "mask: expected a mapping from names to bool tensors or a file's path, got list"),
        (FREE, nn.Linear(3, 2), ValueError, r"optimizer: expected parameters of the model, got 2 others"),
    ],
)
def test_what_does_not_fit_is_refused(mask, model, error, message):
    with pytest.raises(error, match=message):
        mask_updates(torch.optim.SGD(LINEAR.parameters(), lr=0.1), mask, model)


def test_tied_parameters_have_one_mask():
    model = tiny_model(tie_word_embeddings=True)
    fisher = Fisher(
        {n: torch.rand(p.shape) for n, p in model.named_parameters()},
        {"aliases": {"lm_head.weight": "model.embed_tokens.weight"}},
    )
    mask = trainable_mask(fisher, bottom=0.9)
    mask_updates(torch.optim.SGD(model.parameters(), lr=0.1), mask, model)
    before = model.lm_head.weight.detach().clone()
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), 0)
    assert "lm_head.weight" not in mask
    assert torch.equal(before, model.lm_head.weight)
