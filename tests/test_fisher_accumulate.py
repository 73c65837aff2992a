"""`ff.ops.fisher_accumulate_` beyond the gates: checks, dispatch, compile, groups of examples, bounded workspace, size."""

from __future__ import annotations

import itertools

import pytest
import torch
from fisher_registry import FEW, layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_registry import interpreter_problem
from test_linear_cross_entropy import LargestTensor
from torch.library import opcheck

from fastforget import ops, reference
from fastforget.ops import _examples, _gradient_blocks
from fastforget.ops import _fisher_accumulate as implementation

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)
IMPLEMENTATIONS = ["torch", INTERPRETER]
TOKENS = layer(6, 5, (2, 0, 3))(torch.float32)
F, A, D, OFFSETS = (TOKENS[name] for name in ("fisher", "activations", "grad_outputs", "offsets"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"activations": A[0]}, ValueError, r"activations: expected shape \[S, I\], got \(5,\); pack"),
        ({"grad_outputs": D[None]}, ValueError, r"grad_outputs: expected shape \[S, O\], got \(1, 5, 6\)"),
        ({"activations": A.long()}, TypeError, "activations: expected float32, bfloat16, float16 or float64"),
        (
            {"grad_outputs": D.half()},
            TypeError,
            r"grad_outputs: expected torch.float32 like activations, got torch.float16",
        ),
        ({"grad_outputs": D[1:]}, ValueError, "grad_outputs: expected S = 5 rows like activations, got 4"),
        ({"grad_outputs": D.to("meta")}, ValueError, "grad_outputs: expected device cpu like activations, got meta"),
        ({"offsets": OFFSETS.tolist()}, TypeError, "offsets: expected a tensor, got list; call torch.tensor on it"),
        ({"weights": [1.0, 2.0, 3.0]}, TypeError, "weights: expected a tensor, got list; call torch.tensor on it"),
        ({"offsets": OFFSETS[None]}, ValueError, r"offsets: expected shape \[B \+ 1\], got \(1, 4\)"),
        ({"offsets": OFFSETS[:0]}, ValueError, r"offsets: expected shape \[B \+ 1\], got \(0,\)"),
        ({"offsets": OFFSETS.long()}, TypeError, r"offsets: expected int32, got torch.int64; call .int\(\)"),
        ({"offsets": OFFSETS.to("meta")}, ValueError, "offsets: expected device cpu"),
        ({"offsets": OFFSETS + 1}, ValueError, "offsets: expected the first to be 0, got 1"),
        ({"offsets": torch.tensor([0, 3, 2, 5]).int()}, ValueError, "expected no decrease, got 3 then 2 at example 1"),
        ({"offsets": OFFSETS[:-1]}, ValueError, "offsets: expected the last to be S = 5, got 2"),
        ({"fisher": F.T}, ValueError, r"fisher: expected shape \[O, I\] = \(6, 5\), got \(5, 6\)"),
        (
            {"fisher": F.half()},
            TypeError,
            "fisher: expected float32 beside torch.float32 activations, got torch.float16",
        ),
        ({"fisher": F.double()}, TypeError, "fisher: expected float32"),
        ({"fisher": F.to("meta")}, ValueError, "fisher: expected device cpu"),
        (
            {"fisher": F.T.contiguous().T},
            ValueError,
            r"fisher: expected contiguous rows .* got strides \(1, 6\); .* swap",
        ),
        ({"fisher": F[:1].expand(6, 5)}, ValueError, r"fisher: expected contiguous rows that do not overlap"),
        ({"weights": torch.ones(2)}, ValueError, r"weights: expected shape \[B\] = \(3,\), got \(2,\)"),
        ({"weights": torch.ones(3).half()}, TypeError, "weights: expected float32 or float64, got torch.float16"),
        ({"weights": torch.ones(3, device="meta")}, ValueError, "weights: expected device cpu"),
        ({"grad_weight": F[:5]}, ValueError, r"grad_weight: expected shape \[O, I\] = \(6, 5\), got \(5, 5\)"),
        ({"grad_weight": F.bfloat16()}, TypeError, "grad_weight: expected float32 beside torch.float32 activations"),
        ({"impl": "cuda"}, ValueError, 'impl: expected "auto"'),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(changes, error, message):
    grad_weight = torch.full_like(F, 3.0)
    arguments = {
        "fisher": F.clone(),
        "activations": A,
        "grad_outputs": D,
        "offsets": OFFSETS,
        "grad_weight": grad_weight,
    }
    arguments |= changes
    before = {k: v.clone() for k, v in arguments.items() if isinstance(v, torch.Tensor) and v.device.type == "cpu"}
    with pytest.raises(error, match=message):
        ops.fisher_accumulate_(**arguments)
    for name, value in before.items():
        assert torch.equal(arguments[name], value), name


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    with pytest.raises(TypeError, match='float64; pass impl="torch"'):
        ops.fisher_accumulate_(F.double(), A.double(), D.double(), OFFSETS, impl="triton")


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_that_require_a_gradient_are_used_as_they_are(impl: str):
    fisher, leaf, expected = F.clone(), F.clone().requires_grad_(), F.clone()
    for changed in (fisher, leaf):
        ops.fisher_accumulate_(changed, A.clone().requires_grad_(), D.clone().requires_grad_(), OFFSETS, impl=impl)
    ops.fisher_accumulate_(expected, A, D, OFFSETS, impl=impl)
    assert torch.equal(fisher, expected)
    assert torch.equal(leaf, expected)
    assert not fisher.requires_grad


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_writes_nothing_around_a_chunk_of_the_vocabulary(impl: str):
    inputs = layer(70, 40, FEW)(torch.float32)
    wide = torch.full((90, 64), 7.0)
    chunk = wide[10:80, 8:48]
    ops.fisher_accumulate_(chunk, inputs["activations"], inputs["grad_outputs"], inputs["offsets"], impl=impl)
    assert (chunk > 7.0).all()
    chunk.fill_(7.0)
    assert (wide == 7.0).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_fisher_of_the_transposed_weight_by_swapped_roles(impl: str):
    fisher, swapped = torch.zeros(6, 5), torch.zeros(5, 6)
    ops.fisher_accumulate_(fisher, A, D, OFFSETS, impl=impl)
    ops.fisher_accumulate_(swapped, D, A, OFFSETS, impl=impl)
    assert torch.allclose(fisher, swapped.T, rtol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_opcheck(impl: str):
    for grad_weight, weights in itertools.product((None, torch.zeros(6, 5)), (None, torch.ones(3))):
        opcheck(implementation._accumulate, (F.clone(), grad_weight, A, D, OFFSETS, weights, True, False, impl))


def test_compiles_as_one_graph():
    def step(fisher, a, d, offsets, weights):
        ops.fisher_accumulate_(fisher, torch.tanh(a), d, offsets, weights=weights)
        return fisher * 2

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    got, expected = F.clone(), F.clone()
    weights = torch.tensor([1.0, 2.0, 3.0])
    a = A.clone().requires_grad_()
    assert torch.equal(compiled(got, a, D, OFFSETS, weights), step(expected, a, D, OFFSETS, weights))
    assert torch.equal(got, expected)


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
@pytest.mark.parametrize("multiprocessors", [1, 2, 5, 100])
def test_groups_of_examples_give_the_same_bits_again(multiprocessors: int, monkeypatch: pytest.MonkeyPatch):
    from fastforget_kernels import example_gradients as kernels

    monkeypatch.setattr(kernels, "device_properties", lambda device: ("sm_90", multiprocessors))
    weights = [1.0 + n for n in range(6)]
    inputs = layer(33, 20, FEW, weights=weights, grad_weight="accumulator", accumulate=True)(torch.float32)
    results = []
    for _ in range(2):
        fisher, grad_weight = inputs["fisher"].clone(), inputs["grad_weight"].clone()
        ops.fisher_accumulate_(**(inputs | {"fisher": fisher, "grad_weight": grad_weight}), impl="triton")
        results.append((fisher, grad_weight))
    assert all(map(torch.equal, *results))
    arguments = [inputs[name] for name in ("fisher", "activations", "grad_outputs", "offsets")]
    expected, total = reference.fisher_accumulate(*arguments, weights=inputs["weights"])
    assert torch.allclose(results[0][0], expected, rtol=1e-5)
    assert torch.allclose(results[0][1], total + inputs["grad_weight"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("multiprocessors", [1, 4, 108, 132, 304])
@pytest.mark.parametrize("examples", [0, 1, 7, 4096])
def test_groups_fill_the_device_and_bound_the_workspace(multiprocessors: int, examples: int):
    from fastforget_kernels.example_gradients import example_groups

    for tiles in (1, 2, 50, 107, 131, 132, 1024):
        groups = example_groups(tiles, examples, multiprocessors)
        assert 1 <= groups <= max(examples, 1)
        assert tiles * groups >= min(multiprocessors, tiles * max(examples, 1))
        assert groups == 1 or tiles * groups < 2 * multiprocessors


def test_torch_path_holds_one_block(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_gradient_blocks, "_CPU_TILE", 512)
    inputs = layer(300, 32, (4, 9, 1, 2, 30) * 4)(torch.bfloat16)
    tokens = [inputs[name] for name in ("activations", "grad_outputs")]
    fisher, grad_weight, bounds = torch.zeros(300, 32), torch.zeros(300, 32), inputs["offsets"].tolist()
    with LargestTensor() as seen:
        implementation._torch_accumulate_(fisher, *tokens, bounds, None, grad_weight, True)
    assert seen.largest <= 30 * 32  # the longest example's tokens in float32; a block is 16 rows
    wide = [tensor.double() for tensor in tokens]
    expected, total = reference.fisher_accumulate(torch.zeros(300, 32), *wide, inputs["offsets"])
    assert torch.allclose(fisher.double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.allclose(grad_weight.double(), total, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_offsets_and_weights_of_any_stride(impl: str):
    found = []
    strided = torch.stack([OFFSETS, OFFSETS + 1], 1)[:, 0]
    for offsets, weights in ((OFFSETS, torch.full((3,), 2.0)), (strided, torch.tensor(2.0).expand(3))):
        found.append(F.clone())
        ops.fisher_accumulate_(found[-1], A, D, offsets, weights=weights, impl=impl)
    assert torch.equal(*found)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_rows_that_lie_far_apart(impl: str, tmp_path):
    """As those of `hidden[:, -1]` of many gigabytes: 32-bit offsets within a tile would overflow."""
    rows, apart = 130, 2**24 + 8
    file = torch.from_file(str(tmp_path / "sparse"), shared=True, size=rows * apart, dtype=torch.float16)
    a = file.as_strided((rows, 5), (apart, 1)).copy_(torch.randn(rows, 5, generator=torch.Generator().manual_seed(0)))
    d, offsets = torch.ones(rows, 3, dtype=torch.float16), torch.tensor([0, rows], dtype=torch.int32)
    found = [torch.zeros(3, 5), torch.zeros(3, 5)]
    for fisher, activations in zip(found, (a, a.clone()), strict=True):
        ops.fisher_accumulate_(fisher, activations, d, offsets, impl=impl)
    assert torch.equal(*found)
    assert torch.equal(
        *(ops.gradient_products(x, d, offsets, norm=True, impl=impl).square_norm for x in (a, a.clone()))
    )
    labels = torch.zeros(rows, dtype=torch.int64)
    weight = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).half()
    assert torch.equal(*(ops.linear_cross_entropy(x, weight, labels, impl=impl).loss for x in (a, a.clone())))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_known_offsets_are_fetched_again_only_after_a_change(device: str, monkeypatch: pytest.MonkeyPatch):
    offsets, fetched = OFFSETS.to(device, copy=True), []
    if device == "cpu":  # there they are remembered only when they are made here: see the test below
        _examples.remember_bounds(offsets, offsets.tolist())
    else:
        _examples.example_bounds(offsets, len(A))
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: fetched.append(1) or original(self))
    for _ in range(3):
        assert _examples.example_bounds(offsets, len(A)) == original(OFFSETS)
    assert not fetched
    with pytest.raises(ValueError, match="expected the last to be S = 4, got 5"):
        _examples.example_bounds(offsets, 4)
    offsets.data = OFFSETS.to(device).clamp(max=4)
    assert _examples.example_bounds(offsets, 4)[-1] == 4
    offsets[1] = 9
    with pytest.raises(ValueError, match="expected no decrease, got 9 then 2"):
        _examples.example_bounds(offsets, 4)


def test_offsets_that_numpy_changes():
    array = OFFSETS.numpy().copy()
    offsets = torch.from_numpy(array)
    ops.fisher_accumulate_(F.clone(), A, D, offsets)
    array[1] = 9
    with pytest.raises(ValueError, match="expected no decrease, got 9 then 2"):
        ops.fisher_accumulate_(F.clone(), A, D, offsets)
    with torch.inference_mode():  # such tensors carry no version that would tell of a change
        unversioned = OFFSETS.clone()
        ops.fisher_accumulate_(F.clone(), A, D, unversioned)
        unversioned[0] = 1
        with pytest.raises(ValueError, match="expected the first to be 0, got 1"):
            ops.fisher_accumulate_(F.clone(), A, D, unversioned)


@settings(max_examples=40, deadline=None)
@given(
    outputs=st.integers(1, 40),
    inputs=st.integers(1, 40),
    lengths=st.lists(st.integers(0, 12), max_size=8),
    tile=st.integers(1, 600),
    weighted=st.booleans(),
)
def test_any_shape_equals_the_oracle(outputs, inputs, lengths, tile, weighted):
    weights = {"weights": [0.5 + n for n in range(len(lengths))]} if weighted else {}
    made = layer(outputs, inputs, lengths, grad_weight="accumulator", **weights)(torch.float64)
    names = ("fisher", "activations", "grad_outputs", "offsets")
    expected = reference.fisher_accumulate(*(made[name] for name in names), weights=made["weights"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_gradient_blocks, "_CPU_TILE", tile)
        ops.fisher_accumulate_(**made)
    assert torch.allclose(made["fisher"], expected[0], rtol=1e-10)
    assert torch.allclose(made["grad_weight"], expected[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_float32_is_full_precision(impl: str):
    inputs = layer(8, 9, (400, 300))(torch.float32)
    arguments = [inputs[name] for name in ("activations", "grad_outputs", "offsets")]
    fisher = torch.zeros(8, 9)
    ops.fisher_accumulate_(fisher, *arguments, impl=impl)
    expected, _ = reference.fisher_accumulate(
        torch.zeros(8, 9).double(), *(t.double() for t in arguments[:2]), arguments[2]
    )
    assert (fisher - expected).norm() < 1e-6 * expected.norm()  # tf32: 1e-3


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_tf32_only_when_allowed():
    """The interpreter multiplies in full precision whatever is asked for, so what is asked for is looked at."""
    from fastforget_kernels.example_gradients import _launch_options
    from fastforget_kernels.ghost_norm import ghost_settings

    for allow, expected in ((False, "ieee"), (True, "tf32")):
        assert _launch_options(A, D, OFFSETS, allow, 2)[1]["PRECISION"] == expected
        assert ghost_settings(torch.float32, allow)["PRECISION"] == expected


@pytest.mark.gpu
def test_float32_is_full_precision_on_a_gpu_unless_allowed():
    inputs = {name: t.cuda() for name, t in layer(256, 384, (400, 300, 3))(torch.float32).items() if t is not None}
    tokens = [inputs[name] for name in ("activations", "grad_outputs", "offsets")]
    expected, _ = reference.fisher_accumulate(inputs["fisher"].double(), *(t.double() for t in tokens[:2]), tokens[2])
    for allow_tf32, low, high in ((False, 0.0, 2e-6), (True, 1e-5, 1e-2)):
        fisher = inputs["fisher"].clone()
        ops.fisher_accumulate_(fisher, *tokens, allow_tf32=allow_tf32)
        assert low <= float((fisher - expected).norm() / expected.norm()) < high


@pytest.mark.gpu
def test_triton_workspace_is_small():
    a, d = (torch.randn(8192, 1024, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    offsets = torch.arange(0, 8193, 64, device="cuda", dtype=torch.int32)
    fisher, grad_weight = torch.zeros(2, 1024, 1024, device="cuda")
    ops.fisher_accumulate_(fisher, a, d, offsets, grad_weight=grad_weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.fisher_accumulate_(fisher, a, d, offsets, grad_weight=grad_weight)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20  # 128 gradients are 512 MB


@pytest.mark.gpu
def test_works_in_a_cuda_graph_and_runs_again_to_the_same_bits():
    inputs = {
        k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in layer(130, 200, FEW)(torch.bfloat16).items()
    }
    expected, fisher = inputs["fisher"].clone(), inputs["fisher"].clone()
    ops.fisher_accumulate_(**(inputs | {"fisher": expected}))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.fisher_accumulate_(**(inputs | {"fisher": fisher}))
    graph.replay()
    assert torch.equal(fisher, expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"), [(2**21 + 5, 1040, 64), (2**21 + 5, 70, 1040), (40, 2**20 + 3, 2080)]
)
def test_more_than_two_to_the_31_elements(tokens: int, outputs: int, inputs: int):
    a = torch.randn(tokens, inputs, device="cuda", dtype=torch.bfloat16)
    d = torch.randn(tokens, outputs, device="cuda", dtype=torch.bfloat16)
    lengths = [tokens - 30, 20, 10]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
    fisher = torch.zeros(outputs, inputs, device="cuda")
    ops.fisher_accumulate_(fisher, a, d, offsets, weights=torch.tensor([0.0, 1.0, 1.0], device="cuda"))
    some = slice(outputs - 64, outputs)
    expected, _ = reference.fisher_accumulate(
        torch.zeros(64, inputs, device="cuda"), a[-30:].float(), d[-30:, some].float(), torch.tensor([0, 20, 30])
    )
    assert torch.allclose(fisher[some], expected, rtol=1e-3, atol=1e-3)
