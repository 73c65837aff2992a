"""`ff.ops.gradient_products` beyond the gates: checks, its cheaper forms, blocks, compile, bounded workspace, size."""

from __future__ import annotations

import itertools

import pytest
import torch
from fisher_registry import FEW, MANY, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_registry import interpreter_problem
from test_linear_cross_entropy import LargestTensor
from torch.library import opcheck

from fastforget import ops, reference
from fastforget.ops import _gradient_blocks
from fastforget.ops import _gradient_products as implementation

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)
IMPLEMENTATIONS = ["torch", INTERPRETER]
CHOICES = [choice for choice in itertools.product((False, True), repeat=3) if any(choice)]


def tokens(outputs: int, inputs: int, lengths, dtype: torch.dtype = torch.float32):
    """Activations, output gradients, offsets; fisher and direction."""
    made = layer(outputs, inputs, lengths)(dtype)
    direction = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(1), dtype=made["fisher"].dtype)
    return [made[name] for name in ("activations", "grad_outputs", "offsets")], made["fisher"], direction


ARGUMENTS, F, V = tokens(6, 5, (2, 0, 3))
A, D, OFFSETS = ARGUMENTS


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (ARGUMENTS, {}, ValueError, "fisher, direction, norm: expected at least one, got none"),
        ((A[:, 0], D, OFFSETS), {"norm": True}, ValueError, r"activations: expected shape \[S, I\], got \(5,\)"),
        ((A, D, OFFSETS[:-1]), {"norm": True}, ValueError, "offsets: expected the last to be S = 5, got 2"),
        (ARGUMENTS, {"fisher": F.T}, ValueError, r"fisher: expected shape \[O, I\] = \(6, 5\), got \(5, 6\)"),
        (ARGUMENTS, {"direction": V[:5]}, ValueError, r"direction: expected shape \[O, I\] = \(6, 5\), got \(5, 5\)"),
        (ARGUMENTS, {"direction": V.double()}, TypeError, "direction: expected float32 or bfloat16 or float16 beside"),
        (ARGUMENTS, {"fisher": F.long()}, TypeError, "fisher: expected float32"),
        (ARGUMENTS, {"fisher": F.to("meta")}, ValueError, "fisher: expected device cpu"),
        (ARGUMENTS, {"norm": True, "impl": "fast"}, ValueError, 'impl: expected "auto"'),
    ],
)
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ops.gradient_products(*arguments, **options)


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    with pytest.raises(TypeError, match='float64; pass impl="torch"'):
        ops.gradient_products(A.double(), D.double(), OFFSETS, norm=True, impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize(("with_direction", "with_fisher", "norm"), CHOICES)
def test_gives_what_is_asked_for_and_nothing_else(impl: str, with_direction: bool, with_fisher: bool, norm: bool):
    chosen = {"direction": V if with_direction else None, "fisher": F if with_fisher else None, "norm": norm}
    result = ops.gradient_products(*ARGUMENTS, **chosen, impl=impl)
    expected = reference.gradient_products(*ARGUMENTS, fisher=F, direction=V)
    for got, value, wanted in zip(result, expected, (with_direction, with_fisher, norm), strict=True):
        assert (got is not None) == wanted
        if got is not None:
            assert got.dtype == torch.float32
            assert torch.allclose(got, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("lengths", [FEW, (70, 0, 130, 1), MANY[:40], (0, 0), ()])
def test_norm_by_products_of_tokens_equals_norm_by_tiles(impl: str, lengths, monkeypatch: pytest.MonkeyPatch):
    arguments, _, _ = tokens(65, 33, lengths)
    monkeypatch.setattr(implementation, "_BLOCK", 16)
    found = []
    for ghost in (True, False):
        monkeypatch.setattr(implementation, "_ghost_is_cheaper", lambda *_, ghost=ghost: ghost)
        found.append(ops.gradient_products(*arguments, norm=True, impl=impl).square_norm)
    assert torch.allclose(*found, rtol=1e-5)
    expected = reference.gradient_products(*arguments, fisher=torch.zeros(()), direction=torch.zeros(()))[2]
    assert torch.allclose(found[0], expected, rtol=1e-5)


def test_norm_takes_the_cheaper_form():
    bounds, longer = [0, 100, 150], [0, 200, 300]
    a, d = torch.empty(0, 400), torch.empty(0, 200)  # I O / (I + O) = 133 tokens
    assert implementation._ghost_is_cheaper(bounds, a, d)
    assert not implementation._ghost_is_cheaper(longer, a, d)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_matrices_of_any_strides_and_the_inputs_dtype(impl: str):
    arguments, fisher, direction = tokens(70, 40, FEW, torch.bfloat16)
    plain = {"fisher": fisher.bfloat16(), "direction": direction.bfloat16()}
    strided = {"fisher": plain["fisher"].T.contiguous().T, "direction": plain["direction"].repeat(1, 2)[:, :40]}
    expected = ops.gradient_products(*arguments, **plain, norm=True, impl=impl)
    got = ops.gradient_products(*arguments, **strided, norm=True, impl=impl)
    assert all(map(torch.equal, got, expected))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("ghost", [True, False])
def test_offsets_of_any_stride(impl: str, ghost: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(implementation, "_ghost_is_cheaper", lambda *_: ghost)
    strided = torch.stack([OFFSETS, OFFSETS + 1], 1)[:, 0]
    got, expected = (ops.gradient_products(A, D, o, norm=True, impl=impl).square_norm for o in (strided, OFFSETS))
    assert torch.equal(got, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_many_blocks_give_the_same_bits_again_and_equal_the_oracle(impl: str, monkeypatch: pytest.MonkeyPatch):
    from fastforget_kernels import example_gradients as kernels

    arguments, fisher, direction = tokens(200, 70, FEW)
    for maximum in (1, 5, 20):  # one example and one row of tiles a launch, and more
        monkeypatch.setattr(kernels, "MAX_PARTIALS", maximum)
        monkeypatch.setattr(_gradient_blocks, "_CPU_TILE", 100 * maximum)
        monkeypatch.setattr(implementation, "_BLOCK", 7 * maximum)
        first, second = (
            ops.gradient_products(*arguments, fisher=fisher, direction=direction, norm=True, impl=impl)
            for _ in range(2)
        )
        expected = reference.gradient_products(*arguments, fisher=fisher, direction=direction)
        for got, again, value in zip(first, second, expected, strict=True):
            assert torch.equal(got, again)
            assert torch.allclose(got, value, rtol=1e-4, atol=1e-3)
        dot = ops.gradient_products(*arguments, direction=direction, impl=impl).dot
        assert torch.allclose(dot, expected[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_autocast_changes_nothing(impl: str):
    for choice in ({"direction": V}, {"norm": True}, {"direction": V, "fisher": F}):
        with torch.autocast("cpu", torch.bfloat16):
            got = ops.gradient_products(*ARGUMENTS, **choice, impl=impl)
        for value, expected in zip(got, ops.gradient_products(*ARGUMENTS, **choice, impl=impl), strict=True):
            assert value is expected is None or torch.equal(value, expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str):
    for with_direction, with_fisher, norm in CHOICES:
        matrices = (F if with_fisher else None, V if with_direction else None)
        opcheck(implementation._products, (*ARGUMENTS, *matrices, norm, False, impl))


def test_compiles_as_one_graph():
    def objective(a, d, offsets):
        result = ops.gradient_products(torch.tanh(a), d, offsets, direction=V, norm=True)
        return result.dot / result.square_norm

    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(*ARGUMENTS), objective(*ARGUMENTS), equal_nan=True)
    assert not compiled(A.clone().requires_grad_(), D, OFFSETS).requires_grad


@pytest.mark.parametrize(
    ("choice", "largest"), [({"direction": V}, 64), ({"norm": True}, 64), ({"norm": True, "fisher": F}, 60)]
)
def test_torch_path_holds_one_block(choice, largest: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_gradient_blocks, "_CPU_TILE", 60)
    monkeypatch.setattr(implementation, "_BLOCK", 8)
    monkeypatch.setattr(implementation, "_ghost_is_cheaper", lambda *_: True)
    a, d = torch.randn(200, 5), torch.randn(200, 60)
    offsets = torch.arange(0, 201, 20, dtype=torch.int32)
    choice = {name: v if isinstance(v, bool) else v[:1, :1].expand(60, 5).clone() for name, v in choice.items()}
    with LargestTensor() as seen:
        ops.gradient_products(a, d, offsets, **choice)
    # One value a token, the tokens of an example, a column block of the matrix: nothing grows with S x O, O x I or S x S.
    assert seen.largest <= max(largest, 200)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 40),
    lengths=st.lists(st.integers(0, 12), max_size=8),
    choice=st.sampled_from(CHOICES),
)
def test_any_shape_equals_the_oracle(outputs, inputs, lengths, choice):
    arguments, fisher, direction = tokens(outputs, inputs, lengths, torch.float64)
    chosen = {"direction": direction if choice[0] else None, "fisher": fisher if choice[1] else None, "norm": choice[2]}
    expected = reference.gradient_products(*arguments, fisher=fisher, direction=direction)
    for got, value in zip(ops.gradient_products(*arguments, **chosen), expected, strict=True):
        assert got is None or torch.allclose(got, value, rtol=1e-9, atol=1e-9)


@pytest.mark.gpu
def test_triton_workspace_is_small():
    a, d = (torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.arange(0, 8193, 8, device="cuda", dtype=torch.int32)
    fisher, direction = torch.rand(2, 4096, 4096, device="cuda")
    ops.gradient_products(a, d, offsets, fisher=fisher, direction=direction, norm=True)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.gradient_products(a, d, offsets, fisher=fisher, direction=direction, norm=True)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    a = torch.randn(40, 2080, device="cuda", dtype=torch.bfloat16)
    d = torch.zeros(40, 2**20 + 3, device="cuda", dtype=torch.bfloat16)
    d[:, -64:] = torch.randn(40, 64, device="cuda")
    direction = torch.ones(1, 1, device="cuda").expand(2**20 + 3, 2080)
    fisher = torch.zeros(2**20 + 3, 2080, device="cuda", dtype=torch.bfloat16)
    fisher[-64:] = 1
    offsets = torch.tensor([0, 30, 40], device="cuda", dtype=torch.int32)
    got = ops.gradient_products(a, d, offsets, fisher=fisher, direction=direction, norm=True)
    one = torch.ones((), device="cuda")
    expected = reference.gradient_products(a.float(), d[:, -64:].float(), offsets, fisher=one, direction=one)
    for value, right in zip(got, expected, strict=True):
        assert torch.allclose(value, right, rtol=1e-3, atol=1.0)
