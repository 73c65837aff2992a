"""The examples of the documentation run, for one seed and in fewer steps, and show what they say."""

from __future__ import annotations

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "docs/examples"


def test_sequential_fine_tuning(tmp_path):
    pytest.importorskip("matplotlib", reason="the example draws")
    command = [
        sys.executable,
        str(EXAMPLES / "sequential_fine_tuning.py"),
        "--quick",
        "--out",
        str(tmp_path / "record"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "record.json").read_text())
    before, runs = record["seeds"]["0"]["base"], record["seeds"]["0"]["runs"]
    assert {run["method"] for run in runs} == {"AdamW", "EWC, exact Fisher", "EWC, squared batch mean", "mask"}
    values = [value for run in runs for point in run["curve"] for value in point.values()]
    assert all(math.isfinite(value) for value in values)
    after = {run["method"]: run["curve"][-1] for run in runs}
    assert all(end["code"] < before["code"] - 0.5 for end in after.values())  # the second domain is learnt
    for steered in ("EWC, exact Fisher", "EWC, squared batch mean", "mask"):  # what steers, forgets and learns less
        assert after[steered]["prose"] < after["AdamW"]["prose"]
        assert after[steered]["code"] > after["AdamW"]["code"]
    dampened = record["seeds"]["0"]["dampened"]
    shares = [point["share"] for point in dampened]
    assert shares == sorted(shares)  # a lower alpha dampens more
    assert shares[-1] > shares[0]
    assert dampened[-1]["code"] > after["AdamW"]["code"] + 0.5  # what is forgotten
    assert (tmp_path / "record.png").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert "seed 0" not in again.stdout  # is in the record
    assert json.loads((tmp_path / "record.json").read_text()) == record


def test_the_page_has_the_record(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("sequential_fine_tuning")
    record = json.loads((EXAMPLES / "sequential_fine_tuning.json").read_text())
    assert list(record["seeds"]) == ["0", "1", "2", "3", "4"]
    assert record["methods"] == example.STRENGTHS
    assert record["steps"] == example.STEPS
    assert example.table(record) in (EXAMPLES.parent / "optimizers.md").read_text(encoding="utf-8")
