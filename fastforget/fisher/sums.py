"""Where the sums of squared gradients are kept: beside the parameter, in pinned memory, or sharded like it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from fastforget.fisher.reductions import Squares
from fastforget.ops import square_accumulate_

__all__ = ["Sums", "accumulator_dtype"]


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for float32 and lower, float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Sums:
    """One accumulator a parameter.

    Args:
        parameters: By name; a DTensor's accumulator is sharded like it.
        offload: Keep them in (pinned) CPU memory; each is brought to the parameter's device while it is added to.
    """

    def __init__(self, parameters: Mapping[str, Tensor], offload: bool = False) -> None:
        self.parameters = dict(parameters)
        self.tensors: dict[str, Tensor] = {}
        self.adding = False
        """`add_squares` has begun and not ended."""
        for name, parameter in self.parameters.items():
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            moved = offload and local.device.type != "cpu"
            self.tensors[name] = torch.zeros(
                local.shape,
                dtype=accumulator_dtype(local.dtype),
                device="cpu" if moved else local.device,
                pin_memory=moved and local.device.type == "cuda",
            )

    @property
    def dtype(self) -> torch.dtype:
        """Of the accumulators."""
        return next(iter(self.tensors.values())).dtype

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[Tensor]:
        """The accumulator of `name` in the parameter's full shape on its device, to be added to.

        Under FSDP2 this is a collective: what every rank added is summed up and scattered.

        Args:
            name: The parameter's.

        Yields:
            The accumulator, or an empty one whose content is added to it afterwards.
        """
        parameter, total = self.parameters[name], self.tensors[name]
        if isinstance(parameter, DTensor):
            device = parameter.to_local().device
            added = torch.zeros(parameter.shape, dtype=total.dtype, device=device)
            yield added
            mesh = parameter.device_mesh
            partial = DTensor.from_local(added, mesh, [Partial()] * mesh.ndim, run_check=False)
            total += partial.redistribute(placements=parameter.placements).to_local().to(total.device)
        else:
            moved = total.to(parameter.device, non_blocking=True)
            yield moved
            if moved is not total:
                total.copy_(moved, non_blocking=True)

    @contextlib.contextmanager
    def reduction(self, name: str) -> Iterator[Squares]:
        """Adds the squares of per-example gradients to the accumulator of `name`.

        Args:
            name: The parameter's.

        Yields:
            The reduction.
        """
        with self.whole(name) as fisher:
            yield Squares(fisher)

    def add_squares(self, gradients: Mapping[str, Tensor], impl: str) -> None:
        """Add the squares of gradients.

        Args:
            gradients: By name; sharded like their parameters under FSDP2.
            impl: "auto", "triton" or "torch".
        """
        self.adding = True
        here = {name: grad for name, grad in gradients.items() if self.tensors[name].device == grad.device}
        square_accumulate_([self.tensors[name] for name in here], list(here.values()), impl=impl)
        for name in gradients.keys() - here.keys():  # offloaded
            with self.whole(name) as fisher:
                square_accumulate_([fisher], [gradients[name]], impl=impl)
        self.adding = False
