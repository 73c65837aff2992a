"""`ff.optim`: torch's bits without options, the documented step with them, and what they may be given."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_loops import (
    IMPLEMENTATIONS,
    PAIRS,
    SHAPES,
    STEERED,
    Loop,
    Toy,
    adamw,
    assert_close,
    assert_equal,
    resolved,
    some_additions,
    some_gradients,
    stepped,
    walk,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.profiler import profile

import fastforget as ff
from fastforget.fisher.files import save_fisher
from fastforget.ops._tensor_lists import chunk_elements

RATES = {"lr": st.sampled_from([1e-3, 0.3]), "weight_decay": st.sampled_from([0.0, 0.1]), "maximize": st.booleans()}
ADAMW = st.fixed_dictionaries(
    RATES
    | {
        "amsgrad": st.booleans(),
        "betas": st.sampled_from([(0.9, 0.999), (0.0, 0.5)]),
        "eps": st.sampled_from([1e-8, 1e-3]),
    }
)
SGD = st.one_of(
    st.fixed_dictionaries(RATES | {"momentum": st.sampled_from([0.0, 0.9])}),
    st.just({"lr": 0.1, "momentum": 0.8, "nesterov": True}),
    st.just({"lr": 0.1, "momentum": 0.8, "dampening": 0.5}),
)


# Without options ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["AdamW", "SGD"]), data=st.data())
def test_bits_are_torchs(kind: str, data: st.DataObject):
    """Over 20 steps, for any shapes, groups and options, with parameters that have no gradient now and then."""
    ours, base, _ = PAIRS[kind]
    sides = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    shapes = {f"p{i}": shape for i, shape in enumerate(data.draw(st.lists(sides, min_size=1, max_size=5)))}
    options = data.draw(ADAMW if kind == "AdamW" else SGD) | {"fused": data.draw(st.booleans())}
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    named, lr = data.draw(st.booleans()), data.draw(st.sampled_from([0.02, torch.tensor(0.02)]))
    models = [Toy(shapes, dtype) for _ in range(2)]
    cut = data.draw(st.integers(0, len(shapes)))
    optimizers = []
    for cls, model in zip((ours, base), models, strict=True):
        pairs = list(model.named_parameters() if named else model.parameters())
        groups = [{"params": pairs[:cut], "lr": lr}, {"params": pairs[cut:]}]
        optimizers.append(cls([group for group in groups if group["params"]], **options))
    late = (
        kind == "AdamW" or not options["fused"]
    )  # torch's fused SGD fails where some momentum buffers are not there yet
    for grads in some_gradients(shapes, 20, absent=data.draw(st.sampled_from([0.0, 0.4])) if late else 0.0):
        for model, optimizer in zip(models, optimizers, strict=True):
            model.take(grads)
            optimizer.step()
    assert_equal(models[0].values(), models[1].values())
    states = [optimizer.state_dict()["state"] for optimizer in optimizers]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        assert_equal(state, states[1][number])


@pytest.mark.parametrize("kind", PAIRS)
def test_lower_precision_is_at_least_torchs(kind: str):
    """The same states in bfloat16, but arithmetic in float32; with `state_dtype` nearer still."""
    ours, base, rule = PAIRS[kind]
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1} | ({} if kind == "AdamW" else {"momentum": 0.9})
    gradients = [
        {name: grad.bfloat16().float() for name, grad in grads.items() if grad is not None}
        for grads in some_gradients(SHAPES, 20, absent=0.0)
    ]
    errors = []
    for make in (base, ours, lambda parameters, **o: ours(parameters, state_dtype=torch.float32, **o)):
        model = Toy(dtype=torch.bfloat16)
        loop = Loop(rule, model.values(), options)
        walk(model, make(model.parameters(), **options), gradients)  # type: ignore[arg-type]
        for grads in gradients:
            loop.step(grads)
        errors.append(max(float((v - loop.theta[n]).abs().sum()) for n, v in model.values().items()))
    assert errors[1] <= errors[0]
    assert errors[2] <= errors[0]


# With options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("additions", STEERED.values(), ids=STEERED)
@pytest.mark.parametrize("kind", PAIRS)
def test_steered_step_is_the_documented_one(kind: str, additions: dict[str, Any], impl: str):
    """In several groups of other numbers, with parameters that have no gradient now and then."""
    ours, _, rule = PAIRS[kind]
    options = {"lr": 0.05, "weight_decay": 0.1} | ({} if kind == "AdamW" else {"momentum": 0.9, "dampening": 0.1})
    model, given = Toy(), resolved(additions)
    before, loop = model.values(), Loop(rule, model.values(), options, **given)
    parameters = list(model.named_parameters())
    groups = [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.05}]
    optimizer = ours(groups, **options, **given, impl=impl)
    gradients = some_gradients(SHAPES, 25 if impl == "torch" else 4)
    walk(model, optimizer, gradients)
    for grads in gradients:
        loop.step(grads)
    assert_close(model, loop, 2e-5)
    if "mask" in given:
        for name, mask in given["mask"].items():
            assert torch.equal(model.values()[name][~mask], before[name][~mask])
    if "fisher_decay" in given:
        for name, value in optimizer.fisher.items():
            assert torch.allclose(value.double(), loop.fisher[name], rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(kind=st.sampled_from(["AdamW", "SGD"]), data=st.data())
def test_any_options_together_are_the_documented_step(kind: str, data: st.DataObject):
    ours, _, rule = PAIRS[kind]
    options = data.draw(ADAMW if kind == "AdamW" else SGD)
    options["lr"] = 0.01
    shapes = {f"p{i}": (data.draw(st.integers(1, 30)),) for i in range(data.draw(st.integers(1, 3)))}
    additions: dict[str, Any] = {"fisher": data.draw(st.sampled_from([None, True]))}
    if data.draw(st.booleans()) or additions["fisher"] is None:
        additions["fisher_decay"] = data.draw(st.sampled_from([0.0, 0.9, 1.0]))
    if data.draw(st.booleans()):
        additions |= {"anchor": True, "ewc_lambda": 0.2}
    if data.draw(st.booleans()):
        additions["mask"] = True
    if data.draw(st.booleans()) or additions.keys() <= {"fisher", "mask"}:
        additions["soft_weight"] = 2.0
    given = resolved(additions, shapes)
    model = Toy(shapes, torch.float64)
    optimizer, loop = ours(model, **options, **given), Loop(rule, model.values(), options, **given)
    gradients = some_gradients(shapes, 20)
    walk(model, optimizer, gradients)
    for grads in gradients:
        loop.step(grads)
    assert_close(model, loop, 1e-3 if kind == "AdamW" else 1e-9)  # a moment near 0 amplifies the Fisher's rounding


@pytest.mark.parametrize("fused", [False, True])
def test_large_tensors_are_walked_in_chunks(fused: bool):
    """Masks and Fishers of several chunks, in steps that allocate nothing larger than a chunk."""
    size = 3 * chunk_elements(12) + 13
    shapes = {"large": (size,), "small": (3,)}
    model, given = Toy(shapes), resolved(STEERED["all"], shapes)
    optimizer, loop = ff.optim.AdamW(model, fused=fused, **given), Loop(adamw, model.values(), {}, **given)
    gradients = some_gradients(shapes, 3, absent=0.0)
    walk(model, optimizer, gradients[:2])
    model.take(gradients[2])
    with profile(profile_memory=True) as step:
        optimizer.step()
    allocated = [event.self_cpu_memory_usage for event in step.events()]
    assert 0 < max(allocated) <= 8 * chunk_elements(3)  # in bytes, at most in float64
    for grads in gradients:
        loop.step(grads)
    assert_close(model, loop, 1e-5)


def test_the_mean_is_over_all_parameters_with_gradients_or_not():
    model, fisher = Toy(), some_additions(SHAPES)["fisher"]
    model.take({name: torch.ones(shape) if name == "weight" else None for name, shape in SHAPES.items()})
    ff.optim.SGD(model, lr=1.0, fisher=fisher, soft_weight=1.0).step()
    mean = torch.cat([value.flatten() for value in fisher.values()]).double().mean()
    expected = Toy().weight.double() - 1 / (1 + fisher["weight"].double() / mean)
    assert torch.allclose(model.weight.double(), expected, atol=1e-6)


def test_the_mean_of_a_fisher_that_begins_counts_every_entry():
    """A Fisher of zero in parameters that have had no gradient yet, which takes no memory."""
    model = Toy()
    optimizer = ff.optim.SGD(model, lr=1.0, fisher_decay=1.0, soft_weight=1.0)
    for _ in range(2):
        model.take({name: torch.ones(shape) if name == "weight" else None for name, shape in SHAPES.items()})
        optimizer.step()
    mean = 15 / sum(parameter.numel() for parameter in model.parameters())
    assert torch.allclose(model.weight, Toy().weight - 1 - 1 / (1 + 1 / mean), atol=1e-6)
    assert len(optimizer.state) == 1


def test_a_parameter_without_gradient_keeps_its_fisher():
    model, fisher = Toy(), some_additions(SHAPES)["fisher"]
    optimizer = ff.optim.AdamW(model, fisher=fisher, fisher_decay=0.5)
    model.take({name: torch.ones(shape) if name == "weight" else None for name, shape in SHAPES.items()})
    optimizer.step()
    assert torch.equal(optimizer.fisher["bias"], fisher["bias"])
    assert torch.equal(optimizer.fisher["weight"], 0.5 * fisher["weight"] + 1)
    assert torch.equal(fisher["weight"], some_additions(SHAPES)["fisher"]["weight"])  # the caller's is not written to


# What is given --------------------------------------------------------------------------------------------------------


def test_a_fisher_and_a_mask_may_be_files(tmp_path: Path):
    given = some_additions(SHAPES)
    save_fisher(tmp_path / "fisher.safetensors", given["fisher"], {})
    ff.save_mask(given["mask"], tmp_path / "mask.safetensors")
    named = {"fisher": str(tmp_path / "fisher.safetensors"), "mask": tmp_path / "mask.safetensors"}
    expected = stepped(Toy(), fisher=given["fisher"], soft_weight=1.0, mask=given["mask"])
    assert_equal(stepped(Toy(), soft_weight=1.0, **named), expected)


def test_a_fisher_may_be_an_estimator_or_an_optimizers(model: Any, batch: dict[str, Tensor]):
    fisher = ff.DiagonalFisher(model)
    fisher.update(**batch)
    fixed = ff.optim.AdamW(model, fisher=fisher, soft_weight=1.0).fisher
    assert fixed is not None
    assert_equal(dict(fixed), fisher.diagonal())
    again = ff.optim.AdamW(model, fisher=fixed, fisher_decay=1.0)
    assert again.fisher is not None
    assert_equal(dict(again.fisher), dict(fixed))
    assert ff.trainable_mask(again.fisher, top=0.1).keys() == fixed.keys()
    assert ff.optim.AdamW(model).fisher is None


@pytest.mark.parametrize("kind", ["model", "file", "folder", "shards"])
def test_an_anchor_may_be_a_model_or_its_files(kind: str, tmp_path: Path):
    values, fisher = Toy(seed=9).values(), some_additions(SHAPES)["fisher"]
    if kind == "shards":
        halves = [dict(list(values.items())[:2]), dict(list(values.items())[2:])]
        for i, half in enumerate(halves):
            save_file(half, tmp_path / f"model-{i}.safetensors")
        index = {"weight_map": {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        save_file(values, tmp_path / "model.safetensors")
    anchors = {
        "model": Toy(seed=9),
        "file": tmp_path / "model.safetensors",
        "folder": str(tmp_path),
        "shards": tmp_path,
    }
    options = {"fisher": fisher, "ewc_lambda": 1.0}
    assert_equal(stepped(Toy(), anchor=anchors[kind], **options), stepped(Toy(), anchor=values, **options))


def test_an_anchor_that_is_the_parameters_themselves_is_copied():
    options = {"fisher": some_additions(SHAPES)["fisher"], "ewc_lambda": 1.0}
    expected = stepped(Toy(), anchor=Toy().values(), **options)
    for anchor in ("model", "state_dict", "initial"):
        model = Toy()
        given = {"model": model, "state_dict": model.state_dict(), "initial": "initial"}[anchor]
        assert_equal(stepped(model, anchor=given, **options), expected)


def test_an_anchor_of_other_precision_is_fine():
    """Of lower precision beside float32, and of float32 beside lower precision."""
    options = {"fisher": some_additions(SHAPES)["fisher"], "ewc_lambda": 1.0}
    low = {name: value.bfloat16() for name, value in Toy(seed=9).values().items()}
    high = {name: value.float() for name, value in low.items()}
    for dtype in (torch.float32, torch.bfloat16):
        assert_equal(
            stepped(Toy(dtype=dtype), anchor=low, **options), stepped(Toy(dtype=dtype), anchor=high, **options)
        )


def test_names_may_have_wrappers():
    given = some_additions(SHAPES)
    wrapped = {f"_orig_mod.{name}": parameter for name, parameter in Toy().named_parameters()}
    optimizer = ff.optim.AdamW(wrapped.items(), mask={f"module.{name}": v for name, v in given["mask"].items()}, **{
        "fisher": given["fisher"], "soft_weight": 1.0
    })  # fmt: skip
    assert optimizer.fisher is not None
    assert list(optimizer.fisher) == list(SHAPES)


def test_a_model_gives_its_trainable_parameters():
    model = Toy()
    model.bias.requires_grad_(False)
    (group,) = ff.optim.SGD(model).param_groups
    assert group["param_names"] == [name for name in SHAPES if name != "bias"]


# Stochastic rounding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
def test_stochastic_rounding_keeps_small_steps(kind: str):
    """Steps of 1/100 of bfloat16's last place are lost when rounded to the nearest, and not in the mean otherwise."""
    means = []
    for options in ({}, {"stochastic_rounding": True}):
        model = Toy({"a": (20000,)}, torch.bfloat16)
        nn.init.ones_(model.a)
        optimizer = PAIRS[kind][0](model, lr=2**-8 / 100, weight_decay=0.0, **options)
        walk(model, optimizer, [{"a": torch.ones(20000)}] * 50)
        means.append(1 - float(model.a.detach().double().mean()))
    assert means[0] == 0.0
    assert means[1] == pytest.approx(50 * 2**-8 / 100, rel=0.05)


