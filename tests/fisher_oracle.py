"""The diagonal Fisher's definition as a loop of ordinary backwards, one unpadded example each, and how to compare."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

BAR = {torch.float32: 1e-5, torch.float64: 1e-10}


def canonical(name: str) -> str:
    """The parameter's name in the model without DDP, `torch.compile` and PEFT around it."""
    name = re.sub(r"(^|\.)(module|_orig_mod)(?=\.)", "", name).lstrip(".")
    name = name.removeprefix("base_model.model.")
    name = re.sub(r"\.modules_to_save\.\w+", "", name)
    return re.sub(r"(\.base_layer)+(?=\.\w+$)", "", name)  # two LoRAs on one module differ by their base_layer


def batch_1_gradients(
    model: Any, example: Tensor, labels: Tensor | None = None, loss: str = "mean"
) -> dict[str, Tensor] | None:
    """The gradient of one example's own loss, through the model's own logits; None where there is no target."""
    target = (example if labels is None else labels)[1:]
    count = int((target != -100).sum())
    if count == 0:
        return None
    trainable = {canonical(name): p for name, p in model.named_parameters() if p.requires_grad}
    kept = {name: p.grad for name, p in trainable.items()}
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=example[None], use_cache=False).logits[0, :-1]
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    total = torch.nn.functional.cross_entropy(logits, target, reduction="sum")
    (total / count if loss == "mean" else total).backward()
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trainable.items()}
    for name, p in trainable.items():
        p.grad = kept[name]
    return gradients


def batch_1_fisher(
    model: Any,
    examples: Sequence[Tensor],
    labels: Sequence[Tensor] | None = None,
    weights: Sequence[float] | None = None,
    loss: str = "mean",
) -> dict[str, Tensor]:
    """`sum_b w_b G_b^2 / sum_b w_b` over the examples with targets; the model's mode and `.grad` are left as they were."""
    training = model.training
    model.eval()
    total = 0.0
    fisher: dict[str, Tensor] = {}
    for b, example in enumerate(examples):
        gradients = batch_1_gradients(model, example, None if labels is None else labels[b], loss)
        if gradients is None:
            continue
        weight = 1.0 if weights is None else float(weights[b])
        total += weight
        for name, gradient in gradients.items():
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            fisher[name] = fisher.get(name, 0) + weight * gradient.square()
    model.train(training)
    return {name: value / total for name, value in fisher.items()}


@contextlib.contextmanager
def float64_throughout() -> Iterator[None]:
    """Float64 tensors stay float64: many models take norms, softmaxes and losses in float32 whatever their dtype."""

    def kept(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
                args = tuple(torch.float64 if value is torch.float32 else value for value in args)
                kwargs = {key: torch.float64 if value is torch.float32 else value for key, value in kwargs.items()}
                if function is as_float:
                    return tensor
            return function(tensor, *args, **kwargs)

        return call

    as_float = torch.Tensor.float
    names = [(torch.Tensor, name) for name in ("float", "to", "type", "softmax", "sum")]
    names += [
        (torch, "sum"),
        (torch, "softmax"),
        (torch.nn.functional, "softmax"),
        (torch.nn.functional, "log_softmax"),
    ]
    with contextlib.ExitStack() as stack:
        for owner, name in names:
            stack.enter_context(mock.patch.object(owner, name, kept(getattr(owner, name))))
        yield


def assert_exact(
    got: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    dtype: torch.dtype,
    truth: Callable[[], Mapping[str, Tensor]] | None = None,
) -> None:
    """Every tensor, and every slice of it, is within the bar of `expected`: norm(difference) / norm(expected).

    Where `expected`, computed in the same dtype, is itself further from the float64 `truth` than half the bar, an error
    against `truth` of twice its, plus the bar, is allowed instead: both are one draw of rounding errors.
    """
    bar = BAR[dtype]
    floor = noise_floor(expected, dtype, bar)
    for name, value in got.items():
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32), f"{name}: {value.dtype}"

    def errors(name: str) -> Errors:
        result = [(*error, bar) for error in relative(got[name], expected[name], floor)]
        if truth is None or all(error <= bar for _, error, _ in result):
            return result
        theirs = relative(expected[name], truth()[name], floor)
        mine = relative(got[name], truth()[name], floor)
        rows = zip(result, mine, theirs, strict=True)
        return [(w, m, 2 * t + bar) if t > bar / 2 else row for row, (w, m), (_, t) in rows]

    _report(got, expected, errors)


