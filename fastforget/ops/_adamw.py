"""`adamw_`: checks, dispatch, and the PyTorch path."""

from __future__ import annotations

import functools
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
)

if TYPE_CHECKING:
    from fastforget_kernels.tensor_lists import Table

__all__ = ["AdamWNumbers", "adamw_", "adamw_step_", "check_steps"]


@dataclass(frozen=True)
class AdamWNumbers:
    """The optimizer's numbers, which may change in every step.

    Attributes:
        lr: Learning rate; a tensor of one element may live on the device.
        betas: Factors of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled, a factor of lr.
        fused: On the CPU, torch's fused kernel: faster, and other bits than its default.
    """

    lr: float | Tensor
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    fused: bool = False

    def check(self) -> None:
        """Refuse numbers that the optimizer does not take.

        Raises:
            ValueError: One is outside its range.
        """
        for name in ("lr", "eps", "weight_decay"):
            check_number(name, getattr(self, name))
        for i, beta in enumerate(self.betas):
            check_number(f"betas[{i}]", beta, high=1.0)


def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    max_exp_avg_sqs: Sequence[Tensor] | None = None,
    maximize: bool = False,
    steering: Steering | None = None,
    rounding_keys: Tensor | None = None,
    fused: bool = False,
    tables: Sequence[Table] | None = None,
    impl: str = "auto",
) -> None:
    r"""One step of AdamW for a list of parameters, with what a Fisher does to it; one pass, in place.

    Without steering, on the torch path in float32, the bits are those of `torch.optim.AdamW` (`foreach=False`); with `fused`
    those of `fused=True`. Arithmetic is in float32 for lower dtypes. Not differentiable.

    Args:
        params: float32, bfloat16 or float16 (float64 on the torch path), each dense.
        grads: As many, each with its parameter's shape and strides; float32, bfloat16 or float16 (float64).
        exp_avgs: First moments, in the parameter's dtype or float32.
        exp_avg_sqs: Second moments, in the dtype of the first.
        steps: 0-dimensional tensors, on the host or all on the device: how many steps, this one included.
        lr: Learning rate, a number or a tensor that holds one.
        betas: Factors of the moments.
        eps: Added to the denominator.
        weight_decay: Decoupled, a factor of lr.
        max_exp_avg_sqs: Largest second moments so far: AMSGrad.
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

    References:
        Loshchilov and Hutter, arXiv 1711.05101. Reddi, Kale and Kumar, arXiv 1904.09237 (AMSGrad).
    """
    maxima = None if max_exp_avg_sqs is None else list(max_exp_avg_sqs)
    states = {"exp_avgs": list(exp_avgs), "exp_avg_sqs": list(exp_avg_sqs), "max_exp_avg_sqs": maxima}
    update = Update(list(params), list(grads), states, steering or Steering(), rounding_keys, maximize)
    options = AdamWNumbers(lr, betas, eps, weight_decay, fused)
    options.check()
    if update.params:
        implementation, _ = resolve(impl, update.params[0].device)
        check_update(update, implementation)
        check_steps(steps, update.params)
        adamw_step_(update, steps, options, implementation, tables)


def check_steps(steps: Sequence[Tensor], params: Sequence[Tensor]) -> None:
    """Refuse step counts that do not belong to the parameters.

    Args:
        steps: 0-dimensional tensors.
        params: As many.

    Raises:
        TypeError: One is not a floating-point tensor.
        ValueError: Their number, a shape, a device or a count is wrong.
    """
    if len(steps) != len(params):
        raise ValueError(f"steps: expected {len(params)} tensors, one for each of params, got {len(steps)}")
    for i, step in enumerate(steps):
        if not step.is_floating_point():
            raise TypeError(f"steps[{i}]: expected float32, got {step.dtype}")
        if step.ndim or step.device != steps[0].device or step.device not in (torch.device("cpu"), params[0].device):
            raise ValueError(
                f"steps[{i}]: expected no dimension, on the host or like params, and all alike, got shape "
                f"{tuple(step.shape)} on {step.device}"
            )
        if step.device.type == "cpu" and not step >= 1:
            raise ValueError(f"steps[{i}]: expected a count of at least 1, this step included, got {float(step)}")


