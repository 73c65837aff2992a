"""`dampen_`: checks, dispatch, and the PyTorch path."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastforget.ops._dispatch import resolve
from fastforget.ops._examples import accumulator
from fastforget.ops._steering import check_number
from fastforget.ops._tensor_lists import Rule, check_lists, chunks, refuse_impossible, refuse_twice

__all__ = ["dampen_"]


def dampen_(
    params: Sequence[Tensor],
    forget: Sequence[Tensor],
    retain: Sequence[Tensor],
    *,
    alpha: float = 10.0,
    lam: float = 1.0,
    dry_run: bool = False,
    check: bool = True,
    impl: str = "auto",
) -> Tensor:
    r"""`theta *= min(lam F_retain / F_forget, 1)` where `F_forget > alpha F_retain`, for a whole list of tensors.

    Selective synaptic dampening: parameters that matter for what is to be forgotten, and little for the rest, shrink. One
    pass, in place, in float32. Entries that are not dampened keep their bits. Not differentiable.

    Args:
        params: float32, bfloat16 or float16 tensors (float64 on the torch path), each dense; changed in place. None may
            appear twice.
        forget: As many Fishers of what is to be forgotten, float32 (float64 for float64 parameters), each with the shape,
            strides and device of its parameter.
        retain: Fishers of what is to be kept, the same.
        alpha: Least ratio of the Fishers that is dampened, exclusive; at least 0.
        lam: Factor of the ratio; at least 0.
        dry_run: Only count.
        check: Refuse Fishers with a negative or non-finite entry, in one more pass over them.
        impl: "auto", "triton" or "torch".

    Returns:
        `[n]` int64 on the parameters' device: how many entries of each tensor were dampened, or would be.

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Lengths, shapes, strides or devices do not match, a parameter appears twice, a factor or an entry of a
            Fisher is negative or not finite, or `impl` is wrong. Nothing was written then.

    References:
        Foster, Schoepf and Brintrup, "Fast machine unlearning without retraining through selective synaptic dampening",
        arXiv 2308.07707, equations 5 and 6.
    """
    params, forget, retain = list(params), list(forget), list(retain)
    _check(params, forget, retain, alpha, lam)
    if not params:
        return torch.zeros(0, dtype=torch.int64)
    implementation, _ = resolve(impl, params[0].device)
    wrong = [i for i, param in enumerate(params) if param.dtype == torch.float64]
    if wrong and implementation == "triton":
        raise TypeError(
            f'params[{wrong[0]}]: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"'
        )
    with torch.no_grad(), torch.cuda.device_of(params[0]):
        if check:
            _check_values({"forget": forget, "retain": retain}, implementation)
        counts = torch.zeros(len(params), dtype=torch.int64, device=params[0].device)
        if implementation == "triton":
            from fastforget_kernels.dampen import dampen_ as kernel_
        else:
            kernel_ = _torch_dampen_
        kernel_(counts, params, forget, retain, float(alpha), float(lam), write=not dry_run)
        return counts


def _check(params: list[Tensor], forget: list[Tensor], retain: list[Tensor], alpha: float, lam: float) -> None:
    for name, value in (("alpha", alpha), ("lam", lam)):
        check_number(name, value)
    fishers = {"forget": forget, "retain": retain}
    wide = (torch.float32, torch.float64)
    check_lists({"params": Rule(params)} | {name: Rule(tensors, wide) for name, tensors in fishers.items()})
    for name, tensors in fishers.items():
        for i, (param, fisher) in enumerate(zip(params, tensors, strict=True)):
            if fisher.dtype != accumulator(param.dtype):
                raise TypeError(
                    f"{name}[{i}]: expected {accumulator(param.dtype)} for a parameter of {param.dtype}, got {fisher.dtype}"
                )
    refuse_twice("params", params)


def _check_values(fishers: dict[str, list[Tensor]], implementation: str) -> None:
    tensors = [tensor for fisher in fishers.values() for tensor in fisher]
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    if implementation == "triton":
        from fastforget_kernels.dampen import count_invalid_

        count_invalid_(counts, tensors)
    else:
        for i, tensor in enumerate(tensors):
            if tensor.numel():
                low, high = tensor.aminmax()  # NaN if there is one
                counts[i] = ~((low >= 0) & (high < math.inf))
    names = [f"{name}[{i}]" for name, fisher in fishers.items() for i in range(len(fisher))]
    for name, tensor, count in zip(names, tensors, counts.tolist(), strict=True):
        if count:
            low, high = tensor.aminmax()
            refuse_impossible(name, low.item(), high.item(), tensor.dtype)


def _torch_dampen_(
    counts: Tensor,
    params: list[Tensor],
    forget: list[Tensor],
    retain: list[Tensor],
    alpha: float,
    lam: float,
    *,
    write: bool,
) -> None:
    # 1 and 0 choose, since operations on bool tensors are slow on a CPU: lam r / f where 1, and 1 / 1 where 0.
    for i, tensors in enumerate(zip(params, forget, retain, strict=True)):
        ones = None
        for param, f, r in chunks(tensors, scratch=3):
            one = ones = torch.ones_like(f) if ones is None else ones[: len(f)]
            factor = r * alpha
            chosen = torch.gt(f, factor, out=torch.empty_like(f))
            counts[i] += chosen.sum().long()  # exact: a chunk has no more entries than float32 can count
            if write:
                torch.lerp(one, r if lam == 1.0 else r * lam, chosen, out=factor)
                factor.div_(torch.lerp(one, f, chosen, out=chosen)).clamp_(max=1.0)
                # NaN is of an F that is not finite, which is the caller's if not checked.
                param.mul_(factor.nan_to_num_(nan=1.0))
