"""One matrix by several drivers without coordination: the division, the locks, and the same bits as one run."""

import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import build, units_of

import fastforget as ff
from fastforget import cli
from fastforget.matrix import folders, leases, local, models, plan
from fastforget.matrix.runner import choose_device
from fastforget.matrix.shares import Share, parse_share
from fastforget.matrix.shares import units_of as units_of_share
from fastforget.matrix.store import Store

pytestmark = pytest.mark.usefixtures("small_shards")

MANIFEST = {"format": 1, "inputs": {"base": "a"}, "environment": {}}
TASKS = ["full", "lora", "other"]  # 4 rows of 2 units with the base


# The division


def test_shards_are_counted_from_0_as_ranks_are():
    assert parse_share(None) == parse_share("0/1") == Share()
    assert parse_share("3/4") == Share(3, 4)
    for wrong in ("4/4", "0/0", "-1/4", "1", "a/b", "", "1/2/3"):
        with pytest.raises(ValueError, match=r"shard: expected i/n with 0 <= i < n, or auto, got '.*'; count from 0"):
            parse_share(wrong)
    with pytest.raises(TypeError, match="shard: expected a string such as '0/4', got 2"):
        parse_share(2)


def test_auto_is_the_rank_or_the_place_in_the_array():
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "5", "SLURM_ARRAY_TASK_COUNT": "4"}
    assert parse_share("auto", {"RANK": "2", "WORLD_SIZE": "8"}) == Share(2, 8)
    assert parse_share("auto", array) == Share(2, 4)
    assert parse_share("auto", array | {"SLURM_ARRAY_TASK_STEP": "2"}) == Share(1, 4)
    assert parse_share("auto", array | {"RANK": "1", "WORLD_SIZE": "2"}) == Share(5, 8)  # torchrun inside an array
    for wrong, message in (
        ({}, "RANK and WORLD_SIZE .* got neither; start the command with torchrun"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "got 2 of 2"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "an integer in RANK, got 'x'"),
        ({"SLURM_ARRAY_TASK_ID": "0"}, "an integer in SLURM_ARRAY_TASK_COUNT, got None"),
        (array | {"SLURM_ARRAY_TASK_ID": "9"}, r"without gaps, got task 9 of 4 from 5; write --array=0-3"),
    ):
        with pytest.raises(ValueError, match=f"shard: expected .*{message}"):
            parse_share("auto", wrong)


def test_each_process_of_a_node_takes_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(None) == "cuda"
    assert chosen == []  # a run of its own stays where it was
    assert choose_device(None, one_of_many=True) == "cuda"
    assert chosen == [3]


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=40), st.integers(1, 9), st.integers(1, 30))
def test_every_unit_has_one_driver_in_contiguous_balanced_blocks(shards, rows, count):
    units = plan.units(list(range(-1, rows - 1)), len(shards))
    tokens = np.array(shards * rows)
    parts = [units_of_share(Share(i, count), units, tokens) for i in range(count)]
    assert [unit for part in parts for unit in part] == units
    for part in parts:
        assert abs(sum(tokens[unit.index] for unit in part) - tokens.sum() / count) <= max(tokens)


def test_a_driver_loads_the_models_of_its_block_alone(world, tmp_path, monkeypatch):
    loaded = []
    load = models.ResidentModel._load
    monkeypatch.setattr(models.ResidentModel, "_load", lambda self, c: loaded.append(c.label) or load(self, c))
    build(world, tmp_path / "out", TASKS, shard="1/2")
    assert loaded == ["task 'full'", "task 'other'"]  # the base and the adapter are the other driver's


# The same bits