@torch.no_grad()
def adamw_step_(
    update: Update,
    steps: Sequence[Tensor],
    options: AdamWNumbers,
    implementation: str,
    tables: Sequence[Table] | None = None,
) -> None:
    """One step without any check.

    Args:
        update: At least one tensor; its states are `exp_avgs`, `exp_avg_sqs` and `max_exp_avg_sqs` (None without AMSGrad).
        steps: Step counts, this step included.
        options: The optimizer's numbers.
        implementation: "triton" or "torch".
        tables: `update.tables()`, if the caller keeps them.
    """
    if implementation == "triton":
        with torch.cuda.device_of(update.params[0]):
            _triton_step_(update, steps, options, tables)
    elif options.fused and update.plain and update.one_dtype:
        _fused_lists_(update, steps, options)
    else:
        _torch_step_(update, steps, options)


def _scalars(steps: Sequence[Tensor], options: AdamWNumbers) -> list[tuple[float, float, float]] | Tensor:
    """1 - lr weight_decay, lr / (1 - beta1^t) and sqrt(1 - beta2^t) of every tensor, in float64."""
    (beta1, beta2), lr = options.betas, scalar(options.lr)
    t = torch.stack(list(steps)).double()
    if t.device.type == "cpu" and not isinstance(lr, Tensor):
        lr = options.lr  # a tensor of the host has torch divide in float32
        kept = float(1 - lr * options.weight_decay)
        return [(kept, float(lr / (1 - beta1**step)), (1 - beta2**step) ** 0.5) for step in t.tolist()]
    if isinstance(lr, Tensor):
        t, lr = t.to(lr.device), lr.double()
    kept = 1 - lr * options.weight_decay * torch.ones_like(t)
    return torch.stack([kept, lr / (1 - beta1**t), (1 - beta2**t).sqrt()], 1)


def _triton_step_(
    update: Update, steps: Sequence[Tensor], options: AdamWNumbers, tables: Sequence[Table] | None
) -> None:
    from fastforget_kernels.adamw import adamw_ as kernel_

    numbers = _scalars(steps, options)
    tables = ready_tables(update, tables, isinstance(numbers, Tensor))
    betas = float(options.betas[0]), float(options.betas[1])
    amsgrad = update.states["max_exp_avg_sqs"] is not None
    scalars = device_scalars(numbers, update)
    kernel_(tables, scalars, betas, float(options.eps), amsgrad=amsgrad, **kernel_options(update))
    torch.autograd.graph.increment_version(update.params)


def _torch_step_(update: Update, steps: Sequence[Tensor], options: AdamWNumbers) -> None:
    soft = soft_scale(update.steering)
    if options.fused:
        rules = [functools.partial(_fused_rule_, options, step) for step in steps]
    else:
        rules = [functools.partial(_rule_, options, *numbers) for numbers in _scalars(steps, options)]
    for i, rule in enumerate(rules):
        update_tensor_(update, i, rule, soft)


def _rule_(
    options: AdamWNumbers, kept: float | Tensor, step_size: float | Tensor, root: float | Tensor, theta: Tensor, grad: Tensor,
    exp_avg: Tensor, exp_avg_sq: Tensor, max_exp_avg_sq: Tensor | None,
) -> None:  # fmt: skip
    """The operations of `torch.optim.AdamW`, in its order."""
    beta1, beta2 = options.betas
    if options.weight_decay:
        theta.mul_(kept)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    if max_exp_avg_sq is not None:
        exp_avg_sq = torch.maximum(max_exp_avg_sq, exp_avg_sq, out=max_exp_avg_sq)
    denominator = (exp_avg_sq.sqrt() / root).add_(options.eps)
    if isinstance(step_size, Tensor):
        theta.addcdiv_(exp_avg, denominator.div_(step_size), value=-1)
    else:
        theta.addcdiv_(exp_avg, denominator, value=-step_size)


def _fused_rule_(options: AdamWNumbers, step: Tensor, *tensors: Tensor | None) -> None:
    _fused_(options, False, [step], [[tensor] for tensor in tensors if tensor is not None])


def _fused_lists_(update: Update, steps: Sequence[Tensor], options: AdamWNumbers) -> None:
    for *lists, counts in by_dtype([*update.lists(), steps]):
        _fused_(options, update.maximize, counts, lists)


def _fused_(options: AdamWNumbers, maximize: bool, steps: list[Tensor], lists: list[list[Tensor]]) -> None:
    params, grads, exp_avgs, exp_avg_sqs, *maxima = lists
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        maxima[0] if maxima else [],
        [step.to(params[0].device) for step in steps],
        lr=scalar(options.lr),
        beta1=options.betas[0],
        beta2=options.betas[1],
        weight_decay=options.weight_decay,
        eps=options.eps,
        amsgrad=bool(maxima),
        maximize=maximize,
    )
