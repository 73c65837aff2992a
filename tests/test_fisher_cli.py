"""`fastforget fisher`: what it computes, what it says, and what it refuses."""

import os
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
import torch
from fisher_runs import BATCH, looped, relative, rows_of, run, save_fisher_world, write
from matplotlib.image import imread
from tiny_models import save_adapter, save_base, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastforget import cli
from fastforget.fisher.estimator import DiagonalFisher
from fastforget.fisher.files import combine_fishers, load_fisher
from fastforget.fisher_run import runner
from fastforget.fisher_run.options import Options


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return save_fisher_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(autouse=True)
def token_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))


def run_main(monkeypatch, *arguments) -> int:
    monkeypatch.setattr(sys, "argv", ["fastforget", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


# What it computes


def test_the_file_holds_the_exact_fisher_and_its_record(world, tmp_path):
    out = tmp_path / "new" / "f.safetensors"
    fisher = run(world, out)
    expected = looped(world, world / "data.jsonl")
    assert fisher.keys() == expected.keys()
    for name, value in expected.items():
        assert relative(fisher[name], value) < 1e-5, name
    about = fisher.metadata
    assert about["examples"] == about["weight_sum"] == 60
    for name, value in {"per": "example", "labels": "data", "loss": "mean", "model_type": "llama"}.items():
        assert about[name] == value
    assert about["model"] == str(world / "base")
    assert about["failed"] == []
    assert about["run"]["settings"]["tokens_per_batch"] == BATCH
    assert os.listdir(out.parent) == ["f.safetensors"]
    load_fisher(out, AutoModelForCausalLM.from_pretrained(world / "base"))


def test_patterns_choose_parameters(world, tmp_path):
    fisher = run(world, tmp_path / "f.safetensors", parameters=["*.mlp.up_proj.weight", "model.norm.weight"])
    assert set(fisher) == {"model.norm.weight", *(f"model.layers.{i}.mlp.up_proj.weight" for i in range(2))}
    assert relative(fisher["model.norm.weight"], looped(world, world / "data.jsonl")["model.norm.weight"]) < 1e-5
    assert fisher.metadata["parameters"] == ["*.mlp.up_proj.weight", "model.norm.weight"]
    load_fisher(tmp_path / "f.safetensors", AutoModelForCausalLM.from_pretrained(world / "base"))
    for wrong, meant in (("up_proj", r"'\*up_proj\*'\?"), ("*.model.norm.weight", "'model.norm.weight'")):
        with pytest.raises(
            ValueError, match=rf"parameters: .* matches none of 21 names such as .*; did you mean {meant}"
        ):
            run(world, tmp_path / "g.safetensors", parameters=["*.mlp.*", wrong])


def test_limit_uses_the_first_examples(world, tmp_path):
    fisher = run(world, tmp_path / "f.safetensors", limit=5)
    few = write(tmp_path / "few.jsonl", rows_of(world / "data.jsonl")[:5])
    expected = looped(world, few)
    assert fisher.metadata["examples"] == 5
    assert relative(fisher["lm_head.weight"], expected["lm_head.weight"]) < 1e-5


def test_an_adapters_fisher_is_that_of_its_parameters(world, tmp_path):
    from peft import PeftModel

    fisher = run(world, tmp_path / "f.safetensors", adapter=world / "lora", limit=7)
    assert len(fisher) == 8
    assert all(".lora_" in name for name in fisher)
    assert fisher.metadata["adapter"] == str(world / "lora")
    base = AutoModelForCausalLM.from_pretrained(world / "base")
    tuned = PeftModel.from_pretrained(base, str(world / "lora"), is_trainable=True)
    load_fisher(tmp_path / "f.safetensors", tuned)
    # The same from the estimator itself, one example at a time.
    rows = [row["text"] for row in rows_of(world / "data.jsonl")[:7]]
    estimator = DiagonalFisher(tuned)
    for row in rows:
        estimator.update(torch.tensor([tiny_tokenizer()(row)["input_ids"]]))
    for name, value in estimator.diagonal().items():
        assert relative(fisher[name], value.double()) < 1e-5, name


@pytest.mark.parametrize(
    "settings",
    [
        {"labels": "sampled", "samples": 2, "seed": 3},
        {"loss": "sum"},
        {"per": "position"},
        {"per": "batch_mean", "batch_size": 3},
    ],
)
def test_conventions_are_passed_on_and_recorded(world, tmp_path, settings):
    fisher = run(world, tmp_path / "f.safetensors", limit=6, **settings)
    assert {name: fisher.metadata[name] for name in settings} == settings
    plain = run(world, tmp_path / "g.safetensors", limit=6)
    assert relative(fisher["lm_head.weight"], plain["lm_head.weight"].double()) > 1e-3


def test_the_batches_of_batch_mean_are_those_of_the_data(world, tmp_path):
    """Consecutive examples, so that neither lengths nor memory decide; equal parts combine to the whole."""
    chosen = {"per": "batch_mean", "batch_size": 3, "parameters": ["lm_head.weight"]}
    rows = rows_of(world / "data.jsonl")[36:43]  # of very different lengths; the last batch is smaller
    fisher = run(world, tmp_path / "f.safetensors", data=write(tmp_path / "data.jsonl", rows), **chosen)
    batches = [rows[:3], rows[3:6], rows[6:]]
    squares = [batch_gradient(world, batch).square() for batch in batches]
    assert relative(fisher["lm_head.weight"], torch.stack(squares).mean(0)) < 1e-5
    assert (fisher.metadata["examples"], fisher.metadata["weight_sum"]) == (7, 3)
    parts = [
        run(world, tmp_path / f"{i}.safetensors", data=write(tmp_path / f"{i}.jsonl", part), **chosen)
        for i, part in enumerate((rows[:3], rows[3:]))
    ]
    assert relative(combine_fishers(parts)["lm_head.weight"], fisher["lm_head.weight"].double()) < 1e-6
    with pytest.raises(ValueError, match=r"settings batch_size: 3 there, 2 here"):
        run(world, tmp_path / "f.safetensors", data=tmp_path / "data.jsonl", **(chosen | {"batch_size": 2}))
    other = run(world, tmp_path / "2.safetensors", data=tmp_path / "0.jsonl", **(chosen | {"batch_size": 2}))
    with pytest.raises(ValueError, match="fishers: expected batch_size = 3 as in the first, got 2 in number 2"):
        combine_fishers([fisher, other])


def batch_gradient(world, rows):
    """The gradient of the head's weight: of the mean over the rows of each row's own loss, in float64."""
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float64).eval()
    for row in rows:
        ids, first = tiny_tokenizer()(row.get("text") or row["prompt"])["input_ids"], 1
        if "response" in row:
            first = len(ids)
            ids += tiny_tokenizer()(row["response"], add_special_tokens=False)["input_ids"]
        labels = torch.tensor([[-100] * first + ids[first:]])
        (model(torch.tensor([ids]), labels=labels).loss / len(rows)).backward()
    return model.lm_head.weight.grad


@pytest.fixture
def poisoned(world, tmp_path):
    """The model with an embedding that is NaN, so that rows with that token have no finite loss."""
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    (token,) = tiny_tokenizer()("<|user|>", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("nan")
    model.save_pretrained(tmp_path / "poisoned")
    tiny_tokenizer().save_pretrained(tmp_path / "poisoned")
    return tmp_path / "poisoned"


def test_rows_without_a_finite_loss_are_left_out_and_listed(world, poisoned, tmp_path):
    clean = rows_of(world / "data.jsonl")
    rows = [*clean[:7], {"text": "a <|user|> b", "id": "bad"}, *clean[7:], {"text": "<|user|> of it"}]
    data = write(tmp_path / "data.jsonl", rows)
    fisher = run(world, tmp_path / "f.safetensors", model=poisoned, data=data)
    assert fisher.metadata["examples"] == len(clean)
    failed = fisher.metadata["failed"]
    assert {row["where"] for row in failed} == {"data.jsonl line 8", f"data.jsonl line {len(rows)}"}
    assert "bad" in {row["id"] for row in failed}
    expected = looped(world, world / "data.jsonl")
    assert all(relative(fisher[name], value) < 1e-5 for name, value in expected.items())


def test_a_row_without_a_finite_loss_in_the_first_batch_is_left_out_and_listed(world, poisoned, tmp_path):
    clean = rows_of(world / "data.jsonl")
    data = write(tmp_path / "data.jsonl", [*clean, {"text": "<|user|>" + "of it " * 60}])
    fisher = run(world, tmp_path / "f.safetensors", model=poisoned, data=data)
    assert [row["where"] for row in fisher.metadata["failed"]] == [f"data.jsonl line {len(clean) + 1}"]
    assert fisher.metadata["examples"] == len(clean)


def test_data_without_a_finite_loss_is_refused(world, tmp_path, monkeypatch):
    def update(self, *batch, example_ids):
        raise runner.NonFiniteError("loss", example_ids)

    monkeypatch.setattr(DiagonalFisher, "update", update)
    with pytest.raises(ValueError, match="data: expected an example with a finite loss, got none"):
        run(world, tmp_path / "f.safetensors")
    assert not (tmp_path / "f.safetensors").exists()


def test_an_error_about_rows_that_are_not_in_the_batch_is_not_swallowed(world, tmp_path, monkeypatch):
    def update(self, *batch, example_ids):
        raise runner.NonFiniteError("loss of others", [10**6])

    monkeypatch.setattr(DiagonalFisher, "update", update)
    with pytest.raises(runner.NonFiniteError, match="loss of others"):
        run(world, tmp_path / "f.safetensors")


def test_rows_whose_gradient_alone_is_not_finite_are_left_out_and_listed(world, tmp_path, monkeypatch):
    # The error comes after the sums have taken the batch up, so that they are no longer of use.
    clean = run(world, tmp_path / "clean.safetensors", save_every=0.0)
    few = rows_of(world / "data.jsonl")
    lengths = [len(tiny_tokenizer()(row.get("text", ""))["input_ids"]) for row in few]
    bad = lengths.index(sorted(lengths)[30])  # in a batch in the middle of the run
    real = DiagonalFisher.update
    tried = []

    def update(self, input_ids, mask, labels, *, example_ids):
        result = real(self, input_ids, mask, labels, example_ids=example_ids)
        tried.append(list(example_ids))
        if bad in example_ids:
            self._invalid = "a gradient is not finite"
            raise runner.NonFiniteError("gradient", [bad])
        return result

    monkeypatch.setattr(DiagonalFisher, "update", update)
    for name, every in (("saved", 0.0), ("unsaved", 1e9)):
        tried.clear()
        fisher = run(world, tmp_path / f"{name}.safetensors", save_every=every)
        assert [row["where"] for row in fisher.metadata["failed"]] == [f"data.jsonl line {bad + 1}"]
        assert fisher.metadata["examples"] == 59
        restarted = [ids for ids in tried if ids == tried[0]]
        assert len(restarted) == (1 if every == 0.0 else 2)
    saved, unsaved = (load_fisher(tmp_path / f"{name}.safetensors") for name in ("saved", "unsaved"))
    assert all(torch.equal(saved[name], unsaved[name]) for name in clean)
    monkeypatch.undo()
    rest = write(tmp_path / "rest.jsonl", few[:bad] + few[bad + 1 :])
    monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))
    expected = looped(world, rest)
    assert all(relative(saved[name], value) < 1e-5 for name, value in expected.items())


