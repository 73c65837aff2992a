"""Rules of torch functions: whatever a module's class, a parameter that meets one of them is told apart by example.

`torch.nn.functional.linear` is enough for `nn.Linear`, fused QKV, LoRA and routers; `mul`, with `1 + w` and casts seen
through, for most norms.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fastforget.fisher.examples import Examples
from fastforget.fisher.gradients import Elementwise, Lookup, Outer, Piece
from fastforget.fisher.tape import NoRule, Owner, Tape, tap

__all__ = ["FUNCTIONS", "Uses"]

_ASKS = {
    "dtype",
    "device",
    "shape",
    "ndim",
    "requires_grad",
    "is_cuda",
    "layout",
    "is_quantized",
    "is_meta",
    "itemsize",
}
_ASKS |= {
    "size",
    "dim",
    "numel",
    "stride",
    "is_contiguous",
    "is_floating_point",
    "get_device",
    "is_complex",
    "nelement",
}
"""Attributes and methods of a parameter that do not depend on its values."""


_CASTS = {"float", "double", "half", "bfloat16", "to", "type"}
_TRANSPOSES = {"T", "mT", "t"}


class _Use(NamedTuple):
    """A tensor that stands for a parameter: itself, its cast, its sum with a number (`1 + w`), or its transpose."""

    tensor: Tensor  # held, so that its id stays its own
    name: str
    transposed: bool = False


class Uses(TorchFunctionMode):
    """Sees every torch function that a module's forward calls, and taps those that take one of its parameters."""

    def __init__(self, tape: Tape, owner: Owner) -> None:
        super().__init__()
        self.tape, self.owner = tape, owner
        tensors = owner.tensors()
        self.uses = {id(parameter): _Use(parameter, name) for name, parameter in tensors.items()}
        if tape.seen is not None:
            tape.seen.know(tensors)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        values = [
            v for value in (*args, *kwargs.values()) for v in (value if type(value) in (list, tuple) else (value,))
        ]
        used = [self.uses[id(value)] for value in values if id(value) in self.uses]
        if not used:
            return func(*args, **kwargs)
        asked = getattr(getattr(func, "__self__", func), "__name__", "")  # of a method, or of an attribute's getter
        if asked in _ASKS:
            return func(*args, **kwargs)
        if used[0].tensor is args[0] if args else False:
            number = (
                func in FUNCTIONS and FUNCTIONS[func] is _add and not any(isinstance(v, Tensor) for v in values[1:])
            )
            if asked in _CASTS or number or (asked in _TRANSPOSES and used[0].tensor.ndim == 2):
                with self.seen(used):
                    derived = func(self.plain(args[0]), *args[1:], **kwargs)
                transposed = used[0].transposed ^ (asked in _TRANSPOSES)
                self.uses[id(derived)] = _Use(derived, used[0].name, transposed)
                return derived
        if func not in FUNCTIONS or (any(use.transposed for use in used) and FUNCTIONS[func] is not _product):
            raise NoRule(func)
        form = func, len(args), *kwargs
        if form not in _KNOWN_FORMS:
            try:
                SIGNATURES[func].bind(self, func, *args, **kwargs)
            except TypeError as error:
                raise NoRule(func) from error
            _KNOWN_FORMS.add(form)
        with self.seen(used):
            return FUNCTIONS[func](self, func, *args, **kwargs)

    def seen(self, used: list[_Use]) -> contextlib.AbstractContextManager[None]:
        """What is computed inside is seen by a rule."""
        return contextlib.nullcontext() if self.tape.seen is None else self.tape.seen.span({use.name for use in used})

    def stands(self, value: Any) -> bool:
        """Whether a value stands for a parameter."""
        return id(value) in self.uses

    def name(self, value: Any) -> str | None:
        """Of the parameter, if its Fisher is wanted."""
        name = self.uses[id(value)].name if id(value) in self.uses else None
        return name if name in self.tape.selected else None

    def plain(self, value: Any) -> Any:
        """The tensor as the function takes it: without a gradient in `update`."""
        return value.detach() if self.stands(value) and self.tape.detach else value

    def shared(self, tensor: Tensor) -> Tensor:
        """A row that the whole batch shares, such as learned positions `[1, T, H]`, repeated for every row."""
        examples = self.tape.examples
        assert examples is not None
        if tensor.ndim > 1 and tensor.shape[0] == 1 < examples.rows:
            return tensor.expand(examples.rows, *tensor.shape[1:])
        return tensor

    def tap(
        self,
        output: Tensor,
        saved: list[Tensor],
        pieces: Callable[..., dict[str | None, Piece]],
        fused: Tensor | None = None,
    ) -> Tensor:
        """Tap the output of a function; a piece under the name None is not wanted."""
        examples = self.tape.examples
        assert examples is not None
        output = self.shared(output)
        examples.tokens(output)  # an unknown layout is found here, in the forward

        def named(examples: Examples, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> dict[str, Piece]:
            return {name: piece for name, piece in pieces(examples, saved, grads[0]).items() if name is not None}

        return tap(self.tape, [output], saved, named, self.owner, fused)[0]


def _linear(use: Uses, func: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    name, bias_name = use.name(weight), use.name(bias)
    fuse = name is not None and use.tape.fuse_grad and use.tape.expected.get(name) == 1
    output = func(input, weight.detach() if fuse else use.plain(weight), use.plain(bias))

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str | None, Piece]:
        found: dict[str | None, Piece] = {bias_name: Elementwise(grad)}
        if name is not None:
            fused = torch.empty_like(weight) if fuse else None
            x = examples.tokens(saved[0]).to(grad.dtype)
            found[name] = Outer(x, examples.tokens(grad), fused)
        return found

    return use.tap(output, [use.shared(input)] if name else [], pieces, weight if fuse else None)


def _product(use: Uses, func: Any, input: Tensor, weight: Tensor) -> Tensor:
    """`x W` with W `[I, O]`, which may be the transpose of the parameter."""
    name = use.name(weight)
    if weight.ndim != 2 or not use.stands(weight) or use.stands(input):
        raise NoRule(func)
    transposed = use.uses[id(weight)].transposed

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str | None, Piece]:
        x, d = examples.tokens(saved[0]).to(grad.dtype), examples.tokens(grad)
        return {name: Outer(x, d) if transposed else Outer(d, x)}

    return use.tap(func(input, use.plain(weight)), [use.shared(input)], pieces)


