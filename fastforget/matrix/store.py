"""The folder of a run: manifest, journals, unit files. Whatever moment a run dies at, the folder stays valid."""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from fastforget._files import TEMPORARY, differences
from fastforget.matrix.folders import OTHER_FOLDER, open_folder
from fastforget.matrix.leases import Lease
from fastforget.matrix.plan import Unit
from fastforget.matrix.shares import Share

FORMAT_VERSION = 1
MANIFEST, NOISE = "manifest.json", "noise.json"
# Of a run that predicts: which examples are evaluated, and the known base's row.
EVALUATED, KNOWN = "evaluated.parquet", "known.parquet"
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
    """The files of one run.

    Args:
        out: a folder, or a URL that fsspec knows.
        share: what this driver computes of the run; readers need none.
    """

    def __init__(self, out: str | os.PathLike[str], share: Share | None = None):
        self.folder = open_folder(out)
        self.share = share or Share()
        self.journal = f"journal{self.share.suffix}.jsonl"
        self._lease: Lease | None = None

    def __str__(self) -> str:
        return str(self.folder)

    # Before the run

    def check(self, manifest: dict[str, Any]) -> None:
        """Refuse a folder that this run may not write to; nothing is written.

        Args:
            manifest: what this run would record.

        Raises:
            ValueError: if `out` is not a folder, is in use, or belongs to a run with other inputs.
        """
        if not self.folder.check_writable():
            return
        with self.folder.claimed(self.share, create=False):
            if self.folder.exists(MANIFEST):
                self._check_same_run(manifest)
                return
        foreign = [name for name in self.folder.names() if not name.startswith(("lock", "lease", TEMPORARY))]
        # The manifest of a driver that came at the same moment may be here by now.
        if foreign and not self.folder.exists(MANIFEST):
            raise ValueError(
                f"out: expected an empty folder or one of this run, got {self} with "
                f"{', '.join(foreign[:5])} and no manifest.json; {OTHER_FOLDER}"
            )

    def _check_same_run(self, manifest: dict[str, Any]) -> None:
        # Through JSON, so that both sides have the same types.
        here, there = json.loads(json.dumps(manifest["inputs"])), self.manifest()["inputs"]
        found = list(differences(there, here))
        if found:
            raise ValueError(
                f"out: {self} belongs to a run with other inputs; expected the same to continue it, got "
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
            manifest = json.loads(self.folder.read(MANIFEST))
            version = manifest["format"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"out: expected the folder of a forgetting matrix, got {self} without a readable manifest.json; "
                "check the path"
            ) from error
        if version != FORMAT_VERSION:
            raise ValueError(
                f"out: expected a matrix of format {FORMAT_VERSION}, got format {version!r} in {self}; "
                "use the version of fastforget that wrote it"
            )
        return manifest

    @contextlib.contextmanager
    def opened(self, manifest: dict[str, Any], units: list[Unit] | None = None) -> Iterator[None]:
        """Claim the share, write the manifest where there is none, and clear away what a killed run left half done.

        Args:
            manifest: what this run records.
            units: those of the share; None for a whole run, to which every file belongs.

        Yields:
            Nothing; other drivers of the same work are kept away meanwhile.
        """
        with self.folder.claimed(self.share) as self._lease:
            try:
                self.folder.create(MANIFEST, _json(manifest))
            except FileExistsError:
                self._check_same_run(manifest)
            self.folder.clear(None if units is None else {self.journal, *(unit.file_name for unit in units)})
            yield

    # Small files

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace the manifest.

        Args:
            manifest: the new one.
        """
        self.folder.write(MANIFEST, _json(manifest))

    def write_noise(self, noise: dict[str, Any]) -> None:
        """Write the noise floor.

        Args:
            noise: what `measure_noise` returned.
        """
        self.folder.write(NOISE, _json(noise))

    def has_noise(self) -> bool:
        """Whether the noise floor has been measured."""
        return self.folder.exists(NOISE)

    def noise(self) -> dict[str, Any]:
        """The noise floor.

        Returns:
            It; empty until it is measured.
        """
        try:
            return json.loads(self.folder.read(NOISE))
        except FileNotFoundError:
            return {}

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a table where there is none; every driver of a run would write the same.

        Args:
            name: its file.
            table: its content.
        """
        if not self.folder.exists(name):
            self.folder.write_table(name, table)

    def read_table(self, name: str) -> pa.Table:
        """Read a table.

        Args:
            name: its file.

        Returns:
            The table.

        Raises:
            ValueError: if it is missing or damaged.
        """
        try:
            return self.folder.read_table(name)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise ValueError(
                f"out: cannot read {self}/{name}: {error}; delete it if it is damaged, and run the same command again"
            ) from error

    # The journal

    def record(self, event: str, **fields: Any) -> None:
        """Append an event to the driver's journal; it is on the disk when this returns.

        Args:
            event: the kind of event.
            fields: what belongs to it.
        """
        self.folder.append(self.journal, json.dumps({"event": event, **fields}))

    def events(self, event: str) -> list[dict[str, Any]]:
        """The events of one kind in the driver's journal.

        Args:
            event: the kind.

        Returns:
            The events, oldest first.
        """
        return [entry for entry in map(json.loads, self.folder.lines(self.journal)) if entry["event"] == event]

    def budget(self, unit: Unit, default: int) -> int:
        """Tokens per batch of a unit: the least of the reductions that were recorded at or before it.

        Args:
            unit: the unit.
            default: the run's budget.

        Returns:
            The budget in tokens.
        """
        budgets = [e["tokens_per_batch"] for e in self.events("budget") if e["from_unit"] <= unit.index]
        return min([default, *budgets])

    # Units

    def finished(self) -> set[str]:
        """The file names of the finished units, of every driver.

        Returns:
            File names.
        """
        names = self.folder.names("units")
        return {name for name in names if name.startswith("task-") and name.endswith(".parquet")}

    def write_unit(self, unit: Unit, examples: np.ndarray, columns: dict[str, np.ndarray]) -> None:
        """Write the file of a finished unit.

        Args:
            unit: the unit.
            examples: its examples, int `[n]`.
            columns: `nll_sum` (nats), `tokens` and `exact`, `[n]` each.
        """
        if self._lease is not None:
            self._lease.check()
        task = np.full(len(examples), unit.task, dtype=np.int32)
        table = pa.table({"task": task, "example": examples.astype(np.int32), **columns}).cast(VALUES_SCHEMA)
        self.folder.write_table(f"units/{unit.file_name}", table)

    def read_units(self, names: list[str]) -> pa.Table:
        """Read finished units.

        Args:
            names: their file names.

        Returns:
            One table with `VALUES_SCHEMA`.

        Raises:
            ValueError: if a file is damaged.
        """
        return pa.concat_tables([VALUES_SCHEMA.empty_table(), *self.folder.map(self._read_unit, names)])

    def _read_unit(self, name: str) -> pa.Table:
        try:
            return self.folder.read_table(f"units/{name}").cast(VALUES_SCHEMA)
        except (OSError, ValueError) as error:  # pyarrow's errors are ValueErrors
            raise ValueError(
                f"out: expected a finished unit, got the damaged file {self}/units/{name} ({error}); delete it and "
                "give the run's command again"
            ) from error


def predicted_file(task: int) -> str:
    """The file of a predicted row.

    Args:
        task: Its index.

    Returns:
        Its name in the folder.
    """
    return f"predicted/task-{task:04d}.parquet"


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
