"""The penalty of elastic weight consolidation, as a loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from fastforget._parameters import matched, matched_fisher, named
from fastforget.fisher.names import as_fisher
from fastforget.ops._tensor_lists import chunks

__all__ = ["ewc_penalty"]


def ewc_penalty(model: nn.Module, fisher: Any, anchor: Mapping[str, Tensor] | nn.Module) -> Tensor:
    r"""`1/2 sum F (theta - anchor)^2`, to be multiplied by lambda and added to the loss.

    Differentiable in the parameters, with no tensor kept for the backward but the parameters themselves. `ff.optim`'s
    optimizers take `fisher=`, `anchor=` and `ewc_lambda=` instead, and add the same pull in their one pass.

    Args:
        model: Its parameters are theta; those that the Fisher has not are left out.
        fisher: An estimator, a `{name: tensor}`, or a saved file's path, which is read in every call: load it once.
        anchor: The parameters that theta is drawn to: `{name: tensor}`, or a model.

    Returns:
        A scalar, float32 (float64 for float64 parameters).

    Raises:
        TypeError: The Fisher is none, or a dtype is not floating-point.
        ValueError: Names, shapes or devices do not fit, the Fisher holds a negative or non-finite value, or a parameter is
            sharded.

    References:
        Kirkpatrick et al., arXiv 1612.00796.
    """
    given = as_fisher(fisher)
    everything = named(model)
    unknown = [name for name in given if name not in everything]
    if unknown:
        raise ValueError(f"fisher: expected names of the model's parameters, got {unknown[0]!r}; check the model")
    parameters = {name: parameter for name, parameter in everything.items() if name in given}
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise ValueError(f"model: {name} is sharded, expected whole parameters; use ff.optim.AdamW(ewc_lambda=...)")
    fishers = matched_fisher(given, parameters)
    anchors = matched("anchor", named(anchor) if isinstance(anchor, nn.Module) else anchor, parameters)
    same = [
        name for name, value in anchors.items() if value.data_ptr() == parameters[name].data_ptr() and value.numel()
    ]
    if same:
        raise ValueError(
            f"anchor[{same[0]!r}]: expected where the parameter is drawn to, got the parameter itself, whose penalty is always "
            "0; keep a copy with .detach().clone()"
        )
    return _Penalty.apply(list(fishers.values()), list(anchors.values()), *parameters.values())  # type: ignore[return-value]


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fishers: Sequence[Tensor], anchors: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.fishers, ctx.anchors = fishers, anchors
        ctx.save_for_backward(*parameters)
        total = fishers[0].new_zeros((), dtype=torch.float64)
        for fisher, anchor, parameter in zip(fishers, anchors, parameters, strict=True):
            for f, a, p in chunks((fisher, anchor, parameter.detach()), scratch=1):
                away = p.to(f.dtype) - a.to(f.dtype)
                total += away.square_().mul_(f).sum(dtype=torch.float64).to(total.device)
        return (total / 2).to(fishers[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), pulls = grads, []
        for fisher, anchor, parameter in zip(ctx.fishers, ctx.anchors, ctx.saved_tensors, strict=True):
            pull = torch.empty_like(parameter)
            for f, a, p, out in chunks((fisher, anchor, parameter, pull), scratch=1):
                out.copy_((p.to(f.dtype) - a.to(f.dtype)).mul_(f).mul_(grad.to(f.device)))
            pulls.append(pull)
        return (None, None, *pulls)
