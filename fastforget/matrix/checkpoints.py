"""Checkpoints and adapters on the disk: names, folders, fingerprints, tensor shapes, configurations, tokenizers."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastforget.matrix.upstream import tokenizer_parts

BLOCKS, BLOCK = 64, 64 * 1024  # what a fingerprint reads of a weight file ...
TENSOR_BLOCK = 4096  # ... and of every tensor in it, so that tuned norms or biases alone are seen
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
# What a configuration may say differently without changing what the weights compute in eval mode.
HARMLESS = {
    "architectures",
    "auto_map",
    "chunk_size_feed_forward",
    "dtype",
    "finetuning_task",
    "gradient_checkpointing",
}
HARMLESS |= {"id2label", "initializer_range", "label2id", "max_position_embeddings", "output_attentions"}
HARMLESS |= {"output_hidden_states", "pretraining_tp", "problem_type", "return_dict", "task_specific_params"}
HARMLESS |= {"torch_dtype", "transformers_version", "use_cache"}
HARMLESS_ENDINGS = ("_token_id", "dropout", "_pdrop", "_coef", "_initializer_range")


@dataclass(frozen=True)
class Checkpoint:
    """A model on the disk.

    Attributes:
        name: how reports call it.
        kind: `base`, `full` or `adapter`.
        path: as it was given.
        folder: where its files are.
        fingerprint: sha256 of its configuration and of samples of its weights.
    """

    name: str
    kind: str
    path: str
    folder: Path
    fingerprint: str

    @property
    def label(self) -> str:
        """How error messages begin."""
        return "base" if self.kind == "base" else f"task {self.name!r}"


def named_tasks(tasks: Iterable[str | os.PathLike[str]] | Mapping[str, str | os.PathLike[str]]) -> dict[str, str]:
    """The tasks' paths by name, in order.

    Args:
        tasks: paths or hub ids, each perhaps as `NAME=PATH`, or a mapping from names to them. The default name is the
            path's last part.

    Returns:
        Paths by name.

    Raises:
        TypeError: if `tasks` is one string.
        ValueError: if there is no task, or two have the same name.
    """
    if isinstance(tasks, str | os.PathLike):
        raise TypeError(f"tasks: expected a list or a mapping, got {tasks!r}; write [{os.fspath(tasks)!r}]")
    if isinstance(tasks, Mapping):
        pairs = [(str(name), os.fspath(path)) for name, path in tasks.items()]
    else:
        pairs = [_named(os.fspath(task)) for task in tasks]
    if not pairs:
        raise ValueError("tasks: expected at least one checkpoint or adapter, got none; pass tasks=[...] (--task)")
    named: dict[str, str] = {}
    for name, path in pairs:
        if not name:
            raise ValueError(f"tasks: expected a name, got none for {path!r}; write NAME={path}")
        if name in named:
            raise ValueError(
                f"tasks: expected unique names, got {name!r} for {named[name]} and {path}; name them with NAME=PATH"
            )
        named[name] = path
    return named


def _named(task: str) -> tuple[str, str]:
    name, equals, path = task.partition("=")
    # A path may hold an equals sign of its own, as in runs/lr=1e-4.
    if not equals or os.sep in name or "/" in name or Path(task).exists():
        name, path = Path(task).expanduser().resolve().name, task
    return name, path


def find_checkpoint(name: str, path: str, *, is_base: bool = False) -> Checkpoint:
    """Find a checkpoint's files, from the hub where it is no folder, and take its fingerprint.

    Args:
        name: how reports call it.
        path: a folder or a hub id.
        is_base: whether it is the base, which has to be a full checkpoint.

    Returns:
        The checkpoint.

    Raises:
        ValueError: if it is no readable checkpoint or adapter.
    """
    label = "base" if is_base else f"task {name!r}"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        folder = _download(label, path)
    is_adapter = (folder / "adapter_config.json").is_file()
    if is_base and is_adapter:
        raise ValueError(f"base: expected a full checkpoint, got the adapter {path}; merge it into its base first")
    if not is_adapter and not (folder / "config.json").is_file():
        raise ValueError(
            f"{label}: expected a checkpoint (config.json) or an adapter (adapter_config.json), got {path} with "
            "neither; check the path"
        )
    kind = "base" if is_base else "adapter" if is_adapter else "full"
    unnamed = Checkpoint(name, kind, path, folder, "")
    return Checkpoint(name, kind, path, folder, _fingerprint(unnamed))


def _download(label: str, path: str) -> Path:
    if path.startswith((".", "/", "~")) or path.count("/") > 1 or (os.sep != "/" and os.sep in path):
        raise ValueError(f"{label}: expected a folder or a hub id, got {path}, which does not exist; check the path")
    from huggingface_hub import snapshot_download

    try:
        folder = Path(
            snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"])
        )
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(path, allow_patterns=["*.bin"]))
    except Exception as error:  # the hub's client raises its own and its HTTP library's errors
        raise ValueError(
            f"{label}: expected a folder or a hub id, got {path}: no such folder, and the hub says: "
            f"{str(error).splitlines()[0]}; check the path or the connection"
        ) from error
    return folder


def weight_files(checkpoint: Checkpoint) -> list[Path]:
    """The files that hold a checkpoint's tensors, safetensors where there are any.

    Args:
        checkpoint: the checkpoint or adapter.

    Returns:
        The files.

    Raises:
        ValueError: if there are none, or one is missing.
    """
    stems = ("adapter_model",) if checkpoint.kind == "adapter" else ("model", "pytorch_model")
    for ending in (".safetensors", ".bin"):
        for stem in stems:
            index = checkpoint.folder / f"{stem}{ending}.index.json"
            single = checkpoint.folder / f"{stem}{ending}"
            if single.is_file():
                return [single]
            if index.is_file():
                files = _indexed(checkpoint, index)
                missing = [file.name for file in files if not file.is_file()]
                if missing:
                    raise ValueError(
                        f"{checkpoint.label}: expected every file of {index}, got none named {', '.join(missing)}; "
                        "copy the checkpoint again"
                    )
                return files
    raise ValueError(
        f"{checkpoint.label}: expected weights ({stems[0]}.safetensors, its index, or .bin), got none in "
        f"{checkpoint.folder}; save it with save_pretrained"
    )


def _indexed(checkpoint: Checkpoint, index: Path) -> list[Path]:
    try:
        return [index.parent / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{checkpoint.label}: cannot read {index}: {error}; copy the checkpoint again") from error


def _fingerprint(checkpoint: Checkpoint) -> str:
    digest = hashlib.sha256()
    config = "adapter_config.json" if checkpoint.kind == "adapter" else "config.json"
    digest.update((checkpoint.folder / config).read_bytes())
    for path in weight_files(checkpoint):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        steps = range(BLOCKS) if size > BLOCKS * BLOCK else []
        starts = [(k * (size - BLOCK) // (BLOCKS - 1), BLOCK) for k in steps] or [(0, size)]
        with open(path, "rb") as file:
            for start, length in starts + _tensor_blocks(file, size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _tensor_blocks(file: Any, size: int) -> list[tuple[int, int]]:
    # The middle of every tensor of a safetensors file; other files are read in blocks alone.
    header = int.from_bytes(file.read(8), "little")
    if not file.name.endswith(".safetensors") or header > size:
        return []
    try:
        tensors = json.loads(file.read(header))
        ranges = [entry["data_offsets"] for name, entry in sorted(tensors.items()) if name != "__metadata__"]
    except (ValueError, KeyError, AttributeError):  # damaged: tensor_shapes says so
        return []
    return [
        (max(0, 8 + header + (first + last - TENSOR_BLOCK) // 2), TENSOR_BLOCK)
        for first, last in ranges
        if last > first
    ]


def tensor_shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """The shapes of a checkpoint's tensors, from the headers of its files alone.

    Args:
        checkpoint: the checkpoint or adapter.

    Returns:
        Shapes by tensor name.

    Raises:
        ValueError: if a file is damaged.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in weight_files(checkpoint):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            else:
                tensors = torch.load(path, map_location="meta", weights_only=True)
                shapes |= {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        except Exception as error:  # safetensors, zipfile and pickle each have their own
            raise ValueError(
                f"{checkpoint.label}: cannot read {path}: {str(error).splitlines()[0]}; the file is damaged, copy the "
                "checkpoint again"
            ) from error
    return shapes


def load_config(checkpoint: Checkpoint) -> Any:
    """The transformers configuration of a full checkpoint.

    Args:
        checkpoint: the checkpoint.

    Returns:
        The configuration.

    Raises:
        ValueError: if it cannot be read.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(checkpoint.folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{checkpoint.label}: cannot read {checkpoint.folder / 'config.json'}: {error}; copy the checkpoint again"
        ) from error


def config_difference(base: Any, other: Any) -> str | None:
    """The first entry in which a checkpoint's configuration computes something else than the base's.

    Args:
        base: the base's configuration.
        other: the checkpoint's.

    Returns:
        A sentence, or None.
    """
    expected, got = base.to_dict(), other.to_dict()
    for name in sorted(expected.keys() | got.keys()):
        if name in HARMLESS or name.startswith("_") or name.endswith(HARMLESS_ENDINGS):
            continue
        if expected.get(name) != got.get(name):
            return f"expected {name} = {expected.get(name)} as in the base's config.json, got {got.get(name)}"
    return None


# ----- tokenizers


def load_tokenizer(checkpoint: Checkpoint) -> Any:
    """The tokenizer in a checkpoint's folder.

    Args:
        checkpoint: the checkpoint.

    Returns:
        A transformers tokenizer.

    Raises:
        ValueError: if it cannot be read.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint.folder)
    except Exception as error:  # tokenizers raises plain Exception
        raise ValueError(
            f"{checkpoint.label}: cannot load the tokenizer of {checkpoint.folder}: {error}; save it there with "
            "tokenizer.save_pretrained"
        ) from error


