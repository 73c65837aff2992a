"""`ff.ops.square_accumulate_` beyond the gates: checks, layouts, addresses, compile, size."""

from __future__ import annotations

import math

import pytest
import torch
from kernel_registry import interpreter_problem
from test_linear_cross_entropy import LargestTensor
from torch.library import opcheck

from fastforget import ops, reference
from fastforget.ops import _square_accumulate as implementation
from fastforget.ops._tensor_lists import chunk_elements

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)
IMPLEMENTATIONS = ["torch", INTERPRETER]


def pairs(*shapes: tuple[int, ...], seed: int = 0) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(shape, generator=generator) for shape in shapes] for _ in range(2))


FISHERS, GRADS = pairs((3, 4), (5,))


@pytest.mark.parametrize(
    ("fishers", "grads", "options", "error", "message"),
    [
        (FISHERS, GRADS[:1], {}, ValueError, "grads: expected 2 tensors, one for each of fishers, got 1"),
        (FISHERS, GRADS, {"scale": math.nan}, ValueError, "scale: expected a finite number, got nan"),
        (FISHERS, GRADS, {"decay": math.inf}, ValueError, "decay: expected a finite number, got inf"),
        (FISHERS, [GRADS[0].long(), GRADS[1]], {}, TypeError, r"grads\[0\]: expected float32"),
        (
            [FISHERS[0].half(), FISHERS[1]],
            GRADS,
            {},
            TypeError,
            r"fishers\[0\]: expected float32 or float64, got torch.float16",
        ),
        (FISHERS, [GRADS[0], GRADS[1].double()], {}, TypeError, r"fishers\[1\]: expected torch.float64 for a gradient"),
        (
            FISHERS,
            [GRADS[0].T, GRADS[1]],
            {},
            ValueError,
            r"grads\[0\]: expected shape \(3, 4\) like fishers\[0\], got",
        ),
        (
            FISHERS,
            [GRADS[0], GRADS[1].to("meta")],
            {},
            ValueError,
            r"grads\[1\]: expected device cpu like fishers\[0\], got meta",
        ),
        (
            FISHERS,
            [GRADS[0].T.contiguous().T, GRADS[1]],
            {},
            ValueError,
            r"grads\[0\]: expected strides \(4, 1\) like fishers\[0\], got \(1, 3\)",
        ),
        (
            [FISHERS[0], FISHERS[0].new_zeros(10)[::2]],
            [GRADS[0], GRADS[0].new_zeros(10)[::2]],
            {},
            ValueError,
            r"fishers\[1\]: expected a dense tensor, got strides \(2,\)",
        ),
        (
            [FISHERS[0], FISHERS[0]],
            [GRADS[0]] * 2,
            {},
            ValueError,
            r"fishers\[1\]: expected every tensor once, got fishers\[0\] again",
        ),
        (
            [FISHERS[0], FISHERS[0].view(12)],
            [GRADS[0], GRADS[0].view(12)],
            {},
            ValueError,
            "expected every tensor once",
        ),
        (FISHERS, GRADS, {"impl": "foreach"}, ValueError, 'impl: expected "auto"'),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(fishers, grads, options, error, message):
    before = [fisher.clone() for fisher in fishers]
    with pytest.raises(error, match=message):
        ops.square_accumulate_(fishers, grads, **options)
    assert all(map(torch.equal, fishers, before))


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    wide = [FISHERS[0], FISHERS[1].double()]
    with pytest.raises(TypeError, match=r'grads\[1\]: .* got float64; pass impl="torch"'):
        ops.square_accumulate_(wide, [GRADS[0], GRADS[1].double()], impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_to_do(impl: str):
    ops.square_accumulate_([], [], impl=impl)
    ops.square_accumulate_([torch.zeros(0), torch.zeros(0)], [torch.zeros(0)] * 2, impl=impl)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_decay_of_zero_does_not_read_what_it_overwrites(impl: str):
    fishers = [torch.full_like(fisher, torch.nan) for fisher in FISHERS]
    ops.square_accumulate_(fishers, GRADS, decay=0.0, scale=2.0, impl=impl)
    for fisher, grad in zip(fishers, GRADS, strict=True):
        assert torch.equal(fisher, 2.0 * grad.square())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_addresses_are_those_of_the_call(impl: str):
    """Gradients are allocated anew in every step, and a fisher may be moved."""
    fishers, expected = [fisher.clone() for fisher in FISHERS], FISHERS
    for step in range(4):
        _, grads = pairs((3, 4), (5,), seed=step)
        fishers[0] = fishers[0].clone()
        expected = reference.square_accumulate(expected, grads, decay=0.9)
        ops.square_accumulate_(fishers, grads, decay=0.9, impl=impl)
    for fisher, value in zip(fishers, expected, strict=True):
        assert torch.allclose(fisher, value)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_hundreds_of_tensors_around_the_size_of_a_chunk(impl: str):
    from fastforget_kernels.square_accumulate import BLOCK, CHUNK

    sizes = [CHUNK - 1, CHUNK, CHUNK + 1, BLOCK, BLOCK + 1, BLOCK - 1, 2 * CHUNK, *range(1, 300, 3)]
    fishers, grads = pairs(*((size,) for size in sizes))
    grads[2], grads[40] = grads[2].bfloat16(), grads[40].half()
    wide = [grad.float() for grad in grads]
    expected = reference.square_accumulate(fishers, wide, scale=0.5, decay=0.25)
    ops.square_accumulate_(fishers, grads, scale=0.5, decay=0.25, impl=impl)
    for i, (fisher, value) in enumerate(zip(fishers, expected, strict=True)):
        assert torch.allclose(fisher, value, rtol=1e-5, atol=1e-6), i


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_dense_layouts_and_nothing_around_them(impl: str):
    wide = torch.full((200,), 7.0)
    fisher = wide[20:140].view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    fisher = wide[20:140].as_strided(fisher.shape, fisher.stride())
    grad = torch.ones(200)[20:140].as_strided(fisher.shape, fisher.stride())  # ones after its end, too
    one, one_grad = torch.ones(4, 1).T, torch.ones(1, 4)  # strides of a dimension of size one do not matter
    ops.square_accumulate_([fisher, one], [grad, one_grad], impl=impl)
    assert torch.allclose(fisher, torch.full_like(fisher, 8.0))
    assert torch.equal(one, torch.full((1, 4), 2.0))
    assert (wide[:20] == 7.0).all()
    assert (wide[140:] == 7.0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_parameters_that_require_a_gradient(impl: str):
    fisher = FISHERS[0].clone()
    ops.square_accumulate_([fisher], [GRADS[0].clone().requires_grad_()], impl=impl)
    assert torch.allclose(fisher, FISHERS[0] + GRADS[0].square())
    assert not fisher.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str):
    opcheck(implementation._accumulate, ([f.clone() for f in FISHERS], GRADS, 0.5, 0.9, impl))


def test_compiles_as_one_graph():
    def step(first, second, grads):
        ops.square_accumulate_([first, second], [grad * 2 for grad in grads], decay=0.5)
        return first.sum() + second.sum()

    got, expected = ([f.clone() for f in FISHERS] for _ in range(2))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*got, GRADS), step(*expected, GRADS))
    assert all(map(torch.equal, got, expected))


def test_torch_path_holds_one_chunk():
    fisher, grad = torch.zeros(3 * chunk_elements(2)), torch.randn(3 * chunk_elements(2))
    for decay, grads in ((0.5, [grad]), (1.0, [grad.bfloat16()]), (0.0, [grad])):
        with LargestTensor() as seen:
            implementation._torch_accumulate_([fisher], grads, 1.0, decay)
        assert seen.largest <= chunk_elements(2)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_than_two_to_the_31_elements(dtype: torch.dtype):
    sizes = (7, 2**31 + 12_345, 9)
    fishers = [torch.ones(size, device="cuda") for size in sizes]
    grads = [torch.randn(size, device="cuda", dtype=dtype) for size in sizes]
    ops.square_accumulate_(fishers, grads, scale=0.5, decay=2.0)
    for fisher, grad in zip(fishers, grads, strict=True):
        for part in (slice(0, 10_000), slice(fisher.numel() // 2, fisher.numel() // 2 + 10_000), slice(-10_000, None)):
            assert torch.allclose(fisher[part], 2.0 + 0.5 * grad[part].float().square(), rtol=1e-6)


@pytest.mark.gpu
def test_a_cuda_graph_is_refused_by_triton_and_taken_by_torch():
    fishers, grads = ([t.cuda() for t in tensors] for tensors in (FISHERS, GRADS))
    expected = reference.square_accumulate(fishers, grads)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(ValueError, match="while capturing"):
            ops.square_accumulate_(fishers, grads)
        ops.square_accumulate_(fishers, grads, impl="torch")
    graph.replay()
    for fisher, value in zip(fishers, expected, strict=True):
        assert torch.allclose(fisher, value)
