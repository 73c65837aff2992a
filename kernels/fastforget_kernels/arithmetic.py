"""Arithmetic that every kernel shares."""

from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

__all__ = ["INTERPRETING", "LOG2_E", "cast", "dot", "grouped_tile", "tanh"]

INTERPRETING = tl.constexpr(bool(knobs.runtime.interpret))
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """`acc + a b` with a float32 accumulator; PRECISION ("ieee" or "tf32") is for float32 operands."""
    # The interpreter multiplies the raw bits of bfloat16 operands; the product of two upcast ones is exact in float32.
    if INTERPRETING:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Float32 `x` rounded to the nearest DTYPE, ties to even."""
    if INTERPRETING and tl.bfloat16 == DTYPE:  # the interpreter truncates, and takes subnormals for others
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)
        return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def grouped_tile(pid, rows, columns, GROUP: tl.constexpr):
    """Row and column of tile `pid`: GROUP rows on one column, then the next column, so that neighbours share it in L2."""
    group = pid // (GROUP * columns)
    group_size = tl.minimum(rows - group * GROUP, GROUP)
    within = pid % (GROUP * columns)
    return group * GROUP + within % group_size, within // group_size


@triton.jit
def tanh(x):
    """Hyperbolic tangent in float32 within 2 ulp: Cephes' odd polynomial near 0, where 1 - exp(-2x) cancels."""
    magnitude = tl.abs(x)
    square = x * x
    polynomial = -5.70498872745e-3 * square + 2.06390887954e-2
    polynomial = polynomial * square - 5.37397155531e-2
    polynomial = polynomial * square + 1.33314422036e-1
    polynomial = polynomial * square - 3.33332819422e-1
    near = x + x * square * polynomial
    decay = tl.exp2(magnitude * (-2.0 * LOG2_E))
    far = (1.0 - decay) / (1.0 + decay)
    return tl.where(magnitude < 0.625, near, tl.where(x < 0, -far, far))