# Bad input


def test_bad_input_is_refused_before_anything_is_written(world, tmp_path, monkeypatch):
    out = tmp_path / "new" / "f.safetensors"

    def refused(message, error=ValueError, **settings):
        with pytest.raises(error, match=message):
            run(world, **({"out": out} | settings))
        assert not out.parent.exists()

    refused(r"out: expected a file ending in \.safetensors, got .*f\.pt", out=tmp_path / "new" / "f.pt")
    refused("max_length: expected 2 tokens or more, got 1", max_length=1)
    refused("max_length: expected at most 256, the model's limit, got 999", max_length=999)
    refused("tokens_per_batch: expected 1 tokens or more, got 0", tokens_per_batch=0)
    refused("limit: expected 1 examples or more, got 0", limit=0)
    refused("limit: expected 1 examples or more, got 2.5", limit=2.5)
    refused("device: expected a device of this machine, got nowhere", device="nowhere")
    refused("dtype: expected one of float32, bfloat16, float16, float64, got int8", dtype="int8")
    refused(r"^model: expected a folder or a hub id, got \./gone, which does not exist", model="./gone")
    refused("^model: expected a full checkpoint, got the PEFT adapter .* pass it by .*--adapter", model=world / "lora")
    refused(r"^adapter: expected a folder or a hub id, got \./gone", adapter="./gone")
    refused("^adapter: expected a PEFT adapter, got the full checkpoint", adapter=world / "base")
    refused(r"^data: expected an existing file, got absent\.jsonl", data="absent.jsonl")
    data = write(tmp_path / "bad.jsonl", [{"text": "a"}, {"words": "b"}])
    refused("^data: bad.jsonl line 2: expected text, or prompt and response, or messages, got none", data=data)
    data = write(tmp_path / "empty.jsonl", [{"text": "a b c"}, {"prompt": "a", "response": ""}])
    refused("^data: expected a target token in every row, got 1 rows without one", data=data)
    refused("^per: expected .*'example'.*, got 'row'", per="row")
    refused("^batch_size: expected the number of examples in a batch .*--batch-size", per="batch_mean")
    refused("^batch_size: expected none with per='position', .* got 3", per="position", batch_size=3)
    refused("^batch_size: expected 1 examples or more, got 0", per="batch_mean", batch_size=0)
    both = {"per": "batch_mean", "batch_size": 3, "tokens_per_batch": 99}
    refused("^tokens_per_batch: expected none with per='batch_mean', .* got 99", **both)
    refused("^labels: expected .*'data'.*, got 'mine'", labels="mine")
    refused("^loss: expected .*'mean'.*, got 'median'", loss="median")
    refused("^samples: expected ", samples=0)
    other = save_base(tmp_path / "other", hidden_size=16)
    save_adapter(other, tmp_path / "lora")
    refused("^adapter: expected an adapter for ", adapter=tmp_path / "lora")
    refused("^adapter: expected a base with a module for ", adapter=tmp_path / "lora", check_adapter_base=False)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    refused("^out: expected .* MB of free space in ", limit=3)


