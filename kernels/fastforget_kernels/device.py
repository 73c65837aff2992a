"""What a launch has to know of the device."""

from __future__ import annotations

import functools

import torch

__all__ = ["cdiv", "device_properties"]


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


@functools.cache
def device_properties(device: torch.device) -> tuple[str, int]:
    """Architecture name and number of multiprocessors."""
    if device.type != "cuda":
        return "sm_90", 4  # the interpreter: few programs, but more than one split
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.split(":")[0], properties.multi_processor_count
    major = {8: "sm_80", 9: "sm_90"}.get(properties.major, "sm_100")
    # Consumer Ampere, Ada and Blackwell have 100 KB of shared memory, where only the small sm_80 tiles fit.
    return ("sm_80" if properties.shared_memory_per_block_optin < 200_000 else major), properties.multi_processor_count
