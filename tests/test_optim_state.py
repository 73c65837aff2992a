"""`ff.optim` among the rest of torch: state dicts, copies, tensors that move, groups, hooks, schedulers, scalers."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_loops import (
    IMPLEMENTATIONS,
    NUMBERS,
    PAIRS,
    SHAPES,
    STEERED,
    Toy,
    assert_equal,
    resolved,
    some_additions,
    some_gradients,
    walk,
)
from torch import Tensor, nn

import fastforget as ff

# State ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("way", ["to torch", "from torch"])
def test_state_dicts_are_torchs(kind: str, way: str):
    """Either loads the other's, the Fisher besides, and goes on with the same bits."""
    ours, base, _ = PAIRS[kind]
    first, second = (ours, base) if way == "to torch" else (base, ours)
    additions = {"fisher_decay": 0.9}
    gradients = some_gradients(SHAPES, 20)
    expected, model = Toy(), Toy()
    walk(expected, base(expected.parameters(), **NUMBERS[kind]), gradients)
    optimizer = first(model.parameters(), **NUMBERS[kind], **(additions if first is ours else {}))
    walk(model, optimizer, gradients[:10])
    state = copy.deepcopy(optimizer.state_dict())
    assert (first is ours) == any("fisher" in entry for entry in state["state"].values())
    other = second(model.parameters(), **NUMBERS[kind], **(additions if second is ours else {}))
    other.load_state_dict(state)
    walk(model, other, gradients[10:])
    assert_equal(model.values(), expected.values())


@pytest.mark.parametrize("kind", PAIRS)
def test_a_checkpoint_goes_on_bit_for_bit(kind: str, tmp_path: Path):
    """Float32 moments and Fisher of bfloat16 parameters are not rounded on the way, not even by hooks that see the state."""
    ours = PAIRS[kind][0]
    options = NUMBERS[kind] | resolved(STEERED["all"]) | {"state_dtype": torch.float32, "stochastic_rounding": True}
    gradients = some_gradients(SHAPES, 12)
    whole, model = Toy(dtype=torch.bfloat16), Toy(dtype=torch.bfloat16)
    walk(whole, ours(whole, **options), gradients)
    optimizer = ours(model, **options)
    walk(model, optimizer, gradients[:5])
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    again, seen = ours(model, **options), []
    again.register_load_state_dict_post_hook(lambda o: seen.append({n: f.clone() for n, f in o.fisher.items()}))
    again.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert_equal(seen[0], dict(optimizer.fisher))
    for number, state in optimizer.state_dict()["state"].items():
        assert_equal(again.state_dict()["state"][number], state)
    walk(model, again, gradients[5:])
    assert_equal(model.values(), whole.values())


def test_a_fixed_fisher_is_not_in_the_state():
    model, given = Toy(), resolved(STEERED["pull"])
    optimizer = ff.optim.AdamW(model, **given)
    empty = optimizer.state_dict()
    assert empty["state"] == {}
    walk(model, optimizer, some_gradients(SHAPES, 2, absent=0.0))
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in optimizer.state_dict()["state"].values())
    optimizer.load_state_dict(empty)  # accelerate does
    assert_equal(dict(optimizer.fisher), given["fisher"])


@pytest.mark.parametrize("way", ["deepcopy", "file"])
def test_a_copy_goes_on_by_itself(way: str, tmp_path: Path):
    gradients = some_gradients(SHAPES, 8)
    model = Toy()
    optimizer = ff.optim.AdamW(model, **resolved(STEERED["all"]), **NUMBERS["AdamW"])
    walk(model, optimizer, gradients[:4])
    if way == "deepcopy":
        other, twin = copy.deepcopy((model, optimizer))
    else:
        torch.save((model, optimizer), tmp_path / "both.pt")
        other, twin = torch.load(tmp_path / "both.pt", weights_only=False)
    assert twin.param_groups[0]["params"][0] is other.weight
    walk(model, optimizer, gradients[4:])
    assert not torch.equal(other.weight, model.weight)
    walk(other, twin, gradients[4:])
    assert_equal(other.values(), model.values())


