"""The units of a run on the workers of a Ray cluster; this process hands them out and writes what comes back."""

import contextlib
import logging
import os
import socket
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from fastforget.matrix.checkpoints import Checkpoint, find_checkpoint
from fastforget.matrix.job import KINDS, Job, environment
from fastforget.matrix.local import warn_reduced
from fastforget.matrix.models import ResidentModel
from fastforget.matrix.noise import measure_noise
from fastforget.matrix.plan import Buckets, Unit
from fastforget.matrix.progress import ProgressBar
from fastforget.matrix.scoring import Scores, score_unit
from fastforget.matrix.store import Store
from fastforget.matrix.upstream import Upstream

TRIES = 3  # workers that may die under one unit
NOISE = Unit(-1, -1, -1)  # the measurement of the noise floor, which wants the base, too
PATIENCE = 30.0  # seconds without any worker before the run says what it waits for


# On a worker


class Worker:
    """An actor: one model on one device, which stays from call to call. Calls name models by their checkpoints.

    Args:
        base: the base's checkpoint.
        examples: ids, flat tokens, offsets and first targets of the upstream examples.
        device: where it scores.
        dtype: of the parameters.
        buckets: the lengths for which models are compiled, if they are.
    """

    def __init__(
        self, base: Checkpoint, examples: tuple, device: str, dtype: torch.dtype, buckets: Buckets | None = None
    ):
        ids, flat, offsets, first_target = examples
        tokens = np.split(flat, offsets[1:-1])
        self.examples = Upstream(ids, [], tokens, first_target, truncated=0, skipped=[], fingerprint="")
        self.base, self.device, self.dtype, self.buckets = base, device, dtype, buckets
        self._resident: ResidentModel | None = None
        self._held: str | None = None
        self._stack = contextlib.ExitStack()

    def ready(self) -> int:
        """The number of its process."""
        return os.getpid()

    def environment(self) -> dict[str, str]:
        """See `job.environment`."""
        return environment(self.device)

    def resident(self) -> ResidentModel:
        """The base on the device, loaded at the first call."""
        if self._resident is None:
            compiled = self.buckets is not None
            self._resident = ResidentModel(_as_here(self.base), self.device, self.dtype, compile=compiled)
        return self._resident

    def check(self, tasks: list[Checkpoint], check_adapter_base: bool) -> None:
        """Refuse tasks that cannot be loaded into the base."""
        for task in tasks:
            self.resident().check(_as_here(task), check_adapter_base=check_adapter_base)

    def score(self, task: Checkpoint, shard: np.ndarray, budget: int) -> tuple[Scores, list[tuple[int, int]]]:
        """Score a shard under a model; returns the scores, and the budgets with which memory ran out and the next."""
        reductions: list[tuple[int, int]] = []
        scores = score_unit(
            self._model(task),
            self.examples,
            shard,
            budget,
            self.device,
            self.buckets,
            advance=lambda *_: None,
            reduced=lambda *budgets: reductions.append(budgets),
        )
        return scores, reductions

    def noise(self, recorded: np.ndarray, count: int) -> dict[str, Any]:
        """See `measure_noise`."""
        settings = {"count": count, "device": self.device, "dtype": self.dtype}
        return measure_noise(self._model(self.base), self.examples, recorded, **settings)

    def _model(self, task: Checkpoint) -> Any:
        if self._held != task.label:
            self._held = None
            self._stack.close()
            self._current = self._stack.enter_context(self.resident().holding(_as_here(task)))
            self._held = task.label
        return self._current


def _as_here(task: Checkpoint) -> Checkpoint:
    # A hub id is in another folder on another machine; a path has to be the same.
    path = str(task.folder) if task.folder.is_dir() else task.path
    here = find_checkpoint(task.name, path, is_base=task.kind == "base")
    if here.fingerprint != task.fingerprint:
        raise ValueError(
            f"{task.label}: expected the same files on every node, got others in {path} on {socket.gethostname()}; "
            "put the checkpoints where all nodes read them, or copy them again"
        )
    return here


# On the driver


@dataclass(frozen=True)
class Cluster:
    """What a run takes of a cluster.

    Attributes:
        device: type of the workers' device.
        workers: how many of them.
        cpus: cores of each, where there are no GPUs.
    """

    device: str
    workers: int
    cpus: int


