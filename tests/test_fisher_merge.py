"""`ff.ops.fisher_merge_` beyond the gates: checks, weights, memory."""

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


def lists(number: int, *shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(number)
    models, fishers = (
        [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(number)] for _ in range(2)
    )
    return [[p.to(dtype) for p in model] for model in models], [[f.square() for f in fisher] for fisher in fishers]


MODELS, FISHERS = lists(2, (3, 4), (5,))
(A, B), (F, G) = MODELS, FISHERS


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights": [1.0]}, ValueError, "weights: expected 2, one for each of models, got 1"),
        ({"fishers": [F]}, ValueError, "fishers: expected 2, one for each of models, got 1"),
        ({"weights": [1.0, -1.0]}, ValueError, r"weights\[1\]: expected a finite number of at least 0, got -1.0"),
        ({"weights": [math.nan, 1.0]}, ValueError, r"weights\[0\]: expected a finite number"),
        ({"weights": [1.0, math.inf]}, ValueError, r"weights\[1\]: expected a finite number"),
        ({"weights": [0.0, 0.0]}, ValueError, r"weights: expected one above 0, got \[0.0, 0.0\]"),
        ({"models": [], "fishers": [], "weights": []}, ValueError, r"weights: expected one above 0, got \[\]"),
        ({"floor": 0.0}, ValueError, "floor: expected a finite number above 0, got 0.0"),
        ({"floor": math.nan}, ValueError, "floor: expected a finite number above 0"),
        ({"models": [A, B[:1]]}, ValueError, r"models\[1\]: expected 2 tensors, one for each of outs, got 1"),
        ({"fishers": [F, [G[0].T, G[1]]]}, ValueError, r"fishers\[1\]\[0\]: expected shape \(3, 4\) like outs\[0\]"),
        ({"models": [[A[0].T.contiguous().T, A[1]], B]}, ValueError, r"models\[0\]\[0\]: expected strides \(4, 1\)"),
        ({"models": [A, [B[0], B[1].half()]]}, TypeError, r"models\[1\]\[1\]: expected torch.float32 for an out of"),
        ({"fishers": [[F[0], F[1].double()], G]}, TypeError, r"fishers\[0\]\[1\]: expected torch.float32 for an out"),
        ({"fishers": [[F[0], F[1].half()], G]}, TypeError, r"fishers\[0\]\[1\]: expected float32 or float64, got"),
        ({"impl": "foreach"}, ValueError, 'impl: expected "auto"'),
    ],
)
def test_bad_input_is_refused(change, error, message):
    outs = [torch.full_like(param, 7.0) for param in A]
    arguments = {"models": MODELS, "fishers": FISHERS, "weights": [1.0, 2.0]} | change
    with pytest.raises(error, match=message):
        ops.fisher_merge_(outs, **arguments)
    assert all((out == 7.0).all() for out in outs)


def test_memory_that_is_overwritten_before_it_is_read_is_refused():
    outs = [torch.zeros(3), torch.zeros(3)]
    others = [torch.ones(3), torch.ones(3)]
    with pytest.raises(ValueError, match=r"outs\[1\]: expected every tensor once, got outs\[0\] again"):
        ops.fisher_merge_([outs[0]] * 2, [others], [others], [1.0])
    with pytest.raises(ValueError, match=r"models\[1\]\[0\]: expected memory of its own, got that of outs\[1\]"):
        ops.fisher_merge_(outs, [others, outs[::-1]], [others, others], [1.0, 1.0])
    with pytest.raises(ValueError, match=r"fishers\[0\]\[1\]: expected memory of its own, got that of outs\[1\]"):
        ops.fisher_merge_(outs, [others], [[others[0], outs[1]]], [1.0])


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    wide = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r'outs\[0\]: .* got float64; pass impl="torch"'):
        ops.fisher_merge_([wide.clone()], [[wide]], [[wide]], [1.0], impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_model_of_weight_zero_is_not_read(impl: str):
    outs = [torch.empty_like(param) for param in A]
    unknown = [torch.full_like(param, math.nan) for param in A]
    ops.fisher_merge_(outs, [A, unknown, B], [F, unknown, G], [1.0, 0.0, 2.0], impl=impl)
    for out, value in zip(outs, reference.fisher_merge(MODELS, FISHERS, [1.0, 2.0], floor=1e-6), strict=True):
        assert torch.allclose(out, value, rtol=1e-5, atol=1e-6)


ON_GPU = pytest.param("triton", "cuda", marks=pytest.mark.gpu)  # NumPy's maximum propagates NaN anyway


@pytest.mark.parametrize(("impl", "device"), [("torch", "cpu"), ON_GPU])
def test_nan_is_not_hidden_by_the_floor(impl: str, device: str):
    ones = torch.ones(5000, device=device)
    fisher, out = ones.clone(), ones.clone()
    fisher[[3, 4999]] = math.nan
    ops.fisher_merge_([out], [[ones]] * 2, [[fisher], [ones]], [1.0, 1.0], impl=impl)
    assert out.isnan().nonzero().flatten().tolist() == [3, 4999]


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("weight", [1e-44, 1e-300, 1e38, 1e300])
def test_only_the_ratios_of_weights_matter(weight: float, impl: str):
    outs = [torch.empty_like(param) for param in A]
    ops.fisher_merge_(outs, MODELS, FISHERS, [weight, 2 * weight], impl=impl)
    for out, value in zip(outs, reference.fisher_merge(MODELS, FISHERS, [1.0, 2.0], floor=1e-6), strict=True):
        assert torch.allclose(out, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_many_models_into_the_first(impl: str):
    models, fishers = lists(20, (2100,), (3,))
    expected = reference.fisher_merge(models, fishers, range(1, 21), floor=1e-6)
    ops.fisher_merge_(models[0], models, fishers, range(1, 21), impl=impl)
    for out, value in zip(models[0], expected, strict=True):
        assert torch.allclose(out, value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_do(impl: str):
    ops.fisher_merge_([], [[]], [[]], [1.0], impl=impl)
    ops.fisher_merge_([torch.zeros(0)], [[torch.zeros(0)]], [[torch.zeros(0)]], [1.0], impl=impl)


def test_parameters_that_require_a_gradient():
    params = [torch.full((3,), float(j)).requires_grad_() for j in range(2)]
    ops.fisher_merge_([params[0]], [[p] for p in params], [[torch.ones(3)]] * 2, [1.0, 3.0])
    assert params[0].tolist() == [0.75] * 3
    assert params[0].is_leaf


def test_torch_path_holds_chunks():
    chunk = chunk_elements(8)
    models, fishers = lists(2, (3 * chunk,), dtype=torch.bfloat16)
    out = torch.empty_like(models[0][0])
    with LargestTensor() as seen:
        ops.fisher_merge_([out], models, fishers, [1.0, 2.0])
    assert seen.largest <= chunk
