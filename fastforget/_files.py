"""Files that are whole or absent, locks, and what differs between two records."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

__all__ = ["TEMPORARY", "differences", "lock", "sync_folder", "write_atomically"]

TEMPORARY = ".tmp-"


def write_atomically(path: Path, write: Callable[[Path], object], *, replace: bool = True) -> None:
    """Write a file so that it is either absent (or as before) or whole, even after a power failure.

    Args:
        path: the file.
        write: writes everything to the path that it is given. Whatever mode it leaves there, the file's is that of
            a file made by `open`.
        replace: whether an existing file is replaced; without it the first of several writers wins, the others raise
            FileExistsError.

    Raises:
        OSError: if the file cannot be written; no temporary file is left then.
    """
    # Processes of two machines may have the same number.
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}-{path.name}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask, which cannot be asked for without changing it
        write(temporary)
        if temporary.stat().st_mode != mode:  # safetensors writes files that only their owner can read
            temporary.chmod(mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if replace:
            os.replace(temporary, path)
        else:
            _move_to_new(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _move_to_new(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(f"{path} exists") from None
        os.replace(temporary, path)
    else:
        temporary.unlink()


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable.

    Args:
        folder: The folder.
    """
    if os.name == "nt":  # Windows cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def lock(descriptor: int, *, shared: bool = False) -> None:
    """Take the lock of an open file, or raise OSError at once.

    Args:
        descriptor: Of the file, open for reading and writing.
        shared: Whether others may share the lock; on Windows it is exclusive all the same.
    """
    if os.name == "nt":
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        import fcntl

        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """What differs between two records.

    Args:
        there: Nested dictionaries of what JSON can hold.
        here: The same.
        name: Of the record, before the keys.

    Yields:
        One clause a difference.
    """
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *(key for key in here if key not in there)]:
            yield from differences(there.get(key), here.get(key), f"{name} {key}".strip())
    elif there != here:
        first, second = (json.dumps(value)[:100] for value in (there, here))
        yield f"{name}: {first} there, {second} here"
