"""Gates of the operations that choose and combine by a Fisher: their entries of `kernel_registry.OPERATIONS`."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kernel_operation import Compilation, Operation
from torch import Tensor

from fastforget import ops, reference

Make = Callable[[torch.dtype], dict[str, Any]]
SHAPES = ((17, 23), (5,), (0, 4), (), (70_001,), (3, 2, 7), (1,), (7,))
TABLE = {"table_ptr": "*i64", "tensors": "i32", "bisections": "i32"}


def _lists(inputs: dict[str, Any], *names: str) -> list[list[Tensor]]:
    """The tensors `name0`, `name1`, ... of each name: they are values of the dictionary so that the gates convert them."""
    return [[value for key, value in inputs.items() if key.rstrip("0123456789") == name] for name in names]


def _unaligned(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copies with the same strides in one buffer a dtype, one element apart: addresses of every alignment."""
    copies = []
    for tensor in tensors:
        buffer = torch.empty(tensor.numel() + 8, dtype=tensor.dtype, device=tensor.device)
        copies.append(buffer.as_strided(tensor.shape, tensor.stride(), len(copies) % 8).copy_(tensor))
    return copies


def _permuted(tensor: Tensor) -> Tensor:
    return tensor.permute(2, 0, 1) if tensor.ndim == 3 else tensor.T if tensor.ndim == 2 else tensor


# topk_threshold ------------------------------------------------------------------------------------------------------


