"""The units of a run, one after the other in this process."""

import itertools
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from torch import nn

from fastforget.matrix.job import Job, environment
from fastforget.matrix.models import ResidentModel
from fastforget.matrix.noise import measure_noise
from fastforget.matrix.plan import Unit
from fastforget.matrix.progress import ProgressBar
from fastforget.matrix.readahead import ReadAhead
from fastforget.matrix.scoring import score_unit
from fastforget.matrix.store import Store


class LocalRun:
    """Scores units on this process's device.

    Args:
        job: what the run computes.
        store: its files.
        units: those that this driver computes, finished or not.
        spread: put a model on all devices of the job's kind.
        load: makes the resident model.
    """

    def __init__(
        self,
        job: Job,
        store: Store,
        units: list[Unit],
        *,
        spread: bool = False,
        load: Callable[..., ResidentModel] = ResidentModel,
    ):
        self.job, self.store, self.units = job, store, units
        options = {name: True for name, wanted in (("compile", job.buckets), ("spread", spread)) if wanted}
        self.resident = load(job.models[0], job.device, job.dtype, **options)

    def check(self, *, check_adapter_base: bool) -> None:
        """Refuse tasks that cannot be loaded into the base.

        Args:
            check_adapter_base: whether an adapter has to name this base.
        """
        for task in self.job.models[1:]:
            self.resident.check(task, check_adapter_base=check_adapter_base)

    def environment(self) -> dict[str, str]:
        """Versions and hardware of this process."""
        return environment(self.job.device) | self.resident.environment()

    def close(self) -> None:
        """Nothing to end."""

    def execute(self, *, progress: bool) -> None:
        """Score what is left, and measure the noise floor if that falls to this driver.

        Args:
            progress: whether a bar is shown.
        """
        job, store = self.job, self.store
        finished = store.finished()
        done = [unit for unit in self.units if unit.file_name in finished]
        if progress and done:
            Console(stderr=True).print(f"{store}: continuing, {len(done)} of {len(self.units)} units are finished")
        total, before = (int(job.tokens(units).sum()) for units in (self.units, done))
        with ProgressBar(total, before, shown=progress) as bar, ReadAhead() as ahead:
            todo = self._by_model(finished)
            for position, (task, left) in enumerate(todo):
                bar.describe(job.model(task).name)
                with self.resident.holding(job.model(task)) as model:
                    if todo[position + 1 :]:
                        ahead.start(job.model(todo[position + 1][0]))
                    for unit in left:
                        self._score(model, unit, bar)
                    if self._wants_noise(task):
                        self._measure_noise(model, bar)
            # Where the base's row was completed after that, the driver that finishes last measures the noise.
            if len(store.finished()) == len(job.units) and not store.has_noise():
                with self.resident.holding(job.models[0]) as model:
                    self._measure_noise(model, bar)

    def _by_model(self, finished: set[str]) -> list[tuple[int, list[Unit]]]:
        """The tasks whose models are needed, and the units that are left of each."""
        groups = itertools.groupby(self.units, key=lambda unit: unit.task)
        left = [(task, [unit for unit in units if unit.file_name not in finished]) for task, units in groups]
        return [(task, units) for task, units in left if units or self._wants_noise(task)]

    def _wants_noise(self, task: int) -> bool:
        job = self.job
        return task < 0 and job.units[len(job.shards) - 1] in self.units and not self.store.has_noise()

    def _score(self, model: nn.Module, unit: Unit, bar: ProgressBar) -> None:
        job, store = self.job, self.store

        def reduced(before: int, budget: int) -> None:
            # On the disk before the retry: a run that dies now continues with the same batches.
            store.record("budget", from_unit=unit.index, tokens_per_batch=budget)
            warn_reduced(job.device, before, budget)

        shard = job.shards[unit.shard]
        budget = store.budget(unit, job.tokens_per_batch)
        callbacks = {"advance": bar.advance, "reduced": reduced}
        scores = score_unit(model, job.examples, shard, budget, job.device, job.buckets, **callbacks)
        store.write_unit(unit, shard, vars(scores))

    def _measure_noise(self, model: nn.Module, bar: ProgressBar) -> None:
        job = self.job
        recorded = job.base_row(self.store)
        if recorded is None:
            return
        bar.describe("noise floor")
        settings = {"count": job.noise_examples, "device": job.device, "dtype": job.dtype}
        self.store.write_noise(measure_noise(model, job.examples, recorded, **settings))


def warn_reduced(device: str | torch.device, before: int, budget: int) -> None:
    """Say that memory ran out.

    Args:
        device: where.
        before: the token budget with which it did.
        budget: the next one.
    """
    warnings.warn(
        f"out of memory on {device} with {before} tokens per batch; the run goes on with {budget}",
        RuntimeWarning,
        stacklevel=8,
    )
