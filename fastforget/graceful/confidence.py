r"""`forgetting_confidence`: how much learning an example would pull a model away from what it is to learn.

One gradient step on example b, from the model theta, measured by a Laplace approximation of the learning task around its
optimum theta_L with the diagonal precision F:

    FC_b = 1/2 sum_i F_i (theta_i - alpha g_bi - theta_L,i)^2
         = 1/2 sum_i F_i delta_i^2 - alpha <F delta, g_b> + alpha^2 / 2 <F, g_b^2>,    delta = theta - theta_L

The first term is the same for all examples. The brackets are the products that the per-example gradient kernel ends in, so
that a batch takes one backward, and no example's gradient is ever in memory.

Our reading of Jiang et al., "Graceful Forgetting in Generative Language Models", arXiv 2505.19715, from what reviews say.
"""

from __future__ import annotations

import contextlib
import math
import os
import weakref
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastforget._head import eval_mode
from fastforget._parameters import matched, matched_fisher
from fastforget.fisher.examples import Examples
from fastforget.fisher.gradients import How
from fastforget.fisher.names import as_fisher, canonical_name
from fastforget.fisher.passes import Convention, NonFiniteError, backward_under, choose_rules_on, transform_of
from fastforget.fisher.reductions import Products
from fastforget.fisher.tape import Owner, Tape
from fastforget.fisher.watched import Watched, uncompiled
from fastforget.ops._tensor_lists import FLOATS
from fastforget.perplexity import check_batch, pack_rows
from fastforget.update.penalty import anchor_tensors, check_anchor

__all__ = ["forgetting_confidence"]

FIELDS = ("input_ids", "attention_mask", "labels", "position_ids")


