"""Leases: how drivers find one another where there are no file locks. A driver at work renews a small file of its own."""

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fastforget.matrix.shares import Share

if TYPE_CHECKING:
    from fastforget.matrix.folders import Folder

REFRESH = 30.0  # seconds between two renewals
STALE = 180.0  # seconds after which a lease that nobody has renewed is taken over
NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class Lease:
    """One driver's lease.

    Attributes:
        lost: set when another driver has taken over, as after a suspension longer than `STALE`.
    """

    def __init__(self, folder: "Folder", share: Share):
        self.folder = folder
        self.name = f"lease{share.suffix}-{uuid.uuid4().hex[:8]}.json"
        self.lost = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="fastforget lease", daemon=True)

    def write(self) -> None:
        """Write or renew the lease."""
        content = {"host": _machine(), "pid": os.getpid(), "time": time.time()}
        self.folder.write(self.name, json.dumps(content).encode())

    def start(self) -> None:
        """Begin to renew it."""
        self._thread.start()

    def stop(self) -> None:
        """Give it up."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()
        self.folder.delete(self.name)

    def check(self) -> None:
        """Refuse to go on where another driver has taken over.

        Raises:
            ValueError: if so.
        """
        if self.lost.is_set():
            raise ValueError(
                f"out: expected to be alone in {self.folder}, got another driver that took over after {STALE:.0f} s "
                "without a sign of life; finished units are kept"
            )

    def _renew(self) -> None:
        while not self._stop.wait(REFRESH):
            with contextlib.suppress(Exception):  # an unreachable store may be back the next time
                if not self.folder.exists(self.name):
                    self.lost.set()
                    return
                self.write()


@contextlib.contextmanager
def held(folder: "Folder", share: Share, *, create: bool = True) -> Iterator[Lease | None]:
    """Hold a lease on a share of a run.

    Args:
        folder: the run's folder.
        share: what the driver computes.
        create: take one; otherwise only look for others.

    Yields:
        The lease; None without `create`.

    Raises:
        ValueError: if another driver of the same work, or of another division of the run, is at work.
    """
    _refuse_others(folder, share)
    if not create:
        yield None
        return
    lease = Lease(folder, share)
    try:
        lease.write()
        _refuse_others(folder, share, own=lease.name, take_over=True)  # both of two that came at once may be refused
        lease.start()
        yield lease
    finally:
        lease.stop()


def _refuse_others(folder: "Folder", share: Share, *, own: str = "", take_over: bool = False) -> None:
    from fastforget.matrix.folders import in_use

    for name in folder.names():
        if not name.startswith("lease") or name == own:
            continue
        other = Share.of_suffix(name.removeprefix("lease").rpartition("-")[0])
        if other is None or not share.excludes(other):
            continue
        try:
            content = json.loads(folder.read(name))
        except FileNotFoundError:
            continue  # given up meanwhile
        age = time.time() - content["time"]
        if age < STALE and not _is_dead(content):
            by = f" ({other}, process {content['pid']} on {content['host']}, {max(age, 0):.0f} s ago)"
            raise in_use(folder, by)
        if take_over:
            folder.delete(name)


def _is_dead(content: dict[str, Any]) -> bool:
    # A driver of this machine that was killed is known to be dead at once.
    if content["host"] != _machine() or os.name == "nt":
        return False
    try:
        os.kill(content["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _machine() -> str:
    # Containers may share the host's name, but not its processes.
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()
