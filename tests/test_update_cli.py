"""`fastforget merge` and `fastforget dampen`: what they write, what they say, and what they refuse."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import save_base, save_tuned, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastforget as ff
from fastforget import cli
from fastforget.fisher.files import save_fisher
from fastforget.update.changes import Changes


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base")
    save_tuned(base, folder / "tuned")
    model = AutoModelForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(0)
    for name, skip in (("one", ()), ("two", ()), ("few", ("model.norm.weight",))):
        fisher = {
            n: torch.rand(p.shape, generator=generator) ** 4 for n, p in model.named_parameters() if n not in skip
        }
        save_fisher(folder / f"{name}.safetensors", fisher, {})
    return folder


@pytest.fixture
def run(world, tmp_path, monkeypatch, capsys):
    """The exit code and the output of a command that runs in the world's folder."""

    def run_main(*arguments):
        monkeypatch.chdir(world)
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["fastforget", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        return ended.value.code or 0, printed.out, printed.err

    return run_main


def rows(output):
    """The cells of every row of every table, by the first cell."""
    lines = [[cell.strip() for cell in line.strip("│┃").split("│")] for line in output.splitlines() if "│" in line]
    return {line[0]: line[1:] for line in lines}


MERGE = ["merge", "base", "tuned", "--fisher", "one.safetensors", "--fisher", "two.safetensors"]
DAMPEN = ["dampen", "base", "--forget", "one.safetensors", "--retain", "two.safetensors"]


def test_merge_writes_what_the_function_returns(run, tmp_path, world):
    out = tmp_path / "out"
    code, said, progress = run(
        *MERGE, "--weight", 1, "--weight", 3, "--floor", 0.1, "--out", out, "--max-shard-size", "50KB"
    )
    assert code == 0
    assert "merging" in progress
    assert said.splitlines()[-1] == f"wrote {out}"
    paths = [world / "one.safetensors", world / "two.safetensors"]
    expected = ff.fisher_merge([world / "base", world / "tuned"], paths, [1.0, 3.0], floor=0.1)
    model = AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(value, model.get_parameter(name)) for name, value in expected.items())
    assert AutoTokenizer.from_pretrained(out)("a").input_ids == tiny_tokenizer()("a").input_ids
    assert (out / "model.safetensors.index.json").is_file()
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    entries = sum(p.numel() for p in base.parameters())
    changed = sum(int((value != base.get_parameter(name)).sum()) for name, value in expected.items())
    assert rows(said)["all"] == [f"{entries:,}", f"{changed:,}", f"{changed / entries:.2%}"]


def test_dry_runs_count_and_write_nothing(run, tmp_path, world):
    before = sorted(os.listdir(world))
    code, said, progress = run(*DAMPEN, "--dry-run", "--no-progress", "--alpha", 5, "--out", tmp_path / "out")
    assert (code, progress) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    counts = ff.selective_dampening_(model, forget=world / "one.safetensors", retain=world / "two.safetensors", alpha=5)
    table = rows(said)
    for cell, part in (
        ("layer 0", ".layers.0."),
        ("layer 1", ".layers.1."),
        ("embedding", "embed"),
        ("q", "q_proj"),
        ("all", ""),
    ):
        expected = sum(count for name, count in counts.items() if part in name)
        assert table[cell][1] == f"{expected:,}" != "0"
    assert said.splitlines()[-1] == "nothing was written"
    few = ["--fisher", "few.safetensors"] * 2
    code, said, _ = run("merge", "base", "tuned", *few, "--dry-run", "--out", tmp_path / "out")
    assert code == 0
    assert "1 tensors have no Fisher and are the weighted mean, first model.norm.weight" in said
    assert said.splitlines()[-1] == "nothing was written"
    assert sorted(os.listdir(world)) == before
    assert not list(tmp_path.iterdir())


def test_dampen_writes_what_the_function_does(run, tmp_path, world):
    code, said, progress = run(*DAMPEN, "--lam", 0.5, "--out", tmp_path / "out")
    assert code == 0
    assert "dampening" in progress
    assert said.splitlines()[-1] == f"wrote {tmp_path / 'out'}"
    expected = AutoModelForCausalLM.from_pretrained(world / "base")
    ff.selective_dampening_(expected, forget=world / "one.safetensors", retain=world / "two.safetensors", lam=0.5)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(p, model.get_parameter(name)) for name, p in expected.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (MERGE, "out: expected --out, got none; or pass --dry-run"),
        (DAMPEN, "out: expected --out, got none; or pass --dry-run"),
        ([*MERGE, "--out", "base"], "out: expected a new or empty folder"),
        ([*DAMPEN, "--out", "base"], "out: expected a new or empty folder"),
        ([*DAMPEN, "--out", "new", "--alpha", "-1"], "alpha: expected a finite number"),
        (
            [*MERGE, "--out", "new", "--weight", "1"],
            "--weight: expected 2, one for each of ",
        ),
        ([*MERGE[:-2], "--out", "new"], "got 1; repeat the option"),
        (["merge", "base", *MERGE[3:], "--out", "new"], "models: expected at least two, got 1"),
        (["merge", "base", "./gone", *MERGE[3:], "--out", "new"], "models[1]: expected a checkpoint's folder"),
        (["dampen", "base", "--forget", "x", *DAMPEN[4:], "--out", "new"], "forget: path: expected an existing file"),
        ([*DAMPEN[:-1], "few.safetensors", "--out", "new"], "retain: expected the names of forget, got none for"),
        (
            [*MERGE, "--out", "new", "--max-shard-size", "big"],
            "max_shard_size: expected bytes or such as 5GB, got 'big'",
        ),
    ],
)
def test_wrong_input_ends_in_one_line_and_exit_code_2(run, arguments, message, world):
    before = sorted(os.listdir(world))
    code, said, errors = run(*arguments)
    assert code == 2
    assert said == ""
    assert errors.startswith("fastforget: error: ")
    assert message in errors
    assert errors.count("\n") == 1
    assert sorted(os.listdir(world)) == before


def test_tables_know_layers_kinds_and_empty_models():
    changes = Changes(
        {"model.layers.10.mlp.up_proj.weight": 5, "lm_head.weight": 1},
        {"model.layers.10.mlp.up_proj.weight": 20, "lm_head.weight": 3},
    )
    layers, kinds = changes.tables("x")
    assert list(layers.columns[0].cells) == ["layer 10", "head", "all"]
    assert list(kinds.columns[3].cells) == ["25.00%", "33.33%", "26.09%"]
    assert list(Changes().tables("x")[0].columns[3].cells) == ["-"]


def test_a_stopped_run_leaves_nothing(run, world, tmp_path, monkeypatch):
    from fastforget.update import dampening

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(dampening, "dampen_", lambda params, *_, **__: stop() if params else None)
    code, _, _ = run(*DAMPEN, "--out", tmp_path / "out")
    assert code in (1, 130)
    assert not list(Path(tmp_path).iterdir())
