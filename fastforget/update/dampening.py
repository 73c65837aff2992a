"""Selective synaptic dampening of whole models and of checkpoints."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Partial, Replicate

from fastforget._parameters import local, matched, matched_fisher, named
from fastforget.fisher.names import Fisher
from fastforget.ops import dampen_
from fastforget.ops._tensor_lists import FLOATS, is_dense
from fastforget.update.changes import Changes
from fastforget.update.checkpoints import open_source
from fastforget.update.merging import open_fishers
from fastforget.update.writing import write_checkpoint

__all__ = ["dampen_checkpoint", "selective_dampening_"]

BYTES = 2**30  # of the Fishers that are on a device at a time, where they come from a file


@torch.no_grad()
def selective_dampening_(
    model: nn.Module, *, forget: Any, retain: Any, alpha: float = 10.0, lam: float = 1.0, dry_run: bool = False
) -> dict[str, int]:
    r"""Make a model forget: `theta *= min(lam F_retain / F_forget, 1)` where `F_forget > alpha F_retain`.

    In place, in one pass over the parameters and no training. Parameters that the Fishers do not have, and entries that are
    not dampened, keep their bits. Sharded parameters (FSDP2) are dampened where they are; every process has to call this.

    Args:
        model: Wrapped or not; changed in place.
        forget: Fisher of what is to be forgotten: an estimator, a `{name: tensor}`, or a saved file's path, whose tensors are
            taken to the parameters' devices a few at a time.
        retain: Fisher of what is to be kept, with the same names.
        alpha: Least ratio of the Fishers that is dampened, exclusive; at least 0.
        lam: Factor of the ratio; at least 0.
        dry_run: Only count.

    Returns:
        How many entries of each parameter were dampened, or would be, by canonical name; over all shards.

    Raises:
        TypeError: A Fisher is none, or a dtype is not floating-point.
        ValueError: The names of the Fishers differ, or are not all the model's; shapes or devices do not fit; a parameter is
            not dense or shares memory with another; a factor or an entry of a Fisher is negative or not finite. Nothing was
            written then.

    References:
        Foster, Schoepf and Brintrup, arXiv 2308.07707.
    """
    fishers = open_fishers({"forget": forget, "retain": retain})
    move = {"forget": not isinstance(forget, Mapping), "retain": not isinstance(retain, Mapping)}
    parameters = _parameters_of(model, fishers["forget"])
    values = {
        label: {name: fisher[stored] for name, (stored, _) in parameters.items()} for label, fisher in fishers.items()
    }
    targets = {name: parameter for name, (_, parameter) in parameters.items()}
    dampen_([], [], [], alpha=alpha, lam=lam)  # refuses the factors
    _check(values, targets, move)
    counts: dict[str, int] = {}
    for names in _groups(targets):
        chosen = {name: targets[name] for name in names}
        found = [
            list(matched_fisher(_some(values[label], names), chosen, label, move=move[label]).values())
            for label in fishers
        ]
        shards = [local(parameter).detach() for parameter in chosen.values()]
        dampened = dampen_(shards, *found, alpha=alpha, lam=lam, dry_run=dry_run, check=False).tolist()
        counts |= dict(zip(names, dampened, strict=True))
    return _over_shards(counts, targets)


def _some(values: Mapping[str, Tensor], names: Sequence[str]) -> Fisher:
    return Fisher((name, values[name]) for name in names)


def _parameters_of(model: nn.Module, fisher: Fisher) -> dict[str, tuple[str, Tensor]]:
    """The Fisher's name of every parameter that it has, and the parameter, by the parameter's first name."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    every = named(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(every.items())}
    found: dict[str, tuple[str, Tensor]] = {}
    for stored in fisher:
        if stored not in every:
            raise ValueError(
                f"forget: expected names of the model's parameters, got {stored!r}; pass Fishers of this model"
            )
        name = first[id(every[stored])]
        if name in found:
            raise ValueError(
                f"forget: expected one tensor a parameter, got {stored!r}, which is tied to {found[name][0]!r}"
            )
        found[name] = stored, every[stored]
    return found


def _check(values: Mapping[str, Mapping[str, Tensor]], targets: Mapping[str, Tensor], move: Mapping[str, bool]) -> None:
    # Every process goes through all tensors, and all learn of a wrong entry in one of the shards: none is left waiting.
    problem: ValueError | TypeError | None = None
    failed = dict.fromkeys(targets, 0)
    places: dict[int, str] = {}
    for name, parameter in targets.items():
        try:
            _check_writable(name, local(parameter), places)
            for label, fisher in values.items():
                matched_fisher(_some(fisher, [name]), {name: parameter}, label, move=move[label])
        except (ValueError, TypeError) as error:
            problem = problem or error
            failed[name] = 1
    elsewhere = [name for name, count in _over_shards(failed, targets).items() if count]
    if problem is not None:
        raise problem
    if elsewhere:
        raise ValueError(
            f"forget, retain: expected finite values >= 0, got others for {elsewhere[0]!r} in another process"
        )