def _values(k: int, make: Callable[..., Tensor] = torch.randn, **options: Any) -> Make:
    def made(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(k)
        inputs: dict[str, Any] = {"k": k, "largest": options.get("largest", True)}
        others = (torch.float16, torch.bfloat16, torch.float32, dtype)
        for i, shape in enumerate(options.get("shapes", SHAPES)):
            chosen = others[i % 4] if options.get("mixed") else dtype
            inputs[f"tensor{i}"] = _permuted(make(shape, generator=generator).to(chosen))
        return inputs

    return made


def _few_values(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(-2, 3, shape, generator=generator) * 0.5


def _zeros(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.zeros(shape) * torch.randn(shape, generator=generator)  # of both signs


def _run_topk(inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    (tensors,) = _lists(inputs, "tensor")
    tensors = _unaligned(tensors)
    top = ops.topk_threshold(tensors, k=inputs["k"], largest=inputs["largest"], impl=impl)
    masks = {f"mask{i}": top.mask(tensor, i) for i, tensor in enumerate(tensors)}
    packed = {f"packed{i}": top.mask(tensor, i, packed=True) for i, tensor in enumerate(tensors)}
    return {"threshold": torch.tensor(top.threshold, dtype=torch.float64)} | masks | packed


def packed_bits(mask: Tensor) -> Tensor:
    """The definition: element 8 i + j in memory order is bit j of byte i."""
    flat = mask.as_strided((mask.numel(),), (1,)).long()
    flat = torch.cat([flat, flat.new_zeros(-len(flat) % 8)]).view(-1, 8)
    return (flat * 2 ** torch.arange(8)).sum(1).to(torch.uint8)


def _oracle_topk(inputs: dict[str, Any]) -> dict[str, Tensor]:
    (tensors,) = _lists(inputs, "tensor")
    threshold, masks = reference.topk_threshold(tensors, inputs["k"], largest=inputs["largest"])
    masks = [torch.empty_like(t, dtype=torch.bool).copy_(mask) for t, mask in zip(tensors, masks, strict=True)]
    found = {"threshold": torch.tensor(threshold, dtype=torch.float64)}
    found |= {f"mask{i}": mask for i, mask in enumerate(masks)}
    return found | {f"packed{i}": packed_bits(mask) for i, mask in enumerate(masks)}


def _compile_topk(arch: str) -> Iterator[Compilation]:
    import triton.language as tl
    from fastforget_kernels import topk_threshold as kernels

    for dtype, first, aligned in itertools.product((tl.float32, tl.bfloat16), (False, True), (False, True)):
        yield Compilation(
            f"count_digits-{dtype}{'-first' * first}{'-aligned' * aligned}",
            kernels._count_digits_kernel,
            TABLE | {"counts_ptr": "*i64"} | dict.fromkeys(("prefix", "shift", "width"), "i32"),
            {"DTYPE": dtype, "FIRST": first, "ALIGNED": aligned, "CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK}
            | {"BINS": kernels.BINS},
            {"num_warps": kernels.NUM_WARPS},
            False,
        )


# dampen_ -------------------------------------------------------------------------------------------------------------


def _dampened(**options: Any) -> Make:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(5)
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        inputs: dict[str, Any] = {"alpha": options.get("alpha", 10.0), "lam": options.get("lam", 1.0)}
        for i, shape in enumerate(options.get("shapes", SHAPES)):
            param, forget, retain = (torch.randn(shape, generator=generator) for _ in range(3))
            forget, retain = forget.square(), retain.square() * 0.1
            forget.view(-1)[::5], retain.view(-1)[::3] = 0.0, 0.0
            mixed = torch.float16 if options.get("mixed") and i % 2 and accumulator == torch.float32 else dtype
            inputs[f"param{i}"] = _permuted(param.to(mixed))
            inputs[f"forget{i}"] = _permuted(forget.to(accumulator))
            inputs[f"retain{i}"] = _permuted(retain.to(accumulator))
        return inputs

    return make


def _run_dampen(inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    params, forget, retain = _lists(inputs, "param", "forget", "retain")
    params, factors = _unaligned(params), {name: inputs[name] for name in ("alpha", "lam")}
    would = ops.dampen_(params, forget, retain, **factors, dry_run=True, impl=impl)
    counts = ops.dampen_(params, forget, retain, **factors, impl=impl)
    return {"counts": counts, "would": would} | {f"param{i}": param for i, param in enumerate(params)}


def _oracle_dampen(inputs: dict[str, Any]) -> dict[str, Tensor]:
    lists = _lists(inputs, "param", "forget", "retain")
    params, chosen = reference.dampen(*lists, alpha=inputs["alpha"], lam=inputs["lam"])
    counts = torch.stack([mask.sum() for mask in chosen])
    return {"counts": counts, "would": counts} | {f"param{i}": param for i, param in enumerate(params)}


def _compile_dampen(arch: str) -> Iterator[Compilation]:
    import triton.language as tl
    from fastforget_kernels import dampen as kernels

    sizes = {"CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK}
    for dtype, write, aligned in itertools.product((tl.float32, tl.bfloat16), (False, True), (False, True)):
        yield Compilation(
            f"dampen-{dtype}{'-write' * write}{'-aligned' * aligned}",
            kernels._dampen_kernel,
            TABLE | {"counts_ptr": "*i64", "alpha": "fp32", "lam": "fp32"},
            sizes | {"DTYPE": dtype, "WRITE": write, "ALIGNED": aligned},
            {"num_warps": kernels.NUM_WARPS},
            False,
        )
    for aligned in (False, True):
        yield Compilation(
            f"count_invalid{'-aligned' * aligned}",
            kernels._count_invalid_kernel,
            TABLE | {"counts_ptr": "*i64"},
            sizes | {"ALIGNED": aligned},
            {"num_warps": kernels.NUM_WARPS},
            False,
        )


# fisher_merge_ -------------------------------------------------------------------------------------------------------


def _models(*weights: float, **options: Any) -> Make:
    def make(dtype: torch.dtype) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(len(weights))
        accumulator = torch.float64 if dtype == torch.float64 else torch.float32
        inputs: dict[str, Any] = {"weights": weights, "floor": options.get("floor", 1e-6)}
        inputs["in_place"] = options.get("in_place", False)
        for i, shape in enumerate(options.get("shapes", SHAPES)):
            mixed = torch.float16 if options.get("mixed") and i % 2 and accumulator == torch.float32 else dtype
            for j in range(len(weights)):
                param, fisher = (_permuted(torch.randn(shape, generator=generator)) for _ in range(2))
                inputs[f"model_{'abcdef'[j]}{i}"] = param.to(mixed)
                inputs[f"fisher_{'abcdef'[j]}{i}"] = fisher.square().mul(options.get("size", 1.0)).to(accumulator)
        return inputs

    return make


def _merge_lists(inputs: dict[str, Any]) -> tuple[list[list[Tensor]], list[list[Tensor]]]:
    letters = "abcdef"[: len(inputs["weights"])]
    return tuple(_lists(inputs, *(f"{name}_{letter}" for letter in letters)) for name in ("model", "fisher"))


def _run_merge(inputs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    models, fishers = _merge_lists(inputs)
    models[-1] = _unaligned(models[-1])
    outs = models[-1] if inputs["in_place"] else [torch.empty_like(param) for param in models[0]]
    ops.fisher_merge_(outs, models, fishers, inputs["weights"], floor=inputs["floor"], impl=impl)
    return {f"out{i}": out for i, out in enumerate(outs)}


def _oracle_merge(inputs: dict[str, Any]) -> dict[str, Tensor]:
    merged = reference.fisher_merge(*_merge_lists(inputs), inputs["weights"], floor=inputs["floor"])
    return {f"out{i}": out for i, out in enumerate(merged)}


def _compile_merge(arch: str) -> Iterator[Compilation]:
    import triton.language as tl
    from fastforget_kernels import fisher_merge as kernels

    for dtype, aligned in itertools.product((tl.float32, tl.bfloat16), (False, True)):
        yield Compilation(
            f"fisher_merge-{dtype}{'-aligned' * aligned}",
            kernels._fisher_merge_kernel,
            TABLE | {"weights_ptr": "*fp32", "models": "i32", "floor": "fp32"},
            {"DTYPE": dtype, "ALIGNED": aligned, "CHUNK": kernels.CHUNK, "BLOCK": kernels.BLOCK},
            {"num_warps": kernels.NUM_WARPS},
            False,
        )


SELECTION_OPERATIONS = (
    Operation(
        "topk_threshold",
        {
            "plain": _values(350),
            "smallest": _values(350, largest=False),
            "half": _values(35_000),
            "mixed dtypes": _values(40_000, mixed=True),
            "mixed dtypes, smallest": _values(40_000, mixed=True, largest=False),
            "ties": _values(30_000, _few_values),
            "ties, smallest": _values(300, _few_values, largest=False),
            "ties that end in a permuted tensor": _values(300, _few_values, shapes=((40, 30), (7, 8, 9))),
            "all equal": _values(123, _zeros, shapes=((11, 7), (90,))),
            "all": _values(5, shapes=((5,),)),
            "one element": _values(1, shapes=((1,),)),
        },
        _run_topk,
        _oracle_topk,
        _compile_topk,
    ),
    Operation(
        "dampen_",
        {
            "plain": _dampened(),
            "dtypes": _dampened(mixed=True, alpha=1.0, lam=0.5),
            "every ratio": _dampened(alpha=0.0, lam=2.0),
            "none": _dampened(alpha=1e30),
            "one element": _dampened(shapes=((1,),), alpha=0.0),
        },
        _run_dampen,
        _oracle_dampen,
        _compile_dampen,
    ),
    Operation(
        "fisher_merge_",
        {
            "two": _models(1.0, 3.0),
            "four, dtypes": _models(0.5, 0.0, 2.0, 1.0, mixed=True),
            "one": _models(2.0),
            "into a model": _models(1.0, 0.2, in_place=True),
            "floor": _models(1.0, 0.5, 0.25, floor=0.3),
            "tiny weights and Fishers": _models(1e-30, 3e-30, size=1e-6),
            "one element": _models(1.0, 1.0, shapes=((1,),)),
        },
        _run_merge,
        _oracle_merge,
        _compile_merge,
    ),
)
