"""Which implementation an operation uses."""

from __future__ import annotations

import functools
import importlib.util

import torch

__all__ = ["resolve"]


@functools.cache
def _triton_problem() -> str | None:
    """Why Triton cannot be used at all here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (it exists for Linux only)"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


@functools.cache
def _interpreting() -> bool:
    if _triton_problem():
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def resolve(impl: str, device: torch.device) -> tuple[str, str]:
    """The implementation that `impl` means for tensors on `device`, and the reason.

    Args:
        impl: "auto", "triton" or "torch".
        device: Where the tensors are.

    Returns:
        "triton" or "torch", and one clause that says why.

    Raises:
        ValueError: `impl` is unknown, or it asks for Triton where Triton cannot run.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f'impl: expected "auto", "triton" or "torch", got {impl!r}')
    if impl == "torch":
        return "torch", "asked for"
    on_gpu = device.type == "cuda"  # ROCm devices are called "cuda" by torch too
    problem = _triton_problem()
    if impl == "auto":
        if not on_gpu:
            return "torch", f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
        return ("torch", problem) if problem else ("triton", f"{device.type} device with Triton")
    if problem:
        raise ValueError(f'impl: expected a usable implementation, got "triton", but {problem}; pass impl="torch"')
    if not on_gpu and not (device.type == "cpu" and _interpreting()):
        raise ValueError(
            f'impl: "triton" needs tensors on a CUDA or ROCm device, got {device.type}; move them there, or pass '
            'impl="torch" (to interpret the kernels on the CPU, set TRITON_INTERPRET=1 before Python starts)'
        )
    return "triton", "asked for"