def test_foreign_files_are_refused_and_kept(world, tmp_path):
    out = tmp_path / "f.safetensors"
    out.write_bytes(b"something of the user's, and long enough")
    with pytest.raises(ValueError, match="out: expected a safetensors file, got "):
        run(world, out)
    from fastforget.fisher.files import save_fisher

    save_fisher(out, {"a": torch.ones(1)}, {})
    with pytest.raises(ValueError, match="out: expected no file or one of this command, got "):
        run(world, out)
    assert load_fisher(out).keys() == {"a"}


def test_empty_rows_are_left_out_when_asked_for(world, tmp_path):
    data = write(tmp_path / "data.jsonl", [{"text": "the import statement"}, {"prompt": "a", "response": ""}])
    fisher = run(world, tmp_path / "f.safetensors", data=data, skip_empty=True)
    assert (fisher.metadata["examples"], fisher.metadata["skipped"]) == (1, 1)


# The command


@pytest.fixture
def recorded(monkeypatch):
    calls = []

    def record(options):
        calls.append(vars(options))
        return load_fisher.__globals__["Fisher"]({"a": torch.ones(2)}, {"truncated": 3})

    monkeypatch.setattr(runner, "run_fisher", record)
    return calls


FISHER = ["fisher", "--model", "m", "--data", "d.jsonl", "--out", "o.safetensors"]


