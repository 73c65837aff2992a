"""The examples of the documentation run, in a few steps, and write what they say."""

from __future__ import annotations

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
    runs = record["seeds"]["0"]["runs"]
    assert {run["method"] for run in runs} == {"AdamW", "EWC, exact Fisher", "EWC, squared batch mean", "mask"}
    values = [value for run in runs for point in run["curve"] for value in point.values()]
    assert all(math.isfinite(value) for value in values)
    learnt = {run["strength"]: run["curve"][-1]["code"] for run in runs if run["method"] == "mask"}
    assert sorted(learnt, key=learnt.__getitem__) == sorted(learnt)  # the more is masked, the less is learnt
    shares = [point["share"] for point in record["seeds"]["0"]["dampened"]]
    assert shares == sorted(shares)  # a lower alpha dampens more
    assert shares[-1] > shares[0]
    assert (tmp_path / "record.png").stat().st_size > 10_000
