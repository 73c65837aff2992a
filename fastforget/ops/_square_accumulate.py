"""`square_accumulate_`: checks, dispatch, and the PyTorch path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastforget.ops._dispatch import resolve
from fastforget.ops._examples import accumulator
from fastforget.ops._tensor_lists import Rule, check_lists, chunks, refuse_twice

__all__ = ["square_accumulate_"]


def square_accumulate_(
    fishers: Sequence[Tensor], grads: Sequence[Tensor], *, scale: float = 1.0, decay: float = 1.0, impl: str = "auto"
) -> None:
    r"""`fisher = decay * fisher + scale * grad^2` for a whole list of tensors, in one launch a dtype.

    One read of each gradient and one read and write of each fisher, with no temporary. Not differentiable.

    Args:
        fishers: float32 tensors (float64 for float64 gradients), each dense; changed in place. None may appear twice.
        grads: As many tensors, float32, bfloat16 or float16 (float64 on the torch path), each with the shape, strides and
            device of its fisher.
        scale: Factor of the squares; finite.
        decay: Factor of what `fishers` hold; finite. 0 overwrites them.
        impl: "auto", "triton" or "torch".

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Lengths, shapes, strides or devices do not match, a fisher appears twice, a factor is not finite, or
            `impl` is wrong. Nothing was written then.
    """
    fishers, grads = list(fishers), list(grads)
    _check(fishers, grads, scale, decay)
    if fishers:
        with torch.no_grad():
            _accumulate(fishers, grads, float(scale), float(decay), impl)


def _check(fishers: list[Tensor], grads: list[Tensor], scale: float, decay: float) -> None:
    for name, value in (("scale", scale), ("decay", decay)):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    check_lists({"fishers": Rule(fishers, (torch.float32, torch.float64)), "grads": Rule(grads)})
    for i, (fisher, grad) in enumerate(zip(fishers, grads, strict=True)):
        if (fisher.dtype == torch.float64) != (grad.dtype == torch.float64):
            raise TypeError(
                f"fishers[{i}]: expected {accumulator(grad.dtype)} for a gradient of {grad.dtype}, got {fisher.dtype}"
            )


@torch.library.custom_op("fastforget::square_accumulate_", mutates_args=("fishers",))
def _accumulate(fishers: list[Tensor], grads: list[Tensor], scale: float, decay: float, impl: str) -> None:
    implementation, _ = resolve(impl, fishers[0].device)
    refuse_twice("fishers", fishers)
    kernel_ = _triton_kernel(grads) if implementation == "triton" else _torch_accumulate_
    with torch.cuda.device_of(fishers[0]):
        kernel_(fishers, grads, scale, decay)


def _triton_kernel(grads: list[Tensor]) -> Callable[[list[Tensor], list[Tensor], float, float], None]:
    wrong = [i for i, grad in enumerate(grads) if grad.dtype == torch.float64]
    if wrong:
        raise TypeError(
            f'grads[{wrong[0]}]: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"'
        )
    if grads[0].is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            'impl: "triton" copies a table of addresses from the host, which a CUDA graph would replay from memory used '
            'otherwise by then; pass impl="torch" while capturing'
        )
    from fastforget_kernels.square_accumulate import square_accumulate_

    return square_accumulate_


@_accumulate.register_fake
def _(fishers, grads, scale, decay, impl):
    return None


def _torch_accumulate_(fishers: list[Tensor], grads: list[Tensor], scale: float, decay: float) -> None:
    for pair in zip(fishers, grads, strict=True):
        if decay == 1.0 and pair[0].dtype == pair[1].dtype:
            pair[0].addcmul_(pair[1], pair[1], value=scale)
            continue
        for f, g in chunks(pair):  # two passes, or a cast, within the cache
            g = g.to(f.dtype)
            if decay == 0.0:
                torch.mul(g, g, out=f).mul_(scale)
            else:
                f.mul_(decay).addcmul_(g, g, value=scale)
