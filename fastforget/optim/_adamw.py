"""AdamW whose step a Fisher, an anchor or a mask steers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from fastforget.ops._adamw import AdamWNumbers, adamw_step_
from fastforget.ops._steering import Update
from fastforget.optim._lists import Bucket
from fastforget.optim._steered import Steered

if TYPE_CHECKING:
    from fastforget_kernels.tensor_lists import Table

__all__ = ["AdamW"]


class AdamW(Steered, torch.optim.AdamW):
    r"""`torch.optim.AdamW` with what a Fisher does to its step, in the same one pass over the parameters.

    With F the Fisher as it stands before the step and g the gradient, clipped or not::

        g      = g + ewc_lambda F (theta - anchor)
        theta' = AdamW's step from theta with g, weight decay included
        theta  = theta + (theta' - theta) / (1 + soft_weight F / mean(F))   where mask and min_fisher <= F < max_fisher
        F      = fisher_decay F + g^2, if fisher_decay is given, with g as it came

    An entry that may not move keeps its bits; its moments are updated. `mean(F)` is that over all parameters. Without these
    options the bits are those of `torch.optim.AdamW` for float32 on a CPU; in lower dtypes arithmetic is in float32. The
    state dict is torch's: either loads the other's, and goes on. Parameters without a gradient are skipped.

    Args:
        params: A model, `model.named_parameters()`, or whatever `torch.optim` takes; named, where tensors belong to them.
        *args: `lr`, `betas`, `eps`, `weight_decay` and `amsgrad`, as in torch.
        fisher: An estimator, a `{name: tensor}`, or a saved file's path. Tensors that fit are not copied.
        fisher_decay: Accumulate F, from `fisher` or zero, in float32 in the optimizer's state.
        anchor: A model, a `{name: tensor}`, the path of a model's safetensors or their folder, or "initial" for a copy of the
            parameters as they are now, which is kept in the state so that a run that resumes has it. Tensors that fit are
            not copied, unless they are the parameters themselves.
        ewc_lambda: Strength of the pull to the anchor, which needs one; 0 pulls not.
        mask: A `{name: bool tensor}` or a saved mask's path, True = may move; kept with eight entries a byte.
        min_fisher: Only entries with F >= min_fisher move.
        max_fisher: Only entries with F < max_fisher move.
        soft_weight: Weighs the update.
        state_dtype: `torch.float32`: moments of parameters of lower dtypes in float32; None: in the parameter's dtype.
        stochastic_rounding: Round bfloat16 parameters so that the mean is right, and small steps are not lost; the random
            bits are a function of the seed, the step, and the parameter's and the entry's number (in its shard).
        seed: Of the rounding.
        impl: "auto", "triton" or "torch".
        **options: `foreach` (without effect), `maximize`, `capturable`, `differentiable` and `fused`, as in torch.

    Raises:
        TypeError: A tensor has the wrong dtype, or something is none of the allowed kinds.
        ValueError: A number is outside its range, an option lacks what it needs, a name or a tensor is missing, or a tensor
            does not fit its parameter.

    References:
        Loshchilov and Hutter, arXiv 1711.05101 (AdamW). Kirkpatrick et al., arXiv 1612.00796 (the pull: elastic weight
        consolidation). Sung, Nair and Raffel, arXiv 2111.09839 (masks of a Fisher).
    """

    STATES: ClassVar[dict[str, str]] = {
        "exp_avg": "exp_avgs", "exp_avg_sq": "exp_avg_sqs", "max_exp_avg_sq": "max_exp_avg_sqs",
    }  # fmt: skip
    BASE = torch.optim.AdamW

    def _keys(self, group: dict[str, Any]) -> list[str]:
        keys = ["step", "exp_avg", "exp_avg_sq"]
        keys += ["max_exp_avg_sq"] * group["amsgrad"]
        return keys + self._own

    def _apply(self, bucket: Bucket, update: Update, implementation: str, tables: Sequence[Table] | None) -> None:
        group = bucket.group
        beta1, beta2 = group["betas"]
        numbers = AdamWNumbers(
            group["lr"], (float(beta1), float(beta2)), group["eps"], group["weight_decay"], bool(group["fused"])
        )
        adamw_step_(update, bucket.states["step"], numbers, implementation, tables)
