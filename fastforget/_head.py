"""Reaching a causal language model's head through the model's own forward."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastforget.ops import LinearCrossEntropy, linear_cross_entropy

__all__ = [
    "LogitTransform",
    "active_adapters",
    "base_linear",
    "current_forward",
    "eval_mode",
    "find_head",
    "head_loss",
    "head_weight",
    "swapped_forward",
    "unwrapped",
    "verified_transform",
]


class LogitTransform(NamedTuple):
    """What a model does to its head's output: `softcap * tanh(scale * z / softcap)`."""

    scale: float = 1.0
    softcap: float | None = None


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; every module's own mode is restored."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _forward_attribute(module: nn.Module) -> str:
    # accelerate's device hooks sit in `forward` and call `_old_forward`: keep them, they bring the weight to its device.
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


def current_forward(module: nn.Module) -> Callable[..., Any]:
    """What `swapped_forward` replaces.

    Args:
        module: Any.

    Returns:
        Its forward, without accelerate's hooks.
    """
    return getattr(module, _forward_attribute(module))


@contextlib.contextmanager
def swapped_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Another forward for `module` inside; hooks, PEFT and FSDP2 around it keep working."""
    name = _forward_attribute(module)
    saved = vars(module).get(name)
    setattr(module, name, forward)
    try:
        yield
    finally:
        if saved is None:
            delattr(module, name)
        else:
            setattr(module, name, saved)


def unwrapped(model: Any) -> Any:
    """The model without DistributedDataParallel and `torch.compile` around it; PEFT stays.

    Args:
        model: A model.

    Returns:
        The model inside.
    """
    while isinstance(model, nn.parallel.DistributedDataParallel) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model._orig_mod
    return model


def find_head(model: nn.Module) -> nn.Module:
    """The module that turns hidden states into logits.

    Args:
        model: A causal language model of transformers, wrapped or not.

    Returns:
        The output embedding, with PEFT's wrapper if there is one.

    Raises:
        ValueError: The model is none, or is an encoder-decoder, or its PEFT method adds positions, or its head is no
            linear map with a floating-point weight, or a few of its rows are trained.
    """
    name = type(model).__name__
    inner = unwrapped(model)
    config = getattr(inner, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a causal language model, got the encoder-decoder {name}")
    name_inside = type(inner.get_base_model() if hasattr(inner, "get_base_model") else inner).__name__
    if name_inside.endswith("ForMaskedLM"):
        raise ValueError(
            f"model: expected a causal language model, got {name_inside}, which sees later tokens; "
            "load it with AutoModelForCausalLM and is_decoder=True"
        )
    for peft_config in getattr(inner, "peft_config", {}).values():
        if getattr(peft_config, "is_prompt_learning", False):
            raise ValueError(f"model: {peft_config.peft_type} adds virtual tokens, which is not supported; use LoRA")
    get_head = getattr(inner, "get_output_embeddings", None)
    head = get_head() if get_head else None
    if not isinstance(head, nn.Module):
        raise ValueError(
            f"model: expected a causal language model with an output embedding, got {name}; "
            "load it with AutoModelForCausalLM"
        )
    if hasattr(head, "token_adapter"):
        raise ValueError(
            "model: PEFT's trainable_token_indices on an output embedding that is tied to the input's is not supported; train "
            "the embeddings by modules_to_save, or untie them"
        )
    linear: Any = head
    while hasattr(linear, "base_layer") or hasattr(linear, "original_module"):  # PEFT's wrappers
        linear = linear.base_layer if hasattr(linear, "base_layer") else linear.original_module
    weight = getattr(linear, "weight", None)
    if not isinstance(linear, nn.Linear) or weight is None or not weight.is_floating_point():
        dtype = "" if weight is None else f" with a {weight.dtype} weight"
        raise ValueError(
            f"model: its output embedding is a {type(linear).__name__}{dtype}; expected torch.nn.Linear in floating point. "
            "Keep the head unquantised (llm_int8_skip_modules, modules_to_not_convert)"
        )
    return head


def head_weight(head: Any) -> tuple[Tensor, Tensor | None]:
    """Weight `[V, H]` and bias `[V]` that the head applies now, adapters included; differentiable in the adapters.

    Args:
        head: What `find_head` returned. Call this inside the head's forward: FSDP2 has the weight there only.

    Returns:
        The weight and the bias or None.

    Raises:
        ValueError: An adapter on the head is not a sum of the weight and a product.
    """
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):  # PEFT: a trained copy of the head
        adapters = head.active_adapters
        use_copy = not head.disable_adapters and adapters and adapters[0] in head.modules_to_save
        return head_weight(head.modules_to_save[adapters[0]] if use_copy else head.original_module)
    if hasattr(head, "base_layer"):
        weight, bias = head_weight(head.base_layer)
        adapters = [] if head.disable_adapters or head.merged else _active_on(head)
        for adapter in adapters:
            weight = weight + _adapter_delta(head, adapter).to(weight.dtype)
        return weight, bias
    return head.weight, head.bias


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    transform: LogitTransform,
    impl: str,
) -> LinearCrossEntropy:
    """The loss of a model's head, of whose rows each process has some under tensor parallelism.

    Args:
        hidden: `[S, H]`.
        weight: `[V, H]`, perhaps a DTensor, see `head_weight`.
        bias: `[V]` or None.
        target: `[S]` labels.
        transform: What the model does to its logits.
        impl: "auto", "triton" or "torch".

    Returns:
        See `linear_cross_entropy`.

    Raises:
        ValueError: The weight is spread over processes in another way than by its rows.
    """
    group = None
    if isinstance(weight, DTensor):
        if weight.device_mesh.ndim > 1 or not weight.placements[0].is_shard(0):
            raise ValueError(
                f"model: expected an output embedding whose rows are spread over one group of processes, got placements "
                f"{weight.placements} on a mesh {tuple(weight.device_mesh.shape)}; leave it out of the parallel plan"
            )
        group, weight = weight.device_mesh.get_group(), weight.to_local()
        bias = bias.to_local() if isinstance(bias, DTensor) else bias
    options: dict[str, Any] = {"softcap": transform.softcap, "scale": transform.scale, "group": group, "impl": impl}
    return linear_cross_entropy(hidden, weight, target, linear_bias=bias, **options)


def base_linear(head: Any) -> Any:
    """The linear map inside a head's wrappers, which its own weight and bias belong to.

    Args:
        head: What `find_head` returned.

    Returns:
        The module; PEFT's trained copy where that is active.
    """
    if hasattr(head, "modules_to_save") and hasattr(head, "original_module"):
        adapters = head.active_adapters
        use_copy = not head.disable_adapters and adapters and adapters[0] in head.modules_to_save
        return base_linear(head.modules_to_save[adapters[0]] if use_copy else head.original_module)
    return base_linear(head.base_layer) if hasattr(head, "base_layer") else head


def active_adapters(head: Any) -> list[tuple[Any, Any, float]]:
    """The LoRAs that a head applies: `x W^T + scaling (x A^T) B^T`.

    Args:
        head: What `find_head` returned.

    Returns:
        The modules of A and B and the scaling of each.
    """
    if not hasattr(head, "lora_A") or head.disable_adapters or head.merged:
        return []
    return [(head.lora_A[name], head.lora_B[name], head.scaling[name]) for name in _active_on(head)]


def _active_on(head: Any) -> list[str]:
    return [adapter for adapter in head.active_adapters if adapter in getattr(head, "lora_A", {})]


def _adapter_delta(head: Any, adapter: str) -> Tensor:
    if getattr(head, "lora_variant", {}).get(adapter) is not None or getattr(head, "lora_bias", {}).get(adapter):
        raise ValueError(f"model: adapter {adapter!r} on the head is no plain LoRA (DoRA or a bias); merge it first")
    return head.get_delta_weight(adapter)


# head -> state of the model around it -> transform. Heads are held weakly, so that a model can be freed.
_verified: weakref.WeakKeyDictionary[nn.Module, dict[Any, LogitTransform]] = weakref.WeakKeyDictionary()
_CHECKED_TOKENS = 8


def verified_transform(
    model: nn.Module,
    head: nn.Module,
    input_ids: Tensor,
    forward: Callable[..., Any],
    impl: str,
) -> LogitTransform:
    """What the model does to its logits after the head, found by a probe and checked against its own logits once.

    Args:
        model: The model, in eval mode.
        head: Its head.
        input_ids: `[B, T]`, of which a few tokens are used.
        forward: Calls the model with input_ids, and optionally position_ids and attention_mask.
        impl: Implementation to check.

    Returns:
        Scale and softcap.

    Raises:
        ValueError: The model's logits are not `softcap * tanh(scale * (x W^T + b) / softcap)`, or they depend on later
            tokens or on padding.
    """
    parameter = next(head.parameters())
    adapters = tuple(getattr(head, "active_adapters", ())), getattr(head, "disable_adapters", None)
    device = parameter.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    numbers = {k: v for k, v in vars(unwrapped(model).config).items() if isinstance(v, int | float)}  # scales, softcaps
    state = (type(model), adapters, parameter.dtype, parameter.device, autocast, tuple(numbers.items()))
    known = _verified.setdefault(head, {})
    if state not in known and input_ids.numel():
        with torch.no_grad():
            transform, checked = _measure_transform(model, head, input_ids, forward, impl)
        if not checked:
            return transform
        known[state] = transform
    return known.get(state, LogitTransform())


class _Probe:
    """Stands in for the head: keeps its input and weight, and gives known numbers instead of logits."""

    # 0 finds an offset, small numbers the slope, large ones the softcap, and the rest tests the curve in between.
    values = (0.0, 1e-3, -1e-3, 1.0, -1.0, 7.0, -30.0, 200.0, 1e6, -1e6)

    def __init__(self, head: nn.Module) -> None:
        self.head = head

    def __call__(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        self.hidden = hidden
        kind = hidden.device.type  # accelerate switches autocast on inside the model's forward
        self.dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        self.weight, self.bias = head_weight(self.head)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        probe = torch.tensor(self.values, device=hidden.device, dtype=dtype)
        return probe.repeat(*hidden.shape[:-1], 1)


def _measure_transform(
    model: nn.Module, head: nn.Module, input_ids: Tensor, forward: Callable[..., Any], impl: str
) -> tuple[LogitTransform, bool]:
    """The transform, and whether there was a finite loss to check it by."""
    ids = input_ids[:1, :_CHECKED_TOKENS]
    length = ids.shape[1]
    name = type(unwrapped(model)).__name__
    logits = forward(ids).logits[0].double()  # [T, V]
    # The same tokens again, once with one more token behind them and once with one of padding: neither may matter.
    longer = nn.functional.pad(ids, (0, 1), value=0).repeat(2, 1)
    mask = torch.ones_like(longer)
    mask[1, -1] = 0
    probe = _Probe(head)
    with swapped_forward(head, probe):
        try:
            response = forward(longer, None, mask).logits[0, 0].double().tolist()
        except torch.OutOfMemoryError:
            raise
        except (IndexError, RuntimeError) as error:
            raise ValueError(
                f"model: {name} reads particular logits after its head ({error}); only a scale and a softcap are supported"
            ) from error
    transform = _fit_transform(name, _Probe.values, response)
    # A weak leak may hide in the loss: the hidden states before the last token must not see whether it is attended.
    with_later, with_padding = probe.hidden[:, :-1].double()
    leak = float((with_later - with_padding).norm() / with_padding.norm())
    if leak > 1e-4 + 8 * torch.finfo(probe.dtype).eps:
        raise ValueError(
            f"model: {name} is not causal: a later token changes its hidden states by {leak:.2g} of their size; "
            "expected a causal language model"
        )
    target = ids[0].roll(-1)
    expected = torch.logsumexp(logits, 1) - logits.gather(1, target.to(logits.device)[:, None])[:, 0]
    finite = expected.isfinite()  # a diverged model is measured, as NaN, and checked when it is finite again
    device = probe.hidden.device
    largest = float(logits[finite].abs().max()) if finite.any() else 0.0
    tolerance = max(2 * torch.finfo(probe.dtype).eps, 1e-4) * (1 + largest)
    for row, change in ((0, "a later token"), (1, "padding")):
        loss = head_loss(probe.hidden[row, :-1], probe.weight, probe.bias, target.to(device), transform, impl).loss
        # The mean: a wrong head shows everywhere, a router of experts that rounding tips over shows at single tokens.
        error = float((loss.double() - expected.to(device))[finite.to(device)].abs().mean()) if finite.any() else 0.0
        if not error <= tolerance:
            raise ValueError(
                f"model: {name}'s own logits give another loss than its head's input and weight: {error:.2g} nats apart, "
                f"{tolerance:.2g} allowed, on {length} tokens with {change} behind them. Either it is not causal, or it "
                "changes hidden states or logits around its head; it cannot be measured exactly"
            )
    return transform, bool(finite.any())


def _fit_transform(model: str, values: tuple[float, ...], response: list[float]) -> LogitTransform:
    """Scale and softcap of a curve given at `values`; an error where it is none of that form."""
    scale = response[1] / values[1]
    largest = response[values.index(1e6)]
    softcap = largest if abs(largest) < 0.5 * abs(scale) * 1e6 else None
    transform = LogitTransform(_rounded(scale), None if softcap is None else _rounded(softcap))
    z = torch.tensor(values, dtype=torch.float64) * transform.scale
    if transform.softcap is not None:
        z = transform.softcap * torch.tanh(z / transform.softcap)
    got = torch.tensor(response, dtype=torch.float64)
    if not torch.allclose(got, z, rtol=1e-5, atol=1e-9):
        raise ValueError(
            f"model: {model} changes its logits after the head in an unknown way (head outputs {list(values)} became "
            f"{[float(f'{r:.4g}') for r in response]}); only a scale and a softcap are supported"
        )
    return transform


def _rounded(value: float) -> float:
    """The short decimal, or one over it, that `value` is within float32 rounding: 0.0625, 30.0, 1/13; else `value`."""
    candidates = [float(f"{value:.6g}"), 1 / float(f"{1 / value:.6g}") if value else value]
    nearest = min(candidates, key=lambda candidate: abs(candidate - value))
    return nearest if abs(nearest - value) <= 2e-7 * abs(value) else value
