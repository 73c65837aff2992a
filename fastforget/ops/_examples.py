"""What the operations over examples share: packed tokens `[S, ...]`, `offsets` `[B + 1]`, and their checks."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = [
    "FLOATS",
    "accumulator",
    "capturing",
    "check_examples",
    "check_matrix",
    "example_bounds",
    "refuse_float64",
    "refuse_others",
    "remember_bounds",
]

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A model's layers share one tensor of offsets: its values are fetched from the device once, not once a layer.
_bounds: WeakIdKeyDictionary = WeakIdKeyDictionary()


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over inputs of `dtype` are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def capturing(tensor: Tensor) -> bool:
    """Whether a CUDA graph is being captured, where no value can be read from the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def refuse_float64(implementation: str, activations: Tensor) -> None:
    """Settled inside an operation, where `torch.compile` does not trace.

    Args:
        implementation: "triton" or "torch".
        activations: The input that names the dtype.

    Raises:
        TypeError: Triton and float64.
    """
    if implementation == "triton" and activations.dtype == torch.float64:
        raise TypeError(
            'activations: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"'
        )


def refuse_others(**tensors: Any) -> None:
    """Refuse what is no tensor.

    Args:
        **tensors: The arguments.

    Raises:
        TypeError: One is none.
    """
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}; call torch.tensor on it")


def check_examples(activations: Tensor, grad_outputs: Tensor, offsets: Tensor) -> None:
    """Refuse tokens and offsets whose shapes, dtypes or devices do not fit.

    Args:
        activations: `[S, I]`.
        grad_outputs: `[S, O]`.
        offsets: `[B + 1]` int32.

    Raises:
        TypeError: Something is no tensor, or a dtype is wrong.
        ValueError: A shape or a device is wrong.
    """
    refuse_others(activations=activations, grad_outputs=grad_outputs, offsets=offsets)
    for name, tensor, shape in (("activations", activations, "[S, I]"), ("grad_outputs", grad_outputs, "[S, O]")):
        if tensor.ndim != 2:
            raise ValueError(
                f"{name}: expected shape {shape}, got {tuple(tensor.shape)}; pack the tokens of all examples"
            )
    if activations.dtype not in FLOATS:
        raise TypeError(f"activations: expected float32, bfloat16, float16 or float64, got {activations.dtype}")
    if grad_outputs.dtype != activations.dtype:
        raise TypeError(
            f"grad_outputs: expected {activations.dtype} like activations, got {grad_outputs.dtype}; cast one of them"
        )
    if grad_outputs.shape[0] != activations.shape[0]:
        raise ValueError(
            f"grad_outputs: expected S = {activations.shape[0]} rows like activations, got {grad_outputs.shape[0]}"
        )
    if offsets.ndim != 1 or offsets.shape[0] == 0:
        raise ValueError(f"offsets: expected shape [B + 1], got {tuple(offsets.shape)}; [0] is no example")
    if offsets.dtype != torch.int32:
        raise TypeError(f"offsets: expected int32, got {offsets.dtype}; call .int()")
    for name, tensor in (("grad_outputs", grad_outputs), ("offsets", offsets)):
        if tensor.device != activations.device:
            raise ValueError(f"{name}: expected device {activations.device} like activations, got {tensor.device}")


def check_matrix(
    name: str,
    matrix: Tensor,
    activations: Tensor,
    grad_outputs: Tensor,
    dtypes: tuple[torch.dtype, ...],
    *,
    in_place: bool,
) -> None:
    """Refuse an `[O, I]` argument that does not fit the tokens.

    Args:
        name: Of the argument.
        matrix: `[O, I]`.
        activations: `[S, I]`.
        grad_outputs: `[S, O]`.
        dtypes: Those allowed.
        in_place: It is written: its rows must be contiguous and apart.

    Raises:
        TypeError: The dtype is wrong.
        ValueError: Shape, device or strides are wrong.
    """
    shape = (grad_outputs.shape[1], activations.shape[1])
    if matrix.shape != shape:
        raise ValueError(f"{name}: expected shape [O, I] = {shape}, got {tuple(matrix.shape)}")
    if matrix.dtype not in dtypes:
        expected = " or ".join(str(dtype)[6:] for dtype in dict.fromkeys(dtypes))
        raise TypeError(f"{name}: expected {expected} beside {activations.dtype} activations, got {matrix.dtype}")
    if matrix.device != activations.device:
        raise ValueError(f"{name}: expected device {activations.device} like activations, got {matrix.device}")
    wide, tall = shape[1] > 1, shape[0] > 1
    if in_place and ((wide and matrix.stride(1) != 1) or (tall and matrix.stride(0) < shape[1])):
        raise ValueError(
            f"{name}: expected contiguous rows that do not overlap, got strides {matrix.stride()}; for a transposed one "
            "swap activations and grad_outputs and pass its transpose"
        )


def example_bounds(offsets: Tensor, tokens: int) -> list[int]:
    """The offsets on the host, after a check of their values. One small copy from the device, remembered per tensor.

    Args:
        offsets: `[B + 1]` int32.
        tokens: S.

    Returns:
        The B + 1 offsets.

    Raises:
        ValueError: They do not start at 0, decrease, or do not end at S.
    """
    version = _version(offsets)
    known = _bounds.get(offsets) if version is not None else None
    if known is not None and known[:2] == (version, tokens):
        return known[2]
    bounds: list[int] = offsets.tolist()
    if bounds[0] != 0:
        raise ValueError(f"offsets: expected the first to be 0, got {bounds[0]}; offsets are [0, n_1, n_1 + n_2, ...]")
    for example, (start, end) in enumerate(itertools.pairwise(bounds)):
        if end < start:
            raise ValueError(f"offsets: expected no decrease, got {start} then {end} at example {example}")
    if bounds[-1] != tokens:
        raise ValueError(
            f"offsets: expected the last to be S = {tokens}, got {bounds[-1]}; one entry more than examples"
        )
    if (
        version is not None and offsets.device.type != "cpu"
    ):  # there a NumPy array may share the memory; and it is cheap
        _bounds[offsets] = (version, tokens, bounds)
    return bounds


def remember_bounds(offsets: Tensor, bounds: list[int]) -> None:
    """Note the values of offsets that are known on the host already, so that no operation fetches them again.

    Args:
        offsets: `[B + 1]` int32, right by construction.
        bounds: Its values.
    """
    _bounds[offsets] = (_version(offsets), bounds[-1], bounds)


def _version(offsets: Tensor) -> tuple[int, int] | None:
    """What changes with the values; None where a change would go unseen."""
    return None if offsets.is_inference() else (offsets._version, offsets.data_ptr())
