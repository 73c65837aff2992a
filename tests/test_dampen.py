"""`ff.ops.dampen_` beyond the gates: checks, bits that stay, memory."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_registry import interpreter_problem
from test_linear_cross_entropy import LargestTensor

from fastforget import ops, reference
from fastforget.ops._tensor_lists import chunk_elements

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)
IMPLEMENTATIONS = ["torch", INTERPRETER]


def lists(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], ...]:
    generator = torch.Generator().manual_seed(0)
    params, forget, retain = ([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3))
    return [p.to(dtype) for p in params], [f.square() for f in forget], [r.square() * 0.1 for r in retain]


PARAMS, FORGET, RETAIN = lists((3, 4), (5,))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"alpha": -1.0}, ValueError, "alpha: expected a finite number of at least 0, got -1.0"),
        ({"alpha": math.nan}, ValueError, "alpha: expected a finite number"),
        ({"lam": math.inf}, ValueError, "lam: expected a finite number of at least 0, got inf"),
        ({"forget": FORGET[:1]}, ValueError, "forget: expected 2 tensors, one for each of params, got 1"),
        ({"retain": [*RETAIN, RETAIN[0]]}, ValueError, "retain: expected 2 tensors, one for each of params, got 3"),
        ({"retain": [RETAIN[0].T, RETAIN[1]]}, ValueError, r"retain\[0\]: expected shape \(3, 4\) like params\[0\]"),
        ({"forget": [FORGET[0].T.contiguous().T, FORGET[1]]}, ValueError, r"forget\[0\]: expected strides \(4, 1\)"),
        ({"forget": [FORGET[0], FORGET[1].half()]}, TypeError, r"forget\[1\]: expected float32 or float64, got"),
        (
            {"retain": [RETAIN[0], RETAIN[1].double()]},
            TypeError,
            r"retain\[1\]: expected torch.float32 for a parameter",
        ),
        (
            {"params": [PARAMS[0], PARAMS[1].double()]},
            TypeError,
            r"forget\[1\]: expected torch.float64 for a parameter",
        ),
        ({"params": [PARAMS[0], PARAMS[1].long()]}, TypeError, r"params\[1\]: expected float32 or"),
        ({"impl": "foreach"}, ValueError, 'impl: expected "auto"'),
    ],
)
def test_bad_input_is_refused(change, error, message):
    arguments = {"params": PARAMS, "forget": FORGET, "retain": RETAIN} | change
    before = [param.clone() for param in arguments["params"]]
    with pytest.raises(error, match=message):
        ops.dampen_(**arguments)
    assert all(map(torch.equal, arguments["params"], before))


def test_a_parameter_given_twice_is_refused():
    with pytest.raises(ValueError, match=r"params\[1\]: expected every tensor once, got params\[0\] again"):
        ops.dampen_([PARAMS[0]] * 2, [FORGET[0]] * 2, [RETAIN[0]] * 2)


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    wide = [[tensor.double() for tensor in tensors] for tensors in (PARAMS, FORGET, RETAIN)]
    with pytest.raises(TypeError, match=r'params\[0\]: .* got float64; pass impl="torch"'):
        ops.dampen_(*wide, impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["forget", "retain"])
@pytest.mark.parametrize("bad", [-0.5, math.inf, math.nan, -math.inf])
@pytest.mark.parametrize("place", [0, -1])
def test_an_impossible_fisher_is_refused_by_name(bad: float, name: str, place: int, impl: str):
    params, forget, retain = lists((3,), (70_000,))
    forget[0] = torch.ones(4)[1:]  # not aligned: a launch of its own
    {"forget": forget, "retain": retain}[name][1][place] = bad
    before = [param.clone() for param in params]
    with pytest.raises(ValueError, match=rf"{name}\[1\]: expected finite values >= 0, got .*(inf|nan|-0.5)"):
        ops.dampen_(params, forget, retain, impl=impl)
    assert all(map(torch.equal, params, before))
    ops.dampen_(params, forget, retain, check=False, dry_run=True, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_entries_keep_their_bits(dtype: torch.dtype, impl: str):
    params, forget, retain = lists((4096,), (7,), dtype=dtype)
    params[0][:4] = torch.tensor([-0.0, math.inf, -math.inf, math.nan])
    forget[0][:4] = 0.0
    before = [param.clone() for param in params]
    counts = ops.dampen_(params, forget, retain, impl=impl)
    _, chosen = reference.dampen(before, forget, retain, alpha=10.0, lam=1.0)
    for param, old, mask, count in zip(params, before, chosen, counts.tolist(), strict=True):
        same = param.view(torch.uint8).view(-1, dtype.itemsize) == old.view(torch.uint8).view(-1, dtype.itemsize)
        assert torch.equal(same.all(1), ~mask)
        assert count == int(mask.sum())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_dry_run_changes_nothing(impl: str):
    params = [param.clone() for param in PARAMS]
    counts = ops.dampen_(params, FORGET, RETAIN, alpha=1.0, dry_run=True, impl=impl)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int((f > r).sum()) for f, r in zip(FORGET, RETAIN, strict=True)]
    assert sum(counts.tolist())
    assert all(map(torch.equal, params, PARAMS))


@pytest.mark.filterwarnings("ignore:overflow encountered in multiply")  # the interpreter's: alpha F_retain is infinite
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_zeros_and_extremes(impl: str):
    """Nothing is divided by a Fisher of 0, and no product of large or small Fishers leaves float32 for NaN."""
    forget = torch.tensor([0.0, 0.0, 1.0, 1e38, 1e-38, 2e-38, 3e38])
    retain = torch.tensor([0.0, 1.0, 0.0, 1e30, 1e38, 0.0, 1e30])
    param = torch.full((7,), 2.0)
    assert ops.dampen_([param], [forget], [retain], impl=impl).tolist() == [4]
    assert torch.allclose(param, torch.tensor([2.0, 2.0, 0.0, 2e-8, 2.0, 0.0, 2 / 3e8]), rtol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_do(impl: str):
    assert ops.dampen_([], [], [], impl=impl).shape == (0,)
    assert ops.dampen_([torch.zeros(0)], [torch.zeros(0)], [torch.zeros(0)], impl=impl).tolist() == [0]


def test_parameters_that_require_a_gradient():
    param = torch.ones(3).requires_grad_()
    ops.dampen_([param], [torch.ones(3)], [torch.zeros(3)])
    assert param.tolist() == [0.0] * 3
    assert param.is_leaf


def test_a_chunk_is_counted_exactly(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1000)
    assert chunk_elements(6) <= 2**24


def test_torch_path_holds_chunks():
    params, forget, retain = lists((3 * chunk_elements(5),), dtype=torch.bfloat16)
    with LargestTensor() as seen:
        ops.dampen_(params, forget, retain)
    assert seen.largest <= chunk_elements(5)
