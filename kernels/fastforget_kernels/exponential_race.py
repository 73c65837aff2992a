r"""Random arrival times of the classes of a row: the first to arrive is a draw from the softmax of its logits.

    bits_sv = triple32(v ^ low(key_s)), the other half of the 64-bit key_s xored in after its first round
    u_sv = min((bits_sv + 1/2) 2^-32, 1 - 2^-24),    E_sv = -log(1 - u_sv),    t_sv = E_sv exp(m_s - z_sv)

E is exponential, so that t_sv is exponential with rate proportional to exp z_sv and argmin_v t_sv is a draw from
softmax(z_s). This is the Gumbel-max trick without its second logarithm: -log E_sv is Gumbel noise g_sv, and
log t_sv = m_s - (z_sv + g_sv), whatever the shift m_s >= max_v z_sv. The bits are a function of key and class alone: the
same whatever the tiling. Small u, those that win, are 2^-32 apart: a class of probability p >= 2^-30 is drawn with
probability p within 0.3%.

Three multiplications and nine shifts or logical operations a number. Philox makes four numbers of twenty wide
multiplications; a thread would drop three of them, or numbers would have to cross the accumulator's layout.
`fastforget.ops._exponential_race` makes the keys, and the same numbers in PyTorch.

References: Maddison, Tarlow and Minka, "A* Sampling", arXiv 1411.0030 (Gumbel-max); Wellons, "Prospecting for Hash
Functions", nullprogram.com, 2018 (triple32).
"""

# pyright: reportGeneralTypeIssues=false
# (a helper of a kernel is called by the compiler: in Python the call raises, so that pyright sees no result)

from __future__ import annotations

import triton
import triton.language as tl

from fastforget_kernels.arithmetic import INTERPRETING, LOG2_E

__all__ = ["arrival_times", "random_bits"]


@triton.jit
def random_bits(low, high, v):
    """32 random bits of class `v` under the key with these two halves; all uint32."""
    x = v ^ low
    x ^= x >> 17
    x *= 0xED5AD4BB
    x ^= (x >> 11) ^ high
    x *= 0xAC4C1B51
    x ^= x >> 15
    x *= 0x31848BAB
    return x ^ (x >> 14)


@triton.jit
def _arrival_time(z, low, high, v):
    u = tl.minimum(random_bits(low, high, v).to(tl.float32) * 2.0**-32 + 2.0**-33, 1.0 - 2.0**-24)
    # 1 - u = (1 + f) 2^e with |f| <= 1/3; where e = 0, f = -u has the bits that 1 - u rounds away.
    bits = (1.0 - u).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) & -0x800000  # e 2^23
    f = tl.where(u < 1 / 3, -u, (bits - exponent).to(tl.float32, bitcast=True) - 1.0)
    # The minimax polynomial of (log(1 + f) - f) / f^2, good for 6e-8 of log(1 + f): tl.log has special cases to care for.
    log = 0.13425749011418575 * f - 0.15040763723064413
    log = log * f + 0.1411830990265524
    log = log * f - 0.16483017533211697
    log = log * f + 0.20003780322455603
    log = log * f - 0.25004146193660076
    log = log * f + 0.33333320168349617
    log = log * f - 0.49999985561484706
    log = log * f * f + f + exponent.to(tl.float32) * (2.0**-23 / LOG2_E)
    return -log * tl.exp2(tl.minimum(z * -LOG2_E, 120.0))  # 2^120 is late enough, and does not overflow


@triton.jit
def arrival_times(z, key, v):
    """Arrival times in float32 for every int64 `key` and class `v`; `z` are logits minus a shift that none of them passes."""
    low = key.to(tl.uint32)
    high = (key >> 32).to(tl.uint32)
    # Element by element: a whole tile's integers would not fit the registers beside the logits.
    if INTERPRETING:
        return _arrival_time(z, low, high, v.to(tl.uint32))
    else:
        return tl.map_elementwise(_arrival_time, z, low, high, v.to(tl.uint32))
