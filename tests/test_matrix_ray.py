"""The matrix on a Ray cluster of two workers: the bits of a local run, and what a killed worker costs."""

import os
import signal
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny_models import build, tiny_tokenizer, units_of

from fastforget import perplexity
from fastforget.matrix import plan, ray_driver
from fastforget.matrix.checkpoints import find_checkpoint
from fastforget.matrix.job import Job
from fastforget.matrix.store import Store
from fastforget.matrix.upstream import load_upstream

pytestmark = pytest.mark.usefixtures("small_shards")

TASKS = ["full", "lora", "other"]  # 4 rows of 2 units with the base


@pytest.fixture(scope="module")
def cluster():
    """One cluster of this process for all tests; runs use the connection that they find."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastforget[ray]'")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # of the workers: bits depend on the number of threads
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield ray
    ray.shutdown()


@pytest.fixture
def submitted(monkeypatch):
    """The units that were handed out with the process of the worker, in order; `kill` names those that kill it."""
    log, real = [], ray_driver.RayRun._submit

    def submit(self, seat, unit):
        real(self, seat, unit)
        log.append((unit, seat.pid))
        if unit.index in kill and kill[unit.index] > 0:
            kill[unit.index] -= 1
            os.kill(seat.pid, signal.SIGKILL)

    kill = {}
    monkeypatch.setattr(ray_driver.RayRun, "_submit", submit)
    log.append(kill)
    return log


def test_workers_give_the_bits_of_a_local_run_and_a_killed_one_costs_its_unit(world, tmp_path, cluster, submitted):
    kill = submitted.pop()
    kill[4] = 1
    whole = build(world, tmp_path / "whole", TASKS)
    found = build(world, tmp_path / "out", TASKS, ray="auto", workers=3)  # the third has no core before one dies
    assert found.complete
    np.testing.assert_array_equal(found.values, whole.values)
    np.testing.assert_array_equal(found.base, whole.base)
    assert found.noise == whole.noise
    assert units_of(tmp_path / "out") == units_of(tmp_path / "whole")
    for name in ("manifest.json", "examples.parquet", "tasks.parquet", "journal.jsonl"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    times = Counter(unit.index for unit, _ in submitted)
    assert times == {-1: 1, **dict.fromkeys(range(8), 1), 4: 2}
    assert len({pid for unit, pid in submitted if unit.index == 4}) == 2  # another worker


def test_a_unit_that_kills_its_workers_ends_the_run_by_name(world, tmp_path, cluster, submitted, monkeypatch):
    submitted.pop()[3] = 1
    monkeypatch.setattr(ray_driver, "TRIES", 1)  # a worker takes seconds to start
    message = r"got 1 that died in turn under unit task-0000_shard-0001\.parquet of task 'full'"
    with pytest.raises(ValueError, match=message):
        build(world, tmp_path / "out", ["full"], ray="auto", workers=1)
    before = units_of(tmp_path / "out")
    units = [plan.Unit(0, task, shard).file_name for task in (-1, 0) for shard in (0, 1)]
    assert sorted(before) == sorted(units[:3])
    assert build(world, tmp_path / "out", ["full"]).complete  # goes on without Ray
    assert units_of(tmp_path / "out").items() > before.items()


# Without a cluster


def some_job(world, tasks=TASKS):
    examples = load_upstream(world / "upstream.jsonl", tiny_tokenizer(), max_length=256)
    models = [find_checkpoint("base", str(world / "base"), is_base=True)]
    models += [find_checkpoint(name, str(world / name)) for name in tasks]
    settings = {"tokens_per_batch": 2048, "noise_examples": 1, "buckets": None, "upstream": "u"}
    return Job(models=models, examples=examples, device="cpu", dtype=torch.float32, **settings)


def packed(job):
    examples = job.examples
    return examples.ids, np.concatenate(examples.tokens), np.cumsum([0, *job.lengths]), examples.first_target


def test_a_free_worker_goes_on_with_its_model_or_takes_the_one_with_most_work(world):
    job = some_job(world)
    assert [unit.task for unit in job.units[::2]] == [-1, 1, 0, 2]  # base, adapter, checkpoints
    queue = ray_driver.Queue(job, job.units[1:])
    taken = []

    def take(held, *holders):
        taken.append(queue.take(held, Counter(holders)))
        return (taken[-1].task, taken[-1].shard) if taken[-1] else None

    assert take(None) == (-1, 1)  # the base first, for the noise
    queue.put(ray_driver.NOISE)
    assert take(0) == (0, 0)  # it has a checkpoint
    assert take(1) == (1, 0)
    assert take(None, 0, 1) == (-1, -1)
    assert take(None, 0, 1) == (1, 1)
    queue.put(taken[1])  # its worker died
    assert take(None) == (0, 0)
    assert take(None, 0) == (2, 0)
    assert take(0, 2) == (0, 1)
    assert take(0, 2) == (2, 1)
    assert take(0) is None


def test_a_worker_scores_as_a_local_run_and_reports_smaller_budgets(world, tmp_path, monkeypatch):
    job = some_job(world)
    build(world, tmp_path / "out", TASKS, tokens_per_batch=512)
    worker = ray_driver.Worker(job.models[0], packed(job), "cpu", torch.float32)
    worker.check(job.models[1:], True)
    real = perplexity.score_examples

    def scorer(model, input_ids, *args, **kwargs):
        if input_ids.numel() > 600:
            raise torch.OutOfMemoryError("out of memory")
        return real(model, input_ids, *args, **kwargs)

    monkeypatch.setattr(perplexity, "score_examples", scorer)
    for task in (2, 0, 1, -1, 0):
        shard = job.shards[1]
        scores, reductions = worker.score(job.model(task), shard, 2048)
        assert reductions == [(2048, 1024), (1024, 512)]
        table = Store(tmp_path / "out").read_units([plan.Unit(0, task, 1).file_name])
        np.testing.assert_array_equal(table["nll_sum"].to_numpy(), scores.nll_sum)
        assert table["example"].to_pylist() == shard.tolist()


def test_other_files_on_a_node_are_refused(world):
    task = find_checkpoint("full", str(world / "full"))
    with pytest.raises(
        ValueError, match=r"task 'full': expected the same files on every node, got others in .*full on "
    ):
        ray_driver._as_here(replace(task, fingerprint="0"))
    with pytest.raises(
        ValueError, match=r"task 'full': expected a folder or a hub id, got .*gone, which does not exist"
    ):
        ray_driver._as_here(replace(task, folder=world / "gone", path=str(world / "gone")))


def test_what_cannot_run_on_ray_is_refused(world, tmp_path, monkeypatch):
    with pytest.raises(
        ValueError, match="shard: expected none with ray, got shard 0/2; the Ray driver divides the run"
    ):
        build(world, tmp_path / "out", ray="local", shard="0/2")
    with pytest.raises(ValueError, match="workers: expected 1 or more, got 0; leave it out"):
        build(world, tmp_path / "out", ray="local", workers=0)
    with pytest.raises(ValueError, match="workers: expected none without ray, got 2"):
        build(world, tmp_path / "out", workers=2)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        with pytest.raises(ImportError, match=r"ray: expected Ray, got none; pip install 'fastforget\[ray\]'"):
            build(world, tmp_path / "out", ray="local")
    assert not (tmp_path / "out").exists()


def test_a_cluster_that_is_not_there_is_said(world, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastforget[ray]'")

    def init(**_):
        raise ConnectionError("Could not find any running Ray instance")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(
        ValueError, match=r"ray: expected a cluster at 'auto', got none: Could not find.*; start one with"
    ):
        build(world, tmp_path / "out", ray="auto")
