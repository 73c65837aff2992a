"""Gates of the operations on per-example gradients and their squares: their entries of `kernel_registry.OPERATIONS`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kernel_operation import POINTER, Compilation, Operation
from torch import Tensor

from fastforget import ops, reference

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
Make = Callable[[torch.dtype], dict[str, Any]]


def layer(outputs: int, inputs: int, lengths: Sequence[int], **options: Any) -> Make:
    """Tokens of one linear layer for examples of these lengths, and what goes with them."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(outputs * 1009 + inputs * 31 + len(lengths))
        accumulator = torch.float64 if dtype == torch.float64 else FP32

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        tokens = sum(lengths)
        inputs_ = {
            "activations": normal(tokens, inputs).to(dtype),
            "grad_outputs": normal(tokens, outputs).to(dtype),
            "offsets": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            "fisher": normal(outputs, inputs).to(accumulator).square(),
            "weights": None,
            "grad_weight": None,
        }
        if "weights" in options:
            inputs_["weights"] = torch.tensor(options["weights"], dtype=options.get("weights_dtype", FP32))
        if "grad_weight" in options:  # its dtype; a number too large to be overlooked, where it is to be overwritten
            chosen = dtype if options["grad_weight"] == "input" else accumulator
            start = normal(outputs, inputs) if options.get("accumulate") else torch.full((outputs, inputs), torch.nan)
            inputs_["grad_weight"] = start.to(chosen)
            inputs_["accumulate_grad_weight"] = bool(options.get("accumulate"))
        return options["change"](inputs_) if "change" in options else inputs_

    return make


def transposed(inputs: dict[str, Any]) -> dict[str, Any]:
    """Tokens with unit stride along S, and rows of a wider fisher."""
    changed = {name: inputs[name].T.contiguous().T for name in ("activations", "grad_outputs")}
    wide = torch.nn.functional.pad(inputs["fisher"], (3, 5), value=7.0)
    return inputs | changed | {"fisher": wide[:, 3:-5]}


