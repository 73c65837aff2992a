r"""One step of SGD for a whole model, with what a Fisher does to it, in one launch a combination of dtypes.

    g      = the steered gradient + weight_decay theta               (see `steering`)
    b      = momentum b + (1 - dampening) g,     g in the first step
    theta' = theta - lr b,                       theta - lr (g + momentum b) with Nesterov's momentum
    theta  = the steered step from theta to theta'

Without momentum b is g and is not stored. lr is read from memory, so that it may live on the device. Arithmetic is in
float32, whatever the dtypes.

Bytes an element, float32 throughout: 12, with momentum 20. Besides: a Fisher 4 (8 where it is updated), an anchor 4 or 2, a
mask 1/8. Flops about 8.

References: Sutskever et al., "On the importance of initialization and momentum in deep learning", ICML 2013; the form of
`torch.optim.SGD`.
"""

# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportArgumentType=false
# (a launch passes num_warps, which is no parameter of the kernel's Python function, and plain values for constants)

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from fastforget_kernels.steering import LAUNCH, load, save, steered_gradient, steered_save
from fastforget_kernels.tensor_lists import BLOCK, CHUNK, TRITON_DTYPE, Table, address, locate, place

__all__ = ["sgd_"]


@triton.jit
def _sgd_block(
    pointers, offs, mask, start, scalars, key, momentum, rate, weight_decay, ewc_lambda, fisher_decay, min_fisher,
    max_fisher, NESTEROV: tl.constexpr, FISHER: tl.constexpr, MASKED: tl.constexpr, SOFT: tl.constexpr,
    ROUNDED: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    param_ptr, grad_ptr, buffer_ptr, fisher_ptr, anchor_ptr, mask_ptr = pointers
    lr, first, soft = scalars
    before = tl.load(param_ptr + offs, mask=mask)
    theta = before.to(tl.float32)
    step, fisher = steered_gradient(
        grad_ptr, fisher_ptr, anchor_ptr, offs, mask, theta, ewc_lambda, fisher_decay, FISHER, MAXIMIZE
    )
    if weight_decay is not None:
        step += weight_decay * theta
    if momentum is not None:
        # In the first step the buffer may hold anything, NaN included.
        buffer = tl.where(first != 0, step, momentum * load(buffer_ptr, offs, mask) + rate * step)
        save(buffer_ptr, offs, buffer, mask)
        step = step + momentum * buffer if NESTEROV else buffer
    steered_save(
        param_ptr, mask_ptr, offs, mask, start, before, theta - lr * step, fisher, soft, key, min_fisher, max_fisher,
        MASKED, SOFT, ROUNDED,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tensors", "bisections"])
def _sgd_kernel(
    table_ptr, tensors, bisections, scalars_ptr, keys_ptr, momentum, rate, weight_decay, ewc_lambda, fisher_decay,
    min_fisher, max_fisher,
    PARAM_DTYPE: tl.constexpr, GRAD_DTYPE: tl.constexpr, STATE_DTYPE: tl.constexpr, ANCHOR_DTYPE: tl.constexpr,
    NESTEROV: tl.constexpr, FISHER: tl.constexpr, MASKED: tl.constexpr, SOFT: tl.constexpr, ROUNDED: tl.constexpr,
    MAXIMIZE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    tensor, start, size = locate(table_ptr, tensors, bisections, CHUNK)
    pointers = (
        address(table_ptr, tensors, tensor, 0, PARAM_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 1, GRAD_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 2, STATE_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 3, tl.float32, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 4, ANCHOR_DTYPE, ALIGNED) + start,
        address(table_ptr, tensors, tensor, 5, tl.uint8, ALIGNED) + start // 8,
    )
    i = place(table_ptr, tensors, tensor, 6)
    scalars = scalars_ptr + 3 * i
    scalars = (tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2))
    key = tl.load(keys_ptr + i) if ROUNDED else 0
    # No mask but at the end: a mask of unknown alignment would make the accesses narrow.
    full = size // BLOCK
    for block in range(full):
        offs = block * BLOCK + tl.arange(0, BLOCK)
        _sgd_block(
            pointers, offs, None, start, scalars, key, momentum, rate, weight_decay, ewc_lambda, fisher_decay,
            min_fisher, max_fisher, NESTEROV, FISHER, MASKED, SOFT, ROUNDED, MAXIMIZE,
        )  # fmt: skip
    offs = full * BLOCK + tl.arange(0, BLOCK)
    _sgd_block(
        pointers, offs, offs < size, start, scalars, key, momentum, rate, weight_decay, ewc_lambda, fisher_decay,
        min_fisher, max_fisher, NESTEROV, FISHER, MASKED, SOFT, ROUNDED, MAXIMIZE,
    )  # fmt: skip


def sgd_(
    tables: Sequence[Table], scalars: Tensor, *, momentum: float | None, dampening: float, weight_decay: float | None,
    nesterov: bool, keys: Tensor | None, ewc_lambda: float | None, fisher_decay: float | None, min_fisher: float | None,
    max_fisher: float | None, masked: bool, soft: bool, maximize: bool,
) -> None:  # fmt: skip
    """One step, in place; allocates nothing.

    Args:
        tables: Of six lists: parameters, gradients, buffers, fishers, anchors and masks; of an absent one, any list. Fishers
            are float32, masks hold 8 entries a byte, the first in its lowest bit.
        scalars: `[n, 3]` float32, of every tensor: lr, 1 in its first step and else 0, soft.
        momentum: Factor of the buffer; None for no buffer.
        dampening: 1 minus the factor of the gradient in the buffer.
        weight_decay: Factor of the parameter in the gradient; None for 0.
        nesterov: Step along g + momentum b.
        keys: `[n]` int64: bfloat16 parameters are rounded stochastically; None for to the nearest.
        ewc_lambda: Strength of the pull; None for none.
        fisher_decay: Factor of the updated Fisher; None for one that stays.
        min_fisher: Least F that may move; None for any.
        max_fisher: Least F that may not; None for any.
        masked: Entries whose bit is 0 do not move.
        soft: Weigh the update with 1 / (1 + soft F).
        maximize: Negate the gradient.
    """
    fisher = soft or any(value is not None for value in (ewc_lambda, fisher_decay, min_fisher, max_fisher))
    for table in tables:
        param, grad, state, _, anchor, _ = (TRITON_DTYPE[dtype] for dtype in table.dtypes)
        _sgd_kernel[(table.chunks,)](
            table.entries, table.tensors, table.bisections, scalars, keys, momentum, 1 - dampening, weight_decay,
            ewc_lambda, fisher_decay, min_fisher, max_fisher,
            PARAM_DTYPE=param, GRAD_DTYPE=grad, STATE_DTYPE=state, ANCHOR_DTYPE=anchor, NESTEROV=nesterov,
            FISHER=fisher, MASKED=masked, SOFT=soft, ROUNDED=keys is not None and param == tl.bfloat16,
            MAXIMIZE=maximize, ALIGNED=table.aligned, CHUNK=CHUNK, BLOCK=BLOCK, **LAUNCH,
        )  # fmt: skip
