"""The penalty of elastic weight consolidation, as a loss."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from fastforget._parameters import extremes, matched, matched_fisher, named
from fastforget.fisher.names import as_fisher, canonical_name
from fastforget.ops._examples import accumulator
from fastforget.ops._tensor_lists import FLOATS, chunks, dense
from fastforget.update.checkpoints import read_weights

__all__ = ["anchor_tensors", "check_anchor", "ewc_penalty"]


def ewc_penalty(model: nn.Module, fisher: Any, anchor: Any) -> Tensor:
    r"""`1/2 sum F (theta - anchor)^2`, to be multiplied by lambda and added to the loss.

    Differentiable in the parameters, with no tensor kept for the backward but the parameters themselves. `ff.optim`'s
    optimizers take `fisher=`, `anchor=` and `ewc_lambda=` instead, and add the same pull in their one pass.

    Args:
        model: Its parameters are theta; those that the Fisher has not are left out.
        fisher: An estimator, a `{name: tensor}`, or a saved file's path, which is read in every call: load it once.
        anchor: The parameters that theta is drawn to: `{name: tensor}`, a model, or the path of a saved one, as for `fisher`.

    Returns:
        A scalar, float32 (float64 for float64 parameters).

    Raises:
        TypeError: The Fisher or the anchor is none, or a dtype is not floating-point.
        ValueError: Names, shapes or devices do not fit, the Fisher is empty or holds a negative or non-finite value, the
            anchor holds a non-finite value or is the parameters themselves, or a parameter is sharded.

    References:
        Kirkpatrick et al., arXiv 1612.00796.
    """
    given = as_fisher(fisher)
    everything = named(model)
    unknown = [name for name in given if name not in everything]
    if unknown:
        raise ValueError(f"fisher: expected names of the model's parameters, got {unknown[0]!r}; check the model")
    parameters = {name: parameter for name, parameter in everything.items() if name in given}
    if not parameters:
        raise ValueError("fisher: expected a tensor for at least one parameter, got none")
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(
            "fisher: expected a tensor for at least one parameter that is trained, got frozen ones alone, whose penalty "
            "stays as it is; a LoRA needs the Fisher of its own weights"
        )
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise ValueError(f"model: {name} is sharded, expected whole parameters; use ff.optim.AdamW(ewc_lambda=...)")
    like = {name: dense(parameter.detach()) for name, parameter in parameters.items()}
    fishers = matched_fisher(given, like, move=not isinstance(fisher, Mapping))
    values = {canonical_name(name): value for name, value in anchor_tensors(anchor).items()}
    anchors = matched("anchor", values, like, FLOATS, move=isinstance(anchor, str | os.PathLike))
    for name, parameter in parameters.items():
        check_anchor(name, values[name], parameter)
    return _Penalty.apply(list(fishers.values()), list(anchors.values()), *parameters.values())  # type: ignore[return-value]


def anchor_tensors(anchor: Any) -> Mapping[str, Tensor]:
    """The tensors of whatever stands for an anchor.

    Args:
        anchor: A model, a `{name: tensor}`, or the path of a model's safetensors.

    Returns:
        By name; those of files mapped from them.

    Raises:
        TypeError: It is none of these.
        ValueError: No weights can be read.
    """
    if isinstance(anchor, str) and anchor == "initial":
        raise ValueError(
            'anchor: expected the parameters as they were, got "initial", which ff.optim alone knows; keep '
            "{name: parameter.detach().clone() for name, parameter in model.named_parameters()}"
        )
    if isinstance(anchor, str | os.PathLike):
        return read_weights(anchor, "anchor")
    if isinstance(anchor, nn.Module):
        return named(anchor, "anchor")
    if isinstance(anchor, Mapping) and all(isinstance(value, Tensor) for value in anchor.values()):
        return anchor
    raise TypeError(
        "anchor: expected a model, a mapping from parameter names to tensors or the path of a model's safetensors, got "
        f"{type(anchor).__name__}"
    )


def check_anchor(name: str, value: Tensor, parameter: Tensor) -> None:
    """Refuse an anchor that is the parameter itself, or not finite.

    Args:
        name: Of the parameter.
        value: The anchor.
        parameter: The parameter.

    Raises:
        ValueError: It is.
    """
    if value.numel() and value.data_ptr() == parameter.data_ptr():
        raise ValueError(
            f"anchor[{name!r}]: expected other values than the parameter's own, got the parameter itself; keep a copy of where "
            "it was, with .detach().clone()"
        )
    limit = torch.finfo(accumulator(parameter.dtype)).max
    low, high = extremes(value)
    if not (low >= -limit and high <= limit):
        raise ValueError(f"anchor[{name!r}]: expected finite values, got {low:.3g} to {high:.3g}; pass other weights")


class _Penalty(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fishers: Sequence[Tensor], anchors: Sequence[Tensor], *parameters: Tensor) -> Tensor:
        ctx.fishers, ctx.anchors = fishers, anchors
        ctx.save_for_backward(*parameters)
        total = fishers[0].new_zeros((), dtype=torch.float64)
        for fisher, anchor, parameter in zip(fishers, anchors, parameters, strict=True):
            for f, a, p in chunks((fisher, anchor, dense(parameter.detach())), scratch=1):
                away = p.to(f.dtype) - a.to(f.dtype)
                total += away.square_().mul_(f).sum(dtype=torch.float64).to(total.device)
        return (total / 2).to(fishers[0].dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,), pulls = grads, []
        _, _, *needed = ctx.needs_input_grad
        for fisher, anchor, saved, wanted in zip(ctx.fishers, ctx.anchors, ctx.saved_tensors, needed, strict=True):
            parameter = dense(saved)
            pull = torch.empty_like(parameter) if wanted else None
            for f, a, p, out in () if pull is None else chunks((fisher, anchor, parameter, pull), scratch=1):
                out.copy_((p.to(f.dtype) - a.to(f.dtype)).mul_(f).mul_(grad.to(f.device)))
            pulls.append(pull)
        return (None, None, *pulls)
