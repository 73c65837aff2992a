"""Which implementation an operation uses."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["no_autocast", "resolve", "tileable"]

# Settled at import: a cached function would warn under torch.compile, which traces `resolve`.
_TRITON_PROBLEM: str | None = None
_INTERPRETING = False
try:
    from triton import knobs

    _INTERPRETING = bool(knobs.runtime.interpret)
except ImportError as error:
    _TRITON_PROBLEM = f"Triton does not import ({error}); it exists for Linux only"


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
        raise ValueError(f'impl: expected "auto", "triton" or "torch", got {impl!r}; leave it out')
    if impl == "torch":
        return "torch", "asked for"
    on_gpu = device.type == "cuda"  # ROCm devices are called "cuda" by torch too
    problem = _TRITON_PROBLEM
    if on_gpu and not problem and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        problem = "its launch settings are for compute capability 8.0 and newer"
    if impl == "auto":
        if not on_gpu:
            return "torch", f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
        return ("torch", problem) if problem else ("triton", f"{device.type} device with Triton")
    if problem:
        raise ValueError(f'impl: expected a usable implementation, got "triton", but {problem}; pass impl="torch"')
    if not on_gpu and not (device.type == "cpu" and _INTERPRETING):
        raise ValueError(
            f'impl: "triton" needs tensors on a CUDA or ROCm device, got {device.type}; move them there, or pass '
            'impl="torch" (to interpret the kernels on the CPU, set TRITON_INTERPRET=1 before Python starts)'
        )
    return "triton", "asked for"


def no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Autocast off inside: what an operation gets is cast already, and its sums stay wide.

    Args:
        device: Of the operation.

    Returns:
        A context, which costs nothing where autocast is off anyway.
    """
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def tileable(tensor: Tensor) -> Tensor:
    """A matrix whose offsets within a kernel's tile fit 32 bits, as `hidden[:, -1]` of a large tensor's do not.

    Args:
        tensor: Of any strides.

    Returns:
        It, or a contiguous copy.
    """
    rows = 256  # no tile has more rows or columns
    return tensor if all(abs(stride) * rows < 2**31 for stride in tensor.stride()) else tensor.contiguous()
