"""The dense deltas of LoRA adapters, as PEFT computes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastforget._parameters import local, named
from fastforget.fisher.names import canonical_name

__all__ = [
    "adapter_delta",
    "adapter_folder",
    "held_tensors",
    "load_adapter",
    "refuse_changed_base",
    "without_adapters",
]

PLAIN_START = (
    True,
    False,
    None,
    "gaussian",
    "orthogonal",
    "eva",
)  # initialisations that leave the base's weights alone
FIX = "merge it into its base with merge_and_unload() and pass that"


class _Placeholder(nn.Parameter):
    """A parameter of the base that was not read.

    One zero takes its whole shape. It is not on the meta device, because PEFT takes adapters to their weights' device.
    """


def adapter_folder(model: Any) -> Path | None:
    """The folder of an adapter, if it is one.

    Args:
        model: Anything.

    Returns:
        The folder, or None.
    """
    if not isinstance(model, str | os.PathLike):
        return None
    folder = Path(os.fspath(model)).expanduser()
    return folder if (folder / "adapter_config.json").is_file() else None


def without_adapters(model: nn.Module, *, trained: bool = True) -> dict[str, Tensor]:
    """A model's own parameters and persistent buffers.

    Args:
        model: With adapters or without.
        trained: Take the copies that adapters train, as of `modules_to_save`, instead of what they are copies of.

    Returns:
        By canonical name.
    """
    state = {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)}
    kept = ((name, tensor) for name, tensor in state.items() if trained or ".modules_to_save." not in f".{name}")
    return {name: tensor for name, tensor in named(kept).items() if ".lora_" not in f".{name}"}


def held_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What an adapter's folder holds as a whole, such as `modules_to_save`.

    Args:
        model: From `load_adapter`.

    Returns:
        By canonical name.
    """
    every = without_adapters(model)
    return {name: tensor for name, tensor in every.items() if not (tensor.is_meta or isinstance(tensor, _Placeholder))}


def load_adapter(folder: Path, base: Any) -> nn.Module:
    """Load an adapter around a model without values, so that nothing of the base is read.

    Args:
        folder: The adapter's.
        base: A module or a checkpoint's folder; its configuration is used.

    Returns:
        PEFT's model. Only the adapter's tensors have values.

    Raises:
        TypeError: The base is neither.
        ValueError: It is no plain LoRA, or cannot be loaded.
    """
    from peft import PeftConfig

    try:
        config: Any = PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever the configuration's own code raises
        raise ValueError(f"tuned: cannot read {folder / 'adapter_config.json'}: {error}; save it again") from error
    _check_config(config)
    if not isinstance(base, nn.Module | str | os.PathLike):
        raise TypeError(f"base: expected a model or a checkpoint's folder for an adapter, got {type(base).__name__}")
    config.init_lora_weights = False
    try:
        model = _around_skeleton(folder, config, base)
    except Exception as error:
        raise ValueError(f"tuned: cannot load the adapter {folder} for this base: {error}; save it again") from error
    _check_complete(model, folder)
    return model


def _around_skeleton(folder: Path, config: Any, base: Any) -> nn.Module:
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    of_base: Any = base.config if isinstance(base, nn.Module) else AutoConfig.from_pretrained(os.fspath(base))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(of_base)
    placeholders: dict[Tensor, _Placeholder] = {}  # tied parameters stay tied
    for module in skeleton.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                new = _Placeholder(torch.zeros((), dtype=torch.float32).expand(parameter.shape), requires_grad=False)
                module._parameters[name] = placeholders.setdefault(parameter, new)
    return PeftModel.from_pretrained(skeleton, str(folder), config=config, low_cpu_mem_usage=True)


def _check_config(config: Any) -> None:
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    start = getattr(config, "init_lora_weights", True)
    if kind != "LORA":
        raise ValueError(f"tuned: expected a LoRA adapter, got {kind}; {FIX}")
    if config.use_dora:
        raise ValueError(
            f"tuned: expected a plain LoRA adapter, got use_dora=True, whose delta depends on the base; {FIX}"
        )
    if start not in PLAIN_START:
        raise ValueError(f"tuned: expected plain LoRA, got init_lora_weights={start!r}, which changes the base; {FIX}")


