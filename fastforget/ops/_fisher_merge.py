"""`fisher_merge_`: checks, dispatch, and the PyTorch path."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastforget.ops._dispatch import resolve
from fastforget.ops._examples import accumulator
from fastforget.ops._steering import check_number
from fastforget.ops._tensor_lists import Rule, check_lists, chunks, refuse_twice

__all__ = ["fisher_merge_"]

Lists = Sequence[Sequence[Tensor]]


def fisher_merge_(
    outs: Sequence[Tensor],
    models: Lists,
    fishers: Lists,
    weights: Sequence[float],
    *,
    floor: float = 1e-6,
    impl: str = "auto",
) -> None:
    r"""`out = sum_j c_j F_j theta_j / sum_j c_j F_j` with `F_j` at least `floor`, for whole lists of tensors.

    One pass, in float32 (float64 for float64 tensors). A model with weight 0 is not read. Not differentiable.

    Args:
        outs: float32, bfloat16 or float16 tensors (float64 on the torch path), each dense; overwritten. None may appear
            twice. May be one of the models' lists.
        models: J lists of as many tensors, each with the dtype, shape, strides and device of its out.
        fishers: J lists of as many Fishers, float32 (float64 for float64 outs), with the same layouts.
        weights: J factors c_j, finite and at least 0, not all 0. Only their ratios matter.
        floor: Least value of a Fisher; above 0, so that entries that no Fisher knows become a weighted mean.
        impl: "auto", "triton" or "torch".

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Lengths, shapes, strides or devices do not match, an out appears twice, a weight or the floor is out of
            range, or `impl` is wrong. Nothing was written then.

    References:
        Matena and Raffel, "Merging models with Fisher-weighted averaging", arXiv 2111.09832, equation 4.
    """
    outs, models, fishers = list(outs), [list(m) for m in models], [list(f) for f in fishers]
    weights = [float(weight) for weight in weights]
    _check(outs, models, fishers, weights, floor)
    if not outs:
        return
    implementation, _ = resolve(impl, outs[0].device)
    wrong = [i for i, out in enumerate(outs) if out.dtype == torch.float64]
    if wrong and implementation == "triton":
        raise TypeError(
            f'outs[{wrong[0]}]: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"'
        )
    used = [j for j, weight in enumerate(weights) if weight]
    models, fishers = [models[j] for j in used], [fishers[j] for j in used]
    shares = [weights[j] / max(weights) for j in used]  # c F stays in float32's range
    with torch.no_grad(), torch.cuda.device_of(outs[0]):
        if implementation == "triton":
            from fastforget_kernels.fisher_merge import fisher_merge_ as kernel_

            kernel_(outs, models, fishers, torch.tensor(shares, device=outs[0].device), float(floor))
        else:
            _torch_merge_(outs, models, fishers, shares, float(floor))


def _check(
    outs: list[Tensor], models: list[list[Tensor]], fishers: list[list[Tensor]], weights: list[float], floor: float
) -> None:
    for name, given in (("fishers", fishers), ("weights", weights)):
        if len(given) != len(models):
            raise ValueError(f"{name}: expected {len(models)}, one for each of models, got {len(given)}")
    for j, weight in enumerate(weights):
        check_number(f"weights[{j}]", weight)
    if not any(weights):
        raise ValueError(f"weights: expected one above 0, got {weights}")
    if not 0 < floor < math.inf:
        raise ValueError(f"floor: expected a finite number above 0, got {floor}")
    lists = {"outs": Rule(outs)} | {f"models[{j}]": Rule(tensors) for j, tensors in enumerate(models)}
    check_lists(
        lists | {f"fishers[{j}]": Rule(tensors, (torch.float32, torch.float64)) for j, tensors in enumerate(fishers)}
    )
    for i, out in enumerate(outs):
        for name, given, dtype in (("models", models, out.dtype), ("fishers", fishers, accumulator(out.dtype))):
            for j, tensors in enumerate(given):
                if tensors[i].dtype != dtype:
                    raise TypeError(
                        f"{name}[{j}][{i}]: expected {dtype} for an out of {out.dtype}, got {tensors[i].dtype}"
                    )
    refuse_twice("outs", outs)
    places = {out.data_ptr(): i for i, out in enumerate(outs) if out.numel()}
    for name, given in (("models", models), ("fishers", fishers)):
        for j, tensors in enumerate(given):
            for i, tensor in enumerate(tensors):
                place = places.get(tensor.data_ptr(), i) if tensor.numel() else i
                if place != i or (name == "fishers" and tensor.data_ptr() in places):
                    raise ValueError(
                        f"{name}[{j}][{i}]: expected memory of its own, got that of outs[{place}], which is overwritten; "
                        "copy it"
                    )


def _torch_merge_(
    outs: list[Tensor], models: list[list[Tensor]], fishers: list[list[Tensor]], shares: list[float], floor: float
) -> None:
    for out, *others in zip(outs, *models, *fishers, strict=True):
        for merged, *parts in chunks([out, *others], scratch=3):
            numerator, denominator = torch.zeros_like(parts[-1]), torch.zeros_like(parts[-1])
            for param, fisher, share in zip(parts[: len(shares)], parts[len(shares) :], shares, strict=True):
                weight = fisher.clamp(min=floor).mul_(share)
                numerator.addcmul_(weight, param.to(weight.dtype))
                denominator += weight
            merged.copy_(numerator.div_(denominator))
