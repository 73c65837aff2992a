"""The folder of a run: manifest, journal, unit files, lock. Whatever moment a run dies at, the folder stays valid."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastforget._files import TEMPORARY, differences, lock, sync_folder, write_atomically
from fastforget.matrix.plan import Unit

FORMAT_VERSION = 1
VALUES_SCHEMA = pa.schema(
    [
        ("task", pa.int32()),
        ("example", pa.int32()),
        ("nll_sum", pa.float64()),
        ("tokens", pa.int32()),
        ("exact", pa.bool_()),
    ]
)


class Store:
    """The files of one run in the folder `out`."""

    def __init__(self, out: str | Path):
        self.out = Path(out)
        self.units = self.out / "units"
        self.manifest_file = self.out / "manifest.json"
        self.journal_file = self.out / "journal.jsonl"
        self.noise_file = self.out / "noise.json"

    # Before the run

    def check(self, manifest: dict[str, Any]) -> None:
        """Refuse a folder that this run may not write to; nothing is written.

        Args:
            manifest: what this run would record.

        Raises:
            ValueError: if `out` is not a folder, is in use, or belongs to a run with other inputs.
        """
        existing = next(folder for folder in (self.out, *self.out.absolute().parents) if folder.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ValueError(f"out: expected a folder that can be written to, got {existing}; choose another folder")
        if not self.out.exists():
            return
        with self.locked(create=False):
            if self.manifest_file.exists():
                self._check_same_run(manifest)
                return
        foreign = [name for name in os.listdir(self.out) if name != "lock" and not name.startswith(TEMPORARY)]
        if foreign:
            raise ValueError(
                f"out: expected an empty folder or one of this run, got {self.out} with "
                f"{', '.join(sorted(foreign)[:5])} and no manifest.json; choose another folder"
            )

    def _check_same_run(self, manifest: dict[str, Any]) -> None:
        # Through JSON, so that both sides have the same types.
        here, there = json.loads(json.dumps(manifest["inputs"])), self.manifest()["inputs"]
        found = list(differences(there, here))
        if found:
            raise ValueError(
                f"out: {self.out} belongs to a run with other inputs; expected the same to continue it, got "
                + "; ".join(found)
                + "; choose another folder or give the first run's inputs"
            )

    def manifest(self) -> dict[str, Any]:
        """The manifest of the run.

        Returns:
            What the run recorded of its inputs and its environment.

        Raises:
            ValueError: if the folder holds no run.
        """
        try:
            manifest = json.loads(self.manifest_file.read_text(encoding="utf-8"))
            version = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out: expected the folder of a forgetting matrix, got {self.out} without a readable manifest.json; "
                "check the path"
            ) from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"out: expected a matrix of format {FORMAT_VERSION}, got format {version!r} in {self.out}; "
                "use the version of fastforget that wrote it"
            )
        return manifest

    @contextlib.contextmanager
    def locked(self, *, create: bool = True) -> Iterator[None]:
        """Hold the folder's lock, so that one driver at a time writes to it. The system frees it when a driver dies.

        Args:
            create: make the lock file where it is missing; otherwise a missing one is no lock.

        Yields:
            Nothing.

        Raises:
            ValueError: if another driver holds it.
        """
        path = self.out / "lock"
        if not create and not path.exists():
            yield
            return
        with open(path, "ab") as file:
            try:
                lock(file.fileno())
            except (BlockingIOError, PermissionError) as error:
                raise ValueError(
                    f"out: expected a folder that nobody writes to, got {self.out}, in use by another run; wait for it "
                    "or choose another folder"
                ) from error
            yield

    @contextlib.contextmanager
    def opened(self, manifest: dict[str, Any]) -> Iterator[None]:
        """Lock the folder, write the manifest where there is none, and clear away what a killed run left half done.

        Args:
            manifest: what this run records.

        Yields:
            Nothing; the lock is held meanwhile.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        with self.locked():
            if self.manifest_file.exists():
                self._check_same_run(manifest)
            else:
                self.write_json(self.manifest_file, manifest)
            self.units.mkdir(exist_ok=True)
            sync_folder(self.out)
            for folder in (self.out, self.units):
                for leftover in folder.glob(f"{TEMPORARY}*"):
                    leftover.unlink()
            self._drop_torn_line()
            yield

    def write_json(self, path: Path, value: Any) -> None:
        """Write a JSON file atomically.

        Args:
            path: the file.
            value: what `json.dumps` takes.
        """
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))

    # The journal

    def _drop_torn_line(self) -> None:
        """Cut an event that a power failure left half written, so that the next one starts a line."""
        if self.journal_file.exists():
            content = self.journal_file.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]
            if whole != content:
                write_atomically(self.journal_file, lambda temporary: temporary.write_bytes(whole))

    def record(self, event: str, **fields: Any) -> None:
        """Append an event to the journal; it is on the disk when this returns.

        Args:
            event: the kind of event.
            fields: what belongs to it.
        """
        with open(self.journal_file, "a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **fields}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self.out)

    def events(self, event: str) -> list[dict[str, Any]]:
        """The journal's events of one kind.

        Args:
            event: the kind.

        Returns:
            The events, oldest first.
        """
        if not self.journal_file.exists():
            return []
        lines = self.journal_file.read_text(encoding="utf-8").split("\n")[:-1]  # what follows the last \n is torn
        return [entry for entry in map(json.loads, lines) if entry["event"] == event]

    def budget(self, unit: Unit, default: int) -> int:
        """Tokens per batch of a unit: the last reduction that was recorded at or before it.

        Args:
            unit: the unit.
            default: the run's budget.

        Returns:
            The budget in tokens.
        """
        budgets = [e["tokens_per_batch"] for e in self.events("budget") if e["from_unit"] <= unit.index]
        return budgets[-1] if budgets else default

    # Units

    def finished(self) -> set[str]:
        """The file names of the finished units.

        Returns:
            File names.
        """
        return {path.name for path in self.units.glob("task-*.parquet")}

    def write_unit(self, unit: Unit, examples: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Write the file of a finished unit.

        Args:
            unit: the unit.
            examples: its examples, int `[n]`.
            columns: `nll_sum` (nats), `tokens` and `exact`, `[n]` each.
        """
        task = np.full(len(examples), unit.task, dtype=np.int32)
        table = pa.table({"task": task, "example": examples.astype(np.int32), **columns}).cast(VALUES_SCHEMA)
        write_atomically(self.units / unit.file_name, lambda path: pq.write_table(table, path))

    def read_units(self, names: list[str]) -> pa.Table:
        """Read finished units.

        Args:
            names: their file names.

        Returns:
            One table with `VALUES_SCHEMA`.

        Raises:
            ValueError: if a file is damaged.
        """
        tables = [VALUES_SCHEMA.empty_table()]
        for name in names:
            try:
                tables.append(pq.ParquetFile(self.units / name).read().cast(VALUES_SCHEMA))
            except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
                raise ValueError(
                    f"out: expected a finished unit, got the damaged file {self.units / name} ({error}); delete it and "
                    "give the run's command again"
                ) from error
        return pa.concat_tables(tables)
