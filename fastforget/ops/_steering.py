"""What the steps of all optimizers share: the tensors of a step, what a Fisher does to it, checks, and the PyTorch path.

See `fastforget_kernels.steering` for the equations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastforget.ops._examples import accumulator
from fastforget.ops._exponential_race import random_bits
from fastforget.ops._tensor_lists import Rule, check_lists, chunks, refuse_twice

if TYPE_CHECKING:
    from fastforget_kernels.tensor_lists import Table

__all__ = [
    "Steering", "Update", "by_dtype", "check_number", "check_update", "device_scalars", "kernel_options", "ready_tables",
    "scalar", "soft_scale", "update_tensor_",
]  # fmt: skip

FREE = 4  # scratch buffers of a chunk: the pull, what was there before, and two of the optimizer


@dataclass(frozen=True)
class Steering:
    """What a Fisher does to a step; every list is as long as the parameters.

    F is the Fisher as it stands before the step. Not a number compares false: such an F does not pass a threshold.

    Attributes:
        fishers: float32, float64 for float64 parameters, with the parameter's shape and strides.
        fisher_decay: Given, `F = fisher_decay * F + grad^2` after the step, of the gradient as it came.
        anchors: In the parameters' dtype or float32.
        ewc_lambda: The gradient becomes `grad + ewc_lambda * F * (theta - anchor)`.
        masks: uint8 `[ceil(n / 8)]`; bit j of byte i, the lowest first, is entry 8 i + j in memory order. An entry whose bit
            is 0 keeps its bits, weight decay included; its moments are updated.
        min_fisher: Only entries with F >= min_fisher move.
        max_fisher: Only entries with F < max_fisher move.
        soft_weight: The whole update, weight decay included, is multiplied by `1 / (1 + soft_weight * F / mean_fisher)`.
        mean_fisher: One number, on the host or the parameters' device. Where it is 0, no update is weighted.
    """

    fishers: list[Tensor] | None = None
    fisher_decay: float | None = None
    anchors: list[Tensor] | None = None
    ewc_lambda: float = 0.0
    masks: list[Tensor] | None = None
    min_fisher: float | None = None
    max_fisher: float | None = None
    soft_weight: float = 0.0
    mean_fisher: Tensor | float | None = None

    @property
    def needs_fisher(self) -> bool:
        """Whether any option reads F."""
        optional = (self.fisher_decay, self.min_fisher, self.max_fisher)
        return bool(self.ewc_lambda or self.soft_weight) or any(value is not None for value in optional)

    def check_numbers(self) -> None:
        """Refuse numbers that no step can have.

        Raises:
            ValueError: One is outside its range, or no F lies between the thresholds.
        """
        for name in ("fisher_decay", "ewc_lambda", "soft_weight", "mean_fisher"):
            value = getattr(self, name)
            if value is not None:
                check_number(name, value)
        if self.fisher_decay is not None and self.fisher_decay > 1:
            raise ValueError(
                f"fisher_decay: expected a number from 0 to 1, got {self.fisher_decay}; F would grow forever"
            )
        for name, value in (("min_fisher", self.min_fisher), ("max_fisher", self.max_fisher)):
            if value is not None and (not isinstance(value, Real) or math.isnan(value)):
                raise ValueError(f"{name}: expected a number, got {value!r}")
        if self.min_fisher is not None and self.max_fisher is not None and self.min_fisher >= self.max_fisher:
            raise ValueError(
                f"min_fisher: expected less than max_fisher = {self.max_fisher}, got {self.min_fisher}; no entry would move"
            )


@dataclass(frozen=True)
class Update:
    """The tensors of one step of an optimizer.

    Attributes:
        params: Changed in place.
        grads: As many.
        states: The optimizer's lists by name, None for one that this step does not have; changed in place.
        steering: What a Fisher does to the step.
        rounding_keys: `[n]` int64: bfloat16 parameters are rounded stochastically.
        maximize: Negate the gradients.
    """

    params: list[Tensor]
    grads: list[Tensor]
    states: Mapping[str, list[Tensor] | None]
    steering: Steering = field(default_factory=Steering)
    rounding_keys: Tensor | None = None
    maximize: bool = False

    @property
    def plain(self) -> bool:
        """Whether the step is the optimizer's own."""
        steering = self.steering
        return steering.masks is None and not steering.needs_fisher and self.rounding_keys is None

    @property
    def one_dtype(self) -> bool:
        """Whether gradients and states have their parameter's dtype."""
        return all(len({tensor.dtype for tensor in tensors}) == 1 for tensors in zip(*self.lists(), strict=True))

    def lists(self) -> list[list[Tensor]]:
        """Parameters, gradients, and the states that there are."""
        return [self.params, self.grads, *(state for state in self.states.values() if state is not None)]

    def tables(self) -> list[Table]:
        """What a kernel needs to find the tensors: made anew when a storage moves."""
        from fastforget_kernels.tensor_lists import tables

        steering = self.steering
        lists = (*self.states.values(), steering.fishers, steering.anchors, steering.masks)
        return tables(self.params, self.grads, *(tensors or self.params for tensors in lists))