def test_the_command_passes_every_option_on(recorded, monkeypatch, capsys):
    options = ["--adapter", "a", "--per", "position", "--labels", "sampled", "--loss", "sum", "--samples", "2"]
    options += ["--seed", "7", "--parameters", "*.mlp.*", "--parameters", "x", "--limit", "9", "--max-length", "64"]
    options += ["--tokens-per-batch", "128", "--dtype", "bfloat16", "--device", "cpu", "--offload", "--eos"]
    options += ["--skip-empty", "--split", "test", "--config", "en", "--no-check-adapter-base", "--save-every", "5"]
    assert run_main(monkeypatch, *FISHER, *options, "--no-progress") == 0
    assert recorded == [
        {
            "model": "m", "data": "d.jsonl", "out": Path("o.safetensors"), "adapter": "a", "per": "position",
            "batch_size": None, "labels": "sampled", "loss": "sum", "samples": 2, "seed": 7,
            "parameters": ["*.mlp.*", "x"], "limit": 9, "max_length": 64, "tokens_per_batch": 128,
            "dtype": "bfloat16", "device": "cpu", "offload": True, "eos": True, "skip_empty": True, "split": "test",
            "config": "en", "check_adapter_base": False, "save_every": 5.0, "progress": False,
        }
    ]  # fmt: skip
    output = capsys.readouterr().out
    assert "o.safetensors: Fisher(1 tensors, 2 parameters)" in output
    assert "3 examples of the data were truncated" in output
    assert run_main(monkeypatch, *FISHER, "--per", "batch_mean", "--batch-size", "4") == 0
    assert (recorded[1]["per"], recorded[1]["batch_size"]) == ("batch_mean", 4)