@pytest.mark.parametrize("kind", PAIRS)
def test_random_bits_are_of_the_seed_the_step_and_the_parameter(kind: str):
    shapes, options = {"a": (500,), "b": (500,)}, {"lr": 1e-4, "stochastic_rounding": True}
    gradients = [{name: torch.ones(shape) for name, shape in shapes.items()}] * 6

    def run(seed: int, stop: int = 6) -> tuple[Toy, Any]:
        model = Toy(shapes, torch.bfloat16)
        for parameter in model.parameters():
            nn.init.ones_(parameter)
        optimizer = PAIRS[kind][0](model, **options, seed=seed)
        walk(model, optimizer, gradients[:stop])
        return model, optimizer

    first, _ = run(0)
    again, stopped = run(0, 3)
    fresh = PAIRS[kind][0](again, **options, seed=0)
    fresh.load_state_dict(copy.deepcopy(stopped.state_dict()))
    walk(again, fresh, gradients[3:])
    assert_equal(first.values(), again.values())
    assert not torch.equal(first.a, run(1)[0].a)
    assert not torch.equal(first.a, first.b)
    moved = []  # every parameter's in every step, from the same start
    for _ in range(3):
        for parameter in again.parameters():
            nn.init.ones_(parameter)
        walk(again, fresh, gradients[:1])
        moved += [parameter != 1 for parameter in again.parameters()]
    assert all(0 < int(entries.sum()) < 500 for entries in moved)
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(moved, 2))
