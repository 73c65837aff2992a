"""The rule of 3-D expert weights: transformers' experts modules, whichever implementation computes their forward.

Tokens arrive flattened, `[R * T, H]`, with the experts that each was routed to; an expert's tokens of one example are one
segment. The modules say by attributes whether they have gates and biases, and whether weights are transposed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastforget.fisher.examples import Examples, LayoutError
from fastforget.fisher.gradients import Experts, PerExample, Piece, segment_sums
from fastforget.ops._examples import remember_bounds

__all__ = ["experts_rule", "is_experts"]


def is_experts(module: nn.Module) -> bool:
    """Whether a module follows transformers' experts interface, without a norm after each expert.

    Args:
        module: Any.

    Returns:
        Whether `experts_rule` covers it.
    """
    asked = ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj")
    return all(hasattr(module, name) for name in asked) and not getattr(module, "has_post_expert_norm", False)


def experts_rule(
    module: Any, examples: Examples, inputs: Mapping[str, Any], grad_outputs: tuple[Tensor | None, ...]
) -> Mapping[str, Piece | Tensor]:
    """Computes an expert's activations again for its tokens, and keeps them with their gradients.

    Args:
        module: The experts.
        examples: Of the batch.
        inputs: Hidden states `[S, H]`, chosen experts `[S, k]` and their weights `[S, k]`, in this order.
        grad_outputs: Of the output `[S, H]`.

    Returns:
        A piece for every parameter by attribute.

    Raises:
        LayoutError: The tokens are not those of the batch.
    """
    hidden, chosen, routing = list(inputs.values())[:3]
    grad = grad_outputs[0]
    owner = examples.owner.flatten()
    if grad is None or hidden.ndim != 2 or len(hidden) != len(owner) or chosen.shape != routing.shape:
        raise LayoutError(f"experts' input of shape {tuple(hidden.shape)}")
    up_name = "gate_up_proj" if module.has_gate else "up_proj"
    weights = {name: getattr(module, name).detach() for name in (up_name, "down_proj")}
    pieces = {name: Experts(transposed=module.is_transposed) for name in weights}
    biases: dict[str, Tensor] = {}
    if module.has_bias:
        for name in weights:
            bias = getattr(module, f"{name}_bias").detach()
            biases[name] = bias.new_zeros(examples.count, *bias.shape, dtype=examples.weights.dtype)
    for expert, token, place, offsets in _routes(chosen, owner, examples.count, len(weights["down_proj"])):
        x, d = hidden[token], grad[token] * routing[token, place, None].to(grad.dtype)  # [K, H]
        before = _linear(module, up_name, expert, x).detach().requires_grad_()
        with torch.enable_grad():
            inner = module._apply_gate(before) if module.has_gate else module.act_fn(before)  # [K, I]
        down = weights["down_proj"][expert]
        d = d.to(inner.dtype)
        grad_inner = d @ (down.T if module.is_transposed else down).to(d.dtype)
        (grad_before,) = torch.autograd.grad(inner, before, grad_inner)
        for name, a, g in ((up_name, x, grad_before), ("down_proj", inner.detach(), d)):
            pieces[name].experts.append((expert, a.to(g.dtype), g, owner[token], offsets))
            if name in biases:
                biases[name][:, expert] = segment_sums(g.to(biases[name].dtype), offsets)
    return {**pieces, **{f"{name}_bias": PerExample(value) for name, value in biases.items()}}


def _linear(module: Any, name: str, expert: int, x: Tensor) -> Tensor:
    weight = getattr(module, name)[expert]
    result = x @ (weight if module.is_transposed else weight.T)
    return result + getattr(module, f"{name}_bias")[expert] if module.has_bias else result


def _routes(chosen: Tensor, owner: Tensor, count: int, experts: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Sort the choices by expert and example: one copy from the device, not one an expert.

    Yields:
        Expert, its tokens by example, which of their k choices it was, and offsets `[B + 1]`; experts without tokens do
        not occur.
    """
    expert, of = chosen.flatten(), owner.repeat_interleave(chosen.shape[1])
    here = (expert >= 0) & (expert < experts) & (of >= 0)  # others are padding, or another process's
    key = torch.where(here, expert * count + of, experts * count)
    order = torch.sort(key, stable=True).indices
    tokens = torch.zeros(experts * count + 1, dtype=torch.int64, device=key.device).scatter_add_(0, key, here.long())
    offsets = nn.functional.pad(tokens[:-1].view(experts, count).cumsum(1), (1, 0)).int()  # [E, B + 1]
    start = 0
    for e, bounds in enumerate(offsets.tolist()):
        if bounds[-1]:
            mine = order[start : start + bounds[-1]]
            start += bounds[-1]
            row = offsets[e].clone()
            remember_bounds(row, bounds)
            yield e, mine // chosen.shape[1], mine % chosen.shape[1], row
