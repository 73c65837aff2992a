"""What is watched of a model: its trainable parameters, the modules that own them, and its head."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from fastforget._head import find_head, swapped_forward, unwrapped
from fastforget.fisher.names import canonical_name, matching_names
from fastforget.fisher.tape import Owner

__all__ = ["Watched", "checkpointed", "checkpoints_replaced", "local", "uncompiled"]

Filter = str | Sequence[str] | Callable[[str], bool] | None


logger = logging.getLogger("fastforget")
_ACTIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models whose forwards are swapped now."""


class Watched:
    """A model's trainable parameters under their canonical names.

    Args:
        model: A causal language model, wrapped or not.
        wanted: Patterns, a function of the name, or None for all.

    Raises:
        ValueError: No parameter is left, the model is no causal language model, or its parameters are on several devices,
            or are sharded by other means than FSDP2 over all processes.
    """

    def __init__(self, model: nn.Module, wanted: Filter) -> None:
        self.model = model
        self.inner: Any = unwrapped(model)
        self.base: Any = self.inner.get_base_model() if hasattr(self.inner, "get_base_model") else self.inner
        self.head = find_head(model)
        _refuse_places(self.inner, self.base)
        self.owners: list[Owner] = []
        self.loss_checked = False  # that the model's own loss is the one that `observe` undoes
        self.processes: dist.ProcessGroup | None = None  # of a wrapper that only the caller sees
        self.names: dict[tuple[nn.Module, str], str] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for path, module in self.inner.named_modules():
            own: dict[tuple[str, str], str] = {}
            for attribute, parameter in module._parameters.items():
                if parameter is None or not parameter.requires_grad:
                    continue
                whole = f"{path}.{attribute}" if path else attribute
                alias = canonical_name(whole)
                if alias in self.parameters and self.parameters[alias] is not parameter:
                    alias = whole  # two wrappers' parameters, which nothing but the wrappers' own names tells apart
                name = first.setdefault(id(parameter), alias)
                if name != alias:
                    self.aliases[alias] = name
                self.parameters[name] = parameter
                own[path, attribute] = self.names[module, attribute] = name
            if own:
                self.owners.append(Owner(path, module, own, {path: module}))
        self._leave_to_children()
        self._taken = {id(p): p.dtype for p in self.inner.parameters() if p.requires_grad}
        also = {name: [alias for alias, of in self.aliases.items() if of == name] for name in self.parameters}
        self.selected = _chosen(also, wanted)
        self.filter = (
            wanted if wanted is None or isinstance(wanted, str) else "a function" if callable(wanted) else list(wanted)
        )
        frozen = sum(not parameter.is_floating_point() for parameter in self.inner.parameters())
        if frozen:
            logger.warning("DiagonalFisher: %d quantised parameters are frozen, and have no Fisher", frozen)
        self.aliases = {alias: name for alias, name in self.aliases.items() if name in self.selected}

    def _leave_to_children(self) -> None:
        """A parameter that a module shares with one inside it, as BERT's head its bias, is the inner one's."""
        for owner in self.owners:
            inside = [o for o in self.owners if o.path.startswith(f"{owner.path}.") or (not owner.path and o.path)]
            shared = {name for other in inside for name in other.parameters.values()}
            owner.parameters = {place: name for place, name in owner.parameters.items() if name not in shared}
        self.owners = [owner for owner in self.owners if owner.parameters]

    @property
    def wanted(self) -> dict[str, nn.Parameter]:
        """The parameters whose Fisher is estimated, by name."""
        return {name: parameter for name, parameter in self.parameters.items() if name in self.selected}

    @contextlib.contextmanager
    def no_grad_written(self) -> Iterator[None]:
        """The caller's `.grad` put aside, and restored."""
        saved = {name: parameter.grad for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.grad = None
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.grad = saved[name]

    def gradients_of(self, loss: Tensor) -> dict[str, Tensor]:
        """Gradients of the wanted parameters; `.grad` is not touched, and hooks of accumulated gradients do not run.

        Args:
            loss: A scalar.

        Returns:
            By name, of those that the loss depends on; this rank's part under FSDP2.
        """
        if self.sharded:  # only an accumulated gradient is reduced and scattered
            with self.no_grad_written():
                loss.backward()
                return self.gradients()
        found = torch.autograd.grad(loss, list(self.wanted.values()), allow_unused=True)
        return {name: grad for name, grad in zip(self.wanted, found, strict=True) if grad is not None}

    def gradients(self) -> dict[str, Tensor]:
        """`.grad` of the wanted parameters that have one; this rank's part under FSDP2."""
        return {n: local(p.grad) for n, p in self.wanted.items() if p.grad is not None}

    def group(self) -> dist.ProcessGroup | None:
        """The processes whose sums are added to this one's: DDP's, or all under FSDP2; None for a single process."""
        if isinstance(self.model, nn.parallel.DistributedDataParallel):
            return self.model.process_group
        if self.processes is not None:
            return self.processes
        for parameter in self.parameters.values():
            if isinstance(parameter, DTensor):
                return dist.group.WORLD
        return None

    def refuse_changes(self) -> None:
        """Refuse a model whose trainable parameters are others than when it was taken.

        Raises:
            ValueError: They are.
        """
        now = {id(p): p.dtype for p in self.inner.parameters() if p.requires_grad}
        if now != self._taken:
            raise ValueError(
                "model: other parameters require a gradient, or have another dtype, than when the estimator was made; make "
                "a new DiagonalFisher, and leave parameters out by parameters="
            )

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """The model is watched inside, by this alone.

        Yields:
            Nothing.

        Raises:
            ValueError: Something else watches it, it has changed, or no gradients can be had.
        """
        self.refuse_changes()
        if torch.is_inference_mode_enabled():
            raise ValueError(
                "fisher: gradients are needed, got torch.inference_mode(); leave it, or use torch.no_grad()"
            )
        if self.base in _ACTIVE:
            raise ValueError(
                "fisher: an estimator is active on this model already; leave its `with observe()` block before you call "
                "update() or observe() again"
            )
        _ACTIVE.add(self.base)
        try:
            yield
        finally:
            _ACTIVE.discard(self.base)

    @property
    def sharded(self) -> bool:
        """Whether parameters are DTensors."""
        return any(isinstance(parameter, DTensor) for parameter in self.parameters.values())


def _refuse_places(model: nn.Module, base: nn.Module) -> None:
    """Refuse parameters on several devices, and shards that are not those of data parallelism over all processes."""
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if len(devices) > 1 or "meta" in devices:
        raise ValueError(
            f"model: expected all parameters on one device, got {', '.join(devices)}; load it on one device, without "
            "device_map and offloading, or shard it with FSDP2"
        )
    parallel = getattr(base, "_tp_size", None) or 1
    if parallel > 1:
        raise ValueError(f"model: expected no tensor parallelism, got tp_size={parallel}; shard it with FSDP2")
    sharded = {name: p for name, p in model.named_parameters() if isinstance(p, DTensor)}
    by_fsdp = any(isinstance(module, FSDPModule) for module in model.modules())
    for name, parameter in sharded.items():
        mesh, placements = parameter.device_mesh, parameter.placements
        # FSDP2 shards over the mesh's last dimension, and copies over another one before it.
        data = placements[-1].is_shard() and all(placement.is_replicate() for placement in placements[:-1])
        if (
            not (by_fsdp and data and mesh.size() == dist.get_world_size())
            or mesh != next(iter(sharded.values())).device_mesh
        ):
            raise ValueError(
                f"model: expected parameters sharded by FSDP2 over one mesh of all {dist.get_world_size()} processes, got "
                f"{name} as {placements} over {tuple(mesh.shape)} processes; leave tensor parallelism out, and shard over all"
            )


def _chosen(names: dict[str, list[str]], wanted: Filter) -> frozenset[str]:
    """Names that are wanted, by their own or an alias."""
    if wanted is None:
        chosen = frozenset(names)
    elif callable(wanted):
        chosen = frozenset(name for name, also in names.items() if any(map(wanted, (name, *also))))
    else:
        patterns = [wanted] if isinstance(wanted, str) else wanted
        chosen = frozenset(matching_names(names, patterns))
    if not chosen:
        what = f"{wanted!r} matches none of {len(names)} names" if names else "all have requires_grad=False"
        raise ValueError(f"parameters: expected at least one trainable parameter, got none: {what}")
    return chosen


def local(tensor: Any) -> Tensor:
    """This rank's part of a DTensor; other tensors as they are.

    Args:
        tensor: Either.

    Returns:
        An ordinary tensor.
    """
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """`torch.compile` steps aside inside: a compiled graph does not see swapped forwards."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if hasattr(module, "_orig_mod"):
                stack.enter_context(swapped_forward(module, partial(nn.Module.__call__, module._orig_mod)))
            if getattr(module, "_compiled_call_impl", None) is not None:
                compiled, module._compiled_call_impl = module._compiled_call_impl, None
                stack.callback(setattr, module, "_compiled_call_impl", compiled)
        yield


@contextlib.contextmanager
def checkpointed(model: nn.Module) -> Iterator[None]:
    """Gradient checkpointing, where it is switched on, also in eval mode, in which transformers leaves it out."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing:
                stack.enter_context(swapped_forward(module, _checkpointing(module.forward)))
        yield


@contextlib.contextmanager
def checkpoints_replaced(model: nn.Module, by: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Another function inside for each that transformers checkpoints with.

    Args:
        model: Its modules are changed inside.
        by: Gives the other one.

    Yields:
        Nothing.
    """
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            function = vars(module).get("_gradient_checkpointing_func")
            if function is not None and getattr(module, "gradient_checkpointing", False):
                module._gradient_checkpointing_func = by(function)  # type: ignore[assignment]
                stack.callback(setattr, module, "_gradient_checkpointing_func", function)
        yield


def _checkpointing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
