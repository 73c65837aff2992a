import json
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastforget._files import write_atomically
from fastforget.matrix import plan
from fastforget.matrix.store import Store

CAPACITY = Path(__file__).parents[1] / "docs" / "capacity.md"
MANIFEST = {"format": 1, "inputs": {"base": {"weights": "a"}, "settings": {"dtype": "float32"}}, "environment": {}}

# The plan


@given(st.lists(st.integers(2, 3000), min_size=1, max_size=300), st.integers(1, 10_000))
def test_shards_and_batches_hold_every_example_once(values, budget):
    lengths = np.array(values)
    shards = plan.shards(lengths)
    order = np.concatenate(shards)
    assert sorted(order) == list(range(len(lengths)))
    keys = [(-lengths[j], j) for j in order]
    assert keys == sorted(keys)  # longest first, ties by index
    low, high = plan.TOKENS_PER_SHARD
    size = min(max(-(-lengths.sum() // plan.SHARDS_A_ROW), low), high)
    for shard in shards:
        assert len(shard)
        assert lengths[shard[:-1]].sum() < size  # cut at the first example that reaches the size
        parts = list(plan.batches(lengths[shard], budget))
        assert [j for rows in parts for j in shard[rows]] == list(shard)
        for rows in parts:
            padded = (rows.stop - rows.start) * lengths[shard[rows]].max()
            assert padded <= budget or rows.stop - rows.start == 1
        for rows in parts[:-1]:  # greedy: one more row would not have fitted
            assert (rows.stop - rows.start + 1) * lengths[shard[rows.start]] > budget


@given(st.integers(1, 5000), st.sampled_from([None, 5000, 300]))
def test_buckets_are_few_ordered_and_at_most_half_too_long(length, limit):
    length = min(length, limit or length)
    buckets = plan.Buckets(limit)
    bucket = buckets(length)
    assert length <= bucket <= max(64, 1.5 * length)
    assert limit is None or bucket <= limit
    assert buckets(bucket) == bucket
    assert buckets(max(1, length - 1)) <= bucket
    assert len({buckets(n) for n in range(1, (limit or 5000) + 1)}) <= 14


def test_the_default_budget_follows_device_and_dtype():
    assert plan.default_tokens_per_batch("cpu", torch.float32) == 4096
    assert plan.default_tokens_per_batch("cuda", torch.bfloat16) == 65536
    assert plan.default_tokens_per_batch("cuda", torch.float32) == 32768


def test_units_go_model_by_model():
    units = plan.units([-1, 1, 0], 2)
    assert [(unit.index, unit.task, unit.shard) for unit in units] == [
        (0, -1, 0), (1, -1, 1), (2, 1, 0), (3, 1, 1), (4, 0, 0), (5, 0, 1),
    ]  # fmt: skip
    assert [unit.file_name for unit in units[1:3]] == ["task-base_shard-0001.parquet", "task-0001_shard-0000.parquet"]


# The store


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fails(temporary):
        temporary.write_text("half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, fails)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_units_come_back_as_they_were_written(tmp_path):
    store = Store(tmp_path / "out")
    unit = plan.Unit(3, 1, 0)
    with store.opened(MANIFEST):
        columns = {"nll_sum": np.array([0.1, np.nan]), "tokens": np.array([3, 4]), "exact": np.array([True, False])}
        store.write_unit(unit, np.array([5, 2]), columns)
        assert store.finished() == {unit.file_name}
    table = store.read_units([unit.file_name])
    assert str(table.schema).split("\n")[:5] == [
        "task: int32", "example: int32", "nll_sum: double", "tokens: int32", "exact: bool",
    ]  # fmt: skip
    assert table["example"].to_pylist() == [5, 2]
    assert table["task"].to_pylist() == [1, 1]
    assert np.array_equal(table["nll_sum"].to_numpy(), columns["nll_sum"], equal_nan=True)
    assert pq.read_schema(tmp_path / "out" / "units" / unit.file_name).equals(table.schema)


def test_a_damaged_unit_is_refused_by_name(tmp_path):
    store = Store(tmp_path)
    with store.opened(MANIFEST):
        (tmp_path / "units").mkdir()
        (tmp_path / "units" / "task-base_shard-0000.parquet").write_bytes(b"PAR1")
        with pytest.raises(ValueError, match=r"got the damaged file .*task-base_shard-0000\.parquet .*; delete it"):
            store.read_units(sorted(store.finished()))


def test_what_a_killed_run_left_half_written_is_cleared_away(tmp_path):
    store = Store(tmp_path)
    with store.opened(MANIFEST):
        store.record("budget", from_unit=2, tokens_per_batch=64)
        store.record("budget", from_unit=5, tokens_per_batch=32)
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / ".tmp-1-task-base_shard-0000.parquet").write_bytes(b"half")
    (tmp_path / ".tmp-1-noise.json").write_bytes(b"half")
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"event": "bud')
    assert [event["tokens_per_batch"] for event in store.events("budget")] == [64, 32]
    with store.opened(MANIFEST):
        store.record("finished", units=9)
    assert not list(tmp_path.rglob(".tmp-*"))
    assert [json.loads(line)["event"] for line in (tmp_path / "journal.jsonl").read_text().splitlines()] == [
        "budget", "budget", "finished",
    ]  # fmt: skip


def test_the_budget_of_a_unit_is_the_last_reduction_before_it(tmp_path):
    store = Store(tmp_path)
    with store.opened(MANIFEST):
        for start, tokens in ((2, 64), (5, 32), (5, 16)):
            store.record("budget", from_unit=start, tokens_per_batch=tokens)
    budgets = [store.budget(plan.Unit(index, 0, 0), 128) for index in range(7)]
    assert budgets == [128, 128, 64, 64, 64, 16, 16]


def test_a_folder_in_use_is_refused(tmp_path):
    store = Store(tmp_path)
    with store.opened(MANIFEST):
        for attempt in (lambda: Store(tmp_path).check(MANIFEST), lambda: Store(tmp_path).opened(MANIFEST).__enter__()):
            with pytest.raises(
                ValueError, match=r"expected a folder that nobody writes to, got .* in use by another run"
            ):
                attempt()
    store.check(MANIFEST)  # free again


def test_another_runs_folder_is_refused_with_what_differs(tmp_path):
    store = Store(tmp_path)
    with store.opened(MANIFEST):
        pass
    before = (tmp_path / "manifest.json").read_bytes()
    other = json.loads(json.dumps(MANIFEST))
    other["inputs"]["settings"] |= {"dtype": "bfloat16", "eos": True}
    message = r'settings dtype: "float32" there, "bfloat16" here; settings eos: null there, true here; choose another'
    with pytest.raises(ValueError, match=message):
        store.check(other)
    with pytest.raises(ValueError, match=message), store.opened(other):
        pass
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_a_folder_of_something_else_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"expected an empty folder or one of this run, got .* with thesis\.tex"):
        Store(tmp_path).check(MANIFEST)
    assert os.listdir(tmp_path) == ["thesis.tex"]
    with pytest.raises(ValueError, match=r"expected a folder that can be written to, got .*thesis\.tex"):
        Store(tmp_path / "thesis.tex").check(MANIFEST)


def test_a_manifest_that_cannot_be_used_is_refused(tmp_path):
    store = Store(tmp_path)
    with pytest.raises(ValueError, match=r"expected the folder of a forgetting matrix, got .* without a readable"):
        store.manifest()
    (tmp_path / "manifest.json").write_text('{"format": 99}')
    with pytest.raises(ValueError, match=r"expected a matrix of format 1, got format 99"):
        store.manifest()


@pytest.mark.parametrize(
    "line", [line for line in CAPACITY.read_text().splitlines() if line.startswith("| 1") and "%" in line]
)
def test_the_capacity_page_says_how_much_is_padding(line):
    """Its table, measured."""
    count, budget, *shown = (cell.strip() for cell in line.strip("|").split("|"))
    n, tokens_per_batch = int(count.replace(",", "")), int(budget.replace(",", ""))
    generator = np.random.default_rng(0)
    tail = np.clip(generator.lognormal(5.5, 1.0, n), 2, 2048).astype(int)
    uniform = np.random.default_rng(0).integers(2, 513, n)
    for lengths, claimed in zip((tail, uniform), shown, strict=True):
        shards = [lengths[shard] for shard in plan.shards(lengths)]
        padded = sum(
            (b.stop - b.start) * int(shard[b.start]) for shard in shards for b in plan.batches(shard, tokens_per_batch)
        )
        assert f"{100 * (1 - lengths.sum() / padded):.2g}%" == claimed
