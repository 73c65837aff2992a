"""Runs of `fastforget fisher` that are stopped, killed or short of memory give the bytes of one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import pytest
import torch
from fisher_runs import BATCH, looped, relative, run, save_fisher_world, write
from tiny_models import save_base

from fastforget.fisher.estimator import DiagonalFisher
from fastforget.fisher.files import read_metadata
from fastforget.fisher_run import runner
from fastforget.fisher_run.partial import PARTIAL_KIND, RunFiles
from fastforget.fisher_run.partial import environment as environment_of


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_fisher_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def token_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))


# Continuing


def test_a_finished_run_is_not_done_again(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "f.safetensors"
    first = run(world, out, limit=4)
    before = (out.stat().st_ino, out.stat().st_mtime_ns)
    monkeypatch.setattr(runner, "DiagonalFisher", None)
    monkeypatch.setattr(runner, "ResidentModel", None)
    again = run(world, out, limit=4, offload=True, save_every=3.0)
    assert "finished, by the same command on the same inputs; nothing to do" in capsys.readouterr().err
    assert (out.stat().st_ino, out.stat().st_mtime_ns) == before
    assert again.metadata == first.metadata


@pytest.mark.parametrize("stage", ["finished", "partial"])
def test_a_file_of_another_run_is_refused_with_what_differs(world, tmp_path, monkeypatch, stage):
    out = tmp_path / "f.safetensors"
    if stage == "finished":
        run(world, out, limit=4)
    else:
        stop_after(1, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            run(world, out, limit=4, save_every=0.0, tokens_per_batch=100)
        monkeypatch.undo()
        monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("f.*")}
    budget = BATCH if stage == "finished" else 100
    save_base(tmp_path / "other", seed=5)
    data = write(tmp_path / "other.jsonl", [{"text": "something else entirely"}] * 5)
    for message, settings in (
        ('settings loss: "mean" there, "sum" here', {"loss": "sum"}),
        ("settings limit: 4 there, 5 here", {"limit": 5}),
        ("settings parameters: .* there, .*mlp.* here", {"parameters": ["*.mlp.*"]}),
        ("settings tokens_per_batch: .* there, 77 here", {"tokens_per_batch": 77}),
        ('settings dtype: "float32" there, "float64" here', {"dtype": "float64"}),
        ("model weights: ", {"model": tmp_path / "other"}),
        ("adapter: null there", {"adapter": world / "lora"}),
        ("data content: .*; data examples: 60 there, 5 here", {"data": data}),
    ):
        with pytest.raises(ValueError, match=rf"out: .* belongs to a run with other inputs; .* got {message}.*choose"):
            run(world, out, **({"limit": 4, "tokens_per_batch": budget} | settings))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("f.*")} == before


def stop_after(updates: int, monkeypatch) -> list:
    """The run is interrupted at its next update; the examples of all updates are recorded."""
    real, seen = DiagonalFisher.update, []

    def update(self, *args, example_ids, **kwargs):
        if len(seen) == updates:
            raise KeyboardInterrupt
        seen.append(list(example_ids))
        return real(self, *args, example_ids=example_ids, **kwargs)

    monkeypatch.setattr(DiagonalFisher, "update", update)
    return seen


@pytest.mark.parametrize("settings", [{}, {"labels": "sampled", "seed": 1}, {"per": "batch_mean", "batch_size": 7}])
def test_an_interrupted_run_continues_to_the_same_bytes(world, tmp_path, monkeypatch, settings):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "f.safetensors"
    run(world, whole, **settings)
    with monkeypatch.context() as patch:
        first = stop_after(4, patch)
        with pytest.raises(KeyboardInterrupt):
            run(world, out, save_every=0.0, **settings)
    assert {path.name for path in tmp_path.glob("f.*")} == {"f.safetensors.partial"}
    done = read_metadata(tmp_path / "f.safetensors.partial", kind=PARTIAL_KIND)["state"]["position"]
    assert done == sum(map(len, first))
    with monkeypatch.context() as patch:
        rest = stop_after(10**9, patch)
        run(world, out, **settings)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(j for batch in first + rest for j in batch) == list(range(60))  # none twice
    assert {path.name for path in tmp_path.glob("f.*")} == {"f.safetensors"}


def test_the_state_is_written_by_the_clock_and_seldom_where_writing_is_slow(world, tmp_path, monkeypatch):
    now, writes = [0.0], []
    monkeypatch.setattr(runner.time, "monotonic", lambda: now[0])
    real = RunFiles.write

    def slow(self, *args):
        writes.append(now[0])
        now[0] += 5.0
        real(self, *args)

    monkeypatch.setattr(RunFiles, "write", slow)
    update = DiagonalFisher.update

    def timed(self, *args, **kwargs):
        now[0] += 10.0
        return update(self, *args, **kwargs)

    monkeypatch.setattr(DiagonalFisher, "update", timed)
    run(world, tmp_path / "f.safetensors", save_every=20.0, tokens_per_batch=200)
    assert writes[:2] == [20.0, 75.0]  # 20 s first; then ten times the 5 s that the write took


@pytest.mark.parametrize("save_every", [0.0, 1e9])
@pytest.mark.parametrize("plenty", [0, 3])  # batches before memory becomes short
def test_running_out_of_memory_halves_the_batch(world, tmp_path, monkeypatch, save_every, plenty):
    real, cells, seen = DiagonalFisher.update, 300, []

    def update(self, input_ids, *args, **kwargs):
        result = real(self, input_ids, *args, **kwargs)
        if input_ids.numel() > cells and len(seen) >= plenty:  # after a part of it has been added
            raise torch.OutOfMemoryError("out of memory")
        seen.append(input_ids.numel())
        return result

    with monkeypatch.context() as patch:
        patch.setattr(DiagonalFisher, "update", update)
        with pytest.warns(
            RuntimeWarning, match="out of memory on cpu with 600 tokens per batch; the run goes on with 300"
        ):
            fisher = run(world, tmp_path / "f.safetensors", save_every=save_every)
    assert max(seen[plenty:]) <= cells
    assert fisher.metadata["examples"] == 60
    expected = looped(world, world / "data.jsonl")
    assert all(relative(fisher[name], value) < 1e-5 for name, value in expected.items())


def test_an_example_that_does_not_fit_alone_is_named(world, tmp_path, monkeypatch):
    def update(self, input_ids, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(DiagonalFisher, "update", update)
    monkeypatch.setattr(warnings, "warn", lambda *_, **__: None)
    with pytest.raises(ValueError, match=r"data: expected every example to fit in memory, got '\w+' of \d+ tokens"):
        run(world, tmp_path / "f.safetensors")


def test_a_batch_that_has_a_meaning_is_not_halved(world, tmp_path, monkeypatch):
    def update(self, input_ids, *args, **kwargs):
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(DiagonalFisher, "update", update)
    with pytest.raises(
        ValueError, match=r"batch_size: expected a batch that fits in memory, got 9 examples of up to \d"
    ):
        run(world, tmp_path / "f.safetensors", per="batch_mean", batch_size=9)


def test_another_environment_is_named(world, tmp_path, monkeypatch):
    out = tmp_path / "f.safetensors"
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        patch.setattr(runner, "environment", lambda device: environment_of(device) | {"torch": "2.0"})
        with pytest.raises(KeyboardInterrupt):
            run(world, out, save_every=0.0)
    with pytest.warns(RuntimeWarning, match=r"begun in another environment \(torch 2\.0 -> .*by rounding"):
        run(world, out)


# Killed for good

# A run that kills itself at a chosen moment, or that has memory for so many padded tokens only.
SCRIPT = """
import json, os, signal, sys
import torch
from fastforget.fisher.estimator import DiagonalFisher
from fastforget.fisher_run import Options, run_fisher

