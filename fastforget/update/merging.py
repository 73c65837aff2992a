"""Fisher-weighted averages of models, tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from fastforget._parameters import matched, matched_fisher
from fastforget.fisher.names import Fisher, as_fisher
from fastforget.ops import fisher_merge_
from fastforget.ops._examples import accumulator
from fastforget.ops._tensor_lists import FLOATS, dense
from fastforget.update.changes import Changes
from fastforget.update.checkpoints import Source, open_source
from fastforget.update.writing import advancing, write_checkpoint

__all__ = ["fisher_merge", "open_fishers"]

PathLike = str | os.PathLike[str]


@overload
def fisher_merge(
    models: Sequence[Any], fishers: Sequence[Any], weights: Sequence[float] | None = None, *, floor: float = 1e-6
) -> dict[str, Tensor]: ...
@overload
def fisher_merge(
    models: Sequence[Any],
    fishers: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    out: PathLike | None = None,
    dry_run: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> dict[str, Tensor] | Changes: ...


def fisher_merge(
    models: Sequence[Any],
    fishers: Sequence[Any],
    weights: Sequence[float] | None = None,
    *,
    floor: float = 1e-6,
    out: PathLike | None = None,
    dry_run: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> dict[str, Tensor] | Changes:
    r"""Merge models by the weighted average `theta = sum_j c_j F_j theta_j / sum_j c_j F_j`, with every `F_j` at least `floor`.

    Models and Fishers are read tensor by tensor: with `out`, a few tensors are in memory at a time. Tensors that the Fishers
    do not have, as those of frozen parameters, become the mean weighted by `c`; integer tensors have to be equal.

    Args:
        models: J modules, `{name: tensor}`, or folders, safetensors files or hub ids of checkpoints, with the same tensors.
        fishers: J estimators, `{name: tensor}` or saved files' paths, with the same names.
        weights: J factors c, finite and at least 0; default: equal ones. Only their ratios matter.
        floor: Least value of a Fisher; where all are below, the entry becomes the mean weighted by `c`.
        out: Write a checkpoint to this new or empty folder, with the configuration and tokenizer of the first model. It is
            absent until it is whole.
        dry_run: Write nothing, and only count.
        max_shard_size: Of a file of the checkpoint.
        progress: Show a progress bar.

    Returns:
        The merged tensors by canonical name, in the first model's dtypes and on its devices; with `out` or `dry_run` instead
        how many entries differ from the first model's.

    Raises:
        TypeError: A model or Fisher is none of these, or dtypes differ.
        ValueError: Names, shapes or integer tensors differ, a Fisher holds a negative or non-finite value, a factor is out of
            range, or the folder is not empty. Nothing was written then.

    References:
        Matena and Raffel, "Merging models with Fisher-weighted averaging", arXiv 2111.09832, equation 4.
    """
    parts = _parts(models, fishers, weights)
    factors = [1.0] * len(parts) if weights is None else list(weights)
    fisher_merge_([], [[] for _ in parts], [[] for _ in parts], factors, floor=floor)  # refuses what is out of range
    _check(parts)
    first, known = parts[0]
    merged = partial(_merged, parts, factors, floor)
    if out is None and not dry_run:
        with advancing(merged, first.like, "merging", shown=progress) as tensor:
            return {name: tensor(name) for name in first.like}
    floats = [name for name, like in first.like.items() if like.is_floating_point()]
    changes = Changes(averaged=[name for name in floats if name not in known])

    def counted(name: str) -> Tensor:
        result, before = merged(name), first.read(name)
        changes.changed[name], changes.entries[name] = int((result != before).sum()), before.numel()
        return result

    write_checkpoint(out, first, counted, "merging", dry_run=dry_run, max_shard_size=max_shard_size, progress=progress)
    return changes


Parts = Sequence[tuple[Source, Fisher]]


def _parts(models: Sequence[Any], fishers: Sequence[Any], weights: Sequence[float] | None) -> Parts:
    for name, given in (("models", models), ("fishers", fishers)):
        if isinstance(given, str | os.PathLike | Mapping | nn.Module) or not isinstance(given, Sequence):
            raise TypeError(f"{name}: expected a list, got one {type(given).__name__}; put it into a list")
    if len(models) < 2:
        raise ValueError(f"models: expected at least two, got {len(models)}")
    for name, given in (("fishers", fishers), ("weights", weights)):
        if given is not None and len(given) != len(models):
            raise ValueError(f"{name}: expected {len(models)}, one for each of models, got {len(given)}")
    read = open_fishers({f"fishers[{j}]": fisher for j, fisher in enumerate(fishers)})
    needed = set().union(*read.values())
    sources = [open_source(model, f"models[{j}]", needed) for j, model in enumerate(models)]
    for fisher in read.values():
        for source in sources:
            source.tie(fisher.metadata.get("aliases", {}))
    for source in sources:
        for other in sources:
            source.tie(other.aliases)
    return list(zip(sources, read.values(), strict=True))


def open_fishers(fishers: Mapping[str, Any]) -> dict[str, Fisher]:
    """Fishers that have to know the same parameters.

    Args:
        fishers: Estimators, `{name: tensor}` or paths, by what messages call them.

    Returns:
        The Fishers, whose tensors are mapped from their files.

    Raises:
        TypeError: One is none of these.
        ValueError: One cannot be read, or their names differ.
    """
    read: dict[str, Fisher] = {}
    for label, fisher in fishers.items():
        try:
            read[label] = as_fisher(fisher)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{label}: {error}") from error
    (first, expected), *others = read.items()
    for label, fisher in others:
        for name in expected:
            if name not in fisher:
                raise ValueError(
                    f"{label}: expected the names of {first}, got none for {name!r}; use Fishers of one model"
                )
        for name in fisher:
            if name not in expected:
                raise ValueError(
                    f"{label}: expected the names of {first}, got {name!r} besides; use Fishers of one model"
                )
    return read


def _check(parts: Parts) -> None:
    """Refuse what shapes and names show, before anything is read."""
    first = parts[0][0]
    for source, _ in parts:
        odd = [name for name in [*first.like, *source.like] if not (name in first.like and name in source.like)]
        if odd:
            where = source if odd[0] in source.like else first
            raise ValueError(
                f"{source.label}: expected the tensors of {first.label}, got {odd[0]!r} in {where.label} only; merge models "
                "of one architecture"
            )
        for name, expected in first.like.items():
            got = source.like[name]
            if got.shape != expected.shape:
                raise ValueError(
                    f"{source.label}[{name!r}]: expected shape {tuple(expected.shape)} as in {first.label}, got "
                    f"{tuple(got.shape)}"
                )
            if got.dtype != expected.dtype:
                raise TypeError(
                    f"{source.label}[{name!r}]: expected {expected.dtype} as in {first.label}, got {got.dtype}; convert one"
                )
            if got.is_floating_point() and got.dtype not in FLOATS:
                raise TypeError(
                    f"{source.label}[{name!r}]: expected float32, bfloat16, float16 or float64, got {got.dtype}"
                )
    for j, (_, fisher) in enumerate(parts):
        unknown = [name for name in fisher if name not in first.like]
        if unknown:
            raise ValueError(
                f"fishers[{j}]: expected names of the models' tensors, got {unknown[0]!r}; pass the Fishers of these models"
            )
        matched(f"fishers[{j}]", fisher, {n: first.like[n] for n in fisher}, (torch.float32, torch.float64), move=True)


def _merged(parts: Parts, weights: Sequence[float], floor: float, name: str) -> Tensor:
    first = dense(parts[0][0].read(name))
    like = {name: first}
    tensors = [first]
    for source, _ in parts[1:]:
        tensors.append(matched(source.label, {name: source.read(name)}, like, move=True)[name])
    if not first.is_floating_point():
        for (source, _), tensor in zip(parts, tensors, strict=True):
            if not torch.equal(first, tensor):
                raise ValueError(
                    f"{source.label}[{name!r}]: expected the integers of {parts[0][0].label}, got others; a mean of integers "
                    "has no meaning"
                )
        return first.clone()
    if name in parts[0][1]:
        fishers = [
            matched_fisher(fisher, like, f"fishers[{j}]", move=True)[name] for j, (_, fisher) in enumerate(parts)
        ]
    else:
        fishers = [torch.ones_like(first, dtype=accumulator(first.dtype))] * len(parts)
    result = torch.empty_like(first)
    fisher_merge_([result], [[tensor] for tensor in tensors], [[fisher] for fisher in fishers], weights, floor=floor)
    return result