def test_the_defaults_are_those_of_the_function(recorded, monkeypatch):
    assert run_main(monkeypatch, *FISHER) == 0
    defaults = {field.name: field.default for field in fields(Options) if field.default is not MISSING}
    assert set(defaults) == set(recorded[0]) - {"model", "data", "out"}
    assert {name: recorded[0][name] or None for name in defaults} == {n: v or None for n, v in defaults.items()}


def test_an_interrupted_command_says_how_to_continue(monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_fisher", interrupt)
    assert run_main(monkeypatch, *FISHER) == 130
    assert "same command" in capsys.readouterr().err


def test_the_command_computes_and_summarises(world, tmp_path, monkeypatch, capsys):
    out = tmp_path / "f.safetensors"
    command = ["fisher", "--model", world / "base", "--data", world / "data.jsonl", "--out", out, "--limit", 6]
    assert run_main(monkeypatch, *command, "--no-progress", "--summary") == 0
    captured = capsys.readouterr()
    for part in ("6 examples", "layer 1", "mlp down", "share of mass", f"wrote {out.with_suffix('.png')}"):
        assert part in captured.out
    picture = imread(out.with_suffix(".png"))
    assert picture[..., :3].std() > 0.1
    out.with_suffix(".png").unlink()
    assert run_main(monkeypatch, "fisher", "--out", out, "--summary") == 0
    assert capsys.readouterr().out.replace(str(out), "") in captured.out.replace(str(out), "")
    assert (imread(out.with_suffix(".png")) == picture).all()


def test_what_the_command_lacks_is_named(tmp_path, monkeypatch, capsys):
    out = tmp_path / "f.safetensors"
    for arguments, message in (
        ((), "model: expected --model, got none; or pass --summary alone for an existing file"),
        (("--model", "m"), "data: expected --data, got none"),
        (("--data", "d", "--summary"), "model: expected --model, got none"),
        (("--summary",), f"path: expected an existing file, got {out}"),
    ):
        assert run_main(monkeypatch, "fisher", "--out", out, *arguments) == 2
        assert f"fastforget: error: {message}" in capsys.readouterr().err
    assert run_main(monkeypatch, "fisher") == 2
    assert "--out" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