def spaced(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every second element of every second token."""
    changed = {name: inputs[name].repeat_interleave(2, 0).repeat_interleave(2, 1)[::2, ::2] for name in TOKENS}
    return inputs | changed


TOKENS = ("activations", "grad_outputs")
FEW = (5, 1, 0, 17, 40, 0)  # tokens of six examples
MANY = tuple(n % 4 for n in range(240))  # no token to three


# fisher_accumulate_ --------------------------------------------------------------------------------------------------


def _run_fisher(inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    strided = torch.empty_strided(inputs["fisher"].shape, inputs["fisher"].stride(), dtype=inputs["fisher"].dtype)
    fisher = strided.to(inputs["fisher"].device).copy_(inputs["fisher"])
    grad_weight = None if inputs["grad_weight"] is None else inputs["grad_weight"].clone()
    ops.fisher_accumulate_(**(inputs | {"fisher": fisher, "grad_weight": grad_weight}), impl=impl)
    return {"fisher": fisher} if grad_weight is None else {"fisher": fisher, "grad_weight": grad_weight}


def _oracle_fisher(inputs: dict[str, Any]) -> dict[str, Tensor]:
    arguments = {name: inputs[name] for name in ("fisher", *TOKENS, "offsets", "weights")}
    fisher, grad_weight = reference.fisher_accumulate(**arguments)
    if inputs["grad_weight"] is None:
        return {"fisher": fisher}
    before = inputs["grad_weight"] if inputs["accumulate_grad_weight"] else 0
    return {"fisher": fisher, "grad_weight": before + grad_weight}


def _tile_compilation(
    kernel: Any,
    arch: str,
    variant: tuple[torch.dtype, bool, int, str],
    kept: int,
    types: dict[str, str],
    **constants: Any,
) -> Compilation:
    """A kernel that computes a tile of an example's gradient. The variant: dtype, unit strides, mean tokens, precision."""
    from fastforget_kernels.example_gradients import gradient_settings

    dtype, unit, mean_tokens, precision = variant
    settings = gradient_settings(dtype, mean_tokens, arch, contiguous=unit, tiles=kept)
    types = types | {"a_ptr": POINTER[dtype], "d_ptr": POINTER[dtype], "offsets_ptr": "*i32"}
    types |= dict.fromkeys(("outputs", "inputs", "examples", "examples_a_group", "stride_a_s", "stride_d_s"), "i32")
    types |= {} if unit else {"stride_a_i": "i32", "stride_d_o": "i32"}
    constants |= {"stride_a_i": 1, "stride_d_o": 1} if unit else {}
    constants |= {"BLOCK_O": settings.block_o, "BLOCK_I": settings.block_i, "BLOCK_K": settings.block_k}
    constants |= {"GROUP_O": settings.group_o, "PRECISION": precision}
    constants |= {name: None for name in kernel.arg_names if name.endswith("_ptr") and name not in types}
    even = [name for name, kind in types.items() if kind == "i32" and not name.startswith("examples")]
    chosen = [name for name, value in constants.items() if value is True]
    return Compilation(
        f"{kernel.__name__}-{str(dtype)[6:]}-{precision}{'-strided' * (not unit)}-{settings.block_o}x{settings.block_i}"
        f"x{settings.block_k}-{'-'.join(chosen)}",
        kernel,
        types,
        constants,
        {"num_warps": settings.num_warps, "num_stages": settings.num_stages},
        dtype != FP32 or precision == "tf32",
        tuple(even) if unit else (),
    )


VARIANTS = [
    (BF16, True, 1000, "ieee"),
    (BF16, True, 20, "ieee"),
    (BF16, False, 1000, "ieee"),
    (FP16, True, 1000, "ieee"),
    (FP32, True, 1000, "ieee"),
    (FP32, False, 1000, "ieee"),
    (FP32, True, 1000, "tf32"),
]


def _compile_fisher(arch: str) -> Iterator[Compilation]:
    from fastforget_kernels.example_gradients import _fisher_kernel

    strides = ("stride_fisher_g", "stride_fisher_o", "stride_grad_weight_g", "stride_grad_weight_o")
    outputs = {"fisher_ptr": "*fp32"} | dict.fromkeys(strides, "i32")
    for variant in VARIANTS:
        # Weights, the type of the weight gradient, and whether both are added to what is there. The first two need the
        # most registers without and with a weight gradient; the others differ from them little.
        chosen = [("*fp32", None, True), ("*fp32", POINTER[variant[0]], True)]
        if variant == VARIANTS[0]:
            chosen += [(None, None, False), (None, "*fp32", False), ("*fp64", "*fp32", True)]
        for weights, grad, add in chosen:
            types = (
                outputs | ({"weights_ptr": weights} if weights else {}) | ({"grad_weight_ptr": grad} if grad else {})
            )
            flags = {"HAS_WEIGHTS": weights is not None, "HAS_GRAD_WEIGHT": grad is not None}
            flags |= {"ADD_FISHER": add, "ADD_GRAD_WEIGHT": add and grad is not None}
            yield _tile_compilation(_fisher_kernel, arch, variant, 3 if grad else 2, types, **flags)


# gradient_products ---------------------------------------------------------------------------------------------------


def _products(make: Make, **chosen: bool) -> Make:
    """The same tokens, with a direction and whatever is chosen of direction, fisher and norm."""

    def made(dtype: torch.dtype) -> dict[str, Any]:
        inputs = make(dtype)
        direction = torch.randn(inputs["fisher"].shape, generator=torch.Generator().manual_seed(3)).to(dtype)
        matrices = {"fisher": inputs["fisher"], "direction": direction}
        kept = {name: value for name, value in matrices.items() if chosen.get(name, True)}
        tokens = {name: inputs[name] for name in (*TOKENS, "offsets")}
        return tokens | kept | {"norm": chosen.get("norm", True)}

    return made


def _run_products(inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    result = ops.gradient_products(**inputs, impl=impl)
    return {name: value for name, value in result._asdict().items() if value is not None}


def _oracle_products(inputs: dict[str, Any]) -> dict[str, Tensor]:
    tokens = [inputs[name] for name in (*TOKENS, "offsets")]
    matrices = {name: inputs.get(name, torch.zeros((), dtype=tokens[0].dtype)) for name in ("fisher", "direction")}
    dot, fisher_norm, square_norm = reference.gradient_products(*tokens, **matrices)
    found = {"dot": dot} if "direction" in inputs else {}
    found |= {"fisher_norm": fisher_norm} if "fisher" in inputs else {}
    return found | ({"square_norm": square_norm} if inputs["norm"] else {})


def _compile_products(arch: str) -> Iterator[Compilation]:
    from fastforget_kernels.example_gradients import _products_kernel
    from fastforget_kernels.ghost_norm import _ghost_norm_kernel, ghost_settings

    strides = ("stride_direction_o", "stride_direction_i", "stride_fisher_o", "stride_fisher_i")
    for variant in VARIANTS:
        pointer = POINTER[variant[0]]
        # direction and fisher: their types or None; norm
        chosen = [("*fp32", "*fp32", True)]
        if variant == VARIANTS[0]:
            chosen += [(pointer, "*fp32", False), (None, "*fp32", True), (None, None, True)]
        for direction, fisher, norm in chosen:
            kinds = {"dot_ptr": direction and "*fp32", "fisher_norm_ptr": fisher and "*fp32"}
            kinds |= {"square_norm_ptr": norm and "*fp32", "direction_ptr": direction, "fisher_ptr": fisher}
            unit = {name: 1 for name in strides if name.endswith("_i") and variant[1]}
            types = {name: kind for name, kind in kinds.items() if kind} | {n: "i32" for n in strides if n not in unit}
            flags = {"HAS_DIRECTION": bool(direction), "HAS_FISHER": bool(fisher), "HAS_NORM": norm}
            kept = 1 + bool(direction) + bool(fisher)
            yield _tile_compilation(_products_kernel, arch, variant, kept, types, **unit, **flags)
    for dtype, unit, mean_tokens, precision in VARIANTS:
        if mean_tokens < 1000:
            continue
        settings = ghost_settings(dtype, precision == "tf32", contiguous=unit)
        types = {"square_norm_ptr": "*fp32", "a_ptr": POINTER[dtype], "d_ptr": POINTER[dtype], "offsets_ptr": "*i32"}
        sizes = ("outputs", "inputs", "stride_a_s", "stride_d_s")
        types |= dict.fromkeys((*sizes, "examples"), "i32")
        last = dict.fromkeys(("stride_a_i", "stride_d_o"), "i32")
        yield Compilation(
            f"ghost_norm-{str(dtype)[6:]}-{precision}{'-strided' * (not unit)}",
            _ghost_norm_kernel,
            types if unit else types | last,
            {name: settings[name] for name in ("PRECISION", "BLOCK_T", "BLOCK_F")}
            | (dict.fromkeys(last, 1) if unit else {}),
            {name: settings[name] for name in ("num_warps", "num_stages")},
            dtype != FP32 or precision == "tf32",
            sizes if unit else (),
        )


# square_accumulate_ --------------------------------------------------------------------------------------------------


def _tensors(*shapes: tuple[int, ...], **options: Any) -> Make:
    """Pairs of fisher and gradient under names of their own, so that tensors stay values of the dictionary."""

    def make(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(len(shapes))
        accumulator = torch.float64 if dtype == torch.float64 else FP32
        inputs: dict[str, Any] = {"scale": options.get("scale", 1.0), "decay": options.get("decay", 1.0)}
        for i, shape in enumerate(shapes):
            fisher, grad = (torch.randn(shape, generator=generator) for _ in range(2))
            mixed = FP16 if options.get("mixed") and i % 2 and accumulator == FP32 else dtype
            inputs |= {f"fisher{i}": fisher.square().to(accumulator), f"grad{i}": grad.to(mixed)}
        return options["change"](inputs) if "change" in options else inputs

    return make


def _lists(inputs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor], dict[str, float]]:
    fishers = [value for name, value in inputs.items() if name.startswith("fisher")]
    grads = [value for name, value in inputs.items() if name.startswith("grad")]
    return fishers, grads, {name: inputs[name] for name in ("scale", "decay")}


def _run_squares(inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    fishers, grads, factors = _lists(inputs)
    # In one buffer, one element apart from the next: addresses of every alignment. Dense ones keep their strides.
    buffer = torch.empty(sum(f.numel() + 1 for f in fishers) + 1, dtype=fishers[0].dtype, device=fishers[0].device)
    places = itertools.accumulate((f.numel() + 1 for f in fishers[:-1]), initial=0)
    copies = [buffer.as_strided(f.shape, f.stride(), place).copy_(f) for f, place in zip(fishers, places, strict=True)]
    ops.square_accumulate_(copies, grads, **factors, impl=impl)
    return {f"fisher{i}": copy for i, copy in enumerate(copies)}


def _oracle_squares(inputs: dict[str, Any]) -> dict[str, Tensor]:
    fishers, grads, factors = _lists(inputs)
    return {f"fisher{i}": fisher for i, fisher in enumerate(reference.square_accumulate(fishers, grads, **factors))}


def _compile_squares(arch: str) -> Iterator[Compilation]:
    import triton.language as tl
    from fastforget_kernels import square_accumulate as kernels

    for dtype, keep, aligned in itertools.product((tl.float32, tl.bfloat16), (False, True), (False, True)):
        yield Compilation(
            f"square_accumulate-{dtype}{'-keep' * keep}{'-aligned' * aligned}",
            kernels._square_accumulate_kernel,
            {"table_ptr": "*i64", "tensors": "i32", "bisections": "i32", "scale": "fp32", "decay": "fp32"},
            {"GRAD_DTYPE": dtype, "KEEP": keep, "ALIGNED": aligned, "CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK},
            {"num_warps": kernels.NUM_WARPS},
            False,
        )


def _transposed_pairs(inputs: dict[str, Any]) -> dict[str, Any]:
    return {k: v.permute(2, 0, 1) if isinstance(v, Tensor) and v.ndim == 3 else v for k, v in inputs.items()}


_ONES = layer(33, 150, [1] * 90, weights=[0.5 + n % 3 for n in range(90)], grad_weight="accumulator")
FISHER_OPERATIONS = (
    Operation(
        "fisher_accumulate_",
        {
            "plain": layer(130, 201, FEW),
            "few tiles, weights, weight gradient": layer(
                33, 20, FEW, weights=[1.0, 0.0, 3.0, -2.0, 0.3, 1.0], grad_weight="input"
            ),
            "added weight gradient": layer(
                140, 150, FEW, weights=[0.1] * 6, weights_dtype=torch.float64, grad_weight="input", accumulate=True
            ),
            "few tiles, added weight gradient": layer(30, 17, FEW, grad_weight="accumulator", accumulate=True),
            "one element": layer(1, 1, [1]),
            "one output": layer(1, 300, [7, 90], grad_weight="accumulator"),
            "no token": layer(5, 9, [0, 0, 0], grad_weight="input"),
            "no example": layer(5, 9, [], grad_weight="accumulator"),
            "no output": layer(0, 9, [2, 3]),
            "single tokens": _ONES,
            "many short": layer(20, 10, MANY, weights=[1.0 + n % 5 for n in range(len(MANY))], grad_weight="input"),
            "transposed": layer(70, 45, FEW, change=transposed),
            "spaced": layer(70, 45, FEW, change=spaced, grad_weight="accumulator"),
        },
        _run_fisher,
        _oracle_fisher,
        _compile_fisher,
    ),
    Operation(
        "gradient_products",
        {
            "plain": _products(layer(130, 201, FEW)),
            "few tiles": _products(layer(33, 20, FEW)),
            "dot": _products(layer(140, 30, FEW), fisher=False, norm=False),
            "fisher norm": _products(layer(30, 140, FEW), direction=False, norm=False),
            "norm by tiles": _products(layer(30, 17, FEW), direction=False, fisher=False),
            "norm by products of tokens": _products(layer(160, 130, (*FEW, 70)), direction=False, fisher=False),
            "one element": _products(layer(1, 1, [1])),
            "no token": _products(layer(5, 9, [0, 0, 0])),
            "no example": _products(layer(5, 9, [])),
            "no output": _products(layer(0, 9, [2, 3])),
            "single tokens": _products(layer(20, 10, [1] * 60)),
            "many short": _products(layer(20, 10, MANY)),
            "transposed": _products(layer(70, 45, FEW, change=transposed)),
            "spaced": _products(layer(70, 45, FEW, change=spaced)),
            "spaced norm": _products(layer(100, 75, (5, 0, 9), change=spaced), direction=False, fisher=False),
        },
        _run_products,
        _oracle_products,
        _compile_products,
    ),
    Operation(
        "square_accumulate_",
        {
            "plain": _tensors((17, 23), (5,), (3, 2, 7), scale=0.5, decay=0.9),
            "dtypes": _tensors((9,), (300,), (), (41, 3), (2,), mixed=True, scale=-2.0),
            "one element": _tensors((1,)),
            "empty": _tensors((0, 4), (3,), (0,), decay=0.5),
            "overwritten": _tensors((70,), (8, 8), decay=0.0, scale=3.0),
            "many chunks": _tensors((70_001,), (40_000,), (3,), (1,), (70, 500), decay=0.25),
            "permuted": _tensors((4, 5, 6), (7, 3, 2), (6,), change=_transposed_pairs),
        },
        _run_squares,
        _oracle_squares,
        _compile_squares,
    ),
)
