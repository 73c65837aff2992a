"""Where a run's files are: a local or shared folder, or a prefix of an object store. Files are whole or absent in both."""

import contextlib
import inspect
import io
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from fastforget._files import TEMPORARY, lock, sync_folder, write_atomically
from fastforget.matrix import leases
from fastforget.matrix.shares import Share

Result = TypeVar("Result")
AT_ONCE = 16  # requests to an object store
OTHER_FOLDER = "choose another folder"


class Folder(Protocol):
    """What a store needs; names are relative, with `/`. `LocalFolder` and `RemoteFolder` have it."""

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def names(self, below: str = "") -> list[str]:
        """The names in the folder, or in one below it, sorted; none where it is missing."""
        ...

    def read(self, name: str) -> bytes:
        """A file's content; OSError where it cannot be read."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Write or replace a file."""
        ...

    def create(self, name: str, content: bytes) -> None:
        """Write a file; FileExistsError where there is one."""
        ...

    def delete(self, name: str) -> None:
        """Delete a file, if it is there."""
        ...

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write or replace a Parquet file."""
        ...

    def read_table(self, name: str) -> pa.Table:
        """Read a Parquet file."""
        ...

    def map(self, read: Callable[[str], Result], names: list[str]) -> list[Result]:
        """Read several files, at once where that is faster."""
        ...

    def append(self, name: str, line: str) -> None:
        """Add a line to a journal, durably."""
        ...

    def lines(self, name: str) -> list[str]:
        """The whole lines of a journal."""
        ...

    def check_writable(self) -> bool:
        """Raise ValueError where nothing can be written; return whether the folder exists."""
        ...

    def clear(self, names: set[str] | None) -> None:
        """Delete what killed writers of these files (None: of any) left half done."""
        ...

    def claimed(self, share: Share, *, create: bool = True) -> AbstractContextManager[Any]:
        """Keep other drivers of the same work away meanwhile; without `create`, only look whether there are any."""
        ...


def open_folder(out: str | os.PathLike[str]) -> Folder:
    """The folder of a path or of a URL that fsspec knows.

    Args:
        out: a path, or `s3://...`, `gs://...`, `memory://...`; `file://...` is a path.

    Returns:
        The folder; nothing is made.

    Raises:
        ValueError: if the URL's kind is unknown.
        ImportError: if its package is not installed.
    """
    out = os.fspath(out)
    if "://" not in out or out.startswith(("file://", "local://")):
        return LocalFolder(Path(out.partition("://")[2] or out))
    return RemoteFolder(out)


def in_use(folder: object, by: str = "") -> ValueError:
    """The error of a folder in which another driver is at work.

    Args:
        folder: the folder.
        by: who the other is, in parentheses.

    Returns:
        The error.
    """
    return ValueError(
        f"out: expected a folder that nobody writes to, got {folder}, in use by another run{by}; "
        f"wait for it or {OTHER_FOLDER}"
    )


class LocalFolder(Folder):
    """A folder of this machine, or one that machines share."""

    def __init__(self, path: Path):
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @override
    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    @override
    def names(self, below: str = "") -> list[str]:
        try:
            return sorted(os.listdir(self.path / below))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @override
    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    @override
    def write(self, name: str, content: bytes) -> None:
        write_atomically(self._made(name), lambda path: path.write_bytes(content))

    @override
    def create(self, name: str, content: bytes) -> None:
        write_atomically(self._made(name), lambda path: path.write_bytes(content), replace=False)

    @override
    def delete(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)

    @override
    def write_table(self, name: str, table: pa.Table) -> None:
        write_atomically(self._made(name), lambda path: pq.write_table(table, path))

    @override
    def read_table(self, name: str) -> pa.Table:
        return pq.ParquetFile(self.path / name).read()

    @override
    def map(self, read: Callable[[str], Result], names: list[str]) -> list[Result]:
        return [read(name) for name in names]

    @override
    def append(self, name: str, line: str) -> None:
        path = self.path / name
        if path.exists():
            self._drop_torn_line(path)
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.path)

    @staticmethod
    def _drop_torn_line(path: Path) -> None:
        # An event that a power failure left half written is cut, so that the next one starts a line.
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            write_atomically(path, lambda temporary: temporary.write_bytes(whole))

    @override
    def lines(self, name: str) -> list[str]:
        try:
            text = (self.path / name).read_text(encoding="utf-8")
        except FileNotFoundError:
            return []
        return text.split("\n")[:-1]  # what follows the last \n is torn

    def _made(self, name: str) -> Path:
        path = self.path / name
        if not path.parent.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            sync_folder(path.parent.parent)
        return path

    @override
    def check_writable(self) -> bool:
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"out: expected a folder that can be written to, got {existing}; {OTHER_FOLDER}")
        return self.path.exists()

    @override
    def clear(self, names: set[str] | None) -> None:
        for folder in (self.path, self.path / "units", self.path / "predicted"):
            for leftover in folder.glob(f"{TEMPORARY}*"):
                if names is None or leftover.name.endswith(tuple(names)):
                    leftover.unlink(missing_ok=True)

    @override
    @contextlib.contextmanager
    def claimed(self, share: Share, *, create: bool = True) -> Iterator[Any]:
        """Hold the lock of a share; the system frees it when a driver dies. Leases where the file system has no locks.

        Args:
            share: what the driver computes.
            create: make the lock file where it is missing; otherwise a missing one is no lock.

        Yields:
            Nothing; or the lease.

        Raises:
            ValueError: if another driver of the same work, or of another division of the run, is at work.
            OSError: if the lock file cannot be made.
        """
        own = self.path / f"lock{share.suffix}"
        if create:
            self.path.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            lease = None
            try:
                if create or own.exists():
                    stack.enter_context(self._locked(own, share))
                self._look_for_others(share)
            except OSError as error:
                if error.errno not in leases.NO_LOCKS:
                    raise
                lease = stack.enter_context(leases.held(self, share, create=create))
            yield lease

    def _look_for_others(self, share: Share) -> None:
        # Shared, so that drivers that look at the same time do not take each other for drivers at work.
        for path in self.path.glob("lock*"):
            other = Share.of_suffix(path.name.removeprefix("lock"))
            if other is not None and other != share and share.excludes(other):
                with self._locked(path, other, shared=True):
                    pass

    @contextlib.contextmanager
    def _locked(self, path: Path, holder: Share, *, shared: bool = False) -> Iterator[None]:
        with open(path, "rb" if shared else "a+b") as file:
            try:
                lock(file.fileno(), shared=shared)
            except (BlockingIOError, PermissionError) as error:
                raise in_use(self, f" ({holder})" if holder != Share() else "") from error
            yield


class RemoteFolder(Folder):
    """A prefix of an object store, through fsspec: objects are put whole, a journal's events are objects."""

    def __init__(self, url: str):
        import fsspec

        self.url = url.rstrip("/")
        try:
            self.system, self.root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise ImportError(f"out: expected a package for {url}, got none: {error}") from error
        except ValueError as error:
            raise ValueError(f"out: expected a path or a URL that fsspec knows, got {url}: {error}") from error
        self._creates = "mode" in inspect.signature(self.system.pipe_file).parameters

    def __str__(self) -> str:
        return self.url

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root

    @override
    def exists(self, name: str) -> bool:
        self.system.invalidate_cache()  # other drivers write, too
        return self.system.exists(self._path(name))

    @override
    def names(self, below: str = "") -> list[str]:
        self.system.invalidate_cache()
        try:
            found = self.system.ls(self._path(below), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted({path.rstrip("/").rpartition("/")[2] for path in found} - {""})

    @override
    def read(self, name: str) -> bytes:
        return self.system.cat_file(self._path(name))

    @override
    def write(self, name: str, content: bytes) -> None:
        self._put(name, content)

    @override
    def create(self, name: str, content: bytes) -> None:
        if self._creates:
            self._put(name, content, mode="create")
        elif self.exists(name):
            raise FileExistsError(f"{self}/{name} exists")
        else:
            self._put(name, content)

    def _put(self, name: str, content: bytes, **mode: str) -> None:
        path = self._path(name)
        try:
            self.system.pipe_file(path, content, **mode)
        except FileNotFoundError:  # a file system with real folders
            self.system.makedirs(path.rpartition("/")[0], exist_ok=True)
            self.system.pipe_file(path, content, **mode)

    @override
    def delete(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.system.rm_file(self._path(name))

    @override
    def write_table(self, name: str, table: pa.Table) -> None:
        buffer = io.BytesIO()
        pq.write_table(table, buffer)
        self._put(name, buffer.getvalue())

    @override
    def read_table(self, name: str) -> pa.Table:
        return pq.ParquetFile(io.BytesIO(self.read(name))).read()

    @override
    def map(self, read: Callable[[str], Result], names: list[str]) -> list[Result]:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            return list(pool.map(read, names))

    @override
    def append(self, name: str, line: str) -> None:
        self._put(f"{name}/{len(self.names(name)):06d}", (line + "\n").encode())

    @override
    def lines(self, name: str) -> list[str]:
        return [self.read(f"{name}/{event}").decode().rstrip("\n") for event in self.names(name)]

    @override
    def check_writable(self) -> bool:
        try:
            return bool(self.names())
        except Exception as error:  # each store's client has its own
            raise ValueError(
                f"out: expected a place that can be read and written, got {self}: {type(error).__name__}: {error}; "
                "check the address and the credentials"
            ) from error

    @override
    def clear(self, names: set[str] | None) -> None:
        pass  # objects are put whole

    @override
    def claimed(self, share: Share, *, create: bool = True) -> AbstractContextManager[Any]:
        return leases.held(self, share, create=create)
