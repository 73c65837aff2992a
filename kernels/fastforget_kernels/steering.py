r"""What a Fisher does to the step of an optimizer, entry by entry, in the registers of the optimizer's kernel.

    g       = +-grad + ewc_lambda F (theta - anchor)           pull towards an anchor, F as it stands before the step
    theta'  = the optimizer's step from theta with g, weight decay included
    w       = 1 / (1 + soft F)                                 soft = soft_weight / mean_fisher
    theta   = theta + w (theta' - theta)   where mask and F >= min_fisher and F < max_fisher; else theta, bit for bit
    F       = fisher_decay F + grad^2

bfloat16 parameters can be rounded stochastically: 16 random bits are added to the float32 value below the last bit that
is kept, the rest is cut off. The mean over the bits is the float32 value, so that steps smaller than half of a bfloat16's
last place are not lost. The bits are a function of the tensor's key and of the entry alone.

What is None or false costs nothing: it is a constant of the compilation.

References: Kirkpatrick et al., arXiv 1612.00796 (the pull: elastic weight consolidation); Gupta et al., arXiv 1502.02551
(stochastic rounding).
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportOptionalMemberAccess=false
# pyright: reportOptionalOperand=false, reportAttributeAccessIssue=false
# (a helper of a kernel is called by the compiler: in Python the call raises, so that pyright sees no result)

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastforget_kernels.arithmetic import cast
from fastforget_kernels.exponential_race import random_bits
from fastforget_kernels.tensor_lists import NUM_WARPS

__all__ = ["LAUNCH", "load", "save", "steered_gradient", "steered_save"]

# Left alone, NVIDIA's assembler spills a register here and there for more programs at once; two a multiprocessor at 128
# registers have 64 KB of loads under way, twice what the memory's latency asks for.
LAUNCH = {"num_warps": NUM_WARPS} | ({} if torch.version.hip else {"maxnreg": 128})


@triton.jit
def load(ptr, offs, mask):
    """Elements `offs`, in float32."""
    return tl.load(ptr + offs, mask=mask).to(tl.float32)


@triton.jit
def save(ptr, offs, x, mask):
    """Float32 `x` rounded to the nearest."""
    tl.store(ptr + offs, cast(x, ptr.dtype.element_ty), mask=mask)


@triton.jit
def steered_gradient(
    grad_ptr, fisher_ptr, anchor_ptr, offs, mask, theta, ewc_lambda, fisher_decay,
    FISHER: tl.constexpr, MAXIMIZE: tl.constexpr,
):  # fmt: skip
    """The gradient with its pull, and F as it stood; what is stored is F with the raw gradient's square."""
    grad = load(grad_ptr, offs, mask)
    fisher = load(fisher_ptr, offs, mask) if FISHER else 0.0
    if fisher_decay is not None:
        save(fisher_ptr, offs, fisher_decay * fisher + grad * grad, mask)
    if MAXIMIZE:
        grad = -grad
    if ewc_lambda is not None:
        grad += ewc_lambda * fisher * (theta - load(anchor_ptr, offs, mask))
    return grad, fisher


@triton.jit
def _stochastically_rounded(x, key, element):
    """Float32 `x` as a neighbouring bfloat16 in float32; infinity and NaN as they are."""
    noise = random_bits(key.to(tl.uint32), (key >> 32).to(tl.uint32), element.to(tl.uint32)) & 0xFFFF
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + noise) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def steered_save(
    param_ptr, mask_ptr, offs, mask, start, before, theta, fisher, soft, key, min_fisher, max_fisher,
    MASKED: tl.constexpr, SOFT: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Stores `theta` for `before`, weighted, rounded, and where it may move; `start` is the number of entry 0 of `offs`."""
    if SOFT:
        old = before.to(tl.float32)
        theta = old + (theta - old) / (1.0 + soft * fisher)
    if ROUNDED:
        theta = _stochastically_rounded(theta, key, start + offs)
    # Selected in the parameter's own dtype: a masked store would be narrow, and a NaN's bits would not survive a cast.
    after = cast(theta, param_ptr.dtype.element_ty)
    if MASKED:
        after = tl.where((tl.load(mask_ptr + offs // 8, mask=mask) >> (offs % 8)) & 1 != 0, after, before)
    if min_fisher is not None:
        after = tl.where(fisher >= min_fisher, after, before)
    if max_fisher is not None:
        after = tl.where(fisher < max_fisher, after, before)
    tl.store(param_ptr + offs, after, mask=mask)
