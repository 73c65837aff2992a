"""The tensors of a step in lists, what is checked of them, and the mean of a Fisher over all of them."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from fastforget._parameters import local
from fastforget.ops._dispatch import resolve
from fastforget.ops._exponential_race import row_keys
from fastforget.ops._steering import Steering, Update, check_update
from fastforget.ops._tensor_lists import chunks, same_order
from fastforget.optim._given import Given

if TYPE_CHECKING:
    from fastforget_kernels.tensor_lists import Table

__all__ = ["Bucket", "Checked", "makes_states_only", "mean_fisher", "on_device"]

STEP_BIT, SHARD_BIT = 20, 44  # of a key's number: below are the parameter's and, exact in float32, the step's


@dataclass
class Bucket:
    """The parameters of one group on one device that have a gradient.

    Attributes:
        group: Of `param_groups`.
        names: Of the parameters, for messages.
        params: Local tensors, as all others.
        grads: Gradients in the layout of the parameters.
        states: The optimizer's by their keys, `step` too.
        new: For each parameter the keys of the states that this step begins.
        given: What the parameters were given.
        numbers: Number of each parameter and of its shard, which tell the random bits of any two apart.
    """

    group: dict[str, Any]
    names: list[str] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    states: dict[str, list[Tensor]] = field(default_factory=dict)
    new: list[set[str]] = field(default_factory=list)
    given: list[Given] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def add(
        self, name: str, number: int, parameter: Tensor, state: Mapping[str, Tensor], new: set[str], given: Given
    ) -> None:
        """Take a parameter in.

        Args:
            name: Of the parameter.
            number: Of the parameter.
            parameter: With a gradient.
            state: Its tensors.
            new: The keys of those that this step begins.
            given: What it was given.
        """
        own = local(parameter)
        self.names.append(name)
        self.params.append(own)
        self.grads.append(_gradient(name, parameter.grad, own))
        self.new.append(new)
        self.given.append(given)
        self.numbers.append(number + (_shard(parameter) << SHARD_BIT))
        for key, value in state.items():
            self.states.setdefault(key, []).append(local(value))

    def update(self, steering: Steering, states: Mapping[str, str]) -> Update:
        """The step for an operation, which calls the states by the plural names."""
        fishers, anchors, masks = (
            self.states.get(name) or _all([getattr(given, name) for given in self.given])
            for name in ("fisher", "anchor", "mask")
        )
        steering = dataclasses.replace(
            steering,
            fishers=fishers if steering.needs_fisher else None,
            anchors=anchors,
            masks=masks,
        )
        lists = {plural: self.states.get(key) for key, plural in states.items()}
        return Update(self.params, self.grads, lists, steering, maximize=self.group["maximize"])

    def check(self, update: Update, implementation: str) -> None:
        """Refuse tensors that do not belong together; the error has a note with the parameter's name."""
        try:
            check_update(update, implementation)
        except (TypeError, ValueError) as error:
            numbered = re.search(r"\[(\d+)\]", str(error))
            if numbered:
                error.add_note(f"number {numbered[1]} belongs to {self.names[int(numbered[1])]}")
            raise

    def rounding_keys(self, seed: int, numbers: Tensor) -> Tensor:
        """The keys of this step, `[n]`, on the parameters' device."""
        ids = numbers + (torch.stack(self.states["step"]).long() << STEP_BIT)
        return row_keys(seed, ids).to(self.params[0].device, non_blocking=True)