def check_tokenizer(task: Checkpoint, base_tokenizer: Any, samples: list[str]) -> None:
    """Refuse a task whose folder has a tokenizer that cuts text otherwise than the base's, which the run uses.

    Args:
        task: the checkpoint or adapter; one without a tokenizer passes.
        base_tokenizer: the base's.
        samples: some texts that both have to cut alike.

    Raises:
        ValueError: if they differ.
    """
    if not any((task.folder / name).is_file() for name in VOCABULARY_FILES):
        return
    tokenizer = load_tokenizer(task)
    fix = "the run tokenises with the base's tokenizer; evaluate this task against the base that it was tuned from"
    base_parts, parts = tokenizer_parts(base_tokenizer), tokenizer_parts(tokenizer)
    different = [name for name in sorted(base_parts.keys() | parts.keys()) if base_parts.get(name) != parts.get(name)]
    if different:
        raise ValueError(f"{task.label}: expected the base's tokenizer, got another {', '.join(different)}; {fix}")
    for text in samples:
        expected, got = (t(text, verbose=False)["input_ids"] for t in (base_tokenizer, tokenizer))
        if expected != got:
            raise ValueError(
                f"{task.label}: expected the base's tokens {expected[:12]} for {text[:40]!r}, got {got[:12]}; {fix}"
            )
