"""The generic rules: a module is computed again from its saved inputs, so that its parameters may be used in any way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.utils import _pytree as pytree

from fastforget.fisher.examples import Examples, LayoutError
from fastforget.fisher.gradients import Elementwise, Looped, PerExample, Piece
from fastforget.fisher.tape import Owner

__all__ = ["broadcast", "by_example"]

_KEPT_BYTES = 2**28
"""Per-example gradients of a module that are computed together; larger ones are computed for one parameter at a time."""


def broadcast(
    owner: Owner,
    examples: Examples,
    original: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    tapped: list[int],
    grads: tuple[Tensor | None, ...],
    positions: bool,
) -> Mapping[str, Piece]:
    """One computation with a copy of every parameter for each example, or each position.

    Args:
        owner: The module, whose parameters broadcast against its input.
        examples: Of the batch.
        original: The module's forward.
        inputs: Its arguments and keyword arguments.
        tapped: Which of its flattened outputs have gradients.
        grads: These gradients.
        positions: One copy a position.

    Returns:
        A piece for every parameter's name.

    Raises:
        LayoutError: The copies do not broadcast, or the inputs are not laid out by rows or tokens.
    """
    leaves, arguments = pytree.tree_flatten(inputs)
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    main = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
    if main is None:
        raise LayoutError("no floating-point input")
    rows, width = examples.rows, examples.width
    flat = main.shape[0] == rows * width
    by_token = positions or not examples.one_a_row
    if (not flat and main.shape[0] != rows) or (by_token and not flat and main.shape[:2] != (rows, width)):
        raise LayoutError(f"input of shape {tuple(main.shape)}")
    lead = 1 if flat or not by_token else 2  # dimensions of the input that a copy of the parameter has, too
    copies = main.shape[:lead] if by_token or not flat else (rows,)
    with torch.enable_grad():
        parameters = {name: tensor.detach() for name, tensor in owner.tensors().items()}
        leaf_of = {n: p.expand(*copies, *p.shape).contiguous().requires_grad_() for n, p in parameters.items()}
        expanded = {}
        for name, leaf in leaf_of.items():
            whole = leaf if by_token or not flat else leaf.repeat_interleave(width, 0)
            ones = (1,) * (main.ndim - lead - parameters[name].ndim)
            expanded[name] = whole.view(*main.shape[:lead], *ones, *parameters[name].shape)
        outputs = _outputs(owner, original, leaves, arguments, tapped, expanded)
        found = _gradients(outputs, list(grads), list(leaf_of.values()))
    pieces: dict[str, Piece] = {}
    for name, gradient in zip(leaf_of, found, strict=True):
        shape = parameters[name].shape
        pieces[name] = Elementwise(gradient.view(rows, width, *shape), len(shape)) if by_token else PerExample(gradient)
    return pieces


def by_example(
    owner: Owner,
    examples: Examples,
    original: Callable[..., Any],
    inputs: tuple[tuple[Any, ...], dict[str, Any]],
    tapped: list[int],
    grads: tuple[Tensor | None, ...],
) -> Mapping[str, Piece]:
    """One computation an example: on its own row, or on all rows with the other examples' output gradients zero.

    Args:
        owner: The module; its tier is "slice" or "whole".
        examples: Of the batch.
        original: The module's forward.
        inputs: Its arguments and keyword arguments.
        tapped: Which of its flattened outputs have gradients.
        grads: These gradients.

    Returns:
        A piece for every parameter's name.
    """
    leaves, arguments = pytree.tree_flatten(inputs)
    leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    # With as many rows as tokens an input's dimension could be either: all rows then.
    by_row = owner.tier == "slice" and examples.one_a_row and examples.rows != examples.width
    parameters = {name: tensor.detach() for name, tensor in owner.tensors().items()}

    def gradients(b: int, wanted: list[str]) -> list[Tensor]:
        mine = [_row(examples, leaf, b) if isinstance(leaf, Tensor) else leaf for leaf in leaves] if by_row else leaves
        pick = _strict_row if by_row else _masked
        with torch.enable_grad():
            aliases = {n: p.detach().requires_grad_(n in wanted) for n, p in parameters.items()}
            outputs = _outputs(owner, original, mine, arguments, tapped, aliases)
            picked = [None if grad is None else pick(examples, grad, b) for grad in grads]
            return _gradients(outputs, picked, [aliases[name] for name in wanted])

    total = sum(parameter.numel() for parameter in parameters.values()) * examples.count
    if total * examples.weights.element_size() <= _KEPT_BYTES:
        every = [gradients(b, list(parameters)) for b in range(examples.count)]
        stacked = [torch.stack([g.to(examples.weights.dtype) for g in column]) for column in zip(*every, strict=True)]
        return {name: PerExample(gradient) for name, gradient in zip(parameters, stacked, strict=True)}
    return {name: Looped(lambda b, name=name: gradients(b, [name])[0]) for name in parameters}


def _outputs(
    owner: Owner,
    original: Callable[..., Any],
    leaves: list[Any],
    arguments: Any,
    tapped: list[int],
    parameters: dict[str, Tensor],
) -> list[Tensor]:
    if any(isinstance(part, FSDPModule) for part in owner.module.modules() if part is not owner.module):
        raise LayoutError("parts of it are sharded on their own, and cannot run again inside a backward")
    args, kwargs = pytree.tree_unflatten(leaves, arguments)
    with owner.replaced(parameters):
        flat = pytree.tree_leaves(original(*args, **kwargs))
    return [flat[i] for i in tapped]


def _gradients(outputs: list[Tensor], grads: list[Tensor | None], targets: list[Tensor]) -> list[Tensor]:
    """Gradients of the targets, zero for one that no output depends on."""
    used = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    if any(output.shape != grad.shape for output, grad in used):
        raise LayoutError("outputs have another shape than in the forward")
    if not used:
        return [torch.zeros_like(target) for target in targets]
    found = torch.autograd.grad([o for o, _ in used], targets, [g for _, g in used], allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(targets, found, strict=True)]


def _row(examples: Examples, tensor: Tensor, b: int) -> Tensor:
    """Row b of what has one, and all of what the batch shares."""
    if tensor.ndim and tensor.shape[0] == examples.rows:
        return tensor[b : b + 1]
    if tensor.ndim and tensor.shape[0] == examples.rows * examples.width:
        return tensor[b * examples.width : (b + 1) * examples.width]
    return tensor


def _strict_row(examples: Examples, grad: Tensor, b: int) -> Tensor:
    if not grad.ndim or grad.shape[0] not in (examples.rows, examples.rows * examples.width):
        raise LayoutError(f"output of shape {tuple(grad.shape)}")
    return _row(examples, grad, b)


def _masked(examples: Examples, grad: Tensor, b: int) -> Tensor:
    """The output gradient of example b, zero elsewhere."""
    tokens = examples.tokens(grad)
    mine = examples.owners(tokens.shape[1]) == b
    return torch.where(mine[..., None], tokens, 0).view(grad.shape)