def test_two_drivers_make_the_matrix_of_one(world, tmp_path):
    whole = build(world, tmp_path / "whole", TASKS)
    last = build(world, tmp_path / "out", TASKS, shard="1/2")
    assert not last.complete
    assert np.isnan(last.values).all()  # the base's row is missing
    assert not last.noise
    first = build(world, tmp_path / "out", TASKS, shard="0/2")
    assert first.complete
    assert units_of(tmp_path / "out") == units_of(tmp_path / "whole")
    np.testing.assert_array_equal(first.values, whole.values)
    assert first.noise == whole.noise
    for name in ("manifest.json", "examples.parquet", "tasks.parquet", "noise.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    journals = {path.name: path.read_text() for path in (tmp_path / "out").glob("journal*")}
    assert journals == {f"journal-{i}of2.jsonl": '{"event": "finished", "units": 4}\n' for i in (0, 1)}


@pytest.mark.parametrize("order", [range(8), reversed(range(8))])
def test_the_noise_is_measured_once_whoever_finishes_last(world, tmp_path, monkeypatch, order):
    measured = []
    real = local.measure_noise
    monkeypatch.setattr(local, "measure_noise", lambda *args, **kwargs: measured.append(1) or real(*args, **kwargs))
    for shard in order:  # a unit each: the base's row has two drivers
        matrix = build(world, tmp_path / "out", TASKS, shard=f"{shard}/8")
    assert matrix.complete
    assert matrix.noise
    assert len(measured) == 1


def test_more_drivers_than_units_have_nothing_to_do(world, tmp_path):
    for shard in range(9):
        matrix = build(world, tmp_path / "out", ["full"], shard=f"{shard}/9", noise_examples=0)
    assert matrix.complete
    assert len(units_of(tmp_path / "out")) == 4


def test_a_finished_block_is_not_computed_again(world, tmp_path, monkeypatch):
    build(world, tmp_path / "out", TASKS, shard="1/2")
    from fastforget.matrix import runner

    monkeypatch.setattr(runner, "LocalRun", None)  # nothing is loaded
    build(world, tmp_path / "out", TASKS, shard="1/2")


def test_the_whole_run_and_other_divisions_continue_a_folder(world, tmp_path):
    whole = build(world, tmp_path / "whole", TASKS)
    build(world, tmp_path / "out", TASKS, shard="1/4")
    build(world, tmp_path / "out", TASKS, shard="0/3")
    before = units_of(tmp_path / "out")
    assert 0 < len(before) < 8
    assert np.array_equal(build(world, tmp_path / "out", TASKS).values, whole.values)


def test_a_budget_holds_for_its_drivers_units(tmp_path):
    mine, theirs = Store(tmp_path, Share(0, 2)), Store(tmp_path, Share(1, 2))
    with mine.opened(MANIFEST, []), theirs.opened(MANIFEST, []):
        mine.record("budget", from_unit=0, tokens_per_batch=64)
    assert mine.budget(plan.Unit(3, 0, 0), 128) == 64
    assert theirs.budget(plan.Unit(3, 0, 0), 128) == 128


# Locks


@pytest.mark.parametrize("kind", ["locks", "leases"])
def test_who_may_work_at_the_same_time(tmp_path, monkeypatch, kind):
    if kind == "leases":

        def no_locks(descriptor, *, shared=False):
            raise OSError(leases.errno.ENOLCK, "No locks available")

        monkeypatch.setattr(folders, "lock", no_locks)
    whole, first, second, thirds = Share(), Share(0, 2), Share(1, 2), Share(1, 3)
    for inside, others in (
        (whole, {whole: False, first: False, thirds: False}),
        (first, {whole: False, first: False, second: True, thirds: False}),
    ):
        with Store(tmp_path, inside).opened(MANIFEST, []):
            for share, allowed in others.items():
                for attempt in (
                    lambda store: store.check(MANIFEST),
                    lambda store: store.opened(MANIFEST, []).__enter__(),
                ):
                    if allowed:
                        attempt(Store(tmp_path, share))
                        continue
                    named = "" if inside == whole and kind == "locks" else rf" \({inside}.*\)"
                    message = rf"got .*, in use by another run{named}; wait for it or choose another folder"
                    with pytest.raises(ValueError, match=message):
                        attempt(Store(tmp_path, share))
    Store(tmp_path).check(MANIFEST)  # free again
    assert not list(tmp_path.glob("lease*"))


def test_drivers_that_look_for_others_do_not_refuse_one_another(tmp_path):
    (tmp_path / "lock").touch()  # of an earlier run
    with folders.LocalFolder(tmp_path)._locked(tmp_path / "lock", Share(), shared=True):  # as a driver that looks
        with Store(tmp_path, Share(0, 2)).opened(MANIFEST, []):
            pass
        with pytest.raises(ValueError, match="in use by another run"):
            Store(tmp_path).opened(MANIFEST).__enter__()


def test_a_driver_clears_away_its_own_leftovers_alone(tmp_path):
    (tmp_path / "units").mkdir()
    own, other = plan.Unit(0, -1, 0), plan.Unit(1, -1, 1)
    for unit in (own, other):
        (tmp_path / "units" / f".tmp-1-{unit.file_name}").write_bytes(b"half")
    (tmp_path / ".tmp-1-manifest.json").write_bytes(b"half")
    with Store(tmp_path, Share(0, 2)).opened(MANIFEST, [own]):
        pass
    left = {path.name for path in tmp_path.rglob(".tmp-*")}
    assert left == {f".tmp-1-{other.file_name}", ".tmp-1-manifest.json"}  # another driver may be writing them
    with Store(tmp_path).opened(MANIFEST):
        pass
    assert not list(tmp_path.rglob(".tmp-*"))


def test_the_first_manifest_stays(tmp_path):
    barrier = threading.Barrier(4)
    for turn in range(20):
        (tmp_path / str(turn)).mkdir()
        (tmp_path / str(turn) / "lock").touch()  # of an earlier run: all four look at it at the same time

    def drive(number):
        for turn in range(20):
            barrier.wait()
            with Store(tmp_path / str(turn), Share(number, 4)).opened(MANIFEST | {"environment": {"of": number}}, []):
                barrier.wait()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(drive, range(4)))
    for turn in range(20):
        assert sorted(os.listdir(tmp_path / str(turn))) == [
            "lock",
            *(f"lock-{i}of4" for i in range(4)),
            "manifest.json",
        ]
    # Also where it was read before: a later driver does not replace it.
    first = (tmp_path / "0" / "manifest.json").read_bytes()
    with Store(tmp_path / "0", Share(0, 4)).opened(MANIFEST, []):
        pass
    assert (tmp_path / "0" / "manifest.json").read_bytes() == first != json.dumps(MANIFEST).encode()


# The command


def test_the_command_says_what_waits_and_draws_at_the_end(world, tmp_path, monkeypatch, capsys):
    command = ["fastforget", "matrix", "--base", world / "base", "--task", world / "full", "--out", tmp_path / "out"]
    command += ["--upstream", world / "upstream.jsonl", "--noise-examples", 0, "--no-progress", "--shard", "auto"]
    monkeypatch.setattr(cli.sys, "argv", [str(part) for part in command])
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, wanted in (
        ("0", "shard auto is finished; 40 values of .* wait for other drivers"),
        ("1", "wrote .*heatmap"),
    ):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code
        assert re.search(wanted, capsys.readouterr().out)
    assert ff.ForgettingMatrix.load(tmp_path / "out").complete
