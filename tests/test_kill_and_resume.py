"""Runs that are killed with SIGKILL and started again give the bits of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from tiny_models import save_adapter, save_base, save_tuned, texts

import fastforget as ff
from fastforget.matrix.store import Store

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")

# A run that kills itself at a chosen moment, or that has memory for so many padded tokens only.
SCRIPT = """
import json, os, signal, sys, warnings
import torch
import fastforget as ff
from fastforget import perplexity

settings = json.loads(sys.argv[1])
moment = settings.pop("die", {})
cells = settings.pop("memory", None)

def dies_at(name, module, attribute, counts=lambda *args: True):
    if name not in moment:
        return
    real, calls = getattr(module, attribute), []
    def counted(*args, **kwargs):
        calls.extend([1] * counts(*args))
        if len(calls) == moment[name]:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(module, attribute, counted)

if cells:
    real_scorer = perplexity.score_examples
    def scorer(model, input_ids, *args, **kwargs):
        if input_ids.numel() > cells:
            raise torch.OutOfMemoryError("out of memory")
        return real_scorer(model, input_ids, *args, **kwargs)
    perplexity.score_examples = scorer

dies_at("before batch", perplexity, "score_examples")
dies_at("before rename", os, "replace", lambda source, target: target.parent.name == "units")
ff.forgetting_matrix(**settings, progress=False, noise_examples=2)
"""
BATCH = 1200  # several batches a unit


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a checkpoint and an adapter, and about 20,000 tokens in five shards."""
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base")
    save_tuned(base, folder / "full")
    save_adapter(base, folder / "lora")
    (folder / "upstream.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()[:190]))
    return folder


@pytest.fixture(scope="module")
def whole(world):
    """The folder of a run that nothing disturbed."""
    finished = script(world, world / "whole")
    assert finished.returncode == 0, finished.stderr
    return world / "whole"


def environment(world):
    # One thread: the models are tiny, and the bits of a sum depend on the number of threads.
    return os.environ | {"OMP_NUM_THREADS": "1", "FASTFORGET_CACHE": str(world / "cache"), "HF_HUB_OFFLINE": "1"}


def started(world, out, **changes):
    settings = {
        "base": str(world / "base"),
        "tasks": [str(world / "full"), str(world / "lora")],
        "upstream": str(world / "upstream.jsonl"),
        "out": str(out),
        "tokens_per_batch": BATCH,
    }
    command = [sys.executable, "-c", SCRIPT, json.dumps(settings | changes)]
    return subprocess.Popen(command, env=environment(world), stderr=subprocess.PIPE, text=True)


def ended(process):
    _, errors = process.communicate(timeout=300)
    return SimpleNamespace(returncode=process.returncode, stderr=errors)


def script(world, out, **changes):
    return ended(started(world, out, **changes))


def command_line(world, out):
    command = [sys.executable, "-m", "fastforget", "matrix", "--base", world / "base", "--out", out]
    command += ["--task", world / "full", "--task", world / "lora", "--upstream", world / "upstream.jsonl"]
    command += ["--tokens-per-batch", BATCH, "--noise-examples", 2, "--no-progress"]
    return subprocess.Popen(
        [str(part) for part in command],
        env=environment(world),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def killed_when_units_reach(world, out, count):
    """The real command, killed as soon as so many units are there."""
    process = command_line(world, out)
    deadline = time.monotonic() + 240
    while len(Store(out).finished()) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    output, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, output


def contents(out):
    """Every file of the result, bit for bit."""
    names = [path for path in out.rglob("*") if path.is_file() and not path.name.startswith(("lock", "heatmap"))]
    return {str(path.relative_to(out)): path.read_bytes() for path in names}


def traces(out):
    """What changes when a unit is written again."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in (out / "units").glob("task-*")}


@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bits(world, whole, tmp_path):
    out = tmp_path / "out"
    n_units = len(traces(whole))
    assert n_units == 3 * 5

    seen = {}
    counts = []

    def check():
        nonlocal seen
        now = traces(out)
        assert {name: now[name] for name in seen} == seen, "a finished unit was written again"
        counts.append(len(now))
        seen = now
        matrix = ff.ForgettingMatrix.load(out)  # readable at every moment
        assert not matrix.complete

    killed_when_units_reach(world, out, 2)
    check()
    # In the middle of a unit: after some of its batches.
    assert script(world, out, die={"before batch": 6}).returncode == -signal.SIGKILL
    check()
    # Between writing a unit's file and giving it its name.
    assert script(world, out, die={"before rename": 2}).returncode == -signal.SIGKILL
    assert len(list((out / "units").glob(".tmp-*"))) == 1
    check()
    killed_when_units_reach(world, out, counts[-1] + 4)
    check()
    assert 2 <= counts[0] <= counts[1] < counts[2] < counts[3] < n_units

    last = command_line(world, out)
    output, _ = last.communicate(timeout=300)
    assert last.returncode == 0, output
    now = traces(out)
    assert {name: now[name] for name in seen} == seen
    assert contents(out) == contents(whole)
    assert ff.ForgettingMatrix.load(out).complete


@pytest.mark.slow
def test_a_run_killed_after_running_out_of_memory_continues_to_the_same_bits(world, tmp_path):
    whole, out = tmp_path / "whole", tmp_path / "out"
    small = {"memory": 700}
    finished = script(world, whole, **small)
    assert finished.returncode == 0, finished.stderr
    assert "the run goes on with 600" in finished.stderr
    assert [event["tokens_per_batch"] for event in Store(whole).events("budget")] == [600]

    # Killed right after the halved budget is on the disk, before any unit is.
    assert script(world, out, **small, die={"before batch": 2}).returncode == -signal.SIGKILL
    assert [event["tokens_per_batch"] for event in Store(out).events("budget")] == [600]
    assert not traces(out)
    # Continued where memory is plenty: the journal's budget holds, so the batches are the same.
    finished = script(world, out)
    assert finished.returncode == 0, finished.stderr
    assert contents(out) == contents(whole)


@pytest.mark.slow
def test_killed_drivers_of_one_run_continue_to_the_same_bits(world, whole, tmp_path):
    out = tmp_path / "out"
    dies, other = started(world, out, shard="0/2", die={"before rename": 3}), started(world, out, shard="1/2")
    assert ended(dies).returncode == -signal.SIGKILL
    finished = ended(other)
    assert finished.returncode == 0, finished.stderr  # one driver's death is nothing to the other
    seen = traces(out)
    assert sum(name.startswith("task-base") for name in seen) == 2
    assert len(seen) == 2 + 8
    assert len(list((out / "units").glob(".tmp-*"))) == 1
    finished = script(world, out, shard="0/2")
    assert finished.returncode == 0, finished.stderr
    now = traces(out)
    assert {name: now[name] for name in seen} == seen, "a finished unit was written again"
    ours, theirs = ({n: b for n, b in contents(f).items() if "journal" not in n} for f in (out, whole))
    assert ours == theirs


@pytest.mark.slow
def test_a_second_driver_on_the_same_folder_is_refused(world, tmp_path):
    process = command_line(world, tmp_path / "out")
    while not (tmp_path / "out" / "manifest.json").exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        second = script(world, tmp_path / "out")
    finally:
        process.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "in use by another run; wait for it or choose another folder" in second.stderr
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