def check_number(name: str, value: float | Tensor, low: float = 0.0, high: float = math.inf) -> None:
    """Refuse a number outside `[low, high)`; one on a device is not looked at.

    Args:
        name: Of the argument.
        value: A number, or a tensor that holds one.
        low: Least value.
        high: Bound.

    Raises:
        ValueError: It is none, or outside.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name}: expected one number, got a tensor of shape {tuple(value.shape)}")
        if value.device.type != "cpu":
            return
    elif not isinstance(value, Real):
        raise ValueError(f"{name}: expected a number, got {value!r}")
    if not low <= float(value) < high:
        bound = f" and below {high:g}" if high < math.inf else ""
        raise ValueError(f"{name}: expected a finite number of at least {low:g}{bound}, got {float(value)}")


def check_update(update: Update, implementation: str) -> None:
    """Refuse tensors that do not belong together; what an optimizer calls when its lists change.

    Args:
        update: The tensors of a step.
        implementation: "triton" or "torch".

    Raises:
        TypeError: A dtype is wrong.
        ValueError: Lengths, shapes, strides or devices do not match, a tensor to be written occurs twice, or an option lacks
            what it needs.
    """
    steering = update.steering
    states = {name: state for name, state in update.states.items() if state is not None}
    lists = {"params": Rule(update.params), "grads": Rule(update.grads)} | {k: Rule(v) for k, v in states.items()}
    if steering.fishers is not None:
        lists["fishers"] = Rule(steering.fishers, (torch.float32, torch.float64))
    if steering.anchors is not None:
        lists["anchors"] = Rule(steering.anchors)
    check_lists(lists)
    for i in range(len(update.params)):
        _check_dtypes(i, {name: rule.tensors[i] for name, rule in lists.items()}, list(states), implementation)
    _check_options(steering)
    _check_masks(update)
    _check_keys(update)
    for name in ("params", *states, *(["fishers"] if steering.fisher_decay is not None else [])):
        refuse_twice(name, lists[name].tensors)


def _check_dtypes(i: int, tensors: dict[str, Tensor], states: Sequence[str], implementation: str) -> None:
    dtype = tensors["params"].dtype
    if dtype == torch.float64 and implementation == "triton":
        raise TypeError(
            f'params[{i}]: the Triton kernel takes float32, bfloat16 or float16, got float64; pass impl="torch"'
        )
    wide = accumulator(dtype)
    allowed = dict.fromkeys(tensors, frozenset({dtype, wide})) | {"fishers": frozenset({wide})}
    if wide != torch.float64:
        allowed["grads"] = frozenset({torch.float32, torch.bfloat16, torch.float16})
    for name in states[1:]:
        allowed[name] = frozenset({tensors[states[0]].dtype})
    for name, tensor in tensors.items():
        if tensor.dtype not in allowed[name]:
            expected = " or ".join(sorted(str(dtype)[6:] for dtype in allowed[name]))
            raise TypeError(f"{name}[{i}]: expected {expected} beside parameters of {dtype}, got {tensor.dtype}")


def _check_options(steering: Steering) -> None:
    if steering.needs_fisher and steering.fishers is None:
        raise ValueError("fishers: expected a tensor for every parameter, which the other options need, got None")
    if steering.ewc_lambda and steering.anchors is None:
        raise ValueError("anchors: expected a tensor for every parameter, which ewc_lambda needs, got None")
    if steering.soft_weight and steering.mean_fisher is None:
        raise ValueError("mean_fisher: expected a number, which soft_weight needs, got None")
    steering.check_numbers()


def _check_masks(update: Update) -> None:
    masks = update.steering.masks
    if masks is None:
        return
    if len(masks) != len(update.params):
        raise ValueError(f"masks: expected {len(update.params)} tensors, one for each of params, got {len(masks)}")
    for i, (param, mask) in enumerate(zip(update.params, masks, strict=True)):
        _check_vector(f"masks[{i}]", mask, torch.uint8, -(-param.numel() // 8), param.device)


def _check_keys(update: Update) -> None:
    if update.rounding_keys is not None and update.params:
        _check_vector("rounding_keys", update.rounding_keys, torch.int64, len(update.params), update.params[0].device)


def _check_vector(name: str, vector: Tensor, dtype: torch.dtype, size: int, device: torch.device) -> None:
    if vector.dtype != dtype:
        raise TypeError(f"{name}: expected {dtype}, got {vector.dtype}")
    if vector.shape != (size,) or not vector.is_contiguous() or vector.device != device:
        raise ValueError(
            f"{name}: expected a contiguous [{size}] on {device} like params, got shape {tuple(vector.shape)}, strides "
            f"{vector.stride()} on {vector.device}"
        )


def scalar(value: float | Tensor) -> float | Tensor:
    """A number of the host as a float; one on a device as a tensor without dimensions, which nobody waits for."""
    return value.reshape(()) if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def by_dtype(lists: Sequence[Sequence[Tensor]]) -> list[list[list[Tensor]]]:
    """The lists, once for every combination of dtypes that occurs: what a fused operation of torch takes."""
    groups: dict[tuple[torch.dtype, ...], list[tuple[Tensor, ...]]] = {}
    for tensors in zip(*lists, strict=True):
        groups.setdefault(tuple(tensor.dtype for tensor in tensors), []).append(tensors)
    return [[list(tensors) for tensors in zip(*group, strict=True)] for group in groups.values()]


# The Triton path ------------------------------------------------------------------------------------------------------


def soft_scale(steering: Steering) -> float | Tensor:
    """`soft_weight / mean_fisher`, finite; a tensor where the mean is one on a device."""
    if not steering.soft_weight or steering.mean_fisher is None:
        return 0.0
    mean, largest = scalar(steering.mean_fisher), torch.finfo(torch.float32).max
    if isinstance(mean, Tensor):
        return torch.where(mean == 0, 0.0, (steering.soft_weight / mean).clamp(max=largest))
    return min(steering.soft_weight / mean, largest) if mean else 0.0


def device_scalars(scalars: Sequence[Sequence[float]] | Tensor, update: Update) -> Tensor:
    """The optimizer's numbers of every tensor `[n, c]`, and the scale of the soft weight: float32 `[n, c + 1]`."""
    device, soft = update.params[0].device, soft_scale(update.steering)
    if not isinstance(scalars, Tensor):
        if isinstance(soft, float):
            scalars = [[*row, soft] for row in scalars]
        scalars = torch.tensor(scalars, dtype=torch.float32, device="cpu")
        scalars = (scalars.pin_memory() if device.type == "cuda" else scalars).to(device, non_blocking=True)
        if isinstance(soft, float):
            return scalars
    column = soft.float() if isinstance(soft, Tensor) else scalars.new_full((), soft, dtype=torch.float32)
    return torch.cat([scalars.float(), column.expand(len(scalars), 1)], 1)


