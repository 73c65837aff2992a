"""What a fused operation registers for the gates: see `kernel_registry`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

POINTER = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Compilation:
    """One kernel with the types, constants and launch options of one shipped configuration."""

    label: str
    kernel: Any
    types: dict[str, str]  # by argument; a missing one is a constant
    constants: dict[str, Any]
    options: dict[str, int]
    tensor_cores: bool
    divisible_by_16: tuple[str, ...] = ()  # besides every pointer


@dataclass(frozen=True)
class Operation:
    """One fused operation: its inputs, both implementations, its oracle and its compilations."""

    name: str
    cases: dict[str, Callable[[torch.dtype], dict[str, Any]]]  # inputs by case
    run: Callable[[dict[str, Any], str], dict[str, Tensor]]  # inputs, impl -> outputs and gradients
    oracle: Callable[[dict[str, Any]], dict[str, Tensor]]  # in the dtype of the inputs
    compilations: Callable[[str], Iterator[Compilation]]
    dtypes: tuple[torch.dtype, ...] = field(default=(torch.float32, torch.bfloat16, torch.float16))
