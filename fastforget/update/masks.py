"""Masks of parameters: which entries may move. Chosen by a Fisher, saved bit-packed, and kept by any optimizer."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from fastforget._parameters import check_fisher_values, local, matched, named
from fastforget.fisher.files import check_path, read_tensors, write_tensors
from fastforget.fisher.names import NamedTensors, as_fisher, canonical_name
from fastforget.ops import topk_threshold
from fastforget.ops._tensor_lists import FLOATS, dense, pack_bits, unpack_bits

__all__ = ["MaskedUpdates", "as_mask", "load_mask", "mask_updates", "save_mask", "trainable_mask"]

KIND = "parameter mask"
OWN_KEYS = ("shapes", "entries", "free")  # of a file's metadata


def trainable_mask(
    fisher: Any, *, top: float | None = None, bottom: float | None = None, scope: str = "global", impl: str = "auto"
) -> dict[str, Tensor]:
    """Choose the entries that may move: those with the largest Fisher, or those with the smallest.

    `top=0.005` trains what matters most for the Fisher's data, as the FISH mask does; `bottom=0.99` protects the 1% that
    matter most, so that what the Fisher was measured on is kept. Exactly `max(1, round(fraction * N))` of N entries are
    chosen; of equal ones the first tensors', and in a tensor the first in row-major order.

    Args:
        fisher: An estimator, a `{name: tensor}`, or a saved file's path.
        top: Fraction with the largest Fisher that may move, in (0, 1].
        bottom: Fraction with the smallest Fisher that may move, instead.
        scope: "global" ranks the entries of all tensors together, "tensor" those of each by themselves.
        impl: "auto", "triton" or "torch".

    Returns:
        Boolean tensors by canonical parameter name, True = may move.

    Raises:
        TypeError: The Fisher is none, or a dtype is not floating-point.
        ValueError: A fraction is out of range, not just one of the two is given, the Fisher is empty or sharded, or a value is
            negative or not finite.

    References:
        Sung, Nair and Raffel, "Training Neural Networks with Fixed Sparse Masks", arXiv 2111.09839 (FISH mask).
    """
    if (top is None) == (bottom is None):
        raise ValueError(f"top: expected one of top= and bottom=, got top={top} and bottom={bottom}")
    name, fraction = ("top", top) if bottom is None else ("bottom", bottom)
    if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
        raise ValueError(f"{name}: expected a fraction in (0, 1], got {fraction}")
    if scope not in ("global", "tensor"):
        raise ValueError(f"scope: expected 'global' or 'tensor', got {scope!r}")
    found = _whole_fisher(fisher)
    groups = [list(found)] if scope == "global" else [[name] for name in found]
    mask: dict[str, Tensor] = {}
    for names in groups:
        tensors = [found[name] for name in names]
        if not any(tensor.numel() for tensor in tensors):
            mask[names[0]] = torch.empty_like(tensors[0], dtype=torch.bool)
            continue
        chosen = topk_threshold(tensors, fraction, largest=bottom is None, impl=impl)
        mask |= {name: chosen.mask(tensor, i) for i, (name, tensor) in enumerate(zip(names, tensors, strict=True))}
    return mask


def _whole_fisher(fisher: Any) -> dict[str, Tensor]:
    found = as_fisher(fisher)
    for name, value in found.items():
        if local(value) is not value:
            raise ValueError(
                f"fisher[{name!r}]: expected a whole tensor, got a sharded one; save the Fisher and pass the file's path"
            )
        if value.dtype not in FLOATS:
            raise TypeError(
                f"fisher[{name!r}]: expected float32, bfloat16, float16 or float64, got {value.dtype}; cast it with .to()"
            )
    if not any(value.numel() for value in found.values()):
        raise ValueError("fisher: expected at least one entry, got none")
    check_fisher_values(found)
    return {name: dense(value.detach()) for name, value in found.items()}


def as_mask(mask: Any) -> dict[str, Tensor]:
    """A mask from whatever stands for one.

    Args:
        mask: A `{name: bool tensor}` or the path of a saved one.

    Returns:
        Boolean tensors by canonical name.

    Raises:
        TypeError: It is neither, or a tensor is not boolean.
        ValueError: Two names are the same parameter's, or a file cannot be read.
    """
    if isinstance(mask, str | os.PathLike):
        return load_mask(mask)
    if not isinstance(mask, Mapping):
        raise TypeError(
            f"mask: expected a mapping from names to bool tensors or a file's path, got {type(mask).__name__}"
        )
    result: dict[str, Tensor] = {}
    for name, value in mask.items():
        if not isinstance(value, Tensor) or value.dtype != torch.bool:
            got = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"mask[{name!r}]: expected a bool tensor, True where the entry may move, got {got}")
        if canonical_name(name) in result:
            raise ValueError(f"mask: expected one tensor a parameter, got a second for {canonical_name(name)!r}")
        result[canonical_name(name)] = value
    return result


def save_mask(
    mask: Mapping[str, Tensor], path: str | os.PathLike[str], metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a mask as safetensors, eight entries a byte; whole or not at all.

    Args:
        mask: Boolean tensors by parameter name.
        path: The file, `.safetensors`.
        metadata: What JSON can hold, such as how the mask was chosen.

    Raises:
        TypeError: Something else than a boolean tensor is in the mask.
        ValueError: The path cannot be written to, or the metadata have a key of the file's own.
    """
    path, checked = check_path(path), as_mask(mask)
    taken = [key for key in OWN_KEYS if key in (metadata or {})]
    if taken:
        raise ValueError(f"metadata: expected other keys than {', '.join(OWN_KEYS)}, got {taken[0]!r}; rename it")
    shapes = {name: list(value.shape) for name, value in checked.items()}
    free = sum(int(value.sum()) for value in checked.values())
    own = {"shapes": shapes, "entries": sum(value.numel() for value in checked.values()), "free": free}
    packed = {name: pack_bits(value.contiguous()) for name, value in checked.items()}
    write_tensors(path, packed, {**(metadata or {}), **own}, kind=KIND)


