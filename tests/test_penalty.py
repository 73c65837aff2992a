"""`ff.ewc_penalty` against the plain expression, and what it refuses."""

from __future__ import annotations

import copy

import pytest
import torch
from test_linear_cross_entropy import LargestTensor
from tiny_models import tiny_model
from torch import nn

from fastforget import ewc_penalty
from fastforget.fisher.files import save_fisher
from fastforget.ops._tensor_lists import chunk_elements, chunks


def moved(model: nn.Module) -> nn.Module:
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())))
    return other


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_value_and_gradient(dtype: torch.dtype):
    model = tiny_model().to(dtype)
    anchor = moved(model)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    fisher = {n: torch.rand(p.shape, dtype=wide) for n, p in model.named_parameters()}
    penalty = ewc_penalty(model, fisher, anchor)
    (3.0 * penalty).backward()
    exact = copy.deepcopy(model).double()
    old = dict(anchor.double().named_parameters())
    expected = sum((fisher[n] * (p - old[n].detach()) ** 2).sum() / 2 for n, p in exact.named_parameters())
    (3.0 * expected).backward()
    assert penalty.dtype == wide
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-6)  # the sum is float32, or float64, in any case
    for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
        assert (mine.grad.double() - theirs.grad).norm() <= tolerance * theirs.grad.norm()


def test_some_parameters_a_file_and_any_layout(tmp_path):
    model = tiny_model()
    anchor = {
        n: p.detach().mT.contiguous().mT + 1 if p.ndim > 1 else p.detach() + 1 for n, p in model.named_parameters()
    }
    chosen = {n: torch.full_like(p, 2.0) for n, p in model.named_parameters() if ".mlp." in n}
    save_fisher(tmp_path / "f.safetensors", chosen, {"parameters": "*.mlp.*"})
    penalty = ewc_penalty(model, tmp_path / "f.safetensors", anchor)
    assert penalty.item() == pytest.approx(sum(f.numel() for f in chosen.values()), rel=1e-5)
    penalty.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == chosen.keys()


def test_nothing_as_large_as_a_parameter_is_kept():
    model = nn.Linear(2048, 4096, bias=False)
    fisher, anchor = {"weight": torch.rand(4096, 2048)}, {"weight": torch.zeros(4096, 2048)}
    with LargestTensor() as seen:
        ewc_penalty(model, fisher, anchor)
    assert seen.largest <= chunk_elements(4)


@pytest.mark.parametrize("layout", ["gaps", "transposed with gaps", "expanded"])
def test_parameters_that_are_not_dense(layout: str):
    """Their penalty and gradient are those of contiguous copies."""
    wide = torch.randn(4, 10)
    value = {"gaps": wide[:, :5], "transposed with gaps": wide.T[:5], "expanded": wide[:1].expand(4, 10)}[layout]
    model = nn.ParameterDict({"w": nn.Parameter(value)})
    plain = nn.ParameterDict({"w": nn.Parameter(value.detach().clone(memory_format=torch.contiguous_format))})
    fisher = {"w": torch.rand(wide.shape).as_strided(value.shape, value.stride())}
    anchor = {"w": torch.randn(value.shape)}
    penalties = [ewc_penalty(m, fisher, anchor) for m in (model, plain)]
    assert penalties[0].item() == pytest.approx(penalties[1].item(), rel=1e-6)
    grads = [torch.autograd.grad(p, list(m.values()))[0] for p, m in zip(penalties, (model, plain), strict=True)]
    assert torch.equal(*grads)
    with pytest.raises(ValueError, match=r"anchor\['w'\]: expected other values than the parameter's own"):
        ewc_penalty(model, fisher, model)


def test_views_in_memory_order_refuse_other_memory():
    with pytest.raises(ValueError, match=r"tensor: expected a dense one, got strides \(10, 1\) for shape \(4, 5\)"):
        list(chunks([torch.ones(4, 10)[:, :5]]))
    with pytest.raises(ValueError, match=r"tensors: expected strides \(5, 1\) like the first's, got \(1, 4\)"):
        list(chunks([torch.ones(4, 5), torch.ones(5, 4).T]))


def test_an_anchor_is_a_checkpoint_too(tmp_path):
    model = tiny_model()
    old = moved(model)
    old.save_pretrained(tmp_path)
    fisher = {n: torch.ones_like(p) for n, p in model.named_parameters()}
    for anchor in (tmp_path, tmp_path / "model.safetensors"):
        assert torch.equal(ewc_penalty(model, fisher, anchor), ewc_penalty(model, fisher, old))


def test_frozen_parameters_cost_no_gradient(monkeypatch: pytest.MonkeyPatch):
    model = nn.Linear(3, 2)
    model.weight.requires_grad_(False)
    loss = ewc_penalty(model, ONES, {name: value.detach() + 1 for name, value in ONES.items()})
    made, empty_like = [], torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda tensor: made.append(tensor.shape) or empty_like(tensor))
    loss.backward()
    assert made == [(2,)]
    assert model.weight.grad is None


