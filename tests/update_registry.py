"""Gates of the optimizers' steps: their entries of `kernel_registry.OPERATIONS`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kernel_operation import Compilation, Operation
from selection_registry import packed_bits
from torch import Tensor

from fastforget import ops, reference

Make = Callable[[torch.dtype], dict[str, Any]]
SHAPES = ((17, 23), (7,), (0, 4), (70_001,), (), (3, 2, 7), (1,))
STATES = {"adamw": ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), "sgd": ("momentum_buffer",)}
STEERING = ("fisher_decay", "ewc_lambda", "min_fisher", "max_fisher", "soft_weight", "mean_fisher")
PULL = {"anchor": True, "ewc_lambda": 3.0}
BOUNDS = {"min_fisher": 0.25, "max_fisher": 1.5}
SOFT = {"soft_weight": 2.0, "mean_fisher": 0.75}
ALL = PULL | BOUNDS | SOFT | {"movable": True, "fisher_decay": 0.9, "maximize": True}
ADAMW = {"lr": 0.05, "weight_decay": 0.1}
SGD = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}


def _permuted(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor.T if tensor.ndim == 2 else tensor


def step_inputs(operation: str, dtype: torch.dtype, shapes=SHAPES, seed: int = 0, **options: Any) -> dict[str, Any]:
    """Tensors `param0`, `grad0`, ... of every list as values of one dictionary, and the options that the oracle takes.

    Args:
        operation: "adamw" or "sgd".
        dtype: Of the parameters.
        shapes: Of the parameters.
        seed: Of the random numbers.
        options: `mixed` (dtypes of gradients and parameters vary), `wide` (float32 states and anchors), `anchor`, `movable`,
            `amsgrad` (those tensors too), and numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mixed = (
        (torch.float16, torch.float32, torch.bfloat16) if options.pop("mixed", False) and dtype != wide else (dtype,)
    )
    state_dtype = wide if options.pop("wide", False) else None
    amsgrad, anchor, movable = (options.pop(name, False) for name in ("amsgrad", "anchor", "movable"))
    names = STATES[operation][: 2 + amsgrad] if operation == "adamw" or options.get("momentum") else ()
    inputs: dict[str, Any] = dict(options)
    for i, shape in enumerate(shapes):

        def draw(to: torch.dtype, shape=shape) -> Tensor:
            return _permuted(torch.randn(shape, generator=generator).to(to))

        own = mixed[i % len(mixed)]
        inputs |= {f"param{i}": draw(own), f"grad{i}": draw(mixed[(i // 2) % len(mixed)])}
        for name in names:
            value = draw(state_dtype or own)
            inputs[f"{name}{i}"] = value.square() if "sq" in name else value
        inputs |= {f"fisher{i}": draw(wide).square()} if options.keys() & {*STEERING} else {}
        inputs |= {f"anchor{i}": draw(state_dtype or own)} if anchor else {}
        inputs |= {f"movable{i}": draw(wide) > 0} if movable else {}
    return inputs


def _case(operation: str, **options: Any) -> Make:
    return lambda dtype: step_inputs(operation, dtype, **options)


def tensors_of(inputs: dict[str, Any], name: str) -> list[Tensor] | None:
    """The list of a name; None where there is none."""
    return [value for key, value in inputs.items() if key.rstrip("0123456789") == name] or None


def _unaligned(tensors: list[Tensor]) -> list[Tensor]:
    """Copies with the same strides, every third at an address of its own alignment."""
    copies = []
    for i, tensor in enumerate(tensors):
        buffer = torch.empty(tensor.numel() + 8, dtype=tensor.dtype, device=tensor.device)
        copies.append(buffer.as_strided(tensor.shape, tensor.stride(), i % 3).copy_(tensor))
    return copies


def steering_of(inputs: dict[str, Any]) -> ops.Steering:
    """What the options of `inputs` mean to the operations."""
    movable = tensors_of(inputs, "movable")
    return ops.Steering(
        fishers=tensors_of(inputs, "fisher"),
        anchors=tensors_of(inputs, "anchor"),
        masks=movable and [packed_bits(mask.cpu()).to(mask.device) for mask in movable],
        **{name: inputs[name] for name in STEERING if name in inputs},
    )


def run_step(operation: str, inputs: dict[str, Any], impl: str, **changes: Any) -> dict[str, Tensor]:
    """One call for all tensors; the tensors of `inputs` are not changed."""
    names = [name for name in ("param", *STATES[operation], "fisher") if tensors_of(inputs, name)]
    copies = {name: _unaligned(tensors_of(inputs, name) or []) for name in names}
    inputs = inputs | {f"{name}{i}": copy for name, own in copies.items() for i, copy in enumerate(own)}
    numbers = ("lr", "betas", "eps", "weight_decay", "momentum", "dampening", "nesterov", "maximize")
    options = {name: inputs[name] for name in numbers if name in inputs} | {
        "steering": steering_of(inputs),
        "impl": impl,
    }
    n = len(copies["param"])
    if operation == "adamw":
        options["steps"] = [torch.tensor(1.0 + i) for i in range(n)]
        options |= {name + "s": tensors_of(inputs, name) for name in STATES["adamw"]}
        function = ops.adamw_
    else:
        options |= {"momentum_buffers": tensors_of(inputs, "momentum_buffer"), "first_steps": first_steps(inputs, n)}
        function = ops.sgd_
    function(copies["param"], tensors_of(inputs, "grad"), **(options | changes))
    return {f"{name}{i}": copy for name, own in copies.items() for i, copy in enumerate(own)}


def first_steps(inputs: dict[str, Any], n: int) -> list[bool]:
    """Every second tensor where the case has first steps."""
    return [inputs.get("first", False) and i % 2 == 0 for i in range(n)]


def oracle_step(operation: str, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The same by the reference, tensor by tensor."""
    lists = {key.rstrip("0123456789"): None for key, value in inputs.items() if isinstance(value, Tensor)}
    numbers = {key: value for key, value in inputs.items() if not isinstance(value, Tensor) and key != "first"}
    result = {}
    for i in range(len(tensors_of(inputs, "param") or [])):
        own = {name: inputs[f"{name}{i}"] for name in lists} | numbers
        if operation == "adamw":
            stepped = reference.adamw(**own, step=1.0 + i)
        else:
            stepped = reference.sgd(**own, first_step=first_steps(inputs, i + 1)[i])
        result |= {f"{name}{i}": value for name, value in stepped.items()}
    return {name: result[name] for name in sorted(result)}


def _compilations(operation: str, flag: str, numbers: tuple[str, ...], arch: str) -> Iterator[Compilation]:
    import importlib

    import triton.language as tl

    kernels = importlib.import_module(f"fastforget_kernels.{operation}")
    steering = ("ewc_lambda", "fisher_decay", "min_fisher", "max_fisher")
    absent = {"bare": (*steering, "momentum", "weight_decay"), "plain": steering, "everything": ()}
    levels = ("bare", "plain", "everything") if operation == "sgd" else ("plain", "everything")
    dtypes = ((tl.float32, tl.float32), (tl.bfloat16, tl.bfloat16), (tl.bfloat16, tl.float32))
    for (own, state), level, aligned in itertools.product(dtypes, levels, (False, True)):
        everything = level == "everything"
        rounded = everything and own == tl.bfloat16
        types = {"table_ptr": "*i64", "tensors": "i32", "bisections": "i32", "scalars_ptr": "*fp32"}
        types |= dict.fromkeys({*numbers, *steering} - {*absent[level]}, "fp32") | (
            {"keys_ptr": "*i64"} if rounded else {}
        )
        flags = dict.fromkeys((flag, "FISHER", "MASKED", "SOFT", "MAXIMIZE"), everything)
        yield Compilation(
            f"{operation}-{own}-{state}-{level}{'-aligned' * aligned}",
            getattr(kernels, f"_{operation}_kernel"),
            types,
            {name: None for name in (*absent[level], "keys_ptr") if name not in types}
            | {"PARAM_DTYPE": own, "GRAD_DTYPE": own, "STATE_DTYPE": state, "ANCHOR_DTYPE": own, "ROUNDED": rounded}
            | {"ALIGNED": aligned, "CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK, **flags},
            kernels.LAUNCH if arch.startswith("sm") else {"num_warps": kernels.LAUNCH["num_warps"]},
            False,
        )


def _operation(name: str, cases: dict[str, dict[str, Any]], flag: str, numbers: tuple[str, ...]) -> Operation:
    return Operation(
        f"{name}_",
        {case: _case(name, **options) for case, options in cases.items()},
        lambda inputs, impl: run_step(name, inputs, impl),
        lambda inputs: oracle_step(name, inputs),
        lambda arch: _compilations(name, flag, numbers, arch),
    )


STEERED = {
    "mask": {"movable": True},
    "fisher updated": {"fisher_decay": 0.9},
    "pull": PULL,
    "thresholds": BOUNDS,
    "soft": SOFT,
    "mask and pull": PULL | {"movable": True},
    "mask and soft": SOFT | {"movable": True},
    "mask and thresholds": BOUNDS | {"movable": True},
    "mask and fisher updated": {"movable": True, "fisher_decay": 1.0},
    "pull and thresholds": PULL | BOUNDS,
    "pull and soft": PULL | SOFT,
    "pull and fisher updated": PULL | {"fisher_decay": 0.0},
    "thresholds and soft": {"min_fisher": 0.5} | SOFT,
    "thresholds and fisher updated": {"max_fisher": 0.5, "fisher_decay": 0.5},
    "soft and fisher updated": SOFT | {"fisher_decay": 0.5},
    "everything": ALL,
    "everything, float32 states": ALL | {"wide": True},
    "everything, mixed": ALL | {"mixed": True, "wide": True},
}
UPDATE_OPERATIONS = (
    _operation(
        "adamw",
        {
            "plain": ADAMW,
            "float32 states": ADAMW | {"wide": True},
            "mixed": ADAMW | {"mixed": True},
            "amsgrad": ADAMW | {"amsgrad": True},
            "maximize, no decay": {"lr": 0.05, "weight_decay": 0.0, "maximize": True, "betas": (0.0, 0.5), "eps": 0.1},
            **{case: ADAMW | options for case, options in STEERED.items()},
            "everything, amsgrad": ADAMW | ALL | {"amsgrad": True},
        },
        "AMSGRAD",
        ("beta1", "rate1", "beta2", "rate2", "eps"),
    ),
    _operation(
        "sgd",
        {
            "plain": {"lr": 0.1},
            "momentum": SGD | {"first": True},
            "float32 states": SGD | {"wide": True, "dampening": 0.3},
            "mixed": SGD | {"mixed": True},
            "nesterov": SGD | {"nesterov": True},
            "maximize": {"lr": 0.1, "weight_decay": 0.2, "maximize": True},
            **{case: SGD | options for case, options in STEERED.items()},
            "everything, nesterov": SGD | ALL | {"nesterov": True, "first": True},
        },
        "NESTEROV",
        ("momentum", "rate", "weight_decay"),
    ),
)
