"""`ff.optim` refuses what does not fit, before anything is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_loops import (
    NUMBERS,
    PAIRS,
    SHAPES,
    Toy,
    assert_equal,
    some_additions,
    some_gradients,
)
from torch import nn

import fastforget as ff

# What is refused ------------------------------------------------------------------------------------------------------

GIVEN = some_additions(SHAPES)
FISHER, MASK = GIVEN["fisher"], GIVEN["mask"]
NAN = {name: value / 0 for name, value in FISHER.items()}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"ewc_lambda": 1.0, "anchor": "initial"},
            ValueError,
            "fisher: expected a Fisher, which ewc_lambda needs, got None",
        ),
        ({"soft_weight": 1.0}, ValueError, "fisher: expected a Fisher, which soft_weight needs"),
        ({"min_fisher": 0.0}, ValueError, "fisher: expected a Fisher, which min_fisher needs"),
        ({"max_fisher": 1.0}, ValueError, "fisher: expected a Fisher, which max_fisher needs"),
        (
            {"fisher": FISHER, "ewc_lambda": 1.0},
            ValueError,
            "anchor: expected what ewc_lambda pulls to, got None; pass",
        ),
        ({"fisher_decay": -0.1}, ValueError, "fisher_decay: expected a finite number of at least 0, got -0.1"),
        ({"fisher": FISHER, "soft_weight": float("nan")}, ValueError, "soft_weight: expected a finite number"),
        ({"fisher": FISHER, "max_fisher": float("nan")}, ValueError, "max_fisher: expected a number, got nan"),
        ({"fisher": 3.0}, TypeError, "fisher: expected a DiagonalFisher, a mapping"),
        (
            {"fisher": {"weight": FISHER["weight"]}},
            ValueError,
            "fisher: expected a tensor for every parameter, got none for bi",
        ),
        (
            {"fisher": FISHER | {"bias": torch.ones(6)}},
            ValueError,
            r"fisher\['bias'\]: expected shape \(5,\) like the para",
        ),
        (
            {"fisher": FISHER | {"bias": FISHER["bias"].half()}},
            TypeError,
            r"fisher\['bias'\]: expected float32 or float64, ",
        ),
        ({"fisher": FISHER | {"bias": -FISHER["bias"]}}, ValueError, r"fisher\['bias'\]: expected finite values >= 0"),
        ({"fisher": NAN}, ValueError, r"fisher\['weight'\]: expected finite values >= 0"),
        (
            {"fisher": FISHER | {"bias": FISHER["bias"].to("meta")}},
            ValueError,
            r"fisher\['bias'\]: expected device cpu",
        ),
        (
            {"mask": {"weight": MASK["weight"]}},
            ValueError,
            "mask: expected a tensor for every parameter, got none for bias",
        ),
        ({"mask": FISHER}, TypeError, r"mask\['weight'\]: expected a bool tensor, True where the entry may move"),
        ({"mask": 3}, TypeError, "mask: expected a mapping from names to bool tensors"),
        (
            {"fisher": FISHER, "ewc_lambda": 1.0, "anchor": 3},
            TypeError,
            "anchor: expected a model, a mapping from parameter",
        ),
        (
            {"fisher": FISHER, "ewc_lambda": 1.0, "anchor": "nowhere"},
            ValueError,
            "anchor: expected a safetensors file or a folder with a saved model, got nowhere",
        ),
        ({"fisher": FISHER, "ewc_lambda": 1.0, "anchor": MASK}, TypeError, r"anchor\['weight'\]: expected float32"),
        (
            {"state_dtype": torch.bfloat16},
            ValueError,
            "state_dtype: expected torch.float32 or None, got torch.bfloat16",
        ),
        ({"stochastic_rounding": True, "seed": 2**63}, ValueError, "seed: expected an integer of 64 bits, got 9223"),
        (
            {"anchor": "initial"},
            ValueError,
            "ewc_lambda: expected the strength of the pull to the anchor, got an anchor",
        ),
        ({"fisher_decay": "1"}, ValueError, "fisher_decay: expected a number, got '1'"),
        ({"fisher_decay": 1.01}, ValueError, "fisher_decay: expected a number from 0 to 1, got 1.01; F would grow"),
        (
            {"fisher": FISHER, "min_fisher": 1.0, "max_fisher": 1.0},
            ValueError,
            "min_fisher: expected less than max_fisher = 1.0, got 1.0; no entry would move",
        ),
        ({"impl": "cuda"}, ValueError, 'impl: expected "auto", "triton" or "torch", got \'cuda\''),
        ({"mask": MASK, "differentiable": True}, ValueError, "differentiable: expected False beside the options"),
        ({"lr": -1.0, "mask": MASK}, ValueError, "Invalid learning rate"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ff.optim.AdamW(Toy(), **({"soft_weight": 0.0} | options))


def test_a_fisher_that_nothing_reads_is_refused():
    with pytest.raises(
        ValueError, match=r"fisher: expected fisher_decay, ewc_lambda, .* or soft_weight beside it, got no"
    ):
        ff.optim.AdamW(Toy(), fisher=FISHER)


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("fisher", {"fisher": FISHER, "min_fisher": 1.0}),
        ("mask", {"mask": MASK}),
        ("anchor", {"fisher_decay": 1.0, "ewc_lambda": 1.0, "anchor": FISHER}),
    ],
)
def test_unnamed_parameters_are_refused(argument: str, options: dict[str, Any]):
    with pytest.raises(ValueError, match=f"params: expected named parameters beside {argument}, got tensors without n"):
        ff.optim.AdamW(Toy().parameters(), **options)


def test_unnamed_parameters_have_no_fisher_to_show():
    optimizer = ff.optim.AdamW(Toy().parameters(), fisher_decay=1.0)
    with pytest.raises(ValueError, match=r"fisher: expected an optimizer of named parameters; pass it model.named_p"):
        _ = optimizer.fisher


def test_bad_groups_are_refused():
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(
        ValueError, match="params: expected ewc_lambda for the whole optimizer, got one in a group; pass ew"
    ):
        ff.optim.AdamW([{"params": [parameter], "ewc_lambda": 1.0}])
    pairs = [("a", parameter), ("module.a", nn.Parameter(torch.ones(2)))]
    with pytest.raises(ValueError, match="params: expected one parameter a name, got a second one for 'a'"):
        ff.optim.AdamW([{"params": pairs[:1]}, {"params": pairs[1:]}], mask={"a": torch.ones(2, dtype=torch.bool)})
    with pytest.raises(
        TypeError, match=r"params\[0\]: expected float32, bfloat16, float16, float64, got torch.complex64; us"
    ):
        ff.optim.AdamW([nn.Parameter(torch.ones(2, dtype=torch.complex64))], fisher_decay=1.0)
    with pytest.raises(
        ValueError, match=r"params\[0\]: expected a dense parameter, got strides \(2,\) for shape \(2,\); ma"
    ):
        ff.optim.AdamW([nn.Parameter(torch.ones(4)[::2])], fisher_decay=1.0)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("problem", ["sparse", "twice"])
def test_a_refused_step_writes_nothing(kind: str, problem: str):
    """Not in other groups or devices either, and no state is begun."""
    model = Toy()
    parameters = list(model.named_parameters())
    optimizer = PAIRS[kind][0](
        [{"params": parameters[:1]}, {"params": parameters[1:]}], **NUMBERS[kind], fisher_decay=0.5
    )
    model.take({name: torch.ones(shape) for name, shape in SHAPES.items()})
    if problem == "sparse":
        model.table.grad = model.table.grad.to_sparse()
        message = "table: expected a dense gradient, got a sparse one"
    else:
        model.bias.data = model.table.data.flatten()[:5]
        message = r"params\[1\]: expected every tensor once, got params\[0\] again"
    before = model.values()
    with pytest.raises(ValueError, match=message) as caught:
        optimizer.step()
    if problem == "twice":
        assert caught.value.__notes__ == ["number 1 belongs to table"]
    assert_equal(model.values(), before)
    assert not optimizer.state


def test_sparse_gradients_of_adamw_are_refused_by_name():
    parameter = nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3).to_sparse()
    with pytest.raises(
        ValueError, match="embedding: expected a dense gradient, got a sparse one; leave out sparse=True"
    ):
        ff.optim.AdamW([("embedding", parameter)]).step()


def test_triton_where_it_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastforget.ops._dispatch._INTERPRETING", False)
    model = Toy()
    optimizer = ff.optim.AdamW(model, impl="triton")
    model.take(some_gradients(SHAPES, 1, absent=0.0)[0])
    with pytest.raises(ValueError, match='impl: "triton" needs tensors on a CUDA or ROCm device, got cpu'):
        optimizer.step()
    assert not optimizer.state
