"""The next model's files are read while this one computes, so that loading it finds them in the page cache."""

import contextlib
import threading

from fastforget.matrix.checkpoints import Checkpoint, weight_files

CHUNK = 16 * 2**20  # bytes of one read: large, for disks and file systems on the network
SHARE_OF_MEMORY = 0.5  # of what is available: more would push out what the run itself needs


class ReadAhead:
    """Reads files in a thread of its own, and forgets what it read; a context manager that ends it."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def start(self, checkpoint: Checkpoint) -> None:
        """Begin to read the files of a model, and stop reading those of the last one.

        Args:
            checkpoint: the model. Errors are ignored: whoever loads it later reports them.
        """
        self.__exit__()
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(checkpoint,), name="fastforget read-ahead", daemon=True
        )
        self._thread.start()

    def _read(self, checkpoint: Checkpoint) -> None:
        buffer = bytearray(CHUNK)
        with contextlib.suppress(OSError, ValueError):
            files = weight_files(checkpoint)
            if sum(path.stat().st_size for path in files) > SHARE_OF_MEMORY * available_memory():
                return
            for path in files:
                with open(path, "rb", buffering=0) as file:
                    while not self._stop.is_set() and file.readinto(buffer):
                        pass


def available_memory() -> float:
    """Bytes that programs may take without swapping; infinite where the system does not say.

    Returns:
        The bytes.
    """
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":") for line in file)
        return float(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):
        return float("inf")
