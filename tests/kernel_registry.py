"""Every fused operation and every kernel launch that the gates check. A new operation joins by one entry in OPERATIONS.

Imported by the gate tests, and by `ahead_of_time.py` in a process without the interpreter.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import triton
from fisher_registry import FISHER_OPERATIONS
from kernel_operation import POINTER, Compilation, Operation
from selection_registry import SELECTION_OPERATIONS
from torch import Tensor
from update_registry import UPDATE_OPERATIONS

from fastforget import ops, reference


def interpreter_problem() -> str:
    """Why kernels cannot be interpreted in this process; empty where they can."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        return "TRITON_INTERPRET=1 is not set"
    if triton.__version__.startswith("3.6.") and tuple(map(int, np.__version__.split(".")[:2])) >= (2, 4):
        return "Triton 3.6 interprets with NumPy before 2.4 only"
    return ""


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "gfx942")  # consumer cards of any generation run sm_80's settings


def upcast(inputs: dict[str, Any]) -> dict[str, Any]:
    """The same inputs, floating-point tensors in float64."""
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


# linear_cross_entropy ------------------------------------------------------------------------------------------------


def _head(rows: int, hidden: int, classes: int, **options: Any) -> Callable[[torch.dtype], dict[str, Any]]:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(rows * 1_000_003 + hidden * 1009 + classes)
        size = options.get("size", 1.0)
        target = torch.randint(classes, (rows,), generator=generator)
        target[rows // 2 : rows // 2 + 1] = options.get("ignore_index", -100)
        inputs = {
            "input": (torch.randn(rows, hidden, generator=generator) * size).to(dtype),
            "linear_weight": torch.randn(classes, hidden, generator=generator).to(dtype) / hidden**0.5,
            "target": target,
            "linear_bias": torch.randn(classes, generator=generator).to(dtype) if options.get("bias") else None,
            "softcap": options.get("softcap"),
            "scale": options.get("scale", 1.0),
            "ignore_index": options.get("ignore_index", -100),
            "sample_seed": options.get("sample_seed"),
        }
        return options["change"](inputs) if "change" in options else inputs

    return make


def _all_ignored(inputs: dict[str, Any]) -> dict[str, Any]:
    return inputs | {"target": torch.full_like(inputs["target"], -100)}


def _integer_ties(inputs: dict[str, Any]) -> dict[str, Any]:
    """Small whole numbers: logits are exact in every dtype and tie often, within a tile and across splits."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randint(-1, 2, inputs["linear_weight"].shape, generator=generator)
    rows = torch.randint(-1, 2, inputs["input"].shape, generator=generator)
    best = (rows @ weight.T).max(1).values[:, None] == rows @ weight.T
    order = torch.arange(len(inputs["target"]))
    chosen = torch.where(order % 3 == 0, best.int().argmax(1), best.shape[1] - 1 - best.flip(1).int().argmax(1))
    dtype = inputs["input"].dtype  # every third row asks for the first of its best classes, the others for the last
    return inputs | {"input": rows.to(dtype), "linear_weight": weight.to(dtype), "target": chosen}


def _banned_classes(inputs: dict[str, Any]) -> dict[str, Any]:
    bias = inputs["linear_bias"].clone()
    bias[: len(bias) // 2] = -torch.inf  # the whole first splits of the vocabulary
    return inputs | {"linear_bias": bias, "target": inputs["target"].clamp(min=len(bias) // 2)}


def _shuffled_ids(inputs: dict[str, Any]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    rows = len(inputs["target"])
    return inputs | {"row_ids": torch.randperm(rows, generator=generator) * 2**40 - 2**50}


def _strided(inputs: dict[str, Any]) -> dict[str, Any]:
    weight = torch.stack([inputs["linear_weight"]] * 2, dim=1)[:, 1]  # every second row of a larger tensor
    return inputs | {"input": inputs["input"].T.contiguous().T, "linear_weight": weight}


def _differentiable(inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    names = ("input", "linear_weight", "linear_bias")
    leaves = {name: inputs[name].detach().requires_grad_() for name in names if inputs[name] is not None}
    return inputs | leaves, leaves


def _with_gradients(result: tuple[Tensor, ...], leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    loss, hit, lse, targets = result
    rows = torch.arange(len(loss), device=loss.device)
    objective = (loss * torch.cos(rows.double())).sum() + (lse * torch.sin(rows.double())).sum()
    gradients = torch.autograd.grad(objective, list(leaves.values()))
    named = {f"grad_{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"loss": loss.detach(), "hit": hit, "lse": lse.detach(), "targets": targets, **named}


def _run_linear_cross_entropy(inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    inputs, leaves = _differentiable(inputs)
    return _with_gradients(ops.linear_cross_entropy(**inputs, impl=impl), leaves)


def _oracle_linear_cross_entropy(inputs: dict[str, Any]) -> dict[str, Tensor]:
    labels = reference.linear_cross_entropy(**upcast(inputs))[3]  # the eager expression would draw others in 16 bits
    inputs, leaves = _differentiable(inputs | {"target": labels, "sample_seed": None, "row_ids": None})
    return _with_gradients(reference.linear_cross_entropy(**inputs), leaves)


def _compile_linear_cross_entropy(arch: str) -> Iterator[Compilation]:
    from fastforget_kernels import add_product, logits_tile
    from fastforget_kernels import linear_cross_entropy as kernels

    # bfloat16 and float16 differ in one instruction: float16 is compiled once. H = 100 has no aligned row, 80 no full block.
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    variants = [  # dtype, bias, softcap, hidden, unit stride
        (bf16, False, False, 4096, True),
        (bf16, True, True, 4096, True),
        (bf16, False, True, 2304, True),
        (bf16, True, True, 100, True),
        (bf16, False, False, 80, True),
        (bf16, False, False, 4096, False),
        (fp16, False, False, 4096, True),
        (fp32, True, True, 4096, True),
        (fp32, True, True, 100, True),
        (fp32, False, False, 4096, False),
    ]
    for (dtype, bias, softcap, hidden, unit), mode in itertools.product(variants, ("forward", "sample", "grad_logits")):
        backward, sample = mode == "grad_logits", mode == "sample"
        settings = logits_tile.tile_settings(dtype, hidden, arch, contiguous=unit, stores_tile=backward, samples=sample)
        pointer = POINTER[dtype]
        types = {"input_ptr": pointer, "weight_ptr": pointer, "scale": "fp32", "softcap": "fp32"}
        types |= dict.fromkeys(("S", "H", "V", "stride_input_s", "stride_weight_v"), "i32")
        if bias:
            types["bias_ptr"] = pointer
        if backward:
            types |= {"grad_ptr": pointer, "label_ptr": "*i64", "stride_grad_s": "i32"}
            types |= dict.fromkeys(("lse_ptr", "grad_loss_ptr", "grad_sum_ptr"), "*fp32")
        else:
            types |= {"target_ptr": "*i64", "splits": "i32", "tiles_per_split": "i32", "first_class": "i32"}
            types |= dict.fromkeys(("max_ptr", "sum_ptr", "target_logit_ptr", "max_before_ptr"), "*fp32")
        constants = {} if bias else {"bias_ptr": None}
        if sample:
            types |= {"key_ptr": "*i64", "best_ptr": "*fp32", "label_ptr": "*i32"}
        elif not backward:
            constants |= dict.fromkeys(("key_ptr", "best_ptr", "label_ptr"))
        if not backward:
            constants["SAMPLE"] = sample
        constants |= {"HAS_BIAS": bias, "HAS_SOFTCAP": softcap}
        if unit:
            constants |= {"stride_input_h": 1, "stride_weight_h": 1}
        else:
            types |= {"stride_input_h": "i32", "stride_weight_h": "i32"}
        constants |= {"EVEN_H": hidden % settings.block_h == 0, "PRECISION": "ieee", "BLOCK_S": settings.block_s}
        constants |= {"BLOCK_V": settings.block_v, "BLOCK_H": settings.block_h, "GROUP_S": settings.group_s}
        yield Compilation(
            f"{mode}-{str(dtype)[6:]}{'-bias' * bias}{'-softcap' * softcap}-H{hidden}{'-strided' * (not unit)}",
            kernels._grad_logits_kernel if backward else kernels._forward_kernel,
            types,
            constants,
            {"num_warps": settings.num_warps, "num_stages": settings.num_stages},
            dtype != torch.float32,
            ("H", "stride_input_s", "stride_weight_v") if hidden % 16 == 0 else (),
        )
    for dtype, transposed in itertools.product((torch.bfloat16, torch.float32), (False, True)):
        settings = add_product.product_settings(dtype, arch)
        pointer = POINTER[dtype]
        strides = {"a": ("stride_a_m", "stride_a_k"), "b": ("stride_b_n", "stride_b_k")}
        unit = (strides["a"][0] if transposed else strides["a"][1], "stride_b_n")
        sizes = [n for n in ("M", "N", "K", "stride_out_m", *strides["a"], *strides["b"]) if n not in unit]
        yield Compilation(
            f"add_product-{str(dtype)[6:]}{'-transposed' * transposed}",
            add_product._add_product_kernel,
            {"out_ptr": "*fp32", "a_ptr": pointer, "b_ptr": pointer} | dict.fromkeys(sizes, "i32"),
            dict.fromkeys(unit, 1)
            | {"PRECISION": "ieee", "BLOCK_M": settings.block_m, "BLOCK_N": settings.block_n}
            | {"BLOCK_K": settings.block_k, "GROUP_M": settings.group_m},
            {"num_warps": settings.num_warps, "num_stages": settings.num_stages},
            dtype != torch.float32,
            tuple(sizes),
        )
    pointers = ("loss_ptr", "lse_ptr", "max_ptr", "sum_ptr", "target_logit_ptr", "max_before_ptr")
    for sample, shared in itertools.product((False, True), repeat=2):
        types = dict.fromkeys(pointers, "*fp32") | {"hit_ptr": "*i1", "target_ptr": "*i64"}
        types |= dict.fromkeys(("S", "splits", "split_width"), "i32")
        constants = {"SAMPLE": sample, "BLOCK_S": 128}
        if sample:
            types |= {"best_ptr": "*fp32", "label_ptr": "*i32"}
        else:
            constants |= {"best_ptr": None, "label_ptr": None}
        types |= {"row_max_ptr": "*fp32"} if shared else {}
        types |= {"row_best_ptr": "*fp32"} if shared and sample else {}
        constants |= dict.fromkeys({"row_max_ptr", "row_best_ptr"} - types.keys())
        label = f"merge{'-sample' * sample}{'-shared' * shared}"
        yield Compilation(label, kernels._merge_kernel, types, constants, {"num_warps": 4}, False)


OPERATIONS = (
    Operation(
        "linear_cross_entropy",
        {
            "plain": _head(130, 100, 777),
            "bias, softcap and scale": _head(37, 48, 2501, bias=True, softcap=20.0, scale=0.5),
            "one row": _head(1, 16, 3),
            "no row": _head(0, 24, 50, bias=True),
            "one class": _head(5, 7, 1),
            "all ignored": _head(9, 33, 65, change=_all_ignored),
            "large logits": _head(17, 64, 300, size=40.0),
            "saturated softcap": _head(17, 64, 300, size=40.0, softcap=5.0),
            "ties": _head(70, 8, 900, change=_integer_ties),
            "banned classes": _head(12, 20, 1500, bias=True, change=_banned_classes),
            "ignored class": _head(60, 3, 4, ignore_index=2),
            "strided": _head(40, 30, 200, change=_strided),
            "sampled": _head(130, 100, 777, sample_seed=11),
            "sampled, everything": _head(
                41, 48, 2501, bias=True, softcap=20.0, scale=0.5, sample_seed=2**62, change=_shuffled_ids
            ),
            "sampled, one row": _head(1, 16, 3, sample_seed=-1),
            "sampled, no row": _head(0, 24, 50, bias=True, sample_seed=0),
            "sampled, one class": _head(5, 7, 1, sample_seed=4),
            "sampled, all ignored": _head(9, 33, 65, sample_seed=5, change=_all_ignored),
            "sampled, large logits": _head(60, 64, 300, size=10.0, sample_seed=6),
            "sampled, ties": _head(70, 8, 900, scale=2.0, sample_seed=8, change=_integer_ties),
            "sampled, banned classes": _head(60, 20, 1500, bias=True, sample_seed=7, change=_banned_classes),
        },
        _run_linear_cross_entropy,
        _oracle_linear_cross_entropy,
        _compile_linear_cross_entropy,
    ),
    *FISHER_OPERATIONS,
    *SELECTION_OPERATIONS,
    *UPDATE_OPERATIONS,
)
