"""Rules of modules: the forward of a module that owns parameters, tapped as its tier says.

Most modules need no rule of their own: `uses.py` covers the torch functions that their forwards call. A module's rule, one
function, covers what no torch function shows; register one for an own module with `fisher_rule`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers.cache_utils import Cache

from fastforget.fisher.examples import Examples
from fastforget.fisher.experts import experts_rule, is_experts
from fastforget.fisher.gradients import PerExample, Piece
from fastforget.fisher.recompute import broadcast, by_example
from fastforget.fisher.tape import Owner, Tape, tap
from fastforget.fisher.uses import Uses

__all__ = ["fisher_rule", "forward_by_tier", "module_rule"]

ModuleRule = Callable[[Any, Examples, Mapping[str, Any], tuple[Tensor | None, ...]], Mapping[str, Piece | Tensor]]
MODULES: dict[Any, ModuleRule] = {}
"""By the function that is the class's forward, so that a subclass with another forward is not covered."""


def fisher_rule(module_class: type[nn.Module]) -> Callable[[ModuleRule], ModuleRule]:
    """Register a rule for a module class: `@fisher_rule(MyModule)`.

    The rule is called in the backward as `rule(module, examples, inputs, grad_outputs)` with the module's inputs by
    argument name and the gradients of its outputs in order. It returns, for each of the module's own parameters by
    attribute name, the gradients of every example as one tensor `[B, *parameter]`, or a piece such as
    `Outer(examples.tokens(x), examples.tokens(grad))`. It is checked against autograd when it is first used.

    Args:
        module_class: Whose forward it covers; not that of subclasses which override it.

    Returns:
        The decorator, which returns the rule unchanged.
    """

    def register(rule: ModuleRule) -> ModuleRule:
        MODULES[module_class.forward] = rule
        return rule

    return register


def forward_by_tier(
    tape: Tape, owner: Owner, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Run a module's own forward and tap it as its tier says.

    Args:
        tape: That is running.
        owner: The module.
        original: Its forward.
        args: Of the call.
        kwargs: Of the call.

    Returns:
        What the forward returns.

    Raises:
        NoRule: The tier does not cover the module.
        ValueError: The module draws random numbers, which no second computation repeats.
    """
    if owner.tier == "uses":
        with Uses(tape, owner):
            return original(*args, **kwargs)
    rule = module_rule(owner) if owner.tier == "module" else None
    before = torch.get_rng_state(), _device_state(args, kwargs)
    with tape.without_gradients(owner):
        outputs = original(*args, **kwargs)
    after = torch.get_rng_state(), _device_state(args, kwargs)
    if not all(torch.equal(first, second) for first, second in zip(before, after, strict=True)):
        raise ValueError(
            f"model: {owner.path} ({type(owner.module).__name__}) draws random numbers in its forward, which cannot be "
            "repeated example by example; turn its dropout off, or use update()"
        )
    return _tapped(tape, owner, original, (args, kwargs), outputs, rule)


def _tapped(
    tape: Tape,
    owner: Owner,
    original: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    outputs: Any,
    rule: ModuleRule | None,
) -> Any:
    """The outputs, tapped: the backward hands the saved inputs to the rule, or to the tier's generic one."""
    flat, structure = pytree.tree_flatten(outputs)
    places = [i for i, t in enumerate(flat) if isinstance(t, Tensor) and t.is_floating_point()]
    leaves, arguments = pytree.tree_flatten(inputs)
    saved = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    held = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    # Tensors are held by the autograd graph; a cache is empty where a forward begins.
    rest = [None if isinstance(leaf, Tensor | Cache) else leaf for leaf in leaves]
    kind = flat[places[0]].device.type if places else "cpu"
    autocast = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> Mapping[str, Piece]:
        again = list(rest)
        for place, tensor in zip(held, saved, strict=True):
            again[place] = tensor
        call = pytree.tree_unflatten(again, arguments)
        with tape.pause(), torch.autocast(kind, dtype=autocast[0], enabled=autocast[1]):
            if rule is not None:
                named = inspect.signature(original).bind(*call[0], **call[1]).arguments
                return _by_name(owner, rule(owner.module, examples, named, grads))
            if owner.tier == "broadcast":
                return broadcast(owner, examples, original, call, places, grads, tape.how.positions)
            return by_example(owner, examples, original, call, places, grads)

    for place, tensor in zip(places, tap(tape, [flat[i] for i in places], saved, pieces, owner), strict=True):
        flat[place] = tensor
    return pytree.tree_unflatten(flat, structure)


def _device_state(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """State of the random numbers of the inputs' GPU."""
    device = next((t.device for t in (*args, *kwargs.values()) if isinstance(t, Tensor)), torch.device("cpu"))
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.empty(0)


def module_rule(owner: Owner) -> ModuleRule | None:
    """The rule that an owner's class has, by itself or as transformers' experts.

    Args:
        owner: The module.

    Returns:
        The rule or None.
    """
    if any(path != owner.path for path, _ in owner.parameters):
        return None
    rule = MODULES.get(getattr(type(owner.module), "forward", None))
    return experts_rule if rule is None and is_experts(owner.module) else rule


def _by_name(owner: Owner, results: Mapping[str, Piece | Tensor]) -> dict[str, Piece]:
    pieces = {}
    for (_, attribute), name in owner.parameters.items():
        if attribute not in results:
            raise ValueError(
                f"model: the rule of {type(owner.module).__name__} gave no gradient for its parameter {attribute!r}"
            )
        result = results[attribute]
        pieces[name] = PerExample(result) if isinstance(result, Tensor) else result
    return pieces
