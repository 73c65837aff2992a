"""Choosing the rules: a few tokens through every tier, compared with autograd, before anything is measured.

Three rows of a few tokens, the last one shorter, go through the model once as it is, with a loss on the last row only, and
once under the tape with a loss on all rows and the weights (0, 0, 1). Where a parameter's accumulator then differs from its
squared gradient, or its rule raises, its module goes to the next tier, and from the last tier to its parent. So a rule that
mixes examples up, and a weight that is used outside its module, are found whatever the model's code looks like.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from fastforget.fisher.reductions import Squares
from fastforget.fisher.rules import MODULES
from fastforget.fisher.sums import Sums
from fastforget.fisher.tape import TIERS, Owner, Tape

__all__ = ["Comparison", "check_batch", "choose_rules"]

_ROWS, _TOKENS = 3, 7  # which no dimension of a model is likely to be


def check_batch(vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of tokens, the same in every process, and their mask.

    Args:
        vocabulary: Number of tokens.
        device: Of the results.

    Returns:
        `[3, 7]` int64 tokens and mask.
    """
    tokens = (torch.arange(1, _ROWS * _TOKENS + 1, device=device) * 7919 % vocabulary).view(_ROWS, _TOKENS)
    mask = torch.ones_like(tokens)
    mask[-1, -2:] = 0
    return tokens, mask


@dataclass
class Comparison:
    """Takes the place of the accumulators: compares each with the squared gradient, and keeps the difference only."""

    sums: Sums
    expected: dict[str, Tensor]
    """Gradients of the last row's loss; missing where there is none."""
    keep: frozenset[str]
    """Parameters of the head."""
    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """norm(difference) and norm(squared gradient)."""
    kept: dict[str, Tensor] = field(default_factory=dict)
    """Accumulators by name. The head's is added to twice where it is tied; the others are let go."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the accumulators."""
        return self.sums.dtype

    @contextlib.contextmanager
    def reduction(self, name: str) -> Iterator[Squares]:
        """Into an empty accumulator, or that of the head before."""
        parameter, dtype = self.sums.parameters[name], self.sums.tensors[name].dtype
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        fisher = self.kept.get(name)
        if fisher is None:
            fisher = torch.zeros(parameter.shape, dtype=dtype, device=local.device)
        yield Squares(fisher)
        if name in self.keep:
            self.kept[name] = fisher
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            whole = DTensor.from_local(fisher, mesh, [Replicate()] * mesh.ndim, run_check=False)
            fisher = whole.redistribute(placements=parameter.placements).to_local()
        self.compare(name, fisher)

    def compare(self, name: str, fisher: Tensor | None) -> None:
        """Note the difference of one accumulator; None for one that nothing was added to."""
        expected = self.expected.get(name)
        square = None if expected is None else expected.to(self.sums.tensors[name].dtype).square()
        if square is None:
            square = torch.zeros_like(self.sums.tensors[name] if fisher is None else fisher)
        difference = square if fisher is None else fisher.to(square.device) - square
        self.errors[name] = (float(difference.norm()), float(square.norm()))