def assert_as_accurate(
    got: Mapping[str, Tensor | None],
    loop: Mapping[str, Tensor | None],
    truth: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    slack: float,
) -> None:
    """The two-error rule: no tensor's error against the float64 `truth` exceeds that of the loop by more than `slack`.

    Both are one draw of rounding errors computed in `dtype`, so a slice, which averages fewer, may have twice the loop's.
    """
    present = {name: value for name, value in truth.items() if value is not None}
    floor = noise_floor(present, dtype, slack)

    def errors(name: str) -> Errors:
        value, other = got[name], loop[name]
        assert value is not None, f"{name}: missing"
        assert other is not None, f"{name}: missing in the loop"
        mine, theirs = relative(value, present[name], floor), relative(other, present[name], floor)
        pairs = zip(mine, theirs, strict=True)
        return [(w, m, t * (1 if w == "whole 0" else 2) + slack) for (w, m), (_, t) in pairs]

    _report({name: value for name, value in got.items() if value is not None}, present, errors)


Errors = list[tuple[str, float, float]]
"""Slice, error and what is allowed."""


def noise_floor(expected: Mapping[str, Tensor], dtype: torch.dtype, bar: float) -> float:
    """The root mean square below which a tensor counts as zero in theory, where it is rounding errors, squared."""
    largest = max(float(value.double().square().mean()) for value in expected.values()) ** 0.5
    noise = (8 if dtype == torch.bfloat16 else 100) * torch.finfo(dtype).eps
    return noise**2 / bar * largest


def relative(value: Tensor, reference: Tensor, floor: float) -> list[tuple[str, float]]:
    """Per slice: root mean square of the difference over that of the reference, which is taken as `floor` at least."""
    value, reference = value.double(), reference.double()
    result = []
    for (where, difference), (_, size) in zip(slices(value - reference), slices(reference), strict=True):
        result += [(f"{where} {i}", error) for i, error in enumerate((difference / size.clamp(min=floor)).tolist())]
    return result


def slices(value: Tensor) -> list[tuple[str, Tensor]]:
    """Root mean squares of the whole, of thirds and quarters along each dimension, and of each expert and its parts."""
    square = value.square()
    result = [("whole", square.mean()[None])]
    experts = value.ndim == 3 and value.shape[0] > 1
    if experts:
        result.append(("expert", square.mean((1, 2))))
    for dim in range(1 if experts else 0, value.ndim):
        for parts in (3, 4):
            if value.shape[dim] % parts == 0:
                blocks = square.unflatten(dim, (parts, -1)).movedim(dim, 0)  # [parts, ...]
                blocks = blocks.flatten(2).mean(2).flatten() if experts else blocks.flatten(1).mean(1)
                result.append((f"dim {dim}, 1/{parts}", blocks))
    return [(where, mean.sqrt()) for where, mean in result]


def _report(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], errors: Callable[[str], Errors]) -> None:
    assert set(got) == set(expected), f"names differ: {sorted(set(got) ^ set(expected))}"
    failures = []
    for name, reference in expected.items():
        assert got[name].shape == reference.shape, f"{name}: {(*got[name].shape,)}, expected {(*reference.shape,)}"
        assert got[name].isfinite().all(), f"{name}: not finite"
        over = [(error / allowed, where, error, allowed) for where, error, allowed in errors(name) if error > allowed]
        if over:
            _, where, error, allowed = max(over)
            failures.append((max(over)[0], f"{name}, {where}: {error:.2g}, allowed {allowed:.2g}"))
    worst = "\n  ".join(text for _, text in sorted(failures, reverse=True)[:8])
    assert not failures, f"{len(failures)} of {len(expected)} tensors are off; the worst:\n  {worst}"
