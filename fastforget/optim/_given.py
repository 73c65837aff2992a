"""What an optimizer is given for each parameter: a Fisher, an anchor and a mask, laid out in memory like the parameter."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastforget._parameters import local, matched, matched_fisher
from fastforget.fisher.names import Fisher, as_fisher, canonical_name
from fastforget.ops._examples import accumulator
from fastforget.ops._tensor_lists import FLOATS, pack_bits, unpack_bits
from fastforget.update.masks import as_mask
from fastforget.update.penalty import anchor_tensors

__all__ = ["INITIAL", "Given", "Sources", "fit", "sharded_like"]

INITIAL = "initial"
ARGUMENTS = ("fisher", "anchor", "mask")


@dataclass(frozen=True)
class Sources:
    """What the user gave for all parameters, less what they have got.

    Attributes:
        fisher: `{name: tensor}`, as all, or None.
        anchor: Or "initial".
        mask: Of bool tensors.
        moved: The arguments whose tensors are taken to the parameters' devices, as those of a file.
    """

    fisher: Any = None
    anchor: Any = None
    mask: Any = None
    moved: frozenset[str] = frozenset()

    @staticmethod
    def read(fisher: Any, anchor: Any, mask: Any) -> Sources:
        """Open files, and ask an estimator.

        Args:
            fisher: An estimator, a mapping, a path or None.
            anchor: A model, a mapping, a path, "initial" or None.
            mask: A mapping, a path or None.

        Returns:
            The mappings.
        """
        initial = isinstance(anchor, str) and anchor == INITIAL
        given = {"fisher": fisher, "anchor": anchor, "mask": mask}
        return Sources(
            None if fisher is None else as_fisher(fisher),
            anchor if anchor is None or initial else anchor_tensors(anchor),
            None if mask is None else as_mask(mask),
            frozenset(name for name, value in given.items() if not isinstance(value, Mapping | nn.Module)),
        )

    @property
    def by_name(self) -> list[str]:
        """The arguments whose tensors are found by the parameters' names."""
        return [name for name in ARGUMENTS if isinstance(getattr(self, name), Mapping)]

    def without(self, names: Iterable[str]) -> Sources:
        """What is left for others: the tensors of these parameters are not kept alive any longer."""
        names, left = set(names), {}
        for argument in self.by_name:
            tensors = getattr(self, argument)
            used = {tensors.stored_name(name) for name in names} if isinstance(tensors, Fisher) else names
            kept = {name: value for name, value in tensors.items() if canonical_name(name) not in used}
            left[argument] = Fisher(kept, tensors.metadata) if isinstance(tensors, Fisher) else kept
        return dataclasses.replace(self, **left)

    def emptied(self) -> Sources:
        """For a copy or a file of the optimizer: only which arguments there were."""
        return dataclasses.replace(self, **{argument: {} for argument in self.by_name})


@dataclass
class Given:
    """One parameter's local tensors.

    Attributes:
        like: The parameter's device, dtype, strides, and whether it is sharded, which they fit.
        shape: Of the local tensors.
        fisher: float32 (float64).
        anchor: In the parameter's dtype or float32.
        mask: Eight entries a byte, in memory order.
    """

    like: tuple[Any, ...]
    shape: torch.Size
    fisher: Tensor | None = None
    anchor: Tensor | None = None
    mask: Tensor | None = None

    def drop(self, arguments: Iterable[str]) -> None:
        """Let go of what the optimizer's state has now."""
        for argument in arguments:
            setattr(self, argument, None)

    def refitted(self, parameter: Tensor) -> Given:
        """The same for a parameter that has moved, changed its dtype or been sharded since."""
        like = _like(parameter)
        if like == self.like:
            return self
        _, _, stride, sharded = self.like
        target, found = local(parameter) if sharded else parameter, {}
        for argument in ARGUMENTS:
            value = getattr(self, argument)
            if value is not None and argument == "mask":
                bits = unpack_bits(value, math.prod(self.shape))
                value = bits.new_empty_strided(self.shape, stride)
                value.as_strided((value.numel(),), (1,)).copy_(bits)
            found[argument] = None if value is None else {"": value.to(like[0])}
        (result,) = fit({"": target}, Sources(**found))
        result.like = like
        return result


def fit(parameters: Mapping[str, Tensor], sources: Sources) -> list[Given]:
    """Find, check and lay out what is given for parameters.

    Args:
        parameters: By canonical name.
        sources: What is given.

    Returns:
        As many. Tensors that fit are kept, not copied, but for an anchor that is the parameter's own memory.

    Raises:
        TypeError: A dtype is wrong.
        ValueError: A tensor is missing, does not fit, or the Fisher holds a negative or non-finite value.
    """
    found: dict[str, dict[str, Tensor]] = {}
    if sources.fisher is not None:
        found["fisher"] = matched_fisher(sources.fisher, parameters, move="fisher" in sources.moved)
    if isinstance(sources.anchor, Mapping):
        found["anchor"] = _fitted_anchors(sources.anchor, parameters, "anchor" in sources.moved)
    elif sources.anchor is not None:
        found["anchor"] = {name: local(p).detach().clone() for name, p in parameters.items()}
    if sources.mask is not None:
        masks = matched("mask", sources.mask, parameters, (torch.bool,), move="mask" in sources.moved)
        found["mask"] = {name: pack_bits(value) for name, value in masks.items()}
    return [
        Given(_like(p), local(p).shape, **{argument: tensors[name] for argument, tensors in found.items()})
        for name, p in parameters.items()
    ]


def sharded_like(parameter: Tensor, value: Tensor) -> Tensor:
    """A local tensor as a parameter's shard, if the parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return value
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    return DTensor.from_local(value, mesh, placements, run_check=False, shape=shape, stride=parameter.stride())


def _like(parameter: Tensor) -> tuple[Any, ...]:
    own = local(parameter)
    return own.device, own.dtype, own.stride(), isinstance(parameter, DTensor)


def _fitted_anchors(
    anchor: Mapping[str, Tensor], parameters: Mapping[str, Tensor], from_file: bool
) -> dict[str, Tensor]:
    result = matched("anchor", anchor, parameters, FLOATS, move=from_file)
    for name, parameter in parameters.items():
        own, value = local(parameter), result[name]
        if value.dtype not in (own.dtype, accumulator(own.dtype)):
            value = value.to(accumulator(own.dtype))
        elif value.data_ptr() == own.data_ptr() or (from_file and not value.is_cuda):
            value = value.clone()  # the parameter will move, and the file may be written anew
        result[name] = value
    return result