def test_what_torchs_state_has_not_stays():
    """The Fisher and the anchor, when torch's state is loaded in the midst of a run."""
    model, torchs = Toy(), torch.optim.AdamW(Toy().parameters())
    optimizer = ff.optim.AdamW(model, fisher_decay=0.9, anchor="initial", ewc_lambda=1.0)
    walk(model, optimizer, some_gradients(SHAPES, 3, absent=0.0))
    fisher = {name: value.clone() for name, value in optimizer.fisher.items()}
    optimizer.load_state_dict(torchs.state_dict())
    assert_equal(dict(optimizer.fisher), fisher)
    walk(model, optimizer, some_gradients(SHAPES, 1, absent=0.0))
    assert torch.equal(optimizer.state[model.weight]["anchor"], Toy().weight)
    assert float(optimizer.state[model.weight]["step"]) == 1.0


def test_an_initial_anchor_keeps_its_precision(tmp_path: Path):
    """That of the parameters as they were, before they were cast."""
    model = Toy()
    optimizer = ff.optim.AdamW(model, fisher_decay=0.9, anchor="initial", ewc_lambda=1.0)
    model.bfloat16()
    walk(model, optimizer, some_gradients(SHAPES, 1, absent=0.0))
    fresh = ff.optim.AdamW(model, fisher_decay=0.9, anchor="initial", ewc_lambda=1.0)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(fresh.state[model.weight]["anchor"], Toy().weight)


@pytest.mark.parametrize("way", ["step", "load"])
def test_a_fisher_that_accumulates_is_there_once(way: str):
    """What it began with is let go of, as soon as the state has it."""
    model, fisher = Toy(), some_additions(SHAPES)["fisher"]
    first = weakref.ref(fisher["weight"])
    optimizer = ff.optim.AdamW(model, fisher=fisher, fisher_decay=0.9)
    del fisher
    gc.collect()
    assert first() is not None
    if way == "load":
        other = ff.optim.AdamW(Toy(), fisher_decay=0.9)
        for parameter in other.param_groups[0]["params"]:
            parameter.grad = torch.ones_like(parameter)
        other.step()
        optimizer.load_state_dict(other.state_dict())
    else:
        walk(model, optimizer, some_gradients(SHAPES, 1, absent=0.0))
    gc.collect()
    assert first() is None


def test_gradients_are_not_kept_alive():
    model = Toy()
    optimizer = ff.optim.AdamW(model, **resolved(STEERED["all"]))
    walk(model, optimizer, some_gradients(SHAPES, 2, absent=0.0))
    gradient = weakref.ref(model.weight.grad)
    optimizer.zero_grad()
    gc.collect()
    assert gradient() is None