@contextlib.contextmanager
def connected(address: str, workers: int | None, device: str | None) -> Iterator[Cluster]:
    """Connect to a Ray cluster, or start one on this machine.

    Args:
        address: of the cluster; `auto` for the one that this machine belongs to; `local` for a new one. A connection
            that this process has already is used as it is.
        workers: how many; default: one a GPU, or one a node where there are none.
        device: of the workers; default: `cuda` where the cluster has a GPU.

    Yields:
        What the run takes of it.

    Raises:
        ValueError: if there is no such cluster.
        ImportError: if Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("ray: expected Ray, got none; pip install 'fastforget[ray]'") from error
    ours = not ray.is_initialized()
    if ours:
        new: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False, **new)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"ray: expected a cluster at {address!r}, got none: {str(error).splitlines()[0]}; start one with "
                "`ray start --head`, or pass 'local'"
            ) from error
    try:
        has = ray.cluster_resources()
        kind = torch.device(device).type if device else "cuda" if has.get("GPU") else "cpu"
        default = has.get("GPU", 1) if kind == "cuda" else sum(node["Alive"] for node in ray.nodes())
        count = int(workers or default)
        yield Cluster(kind, count, max(1, int(has.get("CPU", 1)) // count))
    finally:
        if ours:
            ray.shutdown()


class Queue:
    """The units that wait, by model.

    Args:
        job: what the run computes.
        units: those that are left.
    """

    def __init__(self, job: Job, units: list[Unit]):
        self.job = job
        self.waiting: dict[int, list[Unit]] = {}
        for unit in units:
            self.waiting.setdefault(unit.task, []).append(unit)

    def put(self, unit: Unit) -> None:
        """Add a unit, to be taken before the others of its model.

        Args:
            unit: the unit.
        """
        self.waiting.setdefault(unit.task, []).insert(0, unit)

    def take(self, held: int | None, holders: Counter[int]) -> Unit | None:
        """The next unit of a free worker: of the model that it has, else of the one with most work for each holder.

        Args:
            held: the task whose model the worker has.
            holders: how many workers have each task's model.

        Returns:
            A unit; None if none waits.
        """
        tasks = [task for task, units in self.waiting.items() if units]
        if not tasks:
            return None
        if held not in tasks:
            first = min(KINDS.index(self.job.model(task).kind) for task in tasks)  # the base, adapters, checkpoints
            tasks = [task for task in tasks if KINDS.index(self.job.model(task).kind) == first]
            held = max(tasks, key=lambda task: len(self.waiting[task]) / (holders[task] + 1))
        return self.waiting[held].pop(0)


@dataclass(eq=False)
class _Seat:
    """A worker as the driver sees it."""

    actor: Any
    pid: int | None = None  # None until it has started
    held: int | None = None  # the task whose model it has
    unit: Unit | None = None  # what it works on


class RayRun:
    """Scores units on a cluster's workers.

    Args:
        job: what the run computes.
        store: its files, written by this process.
        units: what is to be computed, finished or not.
        cluster: where.
    """

    def __init__(self, job: Job, store: Store, units: list[Unit], cluster: Cluster):
        import ray

        self.ray, self.job, self.store, self.units, self.cluster = ray, job, store, units, cluster
        examples = job.examples
        offsets = np.cumsum([0, *job.lengths])
        packed = examples.ids, np.concatenate(examples.tokens), offsets, examples.first_target
        self._examples = ray.put(packed)
        self._calls: dict[Any, _Seat] = {}  # what every worker does, by the reference to its result
        self._free: list[_Seat] = []
        self._died: Counter[Unit] = Counter()
        self._starts_that_failed = 0
        for _ in range(cluster.workers):
            self._start_worker()

    def close(self) -> None:
        """End the workers."""
        for seat in (*self._calls.values(), *self._free):
            self.ray.kill(seat.actor)

    # Before the run

    def check(self, *, check_adapter_base: bool) -> None:
        """Refuse tasks that cannot be loaded into the base, on the first worker that has started.

        Args:
            check_adapter_base: whether an adapter has to name this base.
        """
        self._get(self._first().actor.check.remote(self.job.models[1:], check_adapter_base))

    def environment(self) -> dict[str, str]:
        """Versions and hardware of a worker."""
        return self._get(self._first().actor.environment.remote())

    def _first(self) -> _Seat:
        while not self._free:
            self._wait()
        return self._free[0]

    # The run

    def execute(self, *, progress: bool) -> None:
        """Hand out what is left, and write what comes back.

        Args:
            progress: whether a bar is shown.
        """
        finished = self.store.finished()
        done = [unit for unit in self.units if unit.file_name in finished]
        queue = Queue(self.job, [unit for unit in self.units if unit.file_name not in finished])
        self._put_noise(queue)
        total, before = (int(self.job.tokens(units).sum()) for units in (self.units, done))
        with ProgressBar(total, before, shown=progress) as bar:
            while self._hand_out(queue):
                unit, result = self._wait()
                if unit is None:
                    continue
                if result is None:
                    queue.put(unit)
                elif unit == NOISE:
                    self.store.write_noise(result)
                else:
                    self._write(unit, *result)
                    shard = self.job.shards[unit.shard]
                    bar.describe(self.job.model(unit.task).name)
                    bar.advance(len(shard), int(self.job.lengths[shard].sum()))
                    if unit.task < 0:
                        self._put_noise(queue)

    def _hand_out(self, queue: Queue) -> bool:
        """Give every free worker a unit; returns whether anything is left to wait for."""
        for seat in list(self._free):
            holders = Counter(
                s.held for s in (*self._calls.values(), *self._free) if s is not seat and s.held is not None
            )
            unit = queue.take(seat.held, holders)
            if unit is None:
                break
            self._free.remove(seat)
            self._submit(seat, unit)
        return any(queue.waiting.values()) or any(seat.unit for seat in self._calls.values())

    def _submit(self, seat: _Seat, unit: Unit) -> None:
        job = self.job
        seat.unit, seat.held = unit, unit.task
        if unit == NOISE:
            call = seat.actor.noise.remote(job.base_row(self.store), job.noise_examples)
        else:
            budget = self.store.budget(unit, job.tokens_per_batch)
            call = seat.actor.score.remote(job.model(unit.task), job.shards[unit.shard], budget)
        self._calls[call] = seat

    def _write(self, unit: Unit, scores: Scores, reductions: list[tuple[int, int]]) -> None:
        for before, budget in reductions:
            self.store.record("budget", from_unit=unit.index, tokens_per_batch=budget)
            warn_reduced(self.job.device, before, budget)
        self.store.write_unit(unit, self.job.shards[unit.shard], vars(scores))

    def _put_noise(self, queue: Queue) -> None:
        if not self.store.has_noise() and self.job.base_row(self.store) is not None:
            queue.put(NOISE)

    # Workers

    def _start_worker(self) -> None:
        resources = {"num_gpus": 1} if self.cluster.device == "cuda" else {"num_cpus": self.cluster.cpus}
        job = self.job
        actor: Any = self.ray.remote(Worker).options(max_restarts=0, **resources)  # type: ignore[call-overload]
        seat = _Seat(actor.remote(job.models[0], self._examples, self.cluster.device, job.dtype, job.buckets))
        self._calls[seat.actor.ready.remote()] = seat  # comes when the cluster has room for it

    def _wait(self) -> tuple[Unit | None, Any]:
        """Wait for any worker; returns the unit that it had, and the result, which is None where it died."""
        done: list[Any] = []
        while not done:
            done, _ = self.ray.wait(list(self._calls), num_returns=1, timeout=PATIENCE)
            if not done and all(seat.pid is None for seat in (*self._calls.values(), *self._free)):
                Console(stderr=True).print(f"waiting for a worker: the cluster has {self.ray.available_resources()}")
        seat = self._calls.pop(done[0])
        unit, seat.unit = seat.unit, None
        try:
            result = self._get(done[0])
        except self.ray.exceptions.RayError as error:
            self.ray.kill(seat.actor)
            self._bury(unit, error)
            return unit, None
        if seat.pid is None:
            seat.pid, self._starts_that_failed = result, 0
        self._free.append(seat)
        return unit, result

    def _bury(self, unit: Unit | None, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0]
        if unit is None:
            self._starts_that_failed += 1
            if self._starts_that_failed >= TRIES:
                raise ValueError(
                    f"ray: expected workers that start, got {TRIES} that died: {reason}; is fastforget installed on "
                    "every node?"
                ) from error
        else:
            self._died[unit] += 1
            if self._died[unit] >= TRIES:
                name = "the noise floor" if unit == NOISE else f"unit {unit.file_name}"
                raise ValueError(
                    f"ray: expected workers that live, got {TRIES} that died in turn under {name} of "
                    f"{self.job.model(unit.task).label}, the last with: {reason}; look into Ray's logs, or choose a smaller "
                    "tokens_per_batch and another out folder; finished units are kept"
                ) from error
        self._start_worker()

    def _get(self, reference: Any) -> Any:
        try:
            return self.ray.get(reference)
        except self.ray.exceptions.RayTaskError as error:
            raise error.cause from error
