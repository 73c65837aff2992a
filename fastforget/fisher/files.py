"""Fishers on the disk: safetensors, with a JSON record of how they came about in the header."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastforget.fisher.names import Fisher, as_fisher, canonical_name

__all__ = ["check_fisher", "combine_fishers", "load_fisher", "save_fisher"]

# One entry holds everything: safetensors writes several in an order that changes from run to run.
HEADER_KEY = "fastforget"
KIND, FORMAT_VERSION = "diagonal Fisher", 1
CONVENTION = ("model_type", "per", "batch_size", "labels", "loss")  # what Fishers have to share to be averaged
COUNTERS = ("examples", "tokens", "weight_sum", "skipped")  # what adds up
NAMES_SHOWN = 5


def save_fisher(path: str | os.PathLike[str], diagonal: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a diagonal Fisher; the file is absent, as before, or whole, whatever happens meanwhile.

    The same tensors in the same order and the same metadata give the same bytes.

    Args:
        path: the file, `.safetensors`. Its folder is made where it is missing.
        diagonal: tensors by canonical parameter name.
        metadata: what JSON can hold.

    Raises:
        ValueError: if the path has another ending or cannot be written to, or a value is not finite.
        TypeError: if something else than tensors is in the diagonal, or JSON cannot hold the metadata.
    """
    path = check_path(path)
    for name, tensor in diagonal.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"diagonal: expected tensors, got {type(tensor).__name__} for {name!r}")
    bad = [name for name, tensor in diagonal.items() if not math.isfinite(tensor.detach().sum(dtype=torch.float64))]
    if bad:
        raise ValueError(
            f"diagonal: expected finite values, got NaN or infinity in {_listed(bad)}; leave out the examples whose "
            "gradients are not finite"
        )
    write_tensors(path, diagonal, metadata, kind=KIND)


def load_fisher(path: str | os.PathLike[str], model: nn.Module | None = None) -> Fisher:
    """Read a saved diagonal Fisher; the tensors are mapped from the file, not copied.

    Args:
        path: a file of `save_fisher`.
        model: compare names and shapes with this model's parameters, see `check_fisher`.

    Returns:
        The Fisher, with `.metadata`.

    Raises:
        ValueError: if it is no such file, is damaged, or does not fit the model.
    """
    tensors, metadata = read_tensors(path, kind=KIND)
    fisher = Fisher(tensors, metadata)
    if model is not None:
        check_fisher(fisher, model)
    return fisher


def check_fisher(fisher: Any, model: nn.Module) -> None:
    """Refuse a Fisher that does not belong to a model.

    Args:
        fisher: an estimator, a `{name: tensor}` or a path.
        model: the model, wrapped or not. Every tensor needs a parameter of its shape. Every parameter that requires a
            gradient needs a tensor, unless the Fisher's metadata say that it is that of chosen `parameters`; tied
            parameters need one between them.

    Raises:
        ValueError: if tensors are missing, unexpected or of another shape; the message names the first of each.
    """
    fisher = as_fisher(fisher)
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(canonical_name(name))
    missing, reshaped, used = [], [], set()
    for parameter in model.parameters():
        first, *_ = own = names[id(parameter)]
        stored = next((known for known in map(fisher.stored_name, own) if known is not None), None)
        if stored is not None:
            used.add(stored)
            shape, expected = tuple(fisher[stored].shape), tuple(parameter.shape)
            reshaped += [f"{first} {shape} for {expected}"] if shape != expected else []
        elif parameter.requires_grad and not fisher.metadata.get("parameters"):
            missing.append(first)
    unexpected = [name for name in fisher if name not in used]
    if missing or unexpected or reshaped:
        found = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
        of = f", of {fisher.metadata['model']}" if "model" in fisher.metadata else ""
        raise ValueError(
            f"fisher: expected the trainable parameters of {type(model).__name__}, got a Fisher{of} with "
            + "; ".join(f"{len(names)} {what}: {_listed(names)}" for what, names in found.items() if names)
            + "; load the model that the Fisher was computed on"
            + (", and freeze (requires_grad_(False)) what it leaves out" if missing else "")
        )


