r"""One step of AdamW for a whole model, with what a Fisher does to it, in one launch a combination of dtypes.

    g      = the steered gradient                                    (see `steering`)
    m      = beta1 m + (1 - beta1) g
    v      = beta2 v + (1 - beta2) g^2,      vmax = max(vmax, v)     (AMSGrad; else vmax is v)
    theta' = kept theta - step m / (sqrt(vmax) / root + eps)
    theta  = the steered step from theta to theta'

kept = 1 - lr weight_decay, step = lr / (1 - beta1^t) and root = sqrt(1 - beta2^t) of every tensor are read from memory, so
that a learning rate and a step count may live on the device. Arithmetic is in float32, whatever the dtypes.

Bytes an element, float32 throughout: 28; 22 with bfloat16 parameters and gradients. Besides: AMSGrad 8, a Fisher 4 (8 where
it is updated), an anchor 4 or 2, a mask 1/8. Flops about 15.

References: Loshchilov and Hutter, arXiv 1711.05101 (AdamW); Reddi, Kale and Kumar, arXiv 1904.09237 (AMSGrad).
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps, which is no parameter of the kernel's Python function, and plain values for constants)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.steering import LAUNCH, load, save, steered_gradient, steered_save
from fastforget_kernels.tensor_lists import (
    BLOCK,
    CHUNK,
    TRITON_DTYPE,
    Table,
    address,
    locate,
    place,
)  # fmt: skip

__all__ = ["adamw_"]


@triton.jit
def _adamw_block(
    pointers, offs, mask, start, scalars, key, beta1, rate1, beta2, rate2, eps, ewc_lambda, fisher_decay, min_fisher,
    max_fisher, AMSGRAD: tl.constexpr, FISHER: tl.constexpr, MASKED: tl.constexpr, SOFT: tl.constexpr,
    ROUNDED: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    param_ptr, grad_ptr, exp_avg_ptr, exp_avg_sq_ptr, max_exp_avg_sq_ptr, fisher_ptr, anchor_ptr, mask_ptr = pointers
    kept, step, inverse_root, soft = scalars
    before = tl.load(param_ptr + offs, mask=mask)
    theta = before.to(tl.float32)
    grad, fisher = steered_gradient(
        grad_ptr, fisher_ptr, anchor_ptr, offs, mask, theta, ewc_lambda, fisher_decay, FISHER, MAXIMIZE
    )
    exp_avg = beta1 * load(exp_avg_ptr, offs, mask) + rate1 * grad
    save(exp_avg_ptr, offs, exp_avg, mask)
    exp_avg_sq = beta2 * load(exp_avg_sq_ptr, offs, mask) + rate2 * grad * grad
    save(exp_avg_sq_ptr, offs, exp_avg_sq, mask)
    if AMSGRAD:
        exp_avg_sq = tl.maximum(load(max_exp_avg_sq_ptr, offs, mask), exp_avg_sq, tl.PropagateNan.ALL)
        save(max_exp_avg_sq_ptr, offs, exp_avg_sq, mask)
    theta = kept * theta - step * exp_avg / (tl.sqrt(exp_avg_sq) * inverse_root + eps)
    steered_save(
        param_ptr, mask_ptr, offs, mask, start, before, theta, fisher, soft, key, min_fisher, max_fisher, MASKED, SOFT,
        ROUNDED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "bisections"])
def _adamw_kernel(
    table_ptr, tensors, bisections, scalars_ptr, keys_ptr, beta1, rate1, beta2, rate2, eps, ewc_lambda, fisher_decay,
    min_fisher, max_fisher,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, ANCHOR_DTYPE: tl.constexpr,
    AMSGRAD: tl.constexpr, FISHER: tl.constexpr, MASKED: tl.constexpr, SOFT: tl.constexpr, ROUNDED: tl.constexpr,
    MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start, size = locate(table_ptr, tensors, bisections, CHUNK)
    pointers = (
        address(table_ptr, tensors, tensor, 0, PARAM_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 1, GRAD_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 2, STATE_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 3, STATE_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 4, STATE_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 5, tl.float32, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 6, ANCHOR_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 7, tl.uint8, ALIGNED) + start // 8,
    )
    i = place(table_ptr, tensors, tensor, 8)
    scalars = scalars_ptr + 4 * i
    scalars = (tl.load(scalars), tl.load(scalars + 1), 1.0 / tl.load(scalars + 2), tl.load(scalars + 3))
    key = tl.load(keys_ptr + i) if ROUNDED else 0
    # No mask but at the end: a mask of unknown alignment would make the accesses narrow.
    full = size // BLOCK
    for block in range(full):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        _adamw_block(
            pointers, offs, None, start, scalars, key, beta1, rate1, beta2, rate2, eps, ewc_lambda, fisher_decay,
            min_fisher, max_fisher, AMSGRAD, FISHER, MASKED, SOFT, ROUNDED, MAXIMIZE,
        )  # fmt: skip
    offs = full * BLOCK + tl.arange(0, BLOCK)
    _adamw_block(
        pointers, offs, offs < size, start, scalars, key, beta1, rate1, beta2, rate2, eps, ewc_lambda, fisher_decay,
        min_fisher, max_fisher, AMSGRAD, FISHER, MASKED, SOFT, ROUNDED, MAXIMIZE,
    )  # fmt: skip


def adamw_(
    tables: Sequence[Table], scalars: Tensor, betas: tuple[float, float], eps: float, *, keys: Tensor | None,
    ewc_lambda: float | None, fisher_decay: float | None, min_fisher: float | None, max_fisher: float | None,
    amsgrad: bool, masked: bool, soft: bool, maximize: bool,
) -> None:  # fmt: skip
    """One step, in place; allocates nothing.

    Args:
        tables: Of eight lists: parameters, gradients, m, v, vmax, fishers, anchors and masks; of an absent one, any list.
            m, v and vmax have one dtype, fishers are float32, masks hold 8 entries a byte, the first in its lowest bit.
        scalars: `[n, 4]` float32, of every tensor: kept, step, root, soft.
        betas: beta1 and beta2.
        eps: Added to the denominator.
        keys: `[n]` int64: bfloat16 parameters are rounded stochastically; None for to the nearest.
        ewc_lambda: Strength of the pull; None for none.
        fisher_decay: Factor of the updated Fisher; None for one that stays.
        min_fisher: Least F that may move; None for any.
        max_fisher: Least F that may not; None for any.
        amsgrad: Divide by the largest v so far.
        masked: Entries whose bit is 0 do not move.
        soft: Weigh the update with 1 / (1 + soft F).
        maximize: Negate the gradient.
    """
    beta1, beta2 = betas
    fisher = soft or any(value is not None for value in (ewc_lambda, fisher_decay, min_fisher, max_fisher))
    for table in tables:
        param, grad, state, *_, anchor, _ = (TRITON_DTYPE[dtype] for dtype in table.dtypes)
        _adamw_kernel[(table.chunks,)](
            table.entries, table.tensors, table.bisections, scalars, keys, beta1, 1 - beta1, beta2, 1 - beta2, eps,
            ewc_lambda, fisher_decay, min_fisher, max_fisher,
            PARAM_DTYPE=param, GRAD_DTYPE=grad, STATE_DTYPE=state, ANCHOR_DTYPE=anchor, AMSGRAD=amsgrad,
            FISHER=fisher, MASKED=masked, SOFT=soft,
            ROUNDED=keys is not None and param == tl.bfloat16, MAXIMIZE=maximize, ALIGNED=table.aligned, CHUNK=CHUNK,
            BLOCK=BLOCK, **LAUNCH,
        )  # fmt: skip