# Where tensors move ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_tensors_may_move_between_steps(impl: str):
    """Parameters, gradients and states at other addresses, gradients with other strides."""
    gradients = some_gradients(SHAPES, 6, absent=0.0)
    runs = []
    for moving in (False, True):
        model = Toy()
        optimizer = ff.optim.AdamW(model, **resolved(STEERED["all"]), impl=impl)
        for step, grads in enumerate(gradients):
            model.take(grads)
            if moving and step == 2:
                model.weight.data = model.weight.data.clone()
            if moving and step == 3:
                optimizer.state[model.weight]["exp_avg"] = optimizer.state[model.weight]["exp_avg"].clone()
            if moving and step == 4:
                model.weight.grad = model.weight.grad.T.contiguous().T
            if moving and step == 5:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step()
        runs.append(model.values())
    assert_equal(*runs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_may_change_its_dtype_before_the_first_step(dtype: torch.dtype):
    given = resolved(STEERED["all"])
    early, late = Toy().to(dtype), Toy()
    optimizers = [ff.optim.AdamW(early, **given), ff.optim.AdamW(late, **given)]
    late.to(dtype)
    for model, optimizer in zip((early, late), optimizers, strict=True):
        walk(model, optimizer, some_gradients(SHAPES, 3, absent=0.0))
    assert_equal(early.values(), late.values())


def test_other_memory_layouts():
    """A parameter in another order of its dimensions; what is given follows it, also when it changes."""
    shapes = {"image": (2, 3, 4, 5)}
    results = []
    for when in ("never", "before", "after", "and back"):
        model, given = Toy(shapes), resolved(STEERED["all"], shapes)
        if when in ("before", "and back"):
            model.to(memory_format=torch.channels_last)
        optimizer = ff.optim.AdamW(model, lr=0.1, **given)
        if when == "after":
            model.to(memory_format=torch.channels_last)
        if when == "and back":
            model.to(memory_format=torch.contiguous_format)
        assert model.image.is_contiguous() == (when in ("never", "and back"))
        walk(model, optimizer, some_gradients(shapes, 3, absent=0.0))
        results.append({name: value.contiguous() for name, value in model.values().items()})
    for result in results[1:]:
        assert_equal(results[0], result)


# torch's surroundings -------------------------------------------------------------------------------------------------


def test_groups_can_be_added_or_are_left_out_whole():
    given = resolved(STEERED["all"])
    model, frozen = Toy(), Toy()
    both = ff.optim.AdamW(model, **given)
    parameters = list(frozen.named_parameters())
    optimizer = ff.optim.AdamW(parameters[:2], **given)
    optimizer.add_param_group({"params": parameters[2:]})
    gradients = some_gradients(SHAPES, 3, absent=0.0)
    walk(model, both, gradients)
    walk(frozen, optimizer, gradients)
    assert_equal(model.values(), frozen.values())
    with pytest.raises(
        ValueError, match=r"fisher: expected a tensor for every parameter, got none for other; it holds"
    ):
        optimizer.add_param_group({"params": [("other", nn.Parameter(torch.ones(2)))]})
    assert len(optimizer.param_groups) == 2
    walk(frozen, optimizer, gradients)


def test_the_mean_is_taken_anew_when_groups_are_added():
    given = resolved(STEERED["soft"])
    model, later = Toy(), Toy()
    parameters = list(later.named_parameters())
    optimizer = ff.optim.SGD(parameters[:2], **given)
    ones = {name: torch.ones(shape) for name, shape in SHAPES.items()}
    later.take(dict.fromkeys(SHAPES) | {"weight": torch.zeros(SHAPES["weight"])})
    optimizer.step()
    optimizer.add_param_group({"params": parameters[2:]})
    walk(later, optimizer, [ones])
    walk(model, ff.optim.SGD(model, **given), [ones])
    assert_equal(model.values(), later.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
@pytest.mark.parametrize("kind", PAIRS)
def test_hooks_and_closures_are_called_once(kind: str, dtype: torch.dtype):
    """Also where torch's own step does the work, whose class may have hooks too."""
    ours, base, _ = PAIRS[kind]
    base([nn.Parameter(torch.ones(1))], lr=1.0)  # torch gives its class the hooks
    calls = []
    parameter = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = ours([parameter], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append("closure")
        optimizer.zero_grad()
        loss = parameter.abs().sum()
        loss.backward()
        return loss.detach()

    assert float(optimizer.step(closure)) == 2.0
    assert calls == ["pre", "closure", "post"]
    assert float(parameter.detach().abs().sum()) < 2.0


def test_a_compiled_step_is_left_alone():
    """It reads addresses, which are no constants."""
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    models = Toy(), Toy()
    optimizers = [ff.optim.AdamW(model, **resolved(STEERED["all"])) for model in models]
    compiled = torch.compile(lambda: optimizers[1].step(), backend=keep)
    for grads in some_gradients(SHAPES, 3):
        models[0].take(grads)
        optimizers[0].step()
        models[1].take(grads)
        compiled()
    assert_equal(models[0].values(), models[1].values())
    assert not graphs


def scheduled(kind: str, name: str, cls: Any) -> dict[str, Tensor]:
    model = Toy()
    optimizer = cls(model.named_parameters(), **NUMBERS[kind])
    schedulers = torch.optim.lr_scheduler
    if name == "LambdaLR":
        scheduler: Any = schedulers.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    else:  # it changes momentum too
        scheduler = schedulers.OneCycleLR(optimizer, max_lr=0.2, total_steps=30)
    for grads in some_gradients(SHAPES, 20):
        model.take(grads)
        optimizer.step()
        scheduler.step()
    return model.values()


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("scheduler", ["LambdaLR", "OneCycleLR"])
def test_schedulers(kind: str, scheduler: str):
    ours, base, _ = PAIRS[kind]
    assert_equal(scheduled(kind, scheduler, ours), scheduled(kind, scheduler, base))


@pytest.mark.parametrize("kind", PAIRS)
def test_a_learning_rate_may_be_a_tensor(kind: str):
    ours, base, _ = PAIRS[kind]
    results = []
    for cls in (ours, base):
        model, lr = Toy(), torch.tensor(0.1)
        optimizer = cls(model.parameters(), lr=lr)
        for grads in some_gradients(SHAPES, 10, absent=0.0):
            model.take(grads)
            optimizer.step()
            lr.mul_(0.9)
        results.append(model.values())
    for name, value in results[0].items():
        assert torch.allclose(value, results[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool):
    """A step with an infinite gradient is left out; the Fisher sees unscaled gradients."""
    model = Toy()
    before = model.values()
    optimizer = ff.optim.AdamW(model, fused=fused, fisher_decay=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (True, False):
        optimizer.zero_grad()
        loss = sum(parameter.sum() for parameter in model.parameters())
        scaler.scale(loss * (float("inf") if bad else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if bad:
            assert_equal(model.values(), before)
            assert not any(value.any() for value in optimizer.fisher.values())
    assert all(torch.equal(value, torch.ones_like(value)) for value in optimizer.fisher.values())


@pytest.mark.parametrize("kind", ["sparse", "complex", "differentiable", "not dense"])
def test_what_the_operations_do_not_take_is_torchs(kind: str):
    results = []
    for cls in (ff.optim.SGD, torch.optim.SGD):
        start = torch.arange(12.0).reshape(3, 4)
        values = {"complex": start.to(torch.complex64), "not dense": start[:, ::2]}.get(kind, start)
        parameter: Tensor = nn.Parameter(values.clone() if kind != "not dense" else values)
        if kind == "differentiable":
            parameter = parameter * 1.0  # a leaf is not
            parameter.retain_grad()
        optimizer = cls(
            [parameter], lr=0.1, momentum=0.0 if kind == "sparse" else 0.9, differentiable=kind == "differentiable"
        )
        for _ in range(3):
            parameter.grad = torch.ones_like(parameter).detach()
            if kind == "sparse":
                parameter.grad = parameter.grad.to_sparse()
            optimizer.step()
        results.append(parameter.detach().clone())
    assert torch.equal(*results)


def test_a_state_from_before_the_first_step_takes_the_fisher_back():
    model = torch.nn.Linear(5, 3)
    start = copy.deepcopy(model.state_dict())
    optimizer = ff.optim.AdamW(model, lr=0.1, fisher_decay=0.9, soft_weight=3.0)
    saved, ends = copy.deepcopy(optimizer.state_dict()), []

    def train() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        for _ in range(5):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    ends.append(train())
    model.load_state_dict(start)
    optimizer.load_state_dict(saved)
    ends.append(train())
    assert torch.equal(*ends)


def test_a_given_fisher_that_was_added_to_is_not_taken_for_the_first_one():
    model = torch.nn.Linear(5, 3)
    fisher = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    optimizer = ff.optim.AdamW(model, lr=0.1, fisher=fisher, fisher_decay=0.9, soft_weight=3.0)
    saved = copy.deepcopy(optimizer.state_dict())
    model(torch.ones(1, 5)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match="state_dict: expected one with the Fisher of every parameter"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert all(
        torch.equal(after["state"][i][key], value) for i, own in before["state"].items() for key, value in own.items()
    )


def squares() -> dict[str, Tensor]:
    return {name: value.square() for name, value in Toy().values().items()}


def test_a_state_that_accumulates_no_fisher_leaves_it():
    other = ff.optim.AdamW(Toy(), anchor="initial", fisher=squares(), ewc_lambda=1.0)
    optimizer = ff.optim.AdamW(model := Toy(), fisher_decay=0.9, anchor="initial", ewc_lambda=1.0)
    walk(model, optimizer, some_gradients(SHAPES, 2, absent=0.0))
    fisher = {name: value.clone() for name, value in optimizer.fisher.items()}
    optimizer.load_state_dict(other.state_dict())
    assert_equal(dict(optimizer.fisher), fisher)


def test_an_initial_anchor_comes_back_before_the_first_gradient():
    saved = ff.optim.AdamW(first := Toy(), fisher_decay=0.9, anchor="initial", ewc_lambda=1.0).state_dict()
    model = Toy()
    with torch.no_grad():
        model.weight.mul_(2)
    optimizer = ff.optim.AdamW(model, fisher_decay=0.9, anchor="initial", ewc_lambda=1.0)
    optimizer.load_state_dict(copy.deepcopy(saved))
    walk(model, optimizer, some_gradients(SHAPES, 1, absent=0.0))
    assert torch.equal(optimizer.state[model.weight]["anchor"], first.weight)
    torch.optim.AdamW(first.parameters()).load_state_dict(saved)


def test_states_that_nothing_keeps_are_dropped():
    optimizer = ff.optim.AdamW(model := Toy(), fisher_decay=0.9)
    walk(model, optimizer, some_gradients(SHAPES, 1, absent=0.0))
    plain = ff.optim.AdamW(Toy())
    plain.load_state_dict(optimizer.state_dict())
    assert all("fisher" not in state for state in plain.state.values())


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_the_step_that_only_makes_states_changes_none(kind: str):
    """`torch.distributed.checkpoint` has an optimizer step with lr = 0 and gradients of zeros."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model, fisher = Toy(), squares()
    anchor = {name: value + 1 for name, value in Toy().values().items()}
    options = {"fisher": fisher, "fisher_decay": 0.5, "anchor": anchor, "ewc_lambda": 1.0}
    options |= {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(ff.optim, kind)(model, lr=0.1, **options)
    get_optimizer_state_dict(model, optimizer)
    assert_equal(dict(optimizer.fisher), fisher)
    moments = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    assert not any(bool(state[key].any()) for state in optimizer.state.values() for key in moments if key in state)


def test_the_mean_is_that_of_the_fisher_as_it_is_now():
    fisher, gradients = squares(), some_gradients(SHAPES, 1, absent=0.0)
    optimizer = ff.optim.SGD(model := Toy(), lr=0.1, fisher=fisher, soft_weight=3.0)
    walk(model, optimizer, gradients)
    fisher["weight"].mul_(100)
    other = copy.deepcopy(model)
    walk(model, optimizer, gradients)
    walk(other, ff.optim.SGD(other, lr=0.1, fisher=fisher, soft_weight=3.0), gradients)
    assert_equal(model.values(), other.values())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_default_device_is_not_taken_for_the_parameters(impl: str):
    model = Toy(dtype=torch.bfloat16)
    optimizer = ff.optim.AdamW(model, fisher_decay=0.9, soft_weight=1.0, stochastic_rounding=True, impl=impl)
    gradients = some_gradients(SHAPES, 2, absent=0.0)
    with torch.device("meta"):
        walk(model, optimizer, gradients)
    assert all(bool(value.isfinite().all()) for value in model.values().values())