def combine_fishers(fishers: Iterable[Any], *, weights: Sequence[float] | None = None) -> Fisher:
    """The weighted mean of Fishers of the same model, such as those of several parts of the data.

    `F = sum_k w_k F_k / sum_k w_k` in float64. With the default weights it is the Fisher of all the examples together.

    Args:
        fishers: at least one; estimators, `{name: tensor}` or paths.
        weights: one a Fisher, not negative; default: each Fisher's `weight_sum`, the sum of its examples' weights.

    Returns:
        The mean in the first Fisher's dtypes. Its metadata has the entries that all agree on, and the sums of the
        counts; `weight_sum` is absent where weights were given.

    Raises:
        ValueError: if there is none, conventions, names or shapes differ, or weights are missing or not valid.
    """
    if isinstance(fishers, str | os.PathLike | Mapping):
        raise ValueError(f"fishers: expected a list, got one {type(fishers).__name__}; put it into a list")
    parts = [as_fisher(fisher) for fisher in fishers]
    if not parts:
        raise ValueError("fishers: expected at least one, got none")
    for index, part in enumerate(parts[1:], start=1):
        _check_alike(parts[0], part, index)
    factors = _factors(parts, weights)
    total = math.fsum(factors)
    diagonal = {}
    for name, first in parts[0].items():
        mean = torch.zeros(first.shape, dtype=torch.float64)
        for part, factor in zip(parts, factors, strict=True):
            mean.add_(part[name].detach().to("cpu", torch.float64), alpha=factor / total)
        diagonal[name] = mean.to(first.device, first.dtype)
    shared = {
        name: value
        for name, value in parts[0].metadata.items()
        if all(name in part.metadata and part.metadata[name] == value for part in parts)
    }
    counted = [name for name in COUNTERS if all(name in part.metadata for part in parts)]
    sums = {name: sum(part.metadata[name] for part in parts) for name in counted}
    metadata = {name: value for name, value in shared.items() if name not in COUNTERS} | sums | {"combined": len(parts)}
    if weights is not None:
        metadata.pop("weight_sum", None)  # the mean is no longer that of the examples
    return Fisher(diagonal, metadata)


def _check_alike(first: Fisher, other: Fisher, index: int) -> None:
    for name in CONVENTION:
        expected, got = first.metadata.get(name), other.metadata.get(name)
        if expected != got:
            raise ValueError(
                f"fishers: expected {name} = {expected!r} as in the first, got {got!r} in number {index + 1}; combine "
                "Fishers of one convention and one model"
            )
    odd = [name for name in [*first, *other] if not (dict.__contains__(first, name) and dict.__contains__(other, name))]
    odd += [
        f"{name} {tuple(other[name].shape)} for {tuple(first[name].shape)}"
        for name in first
        if name not in odd and other[name].shape != first[name].shape
    ]
    if odd:
        raise ValueError(
            f"fishers: expected the first's names and shapes, got a difference in {_listed(odd)} in number "
            f"{index + 1}; combine Fishers of one model"
        )


def _factors(parts: list[Fisher], weights: Sequence[float] | None) -> list[float]:
    if weights is None:
        without = [number for number, part in enumerate(parts, start=1) if "weight_sum" not in part.metadata]
        if without:
            raise ValueError(
                f"weights: expected weight_sum in the metadata of every Fisher, got none in number {without[0]}; pass "
                "weights=[...], the number of examples behind each"
            )
        weights = [part.metadata["weight_sum"] for part in parts]
    factors = [float(weight) for weight in weights]
    if len(factors) != len(parts):
        raise ValueError(f"weights: expected {len(parts)}, one a Fisher, got {len(factors)}")
    if not all(math.isfinite(factor) and factor >= 0 for factor in factors) or not sum(factors):
        raise ValueError(f"weights: expected finite numbers >= 0 that are not all 0, got {factors}")
    return factors


# ----- safetensors with a record in the header, for Fishers and for the state of a run