def _check_writable(name: str, shard: Tensor, places: dict[int, str]) -> None:
    if shard.dtype not in FLOATS:
        raise TypeError(f"model: expected floating-point parameters of 16 bits or more, got {shard.dtype} for {name!r}")
    if not is_dense(shard):
        raise ValueError(
            f"model: expected dense parameters, got strides {shard.stride()} for shape {tuple(shard.shape)} of {name!r}; "
            "make it of a contiguous tensor"
        )
    if shard.numel() and places.setdefault(shard.data_ptr(), name) != name:
        raise ValueError(
            f"model: expected every parameter's own memory, got that of {places[shard.data_ptr()]!r} for {name!r}; tie them"
        )


def _groups(targets: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of parameters of one device, a bounded number of bytes at a time."""
    names: dict[torch.device, list[str]] = {}
    size: dict[torch.device, int] = {}
    for name, parameter in targets.items():
        shard = local(parameter)
        names.setdefault(shard.device, []).append(name)
        size[shard.device] = size.get(shard.device, 0) + 2 * 4 * shard.numel()
        if size[shard.device] >= BYTES:
            yield names.pop(shard.device)
            del size[shard.device]
    yield from names.values()


def _over_shards(counts: Mapping[str, int], targets: Mapping[str, Tensor]) -> dict[str, int]:
    """Numbers of whole parameters from those of this process's shards."""
    result = dict(counts)
    alike: dict[Any, list[str]] = {}
    for name, parameter in targets.items():
        if isinstance(parameter, DTensor):
            alike.setdefault((parameter.device_mesh, parameter.placements), []).append(name)
    for (mesh, placements), names in alike.items():
        ours = torch.tensor([counts[name] for name in names], device=mesh.device_type)
        sums = [placement if isinstance(placement, Replicate) else Partial() for placement in placements]
        whole = DTensor.from_local(ours, mesh, sums, run_check=False).full_tensor()
        result |= dict(zip(names, whole.tolist(), strict=True))
    return result


def dampen_checkpoint(
    model: Any,
    out: str | os.PathLike[str] | None,
    *,
    forget: Any,
    retain: Any,
    alpha: float = 10.0,
    lam: float = 1.0,
    dry_run: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> Changes:
    """Dampen a checkpoint into a new one, tensor by tensor; see `selective_dampening_`.

    Args:
        model: A checkpoint's folder, safetensors file or hub id, or what else `fisher_merge` takes.
        out: The new or empty folder, absent until it is whole; None with `dry_run`.
        forget: Fisher of what is to be forgotten: an estimator, a `{name: tensor}`, or a saved file's path.
        retain: Fisher of what is to be kept, with the same names.
        alpha: Least ratio of the Fishers that is dampened, exclusive; at least 0.
        lam: Factor of the ratio; at least 0.
        dry_run: Write nothing, and only count.
        max_shard_size: Of a file of the checkpoint.
        progress: Show a progress bar.

    Returns:
        How many entries are dampened.

    Raises:
        TypeError: Something is none of these, or a dtype is not floating-point.
        ValueError: As in `selective_dampening_`, or the folder is not empty. Nothing was written then.
    """
    if out is None and not dry_run:
        raise ValueError("out: expected a new folder, got none; or pass dry_run=True")
    fishers = open_fishers({"forget": forget, "retain": retain})
    source = open_source(model, "model", fishers["forget"])
    for fisher in fishers.values():
        source.tie(fisher.metadata.get("aliases", {}))
    dampen_([], [], [], alpha=alpha, lam=lam)  # refuses the factors
    for label, fisher in fishers.items():
        for name in fishers["forget"]:
            if name not in source.like:
                raise ValueError(
                    f"{label}: expected names of the model's tensors, got {name!r}; pass Fishers of this model"
                )
            matched(label, fisher, {name: source.like[name]}, (torch.float32, torch.float64), move=True)
    changes = Changes()

    def dampened(name: str) -> Tensor:
        result = source.read(name)
        changes.entries[name], changes.changed[name] = result.numel(), 0
        if name in fishers["forget"]:
            result = result.clone()
            found = [
                [matched_fisher(fisher, {name: result}, label, move=True)[name]] for label, fisher in fishers.items()
            ]
            changes.changed[name] = int(dampen_([result], *found, alpha=alpha, lam=lam, dry_run=dry_run, check=False))
        return result

    write_checkpoint(
        out, source, dampened, "dampening", dry_run=dry_run, max_shard_size=max_shard_size, progress=progress
    )
    return changes
