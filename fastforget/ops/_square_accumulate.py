"""`square_accumulate_`: checks, dispatch, and the PyTorch path."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastforget.ops._dispatch import resolve

__all__ = ["square_accumulate_"]

# Elements that the torch path takes at once where it must cast, or pass twice: 1 MB of float32, one core's L2 cache.
_CHUNK = 2**18


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
    if len(fishers) != len(grads):
        raise ValueError(f"grads: expected {len(fishers)} tensors, one for each of fishers, got {len(grads)}")
    for name, value in (("scale", scale), ("decay", decay)):
        if not math.isfinite(value):
            raise ValueError(f"{name}: expected a finite number, got {value}")
    for i, (fisher, grad) in enumerate(zip(fishers, grads, strict=True)):
        if grad.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise TypeError(f"grads[{i}]: expected float32, bfloat16, float16 or float64, got {grad.dtype}")
        dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
        if fisher.dtype != dtype:
            raise TypeError(f"fishers[{i}]: expected {dtype} for a gradient of {grad.dtype}, got {fisher.dtype}")
        if grad.shape != fisher.shape:
            raise ValueError(
                f"grads[{i}]: expected shape {tuple(fisher.shape)} like fishers[{i}], got {tuple(grad.shape)}"
            )
        if fisher.device != fishers[0].device or grad.device != fishers[0].device:
            raise ValueError(
                f"fishers[{i}], grads[{i}]: expected device {fishers[0].device} like fishers[0], got {fisher.device} and "
                f"{grad.device}; call once for each device"
            )
        if not (_dense(fisher) and _same_order(fisher, grad)):
            raise ValueError(
                f"fishers[{i}], grads[{i}]: expected dense tensors of equal strides, got strides {fisher.stride()} and "
                f"{grad.stride()} for shape {tuple(fisher.shape)}; call .contiguous() on the gradient"
            )


def _dense(tensor: Tensor) -> bool:
    """Whether the elements fill one piece of memory, in some order of the dimensions."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _same_order(fisher: Tensor, grad: Tensor) -> bool:
    """Whether equal places in memory hold equal places of the tensors."""
    if fisher.is_contiguous() and grad.is_contiguous():
        return True
    return all(n == 1 or a == b for n, a, b in zip(fisher.shape, fisher.stride(), grad.stride(), strict=True))


@torch.library.custom_op("fastforget::square_accumulate_", mutates_args=("fishers",))
def _accumulate(fishers: list[Tensor], grads: list[Tensor], scale: float, decay: float, impl: str) -> None:
    implementation, _ = resolve(impl, fishers[0].device)
    addresses = {fisher.data_ptr(): i for i, fisher in enumerate(fishers) if fisher.numel()}
    twice = [i for i, fisher in enumerate(fishers) if fisher.numel() and addresses[fisher.data_ptr()] != i]
    if twice:
        raise ValueError(
            f"fishers[{twice[0]}]: expected every tensor once, got it again as "
            f"fishers[{addresses[fishers[twice[0]].data_ptr()]}]; add its gradients first"
        )
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
    for fisher, grad in zip(fishers, grads, strict=True):
        if decay == 1.0 and fisher.dtype == grad.dtype:
            fisher.addcmul_(grad, grad, value=scale)
            continue
        # Equal dense layouts: both as flat memory, so that a chunk stays in the cache between the two passes and the
        # float32 copy of a 16-bit chunk is bounded.
        flat_fisher, flat_grad = (t.as_strided((t.numel(),), (1,)) for t in (fisher, grad))
        for f, g in zip(flat_fisher.split(_CHUNK), flat_grad.split(_CHUNK), strict=True):
            g = g.to(f.dtype)
            if decay == 0.0:
                torch.mul(g, g, out=f).mul_(scale)
            else:
                f.mul_(decay).addcmul_(g, g, value=scale)
