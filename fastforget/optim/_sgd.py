"""SGD whose step a Fisher, an anchor or a mask steers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastforget.ops._sgd import SGDNumbers, sgd_step_
from fastforget.ops._steering import Update
from fastforget.optim._lists import Bucket
from fastforget.optim._steered import Steered

if TYPE_CHECKING:
    from fastforget_kernels.tensor_lists import Table

__all__ = ["SGD"]


class SGD(Steered, torch.optim.SGD):
    r"""`torch.optim.SGD` with what a Fisher does to its step, in the same one pass over the parameters.

    The options after torch's, and what they do, are those of `AdamW`. Without them the bits are those of `torch.optim.SGD`
    for float32 on a CPU. Sparse gradients are torch's own step's, and refused beside the options.

    Args:
        params: A model, `model.named_parameters()`, or whatever `torch.optim` takes.
        *args: `lr`, `momentum`, `dampening`, `weight_decay` and `nesterov`, as in torch.
        fisher: See `AdamW`, as for all that follow.
        fisher_decay: Accumulate F.
        anchor: What the pull is to.
        ewc_lambda: Strength of the pull, which an anchor needs; 0 pulls not.
        mask: Which entries may move.
        min_fisher: Only entries with F >= min_fisher move.
        max_fisher: Only entries with F < max_fisher move.
        soft_weight: Weighs the update.
        state_dtype: Of momentum buffers.
        stochastic_rounding: Round bfloat16 parameters so that the mean is right.
        seed: Of the rounding.
        impl: "auto", "triton" or "torch".
        **options: `maximize`, `foreach` (without effect), `differentiable` and `fused`, as in torch.

    Raises:
        TypeError: As `AdamW`.
        ValueError: As `AdamW`.
    """

    STATES: ClassVar[dict[str, str]] = {"momentum_buffer": "momentum_buffers"}
    BASE = torch.optim.SGD
    SPARSE = True

    def _keys(self, group: dict[str, Any]) -> list[str]:
        keys = ["step"] * (self._seed is not None)  # torch's has none
        keys += ["momentum_buffer"] * bool(group["momentum"])
        return keys + self._own

    def _apply(self, bucket: Bucket, update: Update, implementation: str, tables: Sequence[Table] | None) -> None:
        group = bucket.group
        first = ["momentum_buffer" in new for new in bucket.new]
        numbers = SGDNumbers(
            group["lr"], group["momentum"], group["dampening"], float(group["weight_decay"]), group["nesterov"],
            bool(group["fused"]),
        )  # fmt: skip
        sgd_step_(update, first, numbers, implementation, tables)
