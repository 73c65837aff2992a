"""Models that outgrow a GPU: the matrix by two processes that hold a part of each model, and by all devices of one."""

from __future__ import annotations

import numpy as np
import pytest
from end_to_end.two_processes import run_in_two_processes
from tiny_models import build, units_of

from fastforget.matrix import ForgettingMatrix, models

SCRIPT = """
import pathlib
import sys

import numpy as np
from tiny_models import build

world, folder = pathlib.Path(WORLD), pathlib.Path(__file__).parent
matrix = build(world, folder / "shared", ["full", "other"], tensor_parallel=True)
assert matrix.complete
again = build(world, folder / "shared", ["full", "other"], tensor_parallel=True)  # nothing is left
np.testing.assert_array_equal(again.values, matrix.values)
next((folder / "shared" / "units").glob("task-0001*")).unlink(missing_ok=True) if dist.get_rank() == 0 else None
dist.barrier()
again = build(world, folder / "shared", ["full", "other"], tensor_parallel=True)  # one unit is
np.testing.assert_array_equal(again.values, matrix.values)
try:
    build(world, folder / "refused", ["lora"], tensor_parallel=True)
    raise AssertionError("an adapter was accepted")
except ValueError as error:
    assert "expected a full checkpoint with tensor_parallel, got an adapter" in str(error), error
try:
    build(world, folder / "refused", ["full"], tensor_parallel=True, shard="0/2")
    raise AssertionError("a shard was accepted")
except ValueError as error:
    assert "shard: expected none with tensor_parallel" in str(error), error
try:
    build(world, folder / "shared", ["full"], tensor_parallel=True)
    raise AssertionError("another run's folder was accepted")
except ValueError as error:
    assert "belongs to a run with other inputs" in str(error), error
"""


def test_two_processes_that_share_every_model(world, tmp_path):
    """Values to rounding, one writer, and a run that continues."""
    run_in_two_processes(f"WORLD = {str(world)!r}\n" + SCRIPT, tmp_path)
    alone, shared = build(world, tmp_path / "alone", ["full", "other"]), ForgettingMatrix.load(tmp_path / "shared")
    np.testing.assert_allclose(shared.values, alone.values, atol=2e-5)
    np.testing.assert_allclose(shared.base, alone.base, atol=2e-5)
    np.testing.assert_array_equal(shared.exact, alone.exact)
    assert shared.about["environment"]["tensor_parallel"] == "2 processes"
    assert shared.noise["examples"] == 1
    assert not (tmp_path / "refused").exists()


def test_on_all_devices_of_one_process(world, tmp_path):
    """The same bits, adapters included, where there is one device."""
    build(world, tmp_path / "alone", ["full", "lora"])
    build(world, tmp_path / "spread", ["full", "lora"], device="auto")
    assert units_of(tmp_path / "spread") == units_of(tmp_path / "alone")


def test_what_is_put_off_to_the_disk_is_refused(world, tmp_path, monkeypatch):
    """In-place loading would write to nothing."""
    load = models.from_pretrained
    monkeypatch.setattr(models, "from_pretrained", lambda *a, **k: load(a[0], a[1]).to("meta"))
    with pytest.raises(ValueError, match="of which a part was put off to the CPU or the disk"):
        build(world, tmp_path / "out", ["full"], device="auto")


def test_without_torchrun_there_is_nothing_to_share(world, tmp_path, monkeypatch):
    """By name, with the command."""
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="tensor_parallel: expected a process of torchrun"):
        build(world, tmp_path / "out", ["full"], tensor_parallel=True)
