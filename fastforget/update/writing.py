"""Checkpoints that are written one tensor at a time, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastforget._files import TEMPORARY, sync_folder
from fastforget.fisher.files import check_space
from fastforget.update.checkpoints import DTYPES, Source

__all__ = ["advancing", "write_checkpoint"]


def write_checkpoint(
    out: str | os.PathLike[str] | None,
    source: Source,
    tensor: Callable[[str], Tensor],
    text: str,
    *,
    dry_run: bool = False,
    max_shard_size: int | str = "5GB",
    progress: bool = False,
) -> None:
    """Write a checkpoint with the names, shapes and dtypes of another, tensor by tensor; the folder is whole or absent.

    Args:
        out: A new or empty folder; None, with `dry_run`, for none.
        source: The other.
        tensor: Computes a tensor from its canonical name; called once for each.
        text: What is done, beside the progress bar.
        dry_run: Compute the tensors, and write nothing.
        max_shard_size: Of a file, in bytes or such as "5GB". A tensor that is larger has a file of its own.
        progress: Show a progress bar.

    Raises:
        ValueError: The folder holds something, the disk has no room, or the size of a file is none.
    """
    from huggingface_hub import split_torch_state_dict_into_shards

    by_stored = {stored: name for name, stored in source.names.items()}
    like = {stored: source.like[name] for stored, name in by_stored.items()}
    try:
        split = split_torch_state_dict_into_shards(like, max_shard_size=max_shard_size)
    except ValueError:
        raise ValueError(f"max_shard_size: expected bytes or such as 5GB, got {max_shard_size!r}") from None
    folder = None if out is None else _free_folder(out, sum(value.nbytes for value in like.values()))
    with advancing(tensor, source.like, text, shown=progress) as advance:
        if folder is None or dry_run:
            for name in source.like:
                advance(name)
            return
        with _whole_folder(folder) as written:
            source.copy_configuration(written)
            for file, names in split.filename_to_tensors.items():
                part = {name: like[name] for name in names}
                _write_file(written / file, part, lambda stored: advance(by_stored[stored]))
            if split.is_sharded:
                index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
                line = json.dumps(index, indent=2, sort_keys=True) + "\n"
                (written / "model.safetensors.index.json").write_text(line, encoding="utf-8")


def _free_folder(out: str | os.PathLike[str], size: int) -> Path:
    folder = Path(os.fspath(out)).expanduser().absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: expected a new or empty folder, got {folder}; choose another")
    try:
        check_space(folder, size)
    except ValueError as error:
        raise ValueError(f"out{str(error).removeprefix('path')}") from None
    return folder


@contextlib.contextmanager
def _whole_folder(out: Path) -> Iterator[Path]:
    temporary = out.with_name(f"{TEMPORARY}{os.getpid()}-{out.name}")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for path in temporary.iterdir():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
        sync_folder(temporary)
        with contextlib.suppress(FileNotFoundError):
            out.rmdir()  # an empty one, which not every system lets a rename replace
        temporary.rename(out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(out.parent)


def _write_file(path: Path, like: Mapping[str, Tensor], tensor: Callable[[str], Tensor]) -> None:
    """The format of safetensors, whose own writer takes all of a file's tensors at once."""
    order = sorted(like, key=lambda name: (-like[name].element_size(), name))  # widest first: each is aligned
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        start, end = end, end + like[name].nbytes
        header[name] = {"dtype": codes[like[name].dtype], "shape": list(like[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            value = tensor(name).detach().to("cpu").contiguous()
            if value.shape != like[name].shape or value.dtype != like[name].dtype:
                raise RuntimeError(f"{name}: announced as {like[name]}, computed as {value.dtype} {tuple(value.shape)}")
            file.write(value.reshape(-1).view(torch.uint8).numpy().data)


@contextlib.contextmanager
def advancing(
    tensor: Callable[[str], Tensor], like: Mapping[str, Tensor], text: str, *, shown: bool
) -> Iterator[Callable[[str], Tensor]]:
    """Draw a progress bar over the bytes of the tensors that a function computes.

    Args:
        tensor: The function, from a name.
        like: Tensors of the same sizes.
        text: What is done.
        shown: Whether anything is drawn.

    Yields:
        The function, which advances the bar.
    """
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = [TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn()]
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task(text, total=sum(value.nbytes for value in like.values()))

        def advance(name: str) -> Tensor:
            result = tensor(name)
            bar.advance(task, like[name].nbytes)
            return result

        yield advance