@dataclass(frozen=True)
class Checked:
    """What is known of a bucket until its tensors change; holds none of them, since gradients have to be freed.

    Attributes:
        layout: Dtypes and strides, and the addresses of all but the gradients.
        implementation: "triton" or "torch".
        numbers: `Bucket.numbers` beside the step counts.
        places: All addresses.
        tables: For Triton, of these addresses.
    """

    layout: list[Any]
    implementation: str
    numbers: Tensor
    places: list[int] = field(default_factory=list)
    tables: list[Table] | None = None

    @staticmethod
    def of(bucket: Bucket, update: Update, impl: str, known: Checked | None) -> Checked:
        """Check a bucket unless it is as it was when it was last checked.

        Args:
            bucket: With at least one parameter.
            update: Its tensors.
            impl: "auto", "triton" or "torch".
            known: What was known in the last step.

        Returns:
            What is known now; `known` itself, where nothing has changed.

        Raises:
            TypeError: A dtype is wrong.
            ValueError: Tensors do not belong together, or `impl` cannot run.
        """
        steering = update.steering
        lists = [update.params, *update.states.values(), steering.fishers, steering.anchors, steering.masks]
        kept = [tensor for tensors in lists for tensor in tensors or ()]
        places = [tensor.data_ptr() for tensor in kept]
        layout: list[Any] = [(tensor.dtype, tensor.stride()) for tensor in itertools.chain(kept, update.grads)]
        layout += [*places, *(tensors and len(tensors) for tensors in lists)]
        if known is None or known.layout != layout:
            if impl == "auto" and update.params[0].dtype == torch.float64:
                impl = "torch"
            implementation, _ = resolve(impl, update.params[0].device)
            bucket.check(update, implementation)
            steps = bucket.states.get("step")
            known = Checked(
                layout, implementation, torch.tensor(bucket.numbers, device=steps[0].device if steps else "cpu")
            )
        places += [grad.data_ptr() for grad in update.grads]
        if known.implementation == "triton" and known.places != places:
            known = dataclasses.replace(known, places=places, tables=update.tables())
        return known


def mean_fisher(fishers: Iterable[tuple[Tensor, Tensor | None]]) -> Tensor:
    """The mean of a Fisher over all parameters, shards included, with float64 sums.

    Args:
        fishers: Every parameter with its local values, None where they are zero.

    Returns:
        One number on the first values' device, which nobody waits for.
    """
    groups: dict[Any, list[Tensor]] = {}
    count = 0
    for parameter, value in fishers:
        count += parameter.numel()
        if value is not None:
            sharded = isinstance(parameter, DTensor)
            placed = (parameter.device_mesh, parameter.placements) if sharded else None
            groups.setdefault((value.device, placed), []).append(value)
    sums = [_sum(tensors, placed) for (_, placed), tensors in groups.items()]
    if not sums:
        return torch.zeros((), dtype=torch.float64, device="cpu")
    return torch.stack([value.to(sums[0].device) for value in sums]).sum() / count


def makes_states_only(buckets: Collection[Bucket]) -> bool:
    """The step with lr = 0 and gradients of zeros by which torch.distributed.checkpoint has an optimizer make its states."""
    rates = [bucket.group["lr"] for bucket in buckets]
    still = not any((isinstance(lr, Tensor) and lr.device.type != "cpu") or bool(lr) for lr in rates)
    return still and not any(bool(grad.any()) for bucket in buckets for grad in bucket.grads)


def on_device(device: torch.device, steering: Steering) -> Steering:
    """The same with the mean Fisher, if it is a tensor, where the parameters are."""
    mean = steering.mean_fisher
    if not isinstance(mean, Tensor) or mean.device == device:
        return steering
    return dataclasses.replace(steering, mean_fisher=mean.to(device))


def _sum(tensors: list[Tensor], placed: Any) -> Tensor:
    """Sum of values >= 0 in float64, over all shards."""
    if tensors[0].is_cuda:
        norms = torch._foreach_norm(tensors, 1, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
        total = torch.stack(norms).sum()
    else:
        pieces = (piece for tensor in tensors for (piece,) in chunks([tensor], scratch=2))
        total = torch.stack([piece.sum(dtype=torch.float64) for piece in pieces]).sum()
    if placed is None:
        return total
    mesh, placements = placed
    kinds = [placement if isinstance(placement, Replicate) else Partial() for placement in placements]
    return DTensor.from_local(total, mesh, kinds, run_check=False).full_tensor()


def _all(tensors: list[Tensor | None]) -> list[Tensor] | None:
    return None if tensors[0] is None else tensors  # pyright: ignore[reportReturnType]


def _gradient(name: str, grad: Tensor | None, own: Tensor) -> Tensor:
    if grad is None or grad.layout != torch.strided:
        raise ValueError(
            f"{name}: expected a dense gradient, got a sparse one; leave out sparse=True where it comes from"
        )
    grad = local(grad)
    return grad if same_order(own, grad) else torch.empty_like(own, dtype=grad.dtype).copy_(grad)


def _shard(parameter: Tensor) -> int:
    """Number of this process's shard; copies have one."""
    number = 0
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        places = zip(mesh.shape, mesh.get_coordinate() or (), parameter.placements, strict=True)
        for size, coordinate, placement in places:
            if not isinstance(placement, Replicate):
                number = number * size + coordinate
    return number
