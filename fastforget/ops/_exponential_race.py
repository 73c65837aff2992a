"""Labels drawn by an exponential race, in PyTorch: see `fastforget_kernels.exponential_race` for the construction.

A row's key is number `row_id` of the SplitMix64 generator that starts at `mix(seed)`. Integers wrap around, as they do in
every integer kernel of torch; a logical shift is an arithmetic one without the copies of the sign.

References: Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014 (SplitMix64).
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["arrival_times", "random_bits", "row_keys"]


def row_keys(seed: int, row_ids: Tensor) -> Tensor:
    """The key of every row.

    Args:
        seed: In `[-2^63, 2^63)`.
        row_ids: `[S]` int64.

    Returns:
        `[S]` int64.
    """
    step = 0x9E3779B97F4A7C15
    start = int(_mix(torch.tensor(seed, device="cpu")))  # of the device there is nothing to wait for
    return _mix(row_ids * _signed(step, 64) + _signed(start + step, 64))


def random_bits(keys: Tensor, first: int, last: int) -> Tensor:
    """Random bits of the classes `first` to `last` of every row.

    Args:
        keys: `[R]` int64.
        first: The first class.
        last: The class after the last one; classes are counted modulo 2^32.

    Returns:
        `[R, last - first]` int32, to be read as unsigned.
    """
    low, high = keys.to(torch.int32), (keys >> 32).to(torch.int32)
    x = torch.arange(first, last, dtype=torch.int32, device=keys.device) ^ low[:, None]
    x ^= _shifted(x, 17)
    x *= _signed(0xED5AD4BB, 32)
    x ^= _shifted(x, 11).bitwise_xor_(high[:, None])
    x *= _signed(0xAC4C1B51, 32)
    x ^= _shifted(x, 15)
    x *= _signed(0x31848BAB, 32)
    x ^= _shifted(x, 14)
    return x


def arrival_times(probabilities: Tensor, keys: Tensor, first: int) -> Tensor:
    """When each class arrives: exponential, with its probability as rate; infinite where that is 0.

    Args:
        probabilities: `[R, C]` of the classes from `first` on, up to a factor a row.
        keys: `[R]` int64.
        first: The first class.

    Returns:
        `[R, C]` in the dtype of `probabilities`; the noise is float32 in either case.
    """
    bits = random_bits(keys, first, first + probabilities.shape[1])
    # Not every device has uint32: two exact halves, rounded once by their sum.
    u = _shifted(bits, 16).to(torch.float32).mul_(2.0**-16).add_(bits.bitwise_and_(0xFFFF), alpha=2.0**-32)
    u = u.add_(2.0**-33).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().to(probabilities.dtype).div_(probabilities)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9, 64)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB, 64)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, places: int) -> Tensor:
    return (x >> places).bitwise_and_((1 << (x.dtype.itemsize * 8 - places)) - 1)


def _signed(value: int, bits: int) -> int:
    return (value + (1 << (bits - 1))) % (1 << bits) - (1 << (bits - 1))
