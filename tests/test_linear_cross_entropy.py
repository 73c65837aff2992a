"""`ff.ops.linear_cross_entropy` beyond the gates: checks, dispatch, autograd, compile, bounded workspace, properties."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_registry import OPERATIONS, interpreter_problem, upcast
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from fastforget import ops, reference
from fastforget.ops import _linear_cross_entropy as implementation
from fastforget.ops import _linear_cross_entropy_torch as torch_path

INTERPRETER = pytest.param(
    "triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
)


def head(rows: int = 6, hidden: int = 5, classes: int = 11, dtype: torch.dtype = torch.float32, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, hidden, generator=generator).to(dtype),
        torch.randn(classes, hidden, generator=generator).to(dtype),
        torch.randint(classes, (rows,), generator=generator),
    )


X, W, T = head()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0], W, T), ValueError, r"input: expected shape \[S, H\], got \(5,\); flatten"),
        ((X.tolist(), W, T), TypeError, r"input: expected a tensor, got list; call torch.tensor\(\)"),
        ((X, W, T.tolist()), TypeError, "target: expected a tensor, got list"),
        ((X.long(), W, T), TypeError, "input: expected float32"),
        ((X, W[:, 1:], T), ValueError, r"linear_weight: expected shape \[V, H\] = \(V, 5\), got \(11, 4\)"),
        ((X, W[:0], T), ValueError, "linear_weight: expected shape"),
        ((X, W.double(), T), TypeError, "linear_weight: expected torch.float32 like input, got torch.float64"),
        ((X, W.to("meta"), T), ValueError, "linear_weight: expected device cpu like input, got meta"),
        ((X, W, T[1:]), ValueError, r"target: expected shape \[S\] = \(6,\), got \(5,\)"),
        ((X, W, T.int()), TypeError, r"target: expected int64, got torch.int32; call .long\(\)"),
        ((X, W, T + 11), ValueError, r"target: expected labels in \[0, 11\) or ignore_index = -100, got \d+ at row 0"),
        ((X, W, torch.full_like(T, -1)), ValueError, "got -1 at row 0"),
    ],
)
def test_bad_tensors(arguments, error, message):
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(*arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"linear_bias": W[:3, 0]}, ValueError, r"linear_bias: expected shape \[V\] = \(11,\), got \(3,\)"),
        ({"linear_bias": W[:, 0].half()}, TypeError, "linear_bias: expected torch.float32"),
        ({"linear_bias": [0.0] * 11}, TypeError, "linear_bias: expected a tensor, got list"),
        ({"softcap": 0.0}, ValueError, "softcap: expected a finite number > 0 or None, got 0.0"),
        ({"softcap": float("inf")}, ValueError, "softcap: expected"),
        ({"scale": float("nan")}, ValueError, "scale: expected a finite number, got nan"),
        ({"impl": "cuda"}, ValueError, 'impl: expected "auto", "triton" or "torch", got \'cuda\''),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ops.linear_cross_entropy(X, W, T, **options)


@pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())
def test_float64_is_refused_by_triton():
    with pytest.raises(TypeError, match='float64; pass impl="torch"'):
        ops.linear_cross_entropy(X.double(), W.double(), T, impl="triton")


def test_dispatch(monkeypatch: pytest.MonkeyPatch):
    from fastforget.ops import _dispatch

    assert ops.resolve("auto", torch.device("cpu"))[0] == "torch"
    assert ops.resolve("auto", torch.device("mps"))[0] == "torch"
    assert ops.resolve("torch", torch.device("cuda"))[0] == "torch"
    with pytest.raises(ValueError, match="needs tensors on a CUDA or ROCm device, got mps"):
        ops.resolve("triton", torch.device("mps"))
    monkeypatch.setattr(_dispatch, "_INTERPRETING", False)
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        ops.resolve("triton", torch.device("cpu"))
    monkeypatch.setattr(_dispatch, "_TRITON_PROBLEM", "Triton does not import")
    assert ops.resolve("auto", torch.device("cuda")) == ("torch", "Triton does not import")
    with pytest.raises(ValueError, match="Triton does not import"):
        ops.resolve("triton", torch.device("cuda"))


def test_auto_follows_the_device_to_triton(monkeypatch: pytest.MonkeyPatch):
    from fastforget.ops import _dispatch

    monkeypatch.setattr(_dispatch, "_TRITON_PROBLEM", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert ops.resolve("auto", torch.device("cuda"))[0] == "torch"
    with pytest.raises(ValueError, match=r"compute capability 8\.0"):
        ops.resolve("triton", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert ops.resolve("auto", torch.device("cuda"))[0] == "triton"


@pytest.mark.parametrize("impl", ["torch", INTERPRETER])
def test_opcheck(impl: str):
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    bias = W[:, 0].clone().requires_grad_()
    opcheck(implementation._forward, (x, w, T, None, 0.0, 1.0, -100, None, None, impl))
    opcheck(implementation._forward, (x, w, T, bias, 3.0, 0.5, -100, None, None, impl))
    opcheck(implementation._forward, (x, w, T, bias, 3.0, 0.5, -100, 7, None, impl))
    opcheck(implementation._forward, (x, w, T, None, 0.0, 1.0, -100, 7, torch.arange(6).flip(0), impl))
    grads = (torch.ones(6), torch.zeros(6), X, W, T, None, torch.ones(6), 0.0, 1.0, impl)
    for need in itertools.product((True, False), repeat=3):
        opcheck(implementation._backward, (*grads, *need))


@pytest.mark.gpu
def test_compiles_as_one_graph_on_a_gpu():
    x, w, t = (tensor.cuda() for tensor in head(40, 64, 500))
    compiled = torch.compile(lambda a: ops.linear_cross_entropy(torch.tanh(a), w, t).loss.sum(), fullgraph=True)
    assert torch.allclose(compiled(x), ops.linear_cross_entropy(torch.tanh(x), w, t).loss.sum(), rtol=1e-4)


@pytest.mark.gpu
def test_launches_on_the_tensors_device():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x, w, t = head(40, 64, 500)
    expected = ops.linear_cross_entropy(x, w, t).loss
    got = ops.linear_cross_entropy(x.to("cuda:1"), w.to("cuda:1"), t.to("cuda:1")).loss
    assert torch.allclose(got.cpu(), expected, atol=1e-4)


def test_compiles_as_one_graph():
    def objective(x, w, t):
        result = ops.linear_cross_entropy(torch.tanh(x), w, t, softcap=5.0)
        return (result.loss * 2).mean() + result.lse.sum() * 0.1

    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(objective(x, w, T), (x, w))
    got = torch.autograd.grad(compiled(x, w, T), (x, w))
    for a, b in zip(got, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert torch.allclose(compiled(X[:3], w, T[:3]), objective(X[:3], w, T[:3]))


def test_weight_gradient_only_when_asked(monkeypatch: pytest.MonkeyPatch):
    asked = []
    original = torch_path.add_product_
    monkeypatch.setattr(torch_path, "add_product_", lambda out, a, b: (asked.append(out.shape), original(out, a, b)))
    x, w = X.clone().requires_grad_(), W.clone()
    ops.linear_cross_entropy(x, w, T).loss.sum().backward()
    assert asked == [(6, 5)]
    w.requires_grad_()
    ops.linear_cross_entropy(x, w, T).loss.sum().backward()
    assert asked[1:] == [(6, 5), (11, 5)]


def test_autocast_casts_as_linear_does():
    with torch.autocast("cpu", torch.bfloat16):
        result = ops.linear_cross_entropy(X, W, T)
    expected = ops.linear_cross_entropy(X.bfloat16(), W.bfloat16(), T)
    assert torch.equal(result.loss, expected.loss)
    assert result.loss.dtype == torch.float32
    for name, x, w in (("input", X.long(), W), ("linear_weight", X, W.double())):  # refused by linear, too
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(TypeError, match=f"{name}: expected"):
            ops.linear_cross_entropy(x, w, T)


@pytest.mark.parametrize("impl", ["torch", INTERPRETER])
def test_bias_of_any_stride(impl: str):
    losses, grads = [], []
    for bias in (W[:, 0].clone(), W[:, 0], W[:1, 0].expand(11), W[:1, 0].repeat(11)):
        x = X.clone().requires_grad_()
        losses.append(ops.linear_cross_entropy(x, W, T, linear_bias=bias, impl=impl).loss)
        grads.append(torch.autograd.grad(losses[-1].sum(), x)[0])
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[2], losses[3])
    assert torch.equal(grads[0], grads[1])
    assert torch.equal(grads[2], grads[3])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, from the interpreter
@pytest.mark.parametrize("impl", ["torch", INTERPRETER])
def test_non_finite_logits_give_nan_and_no_hit(impl: str):
    x = X.clone()
    x[1, 2], x[3, 0] = torch.nan, torch.inf
    result = ops.linear_cross_entropy(x, W, T, impl=impl)
    assert result.loss.isnan().tolist() == [False, True, False, True, False, False]
    assert not result.hit[1]
    assert not result.hit[3]


@pytest.mark.parametrize("impl", ["torch", INTERPRETER])
def test_float32_is_full_precision(impl: str):
    x, w, t = head(8, 512, 40)
    expected = reference.linear_cross_entropy(x.double(), w.double(), t)[0]
    assert (ops.linear_cross_entropy(x, w, t, impl=impl).loss - expected).abs().max() < 1e-4  # tf32: 3e-2


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(
    "case",
    ["bias, softcap and scale", "ties", "banned classes", "strided", "plain", "sampled, everything", "sampled, ties"],
)
@pytest.mark.parametrize("impl", ["torch", INTERPRETER])
def test_many_blocks_equal_the_oracle(impl: str, case: str, monkeypatch: pytest.MonkeyPatch):
    from fastforget_kernels import linear_cross_entropy as kernels

    for name, size in (("ROWS", 16), ("COLUMNS", 24)):
        monkeypatch.setattr(torch_path, name, size)
    for name, size in (("_TRITON_ROWS", 48), ("_TRITON_COLUMNS", 320)):
        monkeypatch.setattr(implementation, name, size)
    monkeypatch.setattr(kernels, "MAX_ROWS", 32)
    (operation,) = (operation for operation in OPERATIONS if operation.name == "linear_cross_entropy")
    inputs = operation.cases[case](torch.float32)
    got, expected = operation.run(inputs, impl), operation.oracle(upcast(inputs))
    for name, value in expected.items():
        assert torch.allclose(got[name].double(), value.double(), rtol=1e-4, atol=1e-5), name


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation gives while active."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, torch.Tensor) and not func.is_view:
                self.largest = max(self.largest, value.numel())
        return result


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize(("rows", "classes"), [(3000, 5000), (9000, 1500)])
def test_torch_workspace_does_not_grow(rows: int, classes: int, sampled: bool):
    x, w, t = head(rows, 16, classes)
    loss, hit, lse, _ = implementation._empty_results(x, None)
    with LargestTensor() as forward:
        torch_path.forward_(loss, hit, lse, x, w, t, None, 0.0, 1.0, torch.arange(rows) if sampled else None)
    assert forward.largest <= torch_path.ROWS * torch_path.COLUMNS
    with LargestTensor() as backward:
        implementation._backward._init_fn(loss, lse, x, w, t, None, lse, 0.0, 1.0, "torch", True, True, False)
    assert backward.largest <= torch_path.ROWS * torch_path.COLUMNS


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    hidden=st.integers(1, 40),
    classes=st.integers(1, 300),
    size=st.floats(0.01, 30.0),
    softcap=st.none() | st.floats(0.5, 50.0),
    scale=st.floats(-2.0, 2.0),
    seed=st.integers(0, 2**31),
)
def test_any_shape_equals_the_oracle(rows, hidden, classes, size, softcap, scale, seed):
    x, w, t = head(rows, hidden, classes, seed=seed)
    x *= size
    got = ops.linear_cross_entropy(x, w, t, softcap=softcap, scale=scale)
    expected = reference.linear_cross_entropy(x.double(), w.double(), t, softcap=softcap, scale=scale)
    largest = float((x.double() @ w.double().T * scale).abs().max()) if rows else 0.0
    assert torch.allclose(got.loss.double(), expected[0], atol=2e-5 * (1 + largest), rtol=0)
    assert torch.allclose(got.lse.double(), expected[2], atol=2e-5 * (1 + largest), rtol=0)


@pytest.mark.parametrize("rows", [1, 3, 8, 20])
@pytest.mark.parametrize("multiprocessors", [1, 108, 132, 160])
def test_vocabulary_splits_fill_the_device(rows: int, multiprocessors: int):
    from fastforget_kernels.linear_cross_entropy import MAX_SPLITS, vocabulary_splits

    for tiles in (1, 7, 125, 501, 1001):
        splits = vocabulary_splits(rows, tiles, multiprocessors, 32)
        assert 1 <= splits <= min(tiles, MAX_SPLITS)
        assert rows * splits >= min(multiprocessors, rows * min(tiles, MAX_SPLITS))


@pytest.mark.gpu
def test_triton_workspace_is_small():
    x = torch.randn(8192, 4096, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(128256, 4096, device="cuda", dtype=torch.bfloat16)
    t = torch.randint(128256, (8192,), device="cuda")
    ops.linear_cross_entropy(x[:16], w, t[:16])
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.linear_cross_entropy(x, w, t)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(("rows", "classes"), [(64, 2**20 + 3), (2**20 + 5, 70)])
def test_more_than_two_to_the_31_elements(rows: int, classes: int):
    hidden = 2080
    x = torch.randn(rows, hidden, device="cuda", dtype=torch.bfloat16)
    w = torch.randn(classes, hidden, device="cuda", dtype=torch.bfloat16)
    t = torch.randint(classes, (rows,), device="cuda")
    some = slice(rows - 32, rows)
    expected = reference.linear_cross_entropy(x[some].float(), w.float(), t[some])
    got = ops.linear_cross_entropy(x, w, t)
    assert torch.allclose(got.loss[some], expected[0], atol=1e-3, rtol=1e-4)


@pytest.mark.gpu
def test_works_in_a_cuda_graph():
    x, w, t = (tensor.cuda() for tensor in head(40, 64, 500))
    expected = ops.linear_cross_entropy(x, w, t).loss
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = ops.linear_cross_entropy(x, w, t)
    graph.replay()
    assert torch.equal(result.loss, expected)


@pytest.mark.parametrize(
    ("properties", "expected"),
    [
        ({"major": 8, "shared_memory_per_block_optin": 166_912}, "sm_80"),  # A100
        ({"major": 8, "shared_memory_per_block_optin": 101_376}, "sm_80"),  # RTX 4090
        ({"major": 9, "shared_memory_per_block_optin": 232_448}, "sm_90"),  # H200
        ({"major": 10, "shared_memory_per_block_optin": 232_448}, "sm_100"),  # B200
        ({"major": 12, "shared_memory_per_block_optin": 101_376}, "sm_80"),  # RTX 5090: its tiles must fit 100 KB
    ],
)
def test_device_properties_choose_the_settings(monkeypatch: pytest.MonkeyPatch, properties: dict, expected: str):
    from fastforget_kernels.device import device_properties

    described = SimpleNamespace(multi_processor_count=132, **properties)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    device_properties.cache_clear()
    assert device_properties(torch.device("cuda", 0)) == (expected, 132)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    described.gcnArchName = "gfx942:sramecc+:xnack-"
    device_properties.cache_clear()
    assert device_properties(torch.device("cuda", 0)) == ("gfx942", 132)
    device_properties.cache_clear()
