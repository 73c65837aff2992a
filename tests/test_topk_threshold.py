"""`ff.ops.topk_threshold` beyond the gates: checks, every kind of number, memory."""

from __future__ import annotations

import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_registry import interpreter_problem
from selection_registry import packed_bits
from test_linear_cross_entropy import LargestTensor

from fastforget import ops, reference
from fastforget.ops import _topk_threshold as implementation

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)
IMPLEMENTATIONS = ["torch", INTERPRETER]
ONE = torch.tensor([3.0, -1.0, 2.0, 2.0])


def assert_right(tensors: list[torch.Tensor], k: int, largest: bool, impl: str) -> ops.TopK:
    top = ops.topk_threshold(tensors, k=k, largest=largest, impl=impl)
    threshold, masks = reference.topk_threshold(tensors, k, largest=largest)
    assert top.threshold == threshold
    for i, (tensor, expected) in enumerate(zip(tensors, masks, strict=True)):
        mask = top.mask(tensor, i)
        assert torch.equal(mask, expected), i
        assert mask.stride() == tensor.stride()
        assert torch.equal(top.mask(tensor, i, packed=True), packed_bits(mask)), i
    return top


@pytest.mark.parametrize(
    ("tensors", "options", "error", "message"),
    [
        ([], {"k": 1}, ValueError, "tensors: expected at least one element, got none"),
        ([torch.zeros(0)], {"fraction": 0.5}, ValueError, "tensors: expected at least one element"),
        ([ONE], {}, ValueError, "fraction: expected either fraction or k, got fraction=None and k=None"),
        ([ONE], {"fraction": 0.5, "k": 2}, ValueError, "fraction: expected either fraction or k"),
        ([ONE], {"fraction": 0.0}, ValueError, r"fraction: expected a number in \(0, 1\], got 0.0"),
        ([ONE], {"fraction": 1.01}, ValueError, "fraction: expected a number in"),
        ([ONE], {"fraction": math.nan}, ValueError, "fraction: expected a number in"),
        ([ONE], {"k": 0}, ValueError, "k: expected 1 to 4, the number of elements, got 0"),
        ([ONE], {"k": 5}, ValueError, "k: expected 1 to 4"),
        ([ONE], {"k": 2.0}, TypeError, "k: expected an int, got float"),
        ([ONE], {"k": True}, TypeError, "k: expected an int, got bool"),
        ([ONE, ONE.long()], {"k": 2}, TypeError, r"tensors\[1\]: expected float32 or .*, got torch.int64"),
        ([ONE, ONE[::2]], {"k": 2}, ValueError, r"tensors\[1\]: expected a dense tensor"),
        ([ONE, ONE.to("meta")], {"k": 2}, ValueError, r"tensors\[1\]: expected device cpu"),
        ([ONE], {"k": 2, "impl": "sort"}, ValueError, 'impl: expected "auto"'),
    ],
)
def test_bad_input_is_refused(tensors, options, error, message):
    with pytest.raises(error, match=message):
        ops.topk_threshold(tensors, **options)


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    with pytest.raises(TypeError, match='got float64; pass impl="torch"'):
        ops.topk_threshold([ONE, ONE.double()], k=1, impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("negative", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_is_refused_by_place(dtype: torch.dtype, negative: bool, impl: str):
    if dtype == torch.float64 and impl == "triton":
        pytest.skip("a dtype of the torch path only")
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for places in ([7, 2500], [7, 4999]):
        bad = torch.ones(5000, dtype=dtype)
        bad.view(integer)[places] = -1 if negative else torch.iinfo(integer).max
        with pytest.raises(ValueError, match=re.escape("tensors[1]: expected numbers, got 2 NaN of 5000")):
            ops.topk_threshold([ONE, bad], k=1, impl=impl)


def test_the_number_is_the_rounded_fraction():
    for fraction, k in ((1e-9, 1), (0.3, 2), (0.7, 5), (1.0, 7)):
        top = ops.topk_threshold([torch.arange(7.0)], fraction)
        assert (top.k, top.threshold) == (k, 7.0 - k)


def test_a_mask_of_what_is_not_dense_is_refused():
    with pytest.raises(ValueError, match=r"tensor\[0\]: expected a dense tensor"):
        ops.topk_threshold([ONE], k=1).mask(ONE[::2], 0)


NUMBERS = [0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 2.0**-149, -(2.0**-149), 2.0**-126, -(2.0**-130), 3.4028235e38]
FEW = st.sampled_from(NUMBERS)
ANY = st.floats(width=32, allow_nan=False)


@st.composite
def lists(draw, dtypes=(torch.float32, torch.bfloat16, torch.float16)):
    number = draw(st.sampled_from([FEW, FEW | ANY, ANY, st.just(draw(FEW))]))
    values = draw(st.lists(st.lists(number, max_size=40), min_size=1, max_size=5).filter(any))
    tensors = [torch.tensor(v, dtype=torch.float32).to(draw(st.sampled_from(dtypes))) for v in values]
    tensors = [t.view(-1, 3).T if len(t) % 3 == 0 and draw(st.booleans()) else t for t in tensors]
    return tensors, draw(st.integers(1, sum(map(len, values)))), draw(st.booleans())


@settings(max_examples=300, deadline=None)
@given(lists())
def test_torch_equals_a_stable_sort(case):
    assert_right(*case, "torch")


@settings(max_examples=100, deadline=None)
@given(lists((torch.float64, torch.float32, torch.float16)))
def test_float64_equals_a_stable_sort(case):
    tensors, k, largest = case
    wide = [torch.where(t.abs() < 1e30, t * (1 + 2.0**-40), t) if t.dtype == torch.float64 else t for t in tensors]
    assert_right(wide, k, largest, "torch")


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
@settings(max_examples=60, deadline=None)  # 40 ms each
@given(lists())
def test_triton_equals_a_stable_sort(case):
    assert_right(*case, "triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_values_are_compared_in_float32(impl: str):
    """Between two neighbours in bfloat16 lies the threshold, which is none: rounded to bfloat16 it would be one of them."""
    low, high = torch.tensor([1.0, 1.0 + 2**-7]).bfloat16().split(1)
    for middle in (1.0 + 2**-9, 1.0 + 2**-8 + 2**-10):
        assert_right([low, high, torch.tensor([middle, 1.0])], 2, True, impl)
        assert_right([low, high, torch.tensor([middle])], 2, False, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_subnormal_numbers_are_not_zero(dtype: torch.dtype, impl: str):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tensor = torch.tensor([2 * tiny, 0.0, tiny, -tiny, -0.0], dtype=dtype)
    for k in range(1, 6):
        assert_right([tensor], k, True, impl)
        assert_right([tensor], k, False, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("largest", [False, True])
def test_ties_over_many_tensors_and_chunks(impl: str, largest: bool, monkeypatch):
    monkeypatch.setattr(implementation, "_box_elements", lambda device: 64)
    generator = torch.Generator().manual_seed(1)
    shapes = [(70,), (9, 30), (3, 200), (200, 3), (2, 5, 90), (1,), (0,), ()]
    tensors = [torch.randint(-1, 2, shape, generator=generator).float() for shape in shapes]
    tensors = [t.permute(2, 0, 1) if t.ndim == 3 else t.T if t.ndim == 2 else t for t in tensors]
    for k in (1, 290, 291, 500, 900, 2300, sum(t.numel() for t in tensors)):
        assert_right(tensors, k, largest, impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_around_the_size_of_a_chunk_and_unaligned(impl: str):
    from fastforget_kernels.tensor_lists import BLOCK, CHUNK

    generator = torch.Generator().manual_seed(2)
    buffer = torch.randn(5 * CHUNK, generator=generator)
    sizes = (CHUNK - 1, CHUNK, CHUNK + 1, BLOCK - 1, BLOCK, BLOCK + 1, 5)
    tensors = list(buffer[1 : 1 + sum(sizes)].split(sizes))
    for k in (1, sum(sizes) // 2, sum(sizes)):
        assert_right(tensors, k, True, impl)


def test_what_requires_a_gradient():
    leaf = ONE.clone().requires_grad_()
    assert ops.topk_threshold([leaf], k=2).mask(leaf, 0).tolist() == [True, False, True, False]


def test_torch_path_holds_a_few_chunks():
    limit = implementation._box_elements(torch.device("cpu"))
    permuted = torch.randn(3, 8 * limit).T  # of 24 chunks; a quarter of an octave has more than the 16 that are kept
    for tensors in ([permuted], [permuted.bfloat16()], [torch.zeros(20 * limit)]):
        with LargestTensor() as seen:
            top = ops.topk_threshold(tensors, fraction=0.5)
            top.mask(tensors[-1], 1, packed=True)
        assert seen.largest <= 16 * limit
    equal = torch.zeros(20 * limit)
    with LargestTensor() as seen:
        ops.topk_threshold([equal], k=7).mask(equal, 0, packed=True)
    assert seen.largest <= 20 * limit // 8


def test_torch_path_reads_the_data_twice_where_few_are_left(monkeypatch):
    passes = []
    memory_order = implementation.memory_order
    monkeypatch.setattr(implementation, "memory_order", lambda tensor: passes.append(1) or memory_order(tensor))
    ops.topk_threshold([torch.randn(1000, generator=torch.Generator().manual_seed(0))], k=10)
    assert len(passes) == 2


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_two_to_the_31_elements(dtype: torch.dtype):
    large = torch.zeros(2**31 + 12_345, device="cuda", dtype=dtype)
    large[-3:] = torch.tensor([1.0, 3.0, 2.0])
    tensors = [torch.tensor([2.5, 0.5], device="cuda"), large]
    assert ops.topk_threshold(tensors, k=3).threshold == 2.0
    top = ops.topk_threshold(tensors, k=2**31 + 12_340)
    assert (top.threshold, top.cut) == (0.0, (1, 2**31 + 12_335))
    assert int(top.mask(large, 1).sum()) == 2**31 + 12_338
