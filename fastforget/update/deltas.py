"""Differences of models, of adapters too, and adding them to a model."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastforget._parameters import local, matched, named
from fastforget.fisher.files import check_path, read_tensors, write_tensors
from fastforget.fisher.names import NamedTensors
from fastforget.ops._tensor_lists import FLOATS
from fastforget.update.adapters import (
    adapter_delta,
    adapter_folder,
    held_tensors,
    load_adapter,
    refuse_changed_base,
    without_adapters,
)
from fastforget.update.checkpoints import Source, open_source, tensor_source

__all__ = ["add_delta_", "load_delta", "parameter_delta", "save_delta"]

KIND = "parameter delta"


@torch.no_grad()
def parameter_delta(tuned: Any, base: Any) -> dict[str, Tensor]:
    """What fine-tuning changed: `tuned - base`, tensor by tensor.

    Args:
        tuned: A module, a `{name: tensor}`, the folder, safetensors file or hub id of a checkpoint, a PEFT model, or the
            folder of a PEFT adapter. Of LoRA adapters the delta is dense, `scaling B A` of every adapted weight; other
            adapters, as DoRA's, are refused.
        base: What it was tuned from, as a module, a `{name: tensor}` or a checkpoint; for an adapter's folder a module or a
            checkpoint's folder, whose configuration is used.

    Returns:
        By canonical name, float32 (float64 where one of the two is); parameters and persistent buffers. Of adapters those
        that they change, else all.

    Raises:
        TypeError: One is none of these.
        ValueError: Names or shapes differ, integer tensors differ, an adapter is not supported, or the base was changed where
            it is: it has merged adapters, or shares with `tuned` what was trained.
    """
    folder = adapter_folder(tuned)
    if folder is None and not getattr(tuned, "peft_config", None):
        if tuned is base and isinstance(base, nn.Module):
            raise ValueError(
                "base: expected another model than tuned, got the same, changed in place; pass its checkpoint or an untouched "
                "copy"
            )
        return _differences(open_source(tuned, "tuned", _names(base)), base)
    adapted = tuned if folder is None else load_adapter(folder, base)
    added = adapter_delta(adapted)
    if folder is None:
        refuse_changed_base(adapted, base)
    whole = tensor_source((without_adapters(adapted) if folder is None else held_tensors(adapted)).items(), "tuned")
    differences = _differences(whole, base, subset=folder is not None) if whole.like else {}
    result = {name: value for name, value in differences.items() if bool(value.any())}
    return result | {name: result[name] + value if name in result else value for name, value in added.items()}


def _names(model: Any) -> list[str]:
    return list(without_adapters(model)) if isinstance(model, nn.Module) else []


def _differences(tuned: Source, base: Any, *, subset: bool = False) -> dict[str, Tensor]:
    if isinstance(base, nn.Module):  # an adapter around it does not count
        other = tensor_source(without_adapters(base, trained=False).items(), "base")
    else:
        other = open_source(base, "base", tuned.like)
    tuned.tie(other.aliases)
    other.tie(tuned.aliases)
    odd = [name for name in tuned.like if name not in other.like]
    odd += [] if subset else [name for name in other.like if name not in tuned.like]
    if odd:
        where = "tuned" if odd[0] in tuned.like else "base"
        raise ValueError(
            f"tuned: expected the base's tensors, got {odd[0]!r} in {where} only; pass what it was tuned from"
        )
    for name, like in tuned.like.items():
        if like.shape != other.like[name].shape:
            raise ValueError(
                f"tuned[{name!r}]: expected shape {tuple(other.like[name].shape)} as in the base, got {tuple(like.shape)}"
            )
    result = {}
    for name in tuned.like:
        first, second = tuned.read(name), other.read(name)
        if first.dtype in FLOATS and second.dtype in FLOATS:
            wide = torch.promote_types(torch.promote_types(first.dtype, second.dtype), torch.float32)
            result[name] = first.to(wide) - second.to(first.device, wide)
        elif not torch.equal(first, second.to(first.device)):
            raise ValueError(
                f"tuned[{name!r}]: expected the base's values of {first.dtype}, got others, whose difference has no meaning"
            )
    return result


@torch.no_grad()
def add_delta_(model: nn.Module, delta: Any, scale: float = 1.0) -> None:
    """`theta += scale * delta`, in place; in float32 for 16-bit parameters, rounded once.

    Args:
        model: Wrapped or not, sharded or not. Adapters of it stay as they are.
        delta: `{name: tensor}`, as `parameter_delta` gives it, or the path of a saved one. Tensors that it does not have stay.
        scale: Negative to remove what was learned, as in F-Learning.

    Raises:
        TypeError: The model is no module, or a dtype is not floating-point.
        ValueError: A name is not the model's, shapes or devices do not fit, entries of a tensor share memory, or the scale is
            not finite. Nothing was written then.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if not math.isfinite(scale):
        raise ValueError(f"scale: expected a finite number, got {scale}")
    move = isinstance(delta, str | os.PathLike)
    given = named(_items(load_delta(delta) if move else delta), "delta")
    state = named((n, t) for n, t in model.state_dict(keep_vars=True).items() if isinstance(t, Tensor))
    places: dict[int, str] = {}
    for name, value in given.items():
        if name not in state:
            raise ValueError(f"delta: expected names of the model's tensors, got {name!r}; pass a delta of this model")
        own = local(state[name])
        if own.dtype not in FLOATS:
            raise TypeError(
                f"delta[{name!r}]: expected a floating-point tensor of the model, of 16 bits or more, got {own.dtype}"
            )
        if any(n > 1 and stride == 0 for n, stride in zip(own.shape, own.stride(), strict=True)):
            raise ValueError(
                f"delta[{name!r}]: expected a tensor of the model whose entries have memory of their own, got one with strides "
                f"{own.stride()}; make it of a contiguous tensor"
            )
        if places.setdefault(id(state[name]), name) != name:
            raise ValueError(
                f"delta: expected one tensor a parameter, got {name!r}, tied to {places[id(state[name])]!r}"
            )
        matched("delta", {name: value}, {name: state[name]}, FLOATS, move=move)
    for name, value in given.items():
        fitted = matched("delta", {name: value}, {name: state[name]}, FLOATS, move=move)[name]
        local(state[name]).detach().add_(fitted, alpha=scale)


def _items(delta: Any) -> Any:
    if not isinstance(delta, Mapping):
        raise TypeError(f"delta: expected a mapping from names to tensors or a path, got {type(delta).__name__}")
    return delta.items()


def save_delta(
    delta: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a delta as safetensors; whole or not at all.

    Args:
        delta: Tensors by name.
        path: The file, `.safetensors`.
        metadata: What JSON can hold.

    Raises:
        TypeError: Something else than tensors is in it, or JSON cannot hold the metadata.
        ValueError: The path cannot be written to.
    """
    write_tensors(check_path(path), named(_items(delta), "delta"), metadata or {}, kind=KIND)


def load_delta(path: str | os.PathLike[str]) -> NamedTensors:
    """Read a delta that `save_delta` wrote.

    Args:
        path: The file.

    Returns:
        Tensors by canonical name, mapped from the file, with `.metadata`.

    Raises:
        ValueError: It is no such file, or is damaged.
    """
    return NamedTensors(*read_tensors(path, kind=KIND))
