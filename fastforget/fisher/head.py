r"""The head in `update`: loss, gradient of the hidden states, and the head's own Fisher, without the logits in memory.

The backward recomputes the logits' gradient dz one block of the vocabulary at a time; from each block come

    dx += dz W,    F_W += sum_b w_b (sum_{t in b} dz_t x_t^T)^2,    F_bias += sum_b w_b (sum_{t in b} dz_t)^2,

and for a LoRA on the head, z = x W^T + s (x A^T) B^T, the same with B's input s x A^T, and A's output gradient s dz B.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastforget._head import LogitTransform, active_adapters, base_linear, head_weight
from fastforget.fisher.examples import Examples, offsets_of
from fastforget.fisher.gradients import HeadRows, segment_sums
from fastforget.fisher.reductions import Reduction
from fastforget.fisher.tape import Tape
from fastforget.fisher.watched import Watched
from fastforget.ops import linear_cross_entropy
from fastforget.ops._dispatch import no_autocast
from fastforget.ops._logit_gradient import ExponentialBlocks, logit_gradient_blocks

__all__ = ["FusedHead"]


class FusedHead:
    """Stands in for the head's forward: keeps the loss of every target, and gives logits that nobody reads.

    Args:
        watched: The model.
        tape: That is running.
        tokens: `[R, T]` input ids, whose rows of a tied weight get a cross term.
        target: `[R, T]` label of the next token, -100 where there is none.
        transform: What the model does to its logits.
        seeds: None for the data's labels; otherwise one seed for every sample of labels.
        row_ids: `[R, T]` int64, of sampled labels.
        impl: "auto", "triton" or "torch".
    """

    def __init__(
        self,
        watched: Watched,
        tape: Tape,
        tokens: Tensor,
        target: Tensor,
        transform: LogitTransform,
        seeds: tuple[int, ...] | None = None,
        row_ids: Tensor | None = None,
        impl: str = "auto",
    ) -> None:
        self.head, self.names, self.tape = watched.head, watched.names, tape
        self.tokens, self.target = tokens, target
        self.tied = frozenset(watched.aliases.values())
        self.transform, self.seeds, self.row_ids, self.impl = transform, seeds, row_ids, impl
        self.losses: list[Tensor] = []
        """`[S]` of every sample (or of the data's labels): losses of the targets in row-major order."""

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        """The head's forward."""
        if self.losses:
            raise ValueError("model: its forward calls the output embedding more than once; one call is expected")
        if hidden.shape[:-1] != self.target.shape:
            raise ValueError(
                f"model: its output embedding got hidden states of shape {tuple(hidden.shape)}, expected "
                f"{(*self.target.shape, hidden.shape[-1])}; models that add or drop positions are not supported"
            )
        device = hidden.device
        is_target = (self.target != -100).to(device)
        x, labels = hidden[is_target], self.target.to(device)[is_target]
        examples = self.tape.examples
        assert examples is not None
        owner = examples.owner.to(device)[is_target]
        with torch.no_grad():
            weight, bias = head_weight(self.head)
        kind = device.type
        if torch.is_autocast_enabled(kind) and x.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        anchor = torch.zeros((), requires_grad=True)  # everything before the head may be frozen
        for seed in self.seeds or [None]:
            ids = None if seed is None or self.row_ids is None else self.row_ids.to(device)[is_target]
            pass_ = _Pass(self, examples, labels, owner, seed, ids)
            self.losses.append(
                _HeadLoss.apply(x, weight.detach(), None if bias is None else bias.detach(), pass_, anchor)
            )  # type: ignore[arg-type]
        return hidden.new_zeros(*hidden.shape[:-1], 1)


@dataclass
class _Pass:
    """One set of labels."""

    fused: FusedHead
    examples: Examples
    labels: Tensor  # [S]
    owner: Tensor  # [S]
    seed: int | None
    row_ids: Tensor | None


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, run: _Pass, anchor: Tensor) -> Tensor:
        fused = run.fused
        softcap, scale = fused.transform.softcap, fused.transform.scale
        labels, ctx.run, ctx.kept = run.labels, run, None
        if run.seed is None and ExponentialBlocks.fit(x, weight, softcap, fused.impl):
            with no_autocast(x.device):
                ctx.kept = ExponentialBlocks(x, weight, bias, labels, scale)
            loss, lse = ctx.kept.loss, ctx.kept.lse
        else:
            options: dict[str, Any] = {} if run.seed is None else {"sample_seed": run.seed, "row_ids": run.row_ids}
            options |= {"linear_bias": bias, "softcap": softcap, "scale": scale, "impl": fused.impl}
            result = linear_cross_entropy(x, weight, labels, **options)
            loss, lse, labels = result.loss, result.lse, result.targets
        ctx.save_for_backward(x, weight, bias, labels, lse)
        return loss

    @staticmethod
    def backward(ctx, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, labels, lse = ctx.saved_tensors
        run: _Pass = ctx.run
        with torch.no_grad(), no_autocast(x.device):
            return _backward(run, ctx.kept, x, weight, bias, labels, lse, grad), None, None, None, None


def _backward(
    run: _Pass,
    kept: ExponentialBlocks | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
) -> Tensor:
    fused, examples = run.fused, run.examples
    fused.tape.begin(examples)
    tape, transform = fused.tape, fused.transform
    count = len(run.owner) if tape.how.positions else examples.count
    segment = torch.arange(count, device=x.device) if tape.how.positions else run.owner
    offsets = offsets_of(segment, count)
    weights = examples.weights[run.owner] if tape.how.positions else examples.weights
    options = {"weights": weights, "grad_weight": None, "impl": fused.impl}
    linear = base_linear(fused.head)
    with contextlib.ExitStack() as stack:

        def reduction_of(module: nn.Module, attribute: str) -> Reduction | None:
            name = fused.names.get((module, attribute))
            return stack.enter_context(tape.reductions.reduction(name)) if name in tape.selected else None  # type: ignore[arg-type]

        of_weight, of_bias = reduction_of(linear, "weight"), reduction_of(linear, "bias")
        adapters = [
            _Adapter(x, module_a, module_b, scaling, reduction_of(module_a, "weight"), reduction_of(module_b, "weight"))
            for module_a, module_b, scaling in active_adapters(fused.head)
        ]
        grad_input = torch.zeros_like(x, dtype=examples.weights.dtype)
        if kept is not None:
            blocks = kept.gradients(weight, grad, grad_input)
        else:
            softcap = transform.softcap or 0.0
            blocks = logit_gradient_blocks(
                x, weight, bias, labels, lse, grad, softcap, transform.scale, fused.impl, grad_input
            )
        for columns, dz in blocks:
            if of_weight is not None:
                of_weight[columns].outer_(x, dz, offsets, **options)
            if of_bias is not None:
                of_bias[columns].dense_(segment_sums(dz.to(weights.dtype), offsets), weights)
            for adapter in adapters:
                adapter.add_block(columns, dz, offsets, options)
        for adapter in adapters:
            adapter.finish(offsets, options)
    for attribute, value in (("weight", of_weight), ("bias", of_bias)):
        if value is not None:
            name = fused.names[linear, attribute]
            tied = attribute == "weight" and name in fused.tied
            rows = _rows_of(run, x, weight, bias, labels, lse, grad, offsets) if tied else None
            tape.add(examples, name, HeadRows(rows))
    for adapter, (module_a, module_b, _) in zip(adapters, active_adapters(fused.head), strict=True):
        for module, value in ((module_a, adapter.of_a), (module_b, adapter.of_b)):
            if value is not None:
                tape.add(examples, fused.names[module, "weight"], HeadRows())
    return grad_input.to(x.dtype)


@dataclass
class _Adapter:
    """A LoRA on the head: z += s (x A^T) B^T."""

    x: Tensor  # [S, H]
    module_a: Any
    module_b: Any
    scaling: float
    of_a: Reduction | None
    of_b: Reduction | None

    def __post_init__(self) -> None:
        self.a, self.b = (module.weight.detach().to(self.x.dtype) for module in (self.module_a, self.module_b))
        self.down = (self.x @ self.a.T) * self.scaling  # [S, r]
        self.grad_down = torch.zeros_like(self.down, dtype=torch.promote_types(self.x.dtype, torch.float32))

    def add_block(self, columns: slice, dz: Tensor, offsets: Tensor, options: dict[str, Any]) -> None:
        """One block of the vocabulary."""
        if self.of_b is not None:
            self.of_b[columns].outer_(self.down, dz.to(self.x.dtype), offsets, **options)
        if self.of_a is not None:
            dtype = self.grad_down.dtype
            self.grad_down.addmm_(dz.to(dtype), self.b[columns].to(dtype), alpha=self.scaling)

    def finish(self, offsets: Tensor, options: dict[str, Any]) -> None:
        """After the last block."""
        if self.of_a is not None:
            self.of_a.outer_(self.x, self.grad_down.to(self.x.dtype), offsets, **options)


def _rows_of(
    run: _Pass,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    lse: Tensor,
    grad: Tensor,
    offsets: Tensor,
) -> Callable[[int, Tensor], Tensor]:
    """Rows of one example's gradient of the weight, for the cross term of tied embeddings."""
    dtype, transform = run.examples.weights.dtype, run.fused.transform
    bounds = offsets.tolist()
    # Copies of the rows that are asked for: under FSDP2 the weight is gone when the embedding's gradient is there.
    known = run.fused.tokens.to(x.device).unique()
    weight = weight[known]
    bias = None if bias is None else bias[known]

    def rows(b: int, wanted: Tensor) -> Tensor:
        mine = slice(bounds[b], bounds[b + 1])
        places = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        if not torch.equal(known[places], wanted):
            raise ValueError(
                "model: its tied embedding looks up other tokens than its input_ids, which is not supported"
            )
        z = x[mine].to(dtype) @ weight[places].to(dtype).T
        if bias is not None:
            z += bias[places]
        z *= transform.scale
        if transform.softcap:
            z = transform.softcap * torch.tanh(z / transform.softcap)
        dz = (z - lse[mine, None]).exp() - (labels[mine, None] == wanted).to(dtype)
        if transform.softcap:
            dz *= 1 - (z / transform.softcap).square()
        dz *= transform.scale * grad[mine, None]
        return dz.T @ x[mine].to(dtype)

    return rows