def forgetting_confidence(
    model: nn.Module,
    batch: Mapping[str, Any] | Tensor,
    *,
    fisher: Any,
    anchor: Any,
    alpha: float,
    constant: bool = False,
    impl: str = "auto",
) -> Tensor:
    r"""How much a gradient step on each example would pull the model away from the learning task; high: forget it.

    `-alpha <F delta, g_b> + alpha^2 / 2 <F, g_b^2>` with `delta = theta - anchor` and g_b the gradient of example b's mean
    loss over its targets, for a whole batch in one forward and backward, in eval mode. No `.grad` is written.

    Args:
        model: A causal language model at theta, the base. Exact for every model and parameter that `DiagonalFisher` is.
        batch: `input_ids` `[B, T]`, or a mapping with it and perhaps `attention_mask`, `labels` (unshifted, -100 for no
            target) and `position_ids`, as `log_perplexity` takes them.
        fisher: F of the learning task at the anchor: an estimator, a `{name: tensor}`, or a saved file's path, which is read in
            every call: load it once. Parameters that it has not do not count.
        anchor: theta_L, what fine-tuning on the learning task gave: `{name: tensor}`, a model, or the path of a saved one.
        alpha: Size of the gradient step; the learning rate of the fine-tuning.
        constant: Add the term that all examples have in common. At small alpha it is larger than the rest by far.
        impl: Implementation of the fused operations: "auto", "triton" or "torch".

    Returns:
        `[B]` float64, on the model's device.

    Raises:
        TypeError: The Fisher, the anchor or the batch is none.
        NonFiniteError: The loss or the result of some examples is not finite; they are named.
        ValueError: alpha is not above 0, an example has no target, names or shapes do not fit, or the model is sharded.

    References:
        Jiang et al., "Graceful Forgetting in Generative Language Models", arXiv 2505.19715.
    """
    if not (isinstance(alpha, int | float) and not isinstance(alpha, bool) and 0 < alpha < math.inf):
        raise ValueError(f"alpha: expected a number > 0, got {alpha!r}; the learning rate of the fine-tuning is usual")
    fields = _fields(batch)
    given = as_fisher(fisher)
    watched = Watched(model, lambda name: name in given)
    products = _Products(watched, given, anchor, move_fisher=not isinstance(fisher, Mapping))
    check_batch(watched.model, **fields)
    rows = pack_rows(**fields)
    counts = (rows.target != -100).sum(1)
    if not bool((counts > 0).all()):
        empty = (counts == 0).nonzero()[:, 0].tolist()
        raise ValueError(
            f"labels: expected at least one target an example, got none for example{'s' * (len(empty) > 1)} "
            f"{', '.join(map(str, empty[:8]))}; leave out prompts without a response"
        )
    with watched.active(), torch.enable_grad(), eval_mode(watched.inner), uncompiled(watched.model):
        transform = transform_of(watched, rows.input_ids, impl)
        uses = _rules(watched, products, impl)
        count = len(rows.input_ids)
        products.begin(count, rows.input_ids.device)
        ones = torch.ones(count, dtype=products.dtype, device=rows.input_ids.device)
        examples = Examples.of_rows(rows, ones, list(range(count)))
        tape = Tape(watched.owners, products, watched.selected, uses, True, How(False, impl))
        backward_under(watched, tape, rows, examples, transform, Convention("mean", None, impl))
    result = products.dot * -alpha + products.norm * (alpha * alpha / 2)
    bad = (~result.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise NonFiniteError(f"gradient: expected finite gradients, got NaN or infinity for examples {bad[:8]}", bad)
    return result + products.constant() if constant else result


def _fields(batch: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        got = f"a mapping with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
        raise TypeError(f"batch: expected input_ids [B, T] or a mapping with them, got {got}")
    return {name: batch.get(name) for name in FIELDS}


class _Products:
    """One reduction a parameter: all add to the same two numbers an example."""

    def __init__(self, watched: Watched, fisher: Any, anchor: Any, *, move_fisher: bool) -> None:
        unknown = [name for name in fisher if name not in watched.parameters and name not in watched.aliases]
        if unknown:
            raise ValueError(
                f"fisher: expected names of the model's trainable parameters, got {unknown[0]!r}; is it another model's?"
            )
        self.parameters: dict[str, Tensor] = {name: p.detach() for name, p in watched.wanted.items()}
        for name, parameter in self.parameters.items():
            if isinstance(parameter, DTensor):
                raise ValueError(f"model: {name} is sharded, expected whole parameters; score on one device")
        self.tensors = matched_fisher(fisher, self.parameters, move=move_fisher)
        values = {canonical_name(name): value for name, value in anchor_tensors(anchor).items()}
        move = isinstance(anchor, str | os.PathLike)
        self.anchors = matched("anchor", values, self.parameters, FLOATS, move=move)
        for name, parameter in self.parameters.items():
            check_anchor(name, values[name], parameter)

    @property
    def dtype(self) -> torch.dtype:
        """Of the Fisher."""
        return next(iter(self.tensors.values())).dtype

    def begin(self, count: int, device: torch.device) -> None:
        """Of a batch of so many examples."""
        self.dot, self.norm = (torch.zeros(count, dtype=torch.float64, device=device) for _ in range(2))

    @contextlib.contextmanager
    def reduction(self, name: str) -> Iterator[Products]:
        """See `Reductions`."""
        yield Products(self.tensors[name], self.parameters[name], self.anchors[name], self.dot, self.norm)

    def constant(self) -> Tensor:
        """`1/2 sum F delta^2`, float64."""
        terms = [
            (self.parameters[name].double() - self.anchors[name].double()).square_().mul_(self.tensors[name]).sum()
            for name in self.parameters
        ]
        return torch.stack(terms).sum() / 2


class _Rules(NamedTuple):
    """What was chosen for a model, without a reference to it."""

    owners: list[tuple[str, str, dict[tuple[str, str], str], list[str]]]
    uses: dict[str, int]


_chosen: weakref.WeakKeyDictionary[nn.Module, dict[Any, _Rules]] = weakref.WeakKeyDictionary()


def _rules(watched: Watched, products: _Products, impl: str) -> dict[str, int]:
    """Choose the rules of a model's modules at first, and take them again later."""
    known = _chosen.setdefault(watched.base, {})
    adapters = getattr(watched.inner, "active_adapters", ())
    adapters = () if callable(adapters) else tuple(adapters)  # PEFT's; a method of models without adapters
    key = (watched.selected, adapters, tuple(str(p.dtype) for p in watched.parameters.values()))
    modules = dict(watched.inner.named_modules())
    if key not in known:
        uses = choose_rules_on(watched, products, impl)  # type: ignore[arg-type]
        owners = [(o.path, o.tier, o.parameters, list(o.holders)) for o in watched.owners]
        known[key] = _Rules(owners, uses)
    else:
        watched.owners[:] = [
            Owner(path, modules[path], parameters, {holder: modules[holder] for holder in holders}, tier)
            for path, tier, parameters, holders in known[key].owners
        ]
    return known[key].uses