def _addmm(use: Uses, func: Any, bias: Tensor, input: Tensor, weight: Tensor) -> Tensor:
    """`b + x W`: GPT-2's Conv1D."""
    name, bias_name = use.name(weight), use.name(bias)
    if use.stands(input) or bias.ndim != 1:
        raise NoRule(func)

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str | None, Piece]:
        x = examples.tokens(saved[0]).to(grad.dtype)
        return {bias_name: Elementwise(grad), name: Outer(examples.tokens(grad), x)}

    return use.tap(func(use.plain(bias), input, use.plain(weight)), [input], pieces)


def _embedding(
    use: Uses,
    func: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    name = use.name(weight)
    if max_norm is not None or scale_grad_by_freq or use.stands(input):
        raise NoRule(func)
    output = func(input, use.plain(weight), padding_idx, sparse=sparse)
    ignored = None if padding_idx is None else padding_idx % weight.shape[0]

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str | None, Piece]:
        return {name: Lookup(examples.tokens(saved[0], 0), examples.tokens(grad), ignored)}

    return use.tap(output, [use.shared(input)], pieces)


def _layer_norm(
    use: Uses,
    func: Any,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    output = func(input, normalized_shape, use.plain(weight), use.plain(bias), eps)

    def normalise(x: Tensor) -> Tensor:
        return F.layer_norm(x, normalized_shape, None, None, eps)

    return _tap_norm(use, output, input, weight, bias, normalise, len(normalized_shape))


def _rms_norm(
    use: Uses,
    func: Any,
    input: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    output = func(input, normalized_shape, use.plain(weight), eps)
    chosen = torch.finfo(input.dtype).eps if eps is None else eps

    def normalise(x: Tensor) -> Tensor:
        return F.rms_norm(x, normalized_shape, None, chosen)

    return _tap_norm(use, output, input, weight, None, normalise, len(normalized_shape))


def _tap_norm(
    use: Uses,
    output: Tensor,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    normalise: Callable[[Tensor], Tensor],
    features: int,
) -> Tensor:
    name, bias_name = use.name(weight), use.name(bias)

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str | None, Piece]:
        x = saved[0].to(torch.promote_types(grad.dtype, torch.float32))
        return {bias_name: Elementwise(grad, features), name: Elementwise(normalise(x) * grad, features)}

    return use.tap(output, [use.shared(input)], pieces)


def _multiply(use: Uses, func: Any, first: Any, second: Any) -> Tensor:
    """`w x`, of which a norm's weight is one."""
    weight, other = (first, second) if use.stands(first) else (second, first)
    if not isinstance(other, Tensor) or use.stands(other) or not _trailing(weight, other):
        raise NoRule(func)
    name = use.name(weight)

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str | None, Piece]:
        return {name: Elementwise(saved[0].to(torch.promote_types(grad.dtype, torch.float32)) * grad, weight.ndim)}

    return use.tap(func(use.plain(first), use.plain(second)), [use.shared(other)], pieces)


def _add(use: Uses, func: Any, first: Any, second: Any) -> Tensor:
    """`x + b`."""
    weight, other = (first, second) if use.stands(first) else (second, first)
    if not isinstance(other, Tensor) or use.stands(other) or not _trailing(weight, other):
        raise NoRule(func)
    name = use.name(weight)

    def pieces(examples: Examples, saved: tuple[Tensor, ...], grad: Tensor) -> dict[str | None, Piece]:
        return {name: Elementwise(grad, weight.ndim)}

    return use.tap(func(use.plain(first), use.plain(second)), [], pieces)


def _trailing(weight: Tensor, other: Tensor) -> bool:
    """The parameter's dimensions are the last ones of the other factor, with the batch's before them."""
    lead = other.ndim - weight.ndim
    return lead >= 1 and other.shape[lead:] == weight.shape


FUNCTIONS: dict[Any, Callable[..., Tensor]] = {
    F.linear: _linear,
    torch.addmm: _addmm,
    F.embedding: _embedding,
    F.layer_norm: _layer_norm,
    F.rms_norm: _rms_norm,
}
for _names, _rule in (
    (("matmul", "__matmul__"), _product),
    (("mul", "__mul__", "__rmul__"), _multiply),
    (("add", "__add__", "__radd__"), _add),
):
    for _name in _names:
        FUNCTIONS[getattr(Tensor, _name)] = _rule
        if hasattr(torch, _name):
            FUNCTIONS[getattr(torch, _name)] = _rule
_KNOWN_FORMS: set[tuple[Any, ...]] = set()
"""Functions with numbers and names of arguments that their rules take: to ask a signature takes longer than the rest."""
SIGNATURES = {function: inspect.signature(rule) for function, rule in FUNCTIONS.items()}