LINEAR = nn.Linear(3, 2)
ONES = {n: torch.ones_like(p) for n, p in LINEAR.named_parameters()}


@pytest.mark.parametrize(
    ("fisher", "anchor", "error", "message"),
    [
        (
            ONES | {"bias": torch.tensor([1.0, -1.0])},
            ONES,
            ValueError,
            r"fisher\['bias'\]: expected finite values >= 0, got -1 to 1",
        ),
        (
            ONES | {"bias": torch.tensor([1.0, torch.nan])},
            ONES,
            ValueError,
            r"fisher\['bias'\]: expected finite values",
        ),
        (
            ONES | {"bias": torch.tensor([1.0, torch.inf])},
            ONES,
            ValueError,
            r"fisher\['bias'\]: expected finite values",
        ),
        (
            ONES | {"bais": torch.ones(2)},
            ONES,
            ValueError,
            "fisher: expected names of the model's parameters, got 'bais'",
        ),
        (ONES | {"bias": torch.ones(3)}, ONES, ValueError, r"fisher\['bias'\]: expected shape \(2,\)"),
        (
            ONES | {"bias": torch.ones(2).int()},
            ONES,
            TypeError,
            r"fisher\['bias'\]: expected float32 or float64, got torch.int32",
        ),
        (
            ONES,
            {"weight": ONES["weight"]},
            ValueError,
            "anchor: expected a tensor for every parameter, got none for bias",
        ),
        (ONES, ONES | {"bias": torch.ones(2, device="meta")}, ValueError, r"anchor\['bias'\]: expected device cpu"),
        (
            ONES,
            ONES | {"bias": torch.ones(2).long()},
            TypeError,
            r"anchor\['bias'\]: expected float32 or .*, got torch.int64",
        ),
        (
            ONES,
            ONES | {"bias": torch.tensor([1.0, torch.nan])},
            ValueError,
            r"anchor\['bias'\]: expected finite values, got nan to nan",
        ),
        (
            ONES | {"bias": torch.tensor([1.0, 1e39], dtype=torch.float64)},
            ONES,
            ValueError,
            r"fisher\['bias'\]: expected finite values >= 0, got 1 to 1e\+39 for float32",
        ),
        (
            ONES,
            "initial",
            ValueError,
            'anchor: expected the parameters as they were, got "initial"',
        ),
        (
            ONES,
            3,
            TypeError,
            "anchor: expected a model, a mapping from parameter names to tensors or the path .*, got int",
        ),
        ({}, ONES, ValueError, "fisher: expected a tensor for at least one parameter, got none"),
        (3, ONES, TypeError, "fisher: expected a DiagonalFisher"),
    ],
)
def test_what_does_not_fit_is_refused(fisher, anchor, error, message):
    for _ in range(2):  # a Fisher is checked once, and one that failed again
        with pytest.raises(error, match=message):
            ewc_penalty(LINEAR, fisher, anchor)


def test_a_fisher_is_checked_once_and_after_a_change(monkeypatch: pytest.MonkeyPatch):
    calls, aminmax = [], torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda value: calls.append(1) or aminmax(value))
    fisher = {name: value.clone() for name, value in ONES.items()}
    for _ in range(3):
        ewc_penalty(LINEAR, fisher, ONES)
    assert len(calls) == 2
    fisher["bias"][0] = -1
    with pytest.raises(ValueError, match="expected finite values >= 0"):
        ewc_penalty(LINEAR, fisher, ONES)


def test_an_anchor_that_moves_along_is_refused():
    for anchor in (LINEAR, dict(LINEAR.named_parameters()), LINEAR.state_dict()):
        with pytest.raises(
            ValueError, match=r"anchor\['weight'\]: expected other values than the parameter's own, got the para"
        ):
            ewc_penalty(LINEAR, ONES, anchor)


def test_a_fisher_of_frozen_parameters_alone_is_refused():
    model = torch.nn.Linear(3, 2)
    values = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    with pytest.raises(
        ValueError, match="fisher: expected a tensor for at least one parameter that is trained, got fro"
    ):
        ewc_penalty(model, values, values)
    with pytest.raises(
        ValueError, match=r'anchor: expected the parameters as they were, got "initial", which ff\.optim'
    ):
        ewc_penalty(model.requires_grad_(True), values, "initial")


def test_a_file_of_another_kind_is_no_anchor(tmp_path):
    from fastforget.fisher.files import save_fisher

    model = torch.nn.Linear(3, 2)
    values = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    save_fisher(tmp_path / "fisher.safetensors", values, {})
    with pytest.raises(ValueError, match=r"anchor: expected a model's weights, got .*, a Fisher, mask or difference"):
        ewc_penalty(model, values, tmp_path / "fisher.safetensors")
