"""The gates that every operation of `kernel_registry` passes: interpreter, torch path, GPU, and ahead-of-time compiler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_registry import ARCHITECTURES, OPERATIONS, Operation, interpreter_problem, upcast

SHARED_MEMORY = {
    "sm_80": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "gfx942": 65_536,
}  # bytes a program may use; sm_80's is that of consumer cards
IMPLEMENTATIONS = [
    pytest.param("torch", "cpu", id="torch-cpu"),
    pytest.param(
        "triton",
        "cpu",
        id="interpreter",
        marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem()),
    ),
    pytest.param("triton", "cuda", id="triton-gpu", marks=pytest.mark.gpu),
    pytest.param("torch", "cuda", id="torch-gpu", marks=pytest.mark.gpu),
]
CASES = [pytest.param(op, case, id=f"{op.name}-{case}") for op in OPERATIONS for case in op.cases]
DTYPES = [pytest.param(d, id=str(d)[6:]) for d in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def assert_within_two_errors(name: str, got: torch.Tensor, oracle: torch.Tensor, eager: torch.Tensor) -> None:
    """The error against the float64 oracle is at most that of eager PyTorch in the same dtype, plus a small constant."""
    assert got.shape == oracle.shape, f"{name}: shape {tuple(got.shape)}, oracle {tuple(oracle.shape)}"
    if not got.is_floating_point():
        wrong = (got.cpu() != oracle.cpu()).nonzero()
        assert not len(wrong), f"{name}: differs from the oracle at {wrong[0].tolist()} and {len(wrong) - 1} others"
        return
    if not got.numel():
        return
    eps = torch.finfo(got.dtype).eps if name.startswith("grad") else torch.finfo(torch.float32).eps
    constant = 1e-14 if got.dtype == torch.float64 else max(eps / 4, 2e-6)
    got, oracle, eager = got.cpu().double(), oracle.cpu(), eager.cpu().double()
    scale = oracle.norm()
    error, allowed = (got - oracle).norm(), (eager - oracle).norm() + constant * scale + 1e-30
    worst = int((got - oracle).abs().argmax())
    assert error <= allowed, (
        f"{name}: error {float(error / scale):.3g}, eager's is {float((eager - oracle).norm() / scale):.3g}; worst at flat "
        f"index {worst}: got {float(got.flatten()[worst]):.9g}, oracle {float(oracle.flatten()[worst]):.9g}"
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize(("operation", "case"), CASES)
@pytest.mark.usefixtures("poisoned_memory")
def test_equals_the_oracle(operation: Operation, case: str, impl: str, device: str, dtype: torch.dtype):
    if impl == "triton" and dtype not in operation.dtypes:
        pytest.skip("a dtype of the torch path only")
    inputs = operation.cases[case](dtype)
    oracle, eager = operation.oracle(upcast(inputs)), operation.oracle(inputs)
    got = operation.run(on(device, inputs), impl)
    assert got.keys() == oracle.keys()
    for name in oracle:
        assert_within_two_errors(name, got[name], oracle[name], eager[name])


@pytest.mark.parametrize(("impl", "device"), IMPLEMENTATIONS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_two_runs_give_the_same_bits(operation: Operation, impl: str, device: str):
    inputs = on(device, next(iter(operation.cases.values()))(torch.float32))
    first, second = operation.run(inputs, impl), operation.run(inputs, impl)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.fixture(scope="session")
def compiler_reports() -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parent
    environment["PYTHONPATH"] = os.pathsep.join([str(root), str(root.parent), str(root.parent / "kernels")])
    command = [sys.executable, str(root / "ahead_of_time.py"), *ARCHITECTURES]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiles_ahead_of_time(compiler_reports: list[dict[str, Any]], arch: str):
    reports = [report for report in compiler_reports if report["arch"] == arch]
    assert reports
    assert not [r for r in reports if r["spilled"]], "registers spill"
    assert not [r for r in reports if r["shared"] > SHARED_MEMORY[arch]], "too much shared memory"
    assert not [r for r in reports if r["wants_tensor_cores"] and not r["tensor_cores"]], "tensor cores are not used"
