"""The files of a Fisher run: the sums so far beside the result, in one file, so that they always belong together."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastforget._files import TEMPORARY, differences, lock
from fastforget.fisher.files import KIND, read_metadata, read_tensors, write_tensors

__all__ = ["RunFiles", "State", "environment"]

PARTIAL_KIND = "partial diagonal Fisher"


def environment(device: str) -> dict[str, str]:
    """What decides how sums are rounded.

    Args:
        device: the run's.

    Returns:
        Versions and the device's name.
    """
    import transformers

    cuda = torch.device(device).type == "cuda"
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else f"cpu, {torch.get_num_threads()} threads",
    }


@dataclass
class State:
    """How far a run is, beside the estimator's sums.

    Attributes:
        position: how many examples of the length order are done.
        failed: indices of the examples without a finite loss or gradient.
        budgets: position and the tokens per batch from there on, where memory ran out.
    """

    position: int = 0
    failed: list[int] = field(default_factory=list)
    budgets: list[list[int]] = field(default_factory=list)

    def joined(self, other: State) -> State:
        """This position, and what either has learned of the data and the memory.

        Args:
            other: of the same run, perhaps further on.

        Returns:
            The state to go on from.
        """
        budgets = self.budgets + [entry for entry in other.budgets if entry not in self.budgets]
        return State(self.position, sorted({*self.failed, *other.failed}), budgets)


class RunFiles:
    """The result, the partial sums and the lock of one run.

    Args:
        out: the result.
        inputs: what has to be the same to continue.
        environment: see `environment`.
    """

    def __init__(self, out: Path, inputs: dict[str, Any], environment: dict[str, str]):
        self.out, self.inputs, self.environment = out, inputs, environment
        self.partial = out.with_name(out.name + ".partial")
        self.lock = out.with_name(out.name + ".lock")

    def finished(self) -> bool:
        """Whether the result is there.

        Returns:
            True if it is this run's.

        Raises:
            ValueError: if it is there and another's.
        """
        if not self.out.exists():
            return False
        there = read_metadata(self.out, kind=KIND).get("run")
        if there is None:
            raise ValueError(f"out: expected no file or one of this command, got {self.out}; choose another file")
        self._check_inputs(self.out, there)
        with self._locked(create=False):
            self.partial.unlink(missing_ok=True)  # of a run that was killed between its last two steps
        return True

    def check(self) -> None:
        """Refuse partial sums that this run cannot continue; nothing is written.

        Raises:
            ValueError: if they are in use, or of a run with other inputs.
        """
        with self._locked(create=False):
            if not self.partial.exists():
                return
            metadata = read_metadata(self.partial, kind=PARTIAL_KIND)
            self._check_inputs(self.partial, metadata["run"])
        first, now = metadata["environment"], self.environment
        changed = [f"{name} {first.get(name)} -> {now[name]}" for name in now if first.get(name) != now[name]]
        if changed:
            warnings.warn(
                f"{self.partial} was begun in another environment ({', '.join(changed)}): the result may differ from "
                "that of one run by rounding",
                RuntimeWarning,
                stacklevel=4,
            )

    def _check_inputs(self, path: Path, there: dict[str, Any]) -> None:
        found = list(differences(there, self.inputs))
        if found:
            raise ValueError(
                f"out: {path} belongs to a run with other inputs; expected the same to continue it, got "
                + "; ".join(found)
                + "; choose another file, delete this one, or give the first run's inputs"
            )

    @contextlib.contextmanager
    def opened(self) -> Iterator[None]:
        """Lock the run, and clear away what a killed one left half written.

        Yields:
            Nothing; the lock is held meanwhile.
        """
        self.out.parent.mkdir(parents=True, exist_ok=True)
        with self._locked():
            for path in (self.out, self.partial):
                for leftover in self.out.parent.glob(f"{TEMPORARY}*-{path.name}"):
                    leftover.unlink()
            yield

    @contextlib.contextmanager
    def _locked(self, *, create: bool = True) -> Iterator[None]:
        # The system frees the lock when a run dies; that the file is there says nothing.
        if not create and not self.lock.exists():
            yield
            return
        in_use = ValueError(
            f"out: expected a file that nobody writes, got {self.out}, in use by another run; wait for it or choose "
            "another file"
        )
        with open(self.lock, "ab") as file:
            try:
                lock(file.fileno())
            except (BlockingIOError, PermissionError) as error:
                raise in_use from error
            # A run that has ended since may have removed the file that was opened here.
            if not self.lock.exists() or os.stat(self.lock).st_ino != os.fstat(file.fileno()).st_ino:
                raise in_use
            try:
                yield
            finally:
                with contextlib.suppress(OSError):
                    self.lock.unlink()

    def read(self) -> tuple[dict[str, Tensor], State] | None:
        """The partial sums.

        Returns:
            The estimator's state and the run's, or None where there are none.
        """
        if not self.partial.exists():
            return None
        tensors, metadata = read_tensors(self.partial, kind=PARTIAL_KIND)
        return tensors, State(**metadata["state"])

    def write(self, sums: Mapping[str, Tensor], state: State) -> None:
        """Replace the partial sums.

        Args:
            sums: the estimator's state.
            state: the run's.
        """
        metadata = {"run": self.inputs, "environment": self.environment, "state": vars(state)}
        write_tensors(self.partial, sums, metadata, kind=PARTIAL_KIND)