def load_mask(path: str | os.PathLike[str]) -> NamedTensors:
    """Read a mask that `save_mask` wrote.

    Args:
        path: The file.

    Returns:
        Boolean tensors by canonical name, on the CPU, with `.metadata`.

    Raises:
        ValueError: It is no such file, or is damaged.
    """
    packed, metadata = read_tensors(path, kind=KIND)
    shapes = metadata.get("shapes", {})
    odd = [name for name in {**packed, **shapes} if not _packs(packed.get(name), shapes.get(name))]
    if odd:
        raise ValueError(
            f"path: expected eight entries of {odd[0]!r} a byte, got others in {path}; make the mask again"
        )
    mask = {name: unpack_bits(bits, math.prod(shapes[name])).view(shapes[name]) for name, bits in packed.items()}
    return NamedTensors(mask, {key: value for key, value in metadata.items() if key not in OWN_KEYS})


def _packs(bits: Tensor | None, shape: list[int] | None) -> bool:
    """Whether a file's tensor is a mask of a shape."""
    if bits is None or shape is None or bits.dtype != torch.uint8:
        return False
    return bits.shape == (-(-math.prod(shape) // 8),)


def mask_updates(optimizer: Optimizer, mask: Any, model: nn.Module) -> MaskedUpdates:
    """Keep an optimizer from moving masked entries: whatever its step does, weight decay included, they stay bit for bit.

    A masked gradient would not do: momentum and weight decay still move the entry. The optimizer's state is its own. Every
    step keeps a copy of the tensors that have a masked entry; `ff.optim`'s optimizers take `mask=` and need none.

    Args:
        optimizer: Any of torch's kind, `accelerate`'s wrapper included.
        mask: `{name: bool tensor}` or a saved mask's path, True = may move; for every parameter of the optimizer that
            requires a gradient.
        model: Whose parameters the optimizer has.

    Returns:
        A handle; its `remove()` ends it, also as a context manager.

    Raises:
        TypeError: A mask is not boolean.
        ValueError: Names, shapes or devices do not fit, the optimizer has parameters that the model has not, or it is LBFGS;
            in a step, its parameters are others by then.
    """
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's
        optimizer = optimizer.optimizer  # type: ignore[attr-defined]
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError(
            "optimizer: expected one that moves the parameters once a step, got LBFGS, whose line search would see the masked "
            "entries move; use another optimizer"
        )
    parameters = named(model)
    by_id = {id(parameter): name for name, parameter in parameters.items()}
    held = _trained(optimizer)
    alien = [tuple(parameter.shape) for parameter in held if id(parameter) not in by_id]
    if alien:
        raise ValueError(
            f"optimizer: expected parameters of the model, got {len(alien)} others, the first of shape {alien[0]}; build the "
            "optimizer from this model"
        )
    masks = as_mask(mask)
    unknown = [name for name in masks if name not in parameters]
    if unknown:
        raise ValueError(f"mask: expected names of the model's parameters, got {unknown[0]!r}; check the names")
    mine = {by_id[id(parameter)]: parameter for parameter in held}
    fitted = matched("mask", masks, mine, (torch.bool,), move=isinstance(mask, str | os.PathLike))
    return MaskedUpdates(optimizer, [(mine[name], value) for name, value in fitted.items() if not bool(value.all())])


class MaskedUpdates:
    """Masked entries are put back after every step, until `remove()`.

    Args:
        optimizer: Its steps.
        masks: Parameters with a masked entry, and their masks.
    """

    def __init__(self, optimizer: Optimizer, masks: Sequence[tuple[Tensor, Tensor]]) -> None:
        self._masks = list(masks)
        self._before: list[Tensor] = []
        self._known = {id(parameter) for parameter in _trained(optimizer)}
        self._hooks = [optimizer.register_step_pre_hook(self._keep), optimizer.register_step_post_hook(self._put_back)]

    @torch.no_grad()
    def _keep(self, optimizer: Optimizer, *_: Any) -> None:
        self._put_back()  # what a step that raised has left
        if {id(parameter) for parameter in _trained(optimizer)} != self._known:
            raise ValueError(
                "optimizer: expected the parameters that it had when mask_updates was called, got others; call remove() and "
                "mask_updates again"
            )
        self._masks = [(parameter, mask.to(local(parameter).device)) for parameter, mask in self._masks]
        self._before = [local(parameter).detach().clone() for parameter, _ in self._masks]

    @torch.no_grad()
    def _put_back(self, *_: Any) -> None:
        for (parameter, mask), before in zip(self._masks if self._before else (), self._before, strict=True):
            shard = local(parameter).detach()
            torch.where(mask.to(shard.device), shard, before.to(shard), out=shard)
        self._before = []

    def remove(self) -> None:
        """The optimizer moves everything again, from its next step on."""
        self._put_back()  # what a step that raised has left
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> MaskedUpdates:
        """The same."""
        return self

    def __exit__(self, *_: Any) -> None:
        """Removed."""
        self.remove()


def _trained(optimizer: Optimizer) -> list[Tensor]:
    """The parameters that an optimizer may move."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