def _check_complete(model: Any, folder: Path) -> None:
    from peft import get_peft_model_state_dict
    from peft.utils.save_and_load import load_peft_weights

    there = load_peft_weights(str(folder), device="cpu")
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(name for name in there if ".lora_" in name and name not in loaded)
    odd += sorted(name for name, tensor in loaded.items() if tensor.is_meta)
    if odd:
        raise ValueError(
            f"tuned: expected the tensors of {folder / 'adapter_config.json'}, got a difference in {odd[0]}"
        )


def adapter_delta(model: nn.Module) -> dict[str, Tensor]:
    """What the active LoRA adapters of a model add to its weights.

    Args:
        model: One of PEFT's.

    Returns:
        `scaling B A` by the weight's canonical name, float32 or the adapter's dtype, summed over the adapters.

    Raises:
        ValueError: An adapter is no plain LoRA, or adapts a tied weight in one of its places only.
    """
    result: dict[str, Tensor] = {}
    for name, value in _deltas(model):
        value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
        result[name] = result[name] + value if name in result else value
    return result


def _deltas(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(canonical_name(name))
    for path, module in _layers(model):
        _check_layer(path, module)
        name, weight = _adapted(path, module)
        also = names.get(id(weight), set()) - {name}
        if also:
            raise ValueError(
                f"tuned: expected adapters of weights in one place, got one of {name}, which is tied to {min(also)}: a delta "
                "would change both; untie them first"
            )
        for adapter in [] if module.disable_adapters else module.active_adapters:
            known = adapter in module.lora_A or adapter in module.lora_embedding_A
            if known and adapter not in module.merged_adapters:
                yield name, module.get_delta_weight(adapter)


def _adapted(path: str, module: Any) -> tuple[str, Tensor]:
    """The weight of the base that a layer of adapters adapts, with its name."""
    weight = module.get_param() if hasattr(module, "parameter_name") else module.get_base_layer().weight
    return canonical_name(f"{path}.{getattr(module, 'parameter_name', 'weight')}"), weight


def refuse_changed_base(model: nn.Module, base: Any) -> None:
    """Refuse a base that is not as it was before the adapters: training them has changed it where it is.

    Args:
        model: One of PEFT's.
        base: What it should be compared with; a checkpoint is never changed.

    Raises:
        ValueError: The base has merged adapters, or shares with the model what was trained.
    """
    tensors = without_adapters(base, trained=False) if isinstance(base, nn.Module) else base
    held = (
        [local(value) for value in tensors.values() if isinstance(value, Tensor)]
        if isinstance(tensors, Mapping)
        else []
    )
    places = {value.data_ptr() for value in held if value.numel() and not value.is_meta}
    changed = [path for path, layer in _layers(base) if layer.merged_adapters] if isinstance(base, nn.Module) else []
    changed += [name for name, tensor in _changed_in_place(model) if local(tensor).data_ptr() in places]
    if changed:
        raise ValueError(
            f"base: expected it as it was before the adapters, got {canonical_name(changed[0])!r}, which was changed in place; "
            "pass its checkpoint or an untouched copy"
        )


def _changed_in_place(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of its base that one of PEFT's models may have changed."""
    configs = list(getattr(model, "peft_config", {}).values())
    biases = any(getattr(config, "bias", "none") != "none" for config in configs)
    residual = any(getattr(config, "init_lora_weights", True) not in PLAIN_START for config in configs)
    for path, layer in _layers(model):
        if residual or layer.merged_adapters:
            yield _adapted(path, layer)
    for name, tensor in without_adapters(model).items():
        if tensor.requires_grad or (biases and name.endswith("bias")):
            yield name, tensor


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of adapters, with their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return ((path, module) for path, module in model.named_modules() if isinstance(module, BaseTunerLayer))


def _check_layer(path: str, module: Any) -> None:
    from peft.tuners.lora import layer as lora

    plain = (lora.Linear, lora.Embedding, lora.Conv1d, lora.Conv2d, lora.Conv3d, lora.ParamWrapper)
    if not isinstance(module, plain):
        got = f"{type(module).__module__.removeprefix('peft.tuners.')}.{type(module).__name__}"
    elif module.lora_variant:
        got = ", ".join(type(variant).__name__ for variant in module.lora_variant.values())
    elif any(module.lora_bias.values()):
        got = "lora_bias=True"
    else:
        return
    raise ValueError(f"tuned: expected plain LoRA of dense weights, got {got} at {canonical_name(path)}; {FIX}")
