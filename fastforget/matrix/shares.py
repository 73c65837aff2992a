"""Runs that are divided among drivers without coordination: each takes a contiguous block of the units."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fastforget.matrix.plan import Unit

EXAMPLE = "count from 0, as in 0/4, 1/4, 2/4, 3/4"


@dataclass(frozen=True)
class Share:
    """What one of `count` drivers computes; the whole run where there is one.

    Attributes:
        index: which of them, from 0.
        count: how many there are.
    """

    index: int = 0
    count: int = 1

    @property
    def suffix(self) -> str:
        """What tells the driver's own files from those of the others; empty for the whole run."""
        return "" if self.count == 1 else f"-{self.index}of{self.count}"

    @classmethod
    def of_suffix(cls, suffix: str) -> "Share | None":
        """The share whose files have a suffix.

        Args:
            suffix: what follows the first part of a file's name.

        Returns:
            The share; None where the suffix is none.
        """
        found = re.fullmatch(r"(?:-(\d+)of(\d+))?", suffix)
        if not found:
            return None
        return cls() if found[1] is None else cls(int(found[1]), int(found[2]))

    def excludes(self, other: "Share") -> bool:
        """Whether two drivers may not work in one folder at the same time.

        Args:
            other: the other driver's share.

        Returns:
            True for the same share and for another division.
        """
        return self.count != other.count or self.index == other.index

    def __str__(self) -> str:
        return "the whole run" if self.count == 1 else f"shard {self.index}/{self.count}"


def parse_share(shard: str | None, environment: Mapping[str, str] | None = None) -> Share:
    """Read the option `shard`.

    Args:
        shard: `i/n` with i from 0 to n - 1; `auto` for what torchrun or a SLURM array has set; None for the whole run.
        environment: the environment variables; default: those of the process.

    Returns:
        The share.

    Raises:
        ValueError: if it is neither, or the environment does not say.
        TypeError: if it is no string.
    """
    if shard is None:
        return Share()
    if not isinstance(shard, str):
        raise TypeError(f"shard: expected a string such as '0/4', got {shard!r}; write it in quotes")
    if shard == "auto":
        return _from_environment(os.environ if environment is None else environment)
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if not found or int(found[1]) >= int(found[2]):
        raise ValueError(f"shard: expected i/n with 0 <= i < n, or auto, got {shard!r}; {EXAMPLE}")
    return Share(int(found[1]), int(found[2]))


def _from_environment(environment: Mapping[str, str]) -> Share:
    # An array whose tasks run torchrun is divided twice.
    share, known = Share(), False
    if "SLURM_ARRAY_TASK_ID" in environment:
        share, known = _of_array(environment), True
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world = (_integer(environment, name) for name in ("RANK", "WORLD_SIZE"))
        share, known = Share(share.index * world + rank, share.count * world), True
    if not known or not 0 <= share.index < share.count:
        got = "neither" if not known else f"{share.index} of {share.count}"
        raise ValueError(
            f"shard: expected RANK and WORLD_SIZE (torchrun) or SLURM_ARRAY_TASK_ID in the environment, got {got}; "
            "start the command with torchrun or sbatch --array, or pass --shard i/n"
        )
    return share


def _of_array(environment: Mapping[str, str]) -> Share:
    task = _integer(environment, "SLURM_ARRAY_TASK_ID")
    first = _integer(environment, "SLURM_ARRAY_TASK_MIN", default=0)
    step = _integer(environment, "SLURM_ARRAY_TASK_STEP", default=1)
    count = _integer(environment, "SLURM_ARRAY_TASK_COUNT", default=None)
    index = (task - first) // max(step, 1)
    if not 0 <= index < count:
        raise ValueError(
            f"shard: expected a SLURM array without gaps, got task {task} of {count} from {first}; "
            f"write --array=0-{count - 1}, or pass --shard i/n"
        )
    return Share(index, count)


def _integer(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = environment.get(name, default)
    try:
        return int(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise ValueError(f"shard: expected an integer in {name}, got {value!r}; pass --shard i/n") from None


def units_of(share: Share, units: list[Unit], tokens: np.ndarray) -> list[Unit]:
    """The units of one driver: a contiguous block, so that it loads few models; the blocks have about equal tokens.

    Args:
        share: the driver's share.
        units: every unit of the run, in order.
        tokens: the tokens of each, int `[units]`.

    Returns:
        Its units, in order; none where there are more drivers than units.
    """
    middle = np.cumsum(tokens) - tokens / 2
    owner = np.floor(middle * share.count / max(tokens.sum(), 1)).astype(int)
    return [unit for unit, of in zip(units, owner, strict=True) if of == share.index]