def check_path(path: str | os.PathLike[str]) -> Path:
    """Refuse a path that a safetensors file cannot be written to.

    Args:
        path: the file.

    Returns:
        The path.

    Raises:
        ValueError: if it ends otherwise, is a folder, or lies where nothing can be written.
    """
    path = Path(os.fspath(path)).expanduser()
    if path.suffix != ".safetensors":
        raise ValueError(f"path: expected a file ending in .safetensors, got {path}; rename it")
    if path.is_dir():
        raise ValueError(f"path: expected a file, got the folder {path}; name a file in it")
    existing = next(folder for folder in path.absolute().parents if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"path: expected a folder that can be written to, got {existing}; choose another folder")
    return path


def check_space(path: Path, needed: int) -> None:
    """Refuse a path without room for a file, before the work rather than after it.

    Args:
        path: the file.
        needed: bytes.

    Raises:
        ValueError: if the disk has less free.
    """
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"path: expected {needed / 1e6:.1f} MB of free space in {folder}, got {free / 1e6:.1f} MB; free some "
            "space, or choose another folder"
        )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any], *, kind: str) -> None:
    """Write tensors and a record under a temporary name, sync and rename.

    safetensors sorts the tensors; the record has their own order, on which choices between equal entries depend.

    Args:
        path: the file; its folder is made where it is missing.
        tensors: on any device; strided, tied and viewed as they like.
        metadata: what JSON can hold.
        kind: what the file is.

    Raises:
        TypeError: if JSON cannot hold the metadata.
        ValueError: if the file cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    from fastforget._files import write_atomically

    record = {"kind": kind, "format": FORMAT_VERSION, "metadata": dict(metadata), "order": list(tensors)}
    try:
        header = {HEADER_KEY: json.dumps(record, sort_keys=True, ensure_ascii=False)}
    except TypeError as error:
        raise TypeError(f"metadata: expected what JSON can hold: {error}") from error
    places: set[int] = set()
    plain = {}
    for name, tensor in tensors.items():
        copy = tensor.detach().to("cpu").contiguous()
        # safetensors refuses tensors that share memory.
        storage = copy.untyped_storage()
        if storage.nbytes() and (storage.data_ptr() in places or storage.nbytes() != copy.nbytes):
            copy = copy.clone()
        places.add(copy.untyped_storage().data_ptr())
        plain[name] = copy
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: save_file(plain, temporary, metadata=header))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: cannot write {path}: {error}; free some space or choose another folder") from error


def read_tensors(path: str | os.PathLike[str], *, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a file of `write_tensors`.

    Args:
        path: the file.
        kind: what it has to be.

    Returns:
        The tensors in the order in which they were given, mapped from the file, and the metadata.

    Raises:
        ValueError: if it is missing, damaged or something else.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(os.fspath(path)).expanduser()
    record = _read_record(path, kind)
    place = {name: i for i, name in enumerate(record.get("order", []))}  # older files have none
    try:
        with safe_open(path, framework="pt") as file:
            names = sorted(file.keys(), key=lambda name: place.get(name, len(place)))
            return {name: file.get_tensor(name) for name in names}, record["metadata"]
    except (OSError, SafetensorError) as error:
        raise ValueError(f"path: cannot read {path}: {error}; the file is damaged, compute it again") from error


def read_metadata(path: str | os.PathLike[str], *, kind: str) -> dict[str, Any]:
    """Read the record of a file of `write_tensors` alone.

    Args:
        path: the file.
        kind: what it has to be.

    Returns:
        The metadata.

    Raises:
        ValueError: if it is missing, damaged or something else.
    """
    return _read_record(Path(os.fspath(path)).expanduser(), kind)["metadata"]


def _read_record(path: Path, kind: str) -> dict[str, Any]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"path: expected an existing file, got {path}; check the path")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ValueError(
            f"path: expected a safetensors file, got {path}: {error}; it is damaged or something else"
        ) from error
    try:
        record = json.loads(header[HEADER_KEY])
        found, version, metadata = record["kind"], record["format"], record["metadata"]
    except (KeyError, TypeError, ValueError):
        record, found, version, metadata = {}, None, None, None
    if found != kind or not isinstance(metadata, dict):
        raise ValueError(f"path: expected a file that fastforget wrote for a {kind}, got {path}; check the path")
    if version != FORMAT_VERSION:
        raise ValueError(
            f"path: expected a {kind} of format {FORMAT_VERSION}, got format {version!r} in {path}; use the version "
            "of fastforget that wrote it"
        )
    return record


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    )
