"""`sgd_`: checks, dispatch, and the PyTorch path."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastforget.ops._dispatch import resolve
from fastforget.ops._steering import (
    Steering,
    Update,
    by_dtype,
    check_number,
    check_update,
    device_scalars,
    kernel_options,
    ready_tables,
    scalar,
    soft_scale,
    update_tensor_,
)  # fmt: skip

if TYPE_CHECKING:
    from fastforget_kernels.tensor_lists import Table

__all__ = ["SGDNumbers", "sgd_", "sgd_step_"]


@dataclass(frozen=True)
class SGDNumbers:
    """The optimizer's numbers, which may change in every step.

    Attributes:
        lr: Learning rate; a tensor of one element may live on the device.
        momentum: Factor of the buffer; 0 for no buffer.
        dampening: 1 minus the factor of the gradient in the buffer.
        weight_decay: Factor of the parameter in the gradient.
        nesterov: Nesterov's momentum.
        fused: On the CPU, torch's fused kernel: faster, and other bits than its default.
    """

    lr: float | Tensor
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    fused: bool = False

    def check(self) -> None:
        """Refuse numbers that the optimizer does not take.

        Raises:
            ValueError: One is outside its range, or Nesterov's momentum has no momentum or is dampened.
        """
        for name in ("lr", "momentum", "weight_decay"):
            check_number(name, getattr(self, name))
        check_number("dampening", self.dampening, low=-math.inf)
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError(
                "nesterov: expected momentum and no dampening, got "
                f"momentum {self.momentum} and dampening {self.dampening}"
            )


def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor] | None = None,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first_steps: Sequence[bool] | None = None,
    maximize: bool = False,
    steering: Steering | None = None,
    rounding_keys: Tensor | None = None,
    fused: bool = False,
    tables: Sequence[Table] | None = None,
    impl: str = "auto",
) -> None:
    r"""One step of SGD for a list of parameters, with what a Fisher does to it; one pass, in place.

    Without steering, on the torch path in float32, the bits are those of `torch.optim.SGD` (`foreach=False`); with `fused`
    those of `fused=True`. Arithmetic is in float32 for lower dtypes. Not differentiable.

    Args:
        params: float32, bfloat16 or float16 (float64 on the torch path), each dense.
        grads: As many, each with its parameter's shape and strides; float32, bfloat16 or float16 (float64).
        momentum_buffers: In the parameter's dtype or float32; given if and only if there is momentum.
        lr: Learning rate, a number or a tensor that holds one.
        momentum: Factor of the buffer.
        dampening: 1 minus the factor of the gradient in the buffer.
        weight_decay: Factor of the parameter in the gradient.
        nesterov: Nesterov's momentum.
        first_steps: Which buffers become the gradient, whatever they hold; None for none of them.
        maximize: Negate the gradients (of the loss; a pull still pulls).
        steering: What a Fisher does to the step.
        rounding_keys: `[n]` int64 on the parameters' device: bfloat16 parameters are rounded stochastically, with bits that
            are a function of key and entry; to be new in every step.
        fused: On the CPU, use torch's fused kernel.
        tables: `Update.tables()` of the same tensors, for a launch that allocates no table, as in a CUDA graph.
        impl: "auto", "triton" or "torch".

    Raises:
        TypeError: A tensor has the wrong dtype.
        ValueError: Lengths, shapes, strides or devices do not match, a tensor to be written occurs twice, a number is outside
            its range, or `impl` is wrong. Nothing was written then.
    """
    buffers = None if momentum_buffers is None else list(momentum_buffers)
    update = Update(
        list(params), list(grads), {"momentum_buffers": buffers}, steering or Steering(), rounding_keys, maximize
    )
    options = SGDNumbers(lr, momentum, dampening, weight_decay, nesterov, fused)
    options.check()
    if (buffers is None) == bool(momentum):
        expected, got = ("tensors", "None") if momentum else ("None", "tensors")
        raise ValueError(f"momentum_buffers: expected {expected} beside momentum {momentum}, got {got}")
    first = [False] * len(update.params) if first_steps is None else list(first_steps)
    if len(first) != len(update.params):
        raise ValueError(f"first_steps: expected {len(update.params)} flags, one for each of params, got {len(first)}")
    if update.params:
        implementation, _ = resolve(impl, update.params[0].device)
        check_update(update, implementation)
        sgd_step_(update, first, options, implementation, tables)


@torch.no_grad()
def sgd_step_(
    update: Update,
    first: Sequence[bool],
    options: SGDNumbers,
    implementation: str,
    tables: Sequence[Table] | None = None,
) -> None:
    """One step without any check.

    Args:
        update: At least one tensor; its state is `momentum_buffers`, None without momentum.
        first: Which buffers become the gradient.
        options: The optimizer's numbers.
        implementation: "triton" or "torch".
        tables: `update.tables()`, if the caller keeps them.
    """
    if implementation == "triton":
        with torch.cuda.device_of(update.params[0]):
            _triton_step_(update, first, options, tables)
    elif options.fused and update.plain and update.one_dtype and all(p.dtype.itemsize > 2 for p in update.params):
        # torch's fused kernel for the CPU skips most of a 16-bit tensor (pytorch issue 191763).
        _fused_lists_(update, first, options)
    else:
        _torch_step_(update, first, options)


def _triton_step_(update: Update, first: Sequence[bool], options: SGDNumbers, tables: Sequence[Table] | None) -> None:
    from fastforget_kernels.sgd import sgd_ as kernel_

    lr = scalar(options.lr)
    tables = ready_tables(update, tables, isinstance(lr, Tensor))
    if isinstance(lr, Tensor):
        flags = lr.new_full((len(first),), first[0]) if len(set(first)) == 1 else lr.new_tensor(first)
        numbers = torch.stack([lr.expand(len(first)), flags], 1)
    else:
        numbers = [(lr, float(flag)) for flag in first]
    kernel_(
        tables, device_scalars(numbers, update), momentum=float(options.momentum) or None,
        dampening=float(options.dampening), weight_decay=float(options.weight_decay) or None, nesterov=options.nesterov,
        **kernel_options(update),
    )  # fmt: skip
    torch.autograd.graph.increment_version(update.params)


def _torch_step_(update: Update, first: Sequence[bool], options: SGDNumbers) -> None:
    soft, rule = soft_scale(update.steering), _fused_rule_ if options.fused else _rule_
    for i, flag in enumerate(first):
        update_tensor_(update, i, functools.partial(rule, options, flag), soft)


def _rule_(options: SGDNumbers, first: bool, theta: Tensor, grad: Tensor, buffer: Tensor | None) -> None:
    """The operations of `torch.optim.SGD`, in its order."""
    if options.weight_decay:
        grad = grad.add(theta, alpha=options.weight_decay)
    if buffer is not None:
        if first:
            buffer.copy_(grad)
        else:
            buffer.mul_(options.momentum).add_(grad, alpha=1 - options.dampening)
        grad = grad.add(buffer, alpha=options.momentum) if options.nesterov else buffer
    lr = scalar(options.lr)
    if isinstance(lr, Tensor):
        theta.sub_(grad * lr)
    else:
        theta.add_(grad, alpha=-lr)


def _fused_rule_(options: SGDNumbers, first: bool, *tensors: Tensor | None) -> None:
    _fused_(options, False, first, [[tensor] for tensor in tensors if tensor is not None])


def _fused_lists_(update: Update, first: Sequence[bool], options: SGDNumbers) -> None:
    for flag in set(first):
        chosen = [[t for t, own in zip(tensors, first, strict=True) if own == flag] for tensors in update.lists()]
        for lists in by_dtype(chosen):
            _fused_(options, update.maximize, flag, lists)


def _fused_(options: SGDNumbers, maximize: bool, first: bool, lists: list[list[Tensor]]) -> None:
    params, grads, *buffers = lists
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        params, grads, buffers[0] if buffers else [], lr=scalar(options.lr), momentum=options.momentum,
        dampening=options.dampening, weight_decay=options.weight_decay, nesterov=options.nesterov, maximize=maximize,
        is_first_step=first,
    )  # fmt: skip