def ready_tables(update: Update, tables: Sequence[Table] | None, on_device: bool) -> Sequence[Table]:
    """The tables of a launch.

    Args:
        update: The tensors of a step.
        tables: Those that the caller keeps.
        on_device: Whether the optimizer's numbers are.

    Returns:
        `tables`, or new ones.

    Raises:
        ValueError: A CUDA graph is captured, and would read from memory of the host that nobody keeps.
    """
    if (tables is None or not on_device) and update.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
        missing = "tables" if tables is None else "lr or steps"
        expected = "kept tables" if tables is None else "tensors on the device"
        raise ValueError(f"{missing}: expected {expected} while a CUDA graph is captured; make them before")
    return update.tables() if tables is None else tables


def kernel_options(update: Update) -> dict[str, Any]:
    """What every kernel is told about steering."""
    steering = update.steering
    optional = {name: getattr(steering, name) for name in ("fisher_decay", "min_fisher", "max_fisher")}
    return {name: None if value is None else float(value) for name, value in optional.items()} | {
        "ewc_lambda": float(steering.ewc_lambda) or None,
        "masked": steering.masks is not None,
        "soft": bool(steering.soft_weight),
        "keys": update.rounding_keys,
        "maximize": update.maximize,
    }


# The PyTorch path -----------------------------------------------------------------------------------------------------


