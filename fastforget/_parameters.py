"""Parameters by name, and the tensors that belong to them: Fishers, anchors, masks, deltas."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.weak import WeakIdKeyDictionary

from fastforget.fisher.names import as_fisher, canonical_name
from fastforget.ops._examples import accumulator
from fastforget.ops._tensor_lists import refuse_impossible, same_order

__all__ = ["check_fisher_values", "extremes", "local", "matched", "matched_fisher", "named"]

_extremes: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Version, least and largest entry of tensors that were looked at."""


def named(parameters: nn.Module | Iterable[tuple[str, Tensor]], argument: str = "model") -> dict[str, Tensor]:
    """Parameters by canonical name; a tied one once, under its first name.

    Args:
        parameters: A model, or what its `named_parameters()` gives.
        argument: Its name in messages.

    Returns:
        The parameters.

    Raises:
        TypeError: It is neither.
        ValueError: Two parameters have one name.
    """
    pairs = parameters.named_parameters() if isinstance(parameters, nn.Module) else parameters
    result: dict[str, Tensor] = {}
    replaced: dict[str, Tensor] = {}  # what PEFT's `modules_to_save` trains a copy of, which has its name
    for pair in pairs:
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Tensor)
        ):
            raise TypeError(
                f"{argument}: expected a model or its named_parameters(), got {type(pair).__name__}; Fishers, anchors and "
                "masks are matched by name"
            )
        name = canonical_name(pair[0])
        if ".original_module." in pair[0]:
            replaced[name] = pair[1]
        elif result.setdefault(name, pair[1]) is not pair[1]:
            raise ValueError(f"{argument}: expected one parameter a name, got a second one for {name!r}")
    return result | {name: tensor for name, tensor in replaced.items() if name not in result}


def matched(
    argument: str,
    values: Mapping[str, Tensor],
    parameters: Mapping[str, Tensor],
    dtypes: tuple[torch.dtype, ...] = (),
    *,
    move: bool = False,
) -> dict[str, Tensor]:
    """The values of parameters, in their order, each with its parameter's memory layout; sharded like it.

    Args:
        argument: Name of the values in messages.
        values: By any of the parameters' names; more than asked for are fine.
        parameters: By canonical name.
        dtypes: Allowed; empty for any.
        move: Take values to the parameter's device, as those of a file; otherwise another device is refused.

    Returns:
        Local tensors. A value that fits already comes back as it is.

    Raises:
        TypeError: A dtype is not allowed.
        ValueError: A value is missing, or has another shape or device.
    """
    canonical = values if hasattr(values, "stored_name") else {canonical_name(n): v for n, v in values.items()}
    missing = [name for name in parameters if canonical.get(name) is None]
    if missing:
        known = ", ".join(list(values)[:2]) or "nothing"
        raise ValueError(
            f"{argument}: expected a tensor for every parameter, got none for {', '.join(missing[:3])}"
            f"{f' and {len(missing) - 3} others' if len(missing) > 3 else ''}; it holds {known}{', ...' * (len(values) > 2)}"
        )
    return {
        name: _fitted(f"{argument}[{name!r}]", canonical[name], parameter, dtypes, move)
        for name, parameter in parameters.items()
    }


def matched_fisher(
    fisher: Any, parameters: Mapping[str, Tensor], argument: str = "fisher", *, move: bool | None = None
) -> dict[str, Tensor]:
    """A Fisher's tensors for parameters, checked: finite and not negative.

    Args:
        fisher: An estimator, a `{name: tensor}`, or a saved file's path, whose tensors are taken to the parameters' devices.
        parameters: By canonical name.
        argument: Its name in messages.
        move: Take its tensors to the parameters' devices; default: those of a file or an estimator.

    Returns:
        Float32 tensors (float64 for float64 parameters).

    Raises:
        TypeError: It is none of these, or a tensor is not floating-point.
        ValueError: A tensor is missing, does not fit, or holds a negative or non-finite value.
    """
    move = not isinstance(fisher, Mapping) if move is None else move
    found = matched(argument, as_fisher(fisher), parameters, (torch.float32, torch.float64), move=move)
    dtypes = {name: accumulator(parameter.dtype) for name, parameter in parameters.items()}
    check_fisher_values(found, argument, dtypes)
    return {name: value.to(dtypes[name]) for name, value in found.items()}


def check_fisher_values(
    fisher: Mapping[str, Tensor], argument: str = "fisher", dtypes: Mapping[str, torch.dtype] | None = None
) -> None:
    """Refuse a Fisher with a negative or non-finite value.

    Args:
        fisher: Floating-point tensors by name.
        argument: Its name in messages.
        dtypes: To which the tensors will be cast; default: their own.

    Raises:
        ValueError: There is such a value, or a tensor has none.
    """
    for name, value in fisher.items():
        _refuse_meta(f"{argument}[{name!r}]", value)
        refuse_impossible(f"{argument}[{name!r}]", *extremes(value), (dtypes or {}).get(name, value.dtype))


def extremes(value: Tensor) -> tuple[float, float]:
    """The least and the largest entry. A tensor is looked at once, not in every step, and again when it has changed.

    Args:
        value: Of real numbers.

    Returns:
        Both; NaN if there is one, 0 without an entry.
    """
    if not value.numel():
        return 0.0, 0.0
    version = None if value.is_inference() else value._version  # which inference tensors do not have
    known = None if version is None else _extremes.get(value)
    if known is None or known[0] != version:
        low, high = torch.aminmax(value.detach())
        known = version, float(low), float(high)
        if version is not None:
            _extremes[value] = known
    return known[1:]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a parameter.

    Args:
        tensor: Sharded or not.

    Returns:
        The shard of a DTensor, else the tensor itself.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fitted(name: str, value: Tensor, parameter: Tensor, dtypes: tuple[torch.dtype, ...], move: bool) -> Tensor:
    if value.shape != parameter.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(parameter.shape)} like the parameter, got {tuple(value.shape)}"
        )
    if dtypes and value.dtype not in dtypes:
        raise TypeError(
            f"{name}: expected {' or '.join(str(dtype)[6:] for dtype in dtypes)}, got {value.dtype}; cast it with .to()"
        )
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        value, mesh = value.to(local(parameter).device), parameter.device_mesh
        value = distribute_tensor(value, mesh, parameter.placements, src_data_rank=None)  # every process has all of it
    if isinstance(value, DTensor) and not isinstance(parameter, DTensor):
        raise ValueError(f"{name}: expected a whole tensor like the parameter, got a sharded one; gather it")
    if isinstance(value, DTensor) and isinstance(parameter, DTensor) and value.placements != parameter.placements:
        raise ValueError(
            f"{name}: expected placements {parameter.placements} like the parameter, got {value.placements}"
        )
    value, like = local(value), local(parameter)
    if move:
        _refuse_meta(name, value)
    value = value.detach() if value.requires_grad else value
    if value.device != like.device and not move:
        raise ValueError(
            f"{name}: expected device {like.device} like the parameter, got {value.device}; move it with .to()"
        )
    if value.device == like.device and same_order(like, value):
        return value
    return torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)


def _refuse_meta(name: str, value: Tensor) -> None:
    if value.is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device; load it")
