"""Models as tensors by name, in memory or on the disk, read one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastforget._parameters import named
from fastforget.fisher.files import HEADER_KEY
from fastforget.fisher.names import canonical_name

__all__ = ["DTYPES", "Source", "open_source", "read_weights", "tensor_source"]

DTYPES = {  # as safetensors calls them
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
COPIED = (".json", ".txt", ".model", ".jinja", ".py", ".tiktoken")  # configuration and tokenizer
NOT_COPIED = (".index.json", "trainer_state.json", "requirements.txt")


@dataclass
class Source:
    """A model as tensors by canonical name.

    Attributes:
        label: What messages call it.
        like: A meta tensor for each, with its shape and dtype.
        names: The name of each where it is stored.
        aliases: Other names of tied tensors, each with the name that it has here.
        read_stored: Reads a tensor by that name; it must not be written to.
        copy_configuration: Writes what a folder needs besides the weights.
    """

    label: str
    like: dict[str, Tensor]
    names: dict[str, str]
    aliases: dict[str, str]
    read_stored: Callable[[str], Tensor]
    copy_configuration: Callable[[Path], object]

    def read(self, name: str) -> Tensor:
        """A tensor, mapped from its file or the model's own.

        Args:
            name: Its canonical name.

        Returns:
            The tensor.

        Raises:
            ValueError: It cannot be read any more.
        """
        return self.read_stored(self.names[name]).detach()

    def tie(self, aliases: Mapping[str, str]) -> None:
        """Call tied tensors by one name, and keep one of those that are stored twice.

        Args:
            aliases: Other names, each with the one to use.

        Raises:
            ValueError: Tensors that should be tied differ.
        """
        for alias, name in aliases.items():
            if alias not in self.like:
                continue
            if name not in self.like:
                self.like[name], self.names[name] = self.like[alias], self.names[alias]
            elif not torch.equal(self.read(alias), self.read(name)):
                raise ValueError(
                    f"{self.label}: expected {alias} to be tied to {name} as elsewhere, got two different tensors; use models "
                    "of one configuration"
                )
            del self.like[alias], self.names[alias]


def open_source(model: Any, label: str, needed: Iterable[str] = ()) -> Source:
    """A model's tensors, wherever they are.

    Args:
        model: A module, a `{name: tensor}`, a checkpoint's folder or safetensors file, or a hub id.
        label: What messages call it.
        needed: Names that have to be there. Where a checkpoint stores others than its model has, as those of some
            mixture-of-experts models, transformers loads it, as a whole.

    Returns:
        The tensors: a module's parameters and persistent buffers.

    Raises:
        TypeError: It is none of these.
        ValueError: It has adapters, is sharded or has no values, or no weights can be read.
    """
    if isinstance(model, nn.Module):
        if getattr(model, "peft_config", None):
            raise ValueError(f"{label}: expected a model without adapters, got one of PEFT's; pass merge_and_unload()")
        return _module_source(model, label)
    if isinstance(model, Mapping):
        return tensor_source(model.items(), label)
    if isinstance(model, str | os.PathLike):
        return _open_checkpoint(_found(model, label), label, set(needed))
    raise TypeError(
        f"{label}: expected a model, a mapping from names to tensors or a checkpoint's path, got {type(model).__name__}"
    )


def tensor_source(pairs: Iterable[tuple[str, Tensor]], label: str) -> Source:
    """Tensors in memory.

    Args:
        pairs: Names and tensors; one that occurs under several names is kept under the first.
        label: What messages call them.

    Returns:
        The tensors.

    Raises:
        TypeError: Something else than tensors is there.
        ValueError: Two have one name, one is sharded, or one has no values.
    """
    tensors, aliases = {}, {}
    places: dict[Any, str] = {}
    for name, tensor in named(pairs, label).items():
        if isinstance(tensor, DTensor) or tensor.is_meta:
            got = "a sharded one" if isinstance(tensor, DTensor) else "one on the meta device"
            raise ValueError(
                f"{label}[{name!r}]: expected a whole tensor with values, got {got}; save the model and pass the folder"
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        first = places.setdefault(place, name)
        if first == name:
            tensors[name] = tensor
        else:
            aliases[name] = first
    like = {name: torch.empty_like(tensor, device="meta", requires_grad=False) for name, tensor in tensors.items()}
    return Source(label, like, dict(zip(like, like, strict=True)), aliases, tensors.__getitem__, lambda folder: None)


def _module_source(model: nn.Module, label: str) -> Source:
    state = model.state_dict(keep_vars=True)
    source = tensor_source(((n, t) for n, t in state.items() if isinstance(t, Tensor)), label)
    source.copy_configuration = partial(_save_configuration, model)
    return source


def _save_configuration(model: nn.Module, folder: Path) -> None:
    for name in ("config", "generation_config"):
        configuration = getattr(model, name, None)
        if hasattr(configuration, "save_pretrained"):
            configuration.save_pretrained(folder)  # type: ignore[union-attr]


# ----- checkpoints on the disk


def read_weights(path: str | os.PathLike[str], label: str) -> dict[str, Tensor]:
    """The tensors of a saved model, all of them.

    Args:
        path: A checkpoint's folder or safetensors file.
        label: What messages call it.

    Returns:
        By canonical name, mapped from the files: a tensor is read when it is used, and must not be written to.

    Raises:
        ValueError: There is none, or no weights can be read.
    """
    found = Path(os.fspath(path)).expanduser()
    if not found.exists():
        raise ValueError(
            f"{label}: expected a safetensors file or a folder with a saved model, got {found}, which does not exist"
        )
    source = _open_checkpoint(found, label)
    return {name: source.read(name) for name in source.like}


def _found(path: str | os.PathLike[str], label: str) -> Path:
    found = Path(os.fspath(path)).expanduser()
    if found.exists():
        return found
    name = os.fspath(path)
    if name.startswith((".", "/", "~")) or name.count("/") > 1 or found.suffix == ".safetensors":
        raise ValueError(f"{label}: expected a checkpoint's folder or a hub id, got {name}, which does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", *(f"*{ending}" for ending in COPIED)]))
    except Exception as error:  # the hub's client raises its own and its HTTP library's errors
        raise ValueError(
            f"{label}: expected a checkpoint's folder or a hub id, got {name}: no such folder, and the hub says: "
            f"{str(error).splitlines()[0]}; check the path or the connection"
        ) from error


def _weight_files(path: Path, label: str) -> list[Path]:
    if path.is_file():
        return [path]
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{label}: expected a full checkpoint, got the adapter {path}; merge it into its base with merge_and_unload()"
        )
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.is_file() or not index.is_file():
        return [single]
    try:
        return [
            path / name for name in sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        ]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{label}: cannot read {index}: {error!r}; copy the checkpoint again") from error


def _open_checkpoint(path: Path, label: str, needed: Set[str] = frozenset()) -> Source:
    from safetensors import SafetensorError, safe_open

    handles: dict[str, Any] = {}
    like, names = {}, {}
    for file in _weight_files(path, label):
        try:
            handle: Any = safe_open(file, framework="pt")
            if HEADER_KEY in (handle.metadata() or {}):
                raise ValueError(
                    f"{label}: expected a model's weights, got {file}, a Fisher, mask or difference of models"
                )
            for stored in handle.keys():  # noqa: SIM118
                header, name = handle.get_slice(stored), canonical_name(stored)
                if names.setdefault(name, stored) != stored:
                    raise ValueError(
                        f"{label}: expected one tensor a name, got {names[name]!r} and {stored!r}, both {name!r}; rename or "
                        f"remove one in {file}"
                    )
                like[name] = torch.empty(header.get_shape(), dtype=DTYPES[header.get_dtype()], device="meta")
                handles[stored] = handle
        except KeyError as error:
            raise ValueError(f"{label}: expected dtypes that torch has, got {error} in {file}") from error
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{label}: cannot read {file}: {error}; save it again with save_pretrained") from error
    folder = path if path.is_dir() else path.parent
    if not needed <= like.keys() and needed <= _names_of_model(folder):
        return _load(folder, label)
    return Source(label, like, names, {}, lambda name: handles[name].get_tensor(name), partial(_copy_files, folder))


def _copy_files(source: Path, folder: Path) -> None:
    if not (source / "config.json").is_file():
        return
    for file in sorted(source.iterdir()):
        if file.is_file() and file.name.endswith(COPIED) and not file.name.endswith(NOT_COPIED):
            shutil.copyfile(file, folder / file.name)


def _names_of_model(folder: Path) -> set[str]:
    """The names that transformers gives the tensors of a checkpoint, without reading it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if not (folder / "config.json").is_file():
        return set()
    with contextlib.suppress(Exception), torch.device("meta"):  # of a model that transformers does not know
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
        return {canonical_name(name) for name in model.state_dict()}
    return set()


def _load(folder: Path, label: str) -> Source:
    from transformers import AutoModelForCausalLM

    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    except Exception as error:  # whatever the model's own code raises
        raise ValueError(f"{label}: cannot load {folder}: {error}; copy the checkpoint again") from error
    model, about = loaded
    bad = sorted(str(name) for key in ("missing_keys", "mismatched_keys", "error_msgs") for name in about[key])
    if bad:
        raise ValueError(f"{label}: expected every tensor of the model in {folder}, got a problem with {bad[0]}")
    source = _module_source(model, label)
    source.copy_configuration = partial(_copy_files, folder)
    return source