def update_tensor_(update: Update, i: int, rule: Callable[..., None], soft: float | Tensor) -> None:
    """One step of tensor i in chunks, in float32 (float64), with nothing allocated that is larger than a chunk.

    Args:
        update: The tensors of a step.
        i: Which.
        rule: `rule(theta, grad, *states)`, the optimizer's step in place, with None for states that there are not.
        soft: `soft_scale` of the steering.
    """
    steering, start = update.steering, 0
    fishers = steering.fishers if steering.needs_fisher else None
    anchors = steering.anchors if steering.ewc_lambda else None
    lists = (update.params, update.grads, fishers, anchors, *update.states.values())
    for views in chunks([tensors[i] for tensors in lists if tensors is not None], scratch=0 if update.plain else FREE):
        rest = iter(views)
        pieces = [None if tensors is None else next(rest) for tensors in lists]
        _update_chunk_(update, i, start, rule, soft, *pieces)
        start += len(views[0])


def _update_chunk_(
    update: Update, i: int, start: int, rule: Callable[..., None], soft: float | Tensor, param: Any, grad: Any, fisher: Any,
    anchor: Any, *states: Any,
) -> None:  # fmt: skip
    steering, dtype = update.steering, accumulator(param.dtype)
    theta, grad = param.to(dtype), grad.to(dtype)  # themselves where they have that dtype
    work = [None if state is None else state.to(dtype) for state in states]
    movable = _movable(steering, i, start, fisher, len(param))
    before = param.clone() if theta is param and (steering.soft_weight or movable is not None) else param
    step = -grad if update.maximize else grad
    if anchor is not None:
        step = (theta - anchor).mul_(fisher).mul_(steering.ewc_lambda).add_(step)
    rule(theta, step, *work)
    if steering.soft_weight:
        theta.sub_(before).div_((fisher * soft).add_(1)).add_(before)
    if update.rounding_keys is not None and param.dtype == torch.bfloat16:
        theta = _stochastically_rounded(theta, update.rounding_keys[i : i + 1], start)
    if movable is not None:
        torch.where(movable, theta.to(param.dtype), before, out=param)
    elif theta is not param:
        param.copy_(theta)
    for state, new in zip(states, work, strict=True):
        if new is not state:
            state.copy_(new)
    if steering.fisher_decay is not None:
        fisher.mul_(steering.fisher_decay).addcmul_(grad, grad)


@functools.cache
def _bits_of_bytes(device: torch.device) -> Tensor:
    """The 8 booleans of every byte, lowest bit first, as one int64: `[256]`."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device)
    return bits.bitwise_and_(1).to(torch.bool).view(torch.int64)[:, 0]


def _movable(steering: Steering, i: int, start: int, fisher: Tensor | None, size: int) -> Tensor | None:
    """Which entries of a chunk may move, None for all of them; `start` is a multiple of 8."""
    conditions = []
    if steering.masks is not None:
        mask = steering.masks[i][start // 8 : -(-(start + size) // 8)]
        conditions.append(_bits_of_bytes(mask.device).index_select(0, mask.int()).view(torch.bool)[:size])
    if fisher is not None and steering.min_fisher is not None:
        conditions.append(fisher >= steering.min_fisher)
    if fisher is not None and steering.max_fisher is not None:
        conditions.append(fisher < steering.max_fisher)
    return functools.reduce(Tensor.logical_and_, conditions) if conditions else None


def _stochastically_rounded(x: Tensor, key: Tensor, start: int) -> Tensor:
    """Float32 `x` with the bits of a neighbouring bfloat16; infinity and NaN as they are."""
    bits = random_bits(key, start, start + len(x))[0].bitwise_and_(0xFFFF).add_(x.view(torch.int32))
    return torch.where(x.isfinite(), bits.bitwise_and_(-0x10000).view(torch.float32), x)