settings = json.loads(sys.argv[1])
moment, cells = settings.pop("die", {}), settings.pop("memory", None)

def dies_at(name, owner, attribute, counts=lambda *args: True):
    real, calls = getattr(owner, attribute), []
    def counted(*args, **kwargs):
        calls.extend([1] * counts(*args))
        if len(calls) == moment.get(name):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    setattr(owner, attribute, counted)

if cells:
    real_update = DiagonalFisher.update
    def update(self, input_ids, *args, **kwargs):
        result = real_update(self, input_ids, *args, **kwargs)
        if input_ids.numel() > cells:
            raise torch.OutOfMemoryError("out of memory")
        return result
    DiagonalFisher.update = update

dies_at("before batch", DiagonalFisher, "update")
dies_at("before rename", os, "replace", lambda source, target: ".safetensors" in str(target))
dies_at("before unlink", os, "unlink", lambda path, *_: str(path).endswith(".partial"))
run_fisher(Options(**settings, progress=False))
"""
needs_sigkill = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


def environment(tmp_path):
    # One thread: the models are tiny, and the bits of a sum depend on the number of threads.
    return os.environ | {"OMP_NUM_THREADS": "1", "FASTFORGET_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}


def script(world, out, **changes):
    given = {"model": str(world / "base"), "data": str(world / "data.jsonl"), "out": str(out)}
    settings = given | {"tokens_per_batch": BATCH, "save_every": 0.0} | changes
    command = [sys.executable, "-c", SCRIPT, json.dumps(settings)]
    return subprocess.run(command, env=environment(out.parent), capture_output=True, text=True, timeout=300)


def position(out) -> int:
    return read_metadata(out.with_name(out.name + ".partial"), kind=PARTIAL_KIND)["state"]["position"]


@needs_sigkill
@pytest.mark.slow
def test_a_killed_run_continues_to_the_same_bytes(world, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "f.safetensors"
    finished = script(world, whole)
    assert finished.returncode == 0, finished.stderr

    def killed(**settings):
        ended = script(world, out, **settings)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        assert not out.exists() or "before unlink" in settings["die"]

    # In the middle of a batch, after three that are saved.
    killed(die={"before batch": 4})
    first = position(out)
    assert 0 < first < 60
    # Between writing the state and giving it its name: the state before it holds.
    killed(die={"before rename": 2})
    second = position(out)
    assert first < second
    assert len(list(tmp_path.glob(".tmp-*"))) == 1
    # Before any batch, and without a write: nothing is gained or lost.
    killed(die={"before batch": 1})
    assert position(out) == second
    killed(die={"before batch": 3}, save_every=1e9)
    assert position(out) == second
    # At any moment, by the real command.
    command = [sys.executable, "-m", "fastforget", "fisher", "--model", world / "base", "--data", world / "data.jsonl"]
    command += ["--out", out, "--tokens-per-batch", BATCH, "--save-every", 0, "--no-progress"]
    process = subprocess.Popen([str(part) for part in command], env=environment(tmp_path))
    deadline = time.monotonic() + 240
    while position(out) == second and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.wait()
    if process.returncode == -signal.SIGKILL and not out.exists():
        assert position(out) > second
    # Between the result and the removal of the state.
    if not out.exists():
        killed(die={"before unlink": 1})
        assert out.exists()
    last = subprocess.run([str(part) for part in command], env=environment(tmp_path), capture_output=True, text=True)
    assert last.returncode == 0, last.stderr
    assert "nothing to do" in last.stderr
    assert out.read_bytes() == whole.read_bytes()
    assert {path.name for path in tmp_path.glob("*f.safetensors*")} == {"f.safetensors"}


@needs_sigkill
@pytest.mark.slow
def test_a_run_killed_after_running_out_of_memory_continues_to_the_same_bytes(world, tmp_path):
    whole, out = tmp_path / "whole.safetensors", tmp_path / "f.safetensors"
    small = {"memory": 400, "save_every": 1e9}
    finished = script(world, whole, **small)
    assert finished.returncode == 0, finished.stderr
    assert "the run goes on with 300" in finished.stderr
    # Killed right after the halved budget is on the disk; continued where memory is plenty: the budget holds.
    assert script(world, out, **small, die={"before batch": 2}).returncode == -signal.SIGKILL
    assert position(out) == 0
    finished = script(world, out)
    assert finished.returncode == 0, finished.stderr
    assert out.read_bytes() == whole.read_bytes()


@needs_sigkill
@pytest.mark.slow
def test_a_second_run_on_the_same_file_is_refused(world, tmp_path):
    out = tmp_path / "f.safetensors"
    given = {"model": str(world / "base"), "data": str(world / "data.jsonl"), "out": str(out), "save_every": 0.0}
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, json.dumps(given | {"tokens_per_batch": 100})],
        env=environment(tmp_path),
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "f.safetensors.partial").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.001)
    process.send_signal(signal.SIGSTOP)
    try:
        second = script(world, out, tokens_per_batch=100)
    finally:
        process.send_signal(signal.SIGCONT)
    assert second.returncode == 1
    assert "in use by another run; wait for it or choose another file" in second.stderr
    _, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert os.listdir(tmp_path / "cache")
    assert not (tmp_path / "f.safetensors.lock").exists()