def choose_rules(
    owners: list[Owner],
    sums: Sums,
    head: frozenset[str],
    reference: Callable[[], dict[str, Tensor]],
    measure: Callable[[Comparison], Tape],
    modules: dict[str, nn.Module],
    eps: float,
) -> dict[str, int]:
    """Move owners to the first tier whose result equals autograd's.

    Args:
        owners: Modules with their parameters, changed in place.
        sums: The accumulators, which are not touched.
        head: Names of the head's parameters.
        reference: Gradients of the last row's loss by name, of the model as it is.
        measure: Runs a tape into a comparison.
        modules: Of the model, by path.
        eps: Of the dtype that the model computes in.

    Returns:
        How often each parameter is used in one forward.

    Raises:
        ValueError: No tier is right for a parameter.
    """
    expected = reference()
    while True:
        comparison = Comparison(sums, expected, head)
        tape = measure(comparison)
        failures = tape.failures or {}
        for name in sums.tensors:
            if name not in comparison.errors:
                comparison.compare(name, None)
        wrong = _wrong(comparison, sums, eps) | tape.bypassed
        moved = [o for o in owners if o.path in failures or not wrong.isdisjoint(o.parameters.values())]
        if not _any_rank(bool(moved), sums):
            break
        for owner in moved:
            if owner.tier == "module" and type(owner.module).forward in MODULES:
                raise ValueError(
                    f"fisher_rule: the rule of {type(owner.module).__name__} gives other gradients than autograd for "
                    f"{owner.path}: {failures.get(owner.path, 'other values')}; correct it"
                ) from failures.get(owner.path)
            unseen = tape.received.keys().isdisjoint(owner.parameters.values()) and owner.path not in failures
            _escalate(owner, owners, modules, unseen, failures.get(owner.path))
        owners[:] = [owner for owner in owners if owner.parameters]
    slow = {f"{o.path} ({type(o.module).__name__})" for o in owners if o.slow}
    if slow:
        shown = ", ".join(sorted(slow)[:4]) + (f" and {len(slow) - 4} others" if len(slow) > 4 else "")
        warnings.warn(
            f"DiagonalFisher: exact, but slow, example by example: {shown}. Register a rule with ff.fisher_rule, or leave "
            "their parameters out by parameters=",
            stacklevel=5,
        )
    return tape.received


def _wrong(comparison: Comparison, sums: Sums, eps: float) -> set[str]:
    """Names whose difference is no rounding."""
    values = torch.tensor(list(comparison.errors.values()), dtype=torch.float64).view(-1, 2).square()
    distributed = [p for p in sums.parameters.values() if isinstance(p, DTensor)]
    if distributed:  # every rank holds a part of each tensor
        values = values.to(distributed[0].to_local().device)
        dist.all_reduce(values)
    error, size = values.sqrt().T
    # A wrong rule is wrong by a good part of the whole; some models compute in float32 whatever their dtype.
    tolerance = max(1e-4, 16 * eps)
    # A gradient that is zero in theory, as that of a key projection's bias, is rounding of others': compare with the largest.
    allowed = tolerance * size + max(1e-6, 4 * eps) ** 2 * size.max()
    # not <=: NaN is wrong
    return {name for name, bad in zip(comparison.errors, (~(error <= allowed)).tolist(), strict=True) if bad}


def _any_rank(value: bool, sums: Sums) -> bool:
    device = next((p.to_local().device for p in sums.parameters.values() if isinstance(p, DTensor)), None)
    if device is None:
        return value
    flag = torch.tensor(int(value), device=device)
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag)


def _escalate(
    owner: Owner, owners: list[Owner], modules: dict[str, nn.Module], unseen: bool, error: Exception | None
) -> None:
    """The next tier; from the last one, or where the module's forward never ran, the parent."""
    position = TIERS.index(owner.tier) + 1
    if position < len(TIERS) and not unseen:
        owner.tier = TIERS[position]
        return
    path = owner.path.rpartition(".")[0]
    while path in modules and isinstance(modules[path], nn.ModuleList | nn.ModuleDict):
        path = path.rpartition(".")[0]
    names = sorted(set(owner.parameters.values()))
    if not path:
        raise ValueError(
            f"model: no rule gives the per-example gradients of {names[0]}{' and others' if len(names) > 1 else ''}: what "
            "uses it mixes examples, or is not known. Exclude it by parameters=, or register a rule with ff.fisher_rule"
        ) from error
    parent = next((other for other in owners if other.path == path), None)
    if parent is None:
        parent = Owner(path, modules[path], {}, {}, "slice")
        owners.append(parent)
    parent.tier = max(parent.tier, "slice", key=TIERS.index)
    parent.parameters.update(owner.parameters)
    parent.holders.update(owner.holders)
    owner.parameters.clear()
