"""The demo, small but whole: real text, real training, a matrix, a report, and a stop in the middle."""

import json
import re
import shlex

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import fastforget.demo as demo
from fastforget import ForgettingMatrix
from fastforget.cli import app
from fastforget.demo import training
from fastforget.demo.text import Document, library_files, sample, split_examples, unicode_records


def snapshot(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def stopped_and_continued(tmp_path_factory):
    """A demo that was stopped in its third fine-tuning and then continued: its folder, and its files at the stop."""
    out = tmp_path_factory.mktemp("demo") / "out"
    calls = []

    def stops(*arguments, **settings):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return fine_tune(*arguments, **settings)

    fine_tune = training.fine_tune
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # so small a model gains nothing from more, and loses much where the cores are busy
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fine_tune", stops)
        with pytest.raises(KeyboardInterrupt):
            demo.run(out, device="cpu", quick=True)
    before = snapshot(out)
    assert demo.run(out, device="cpu", quick=True) == out / "report.md"
    torch.set_num_threads(threads)
    return out, before


def test_a_stopped_demo_keeps_what_was_finished(stopped_and_continued):
    out, before = stopped_and_continued
    after = snapshot(out)
    kept = [path for path in before if path.name != "seconds.json"]
    assert {path.relative_to(out).parts[1] for path in kept if "tasks" in path.parts} >= {"email", "licences"}
    assert out / "base/model.safetensors" in kept
    assert [path for path in kept if after[path] != before[path]] == []
    assert [path.name for path in out.rglob(".tmp-*")] == []
    assert len(json.loads((out / "seconds.json").read_text())) == 4 + demo.MIN_TASKS + 1


def test_models_have_learned(stopped_and_continued):
    out, _ = stopped_and_continued
    base = json.loads((out / "base/training.json").read_text())
    assert base["loss_after"] < base["losses"][0] - 1
    kinds = set()
    for folder in (out / "tasks").iterdir():
        record = json.loads((folder / "training.json").read_text())
        assert record["loss_after"] < record["loss_before"], folder
        kinds.add((folder / "adapter_config.json").exists())
        assert (folder / "adapter_config.json").exists() != (folder / "model.safetensors").exists()
    assert kinds == {True, False}


def test_the_matrix_is_the_change_of_log_perplexity(stopped_and_continued):
    out, _ = stopped_and_continued
    matrix = ForgettingMatrix.load(out / "matrix")
    assert matrix.complete
    assert matrix.values.shape == (demo.MIN_TASKS, demo.QUICK.examples)
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    rows = [json.loads(line) for line in (out / "upstream.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["id"] for row in rows] == matrix.examples

    def log_perplexity(model, j):
        ids = torch.tensor([tokenizer(rows[j]["text"])["input_ids"]])
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    for name in ("email", "licences"):  # an adapter and a full checkpoint
        base = AutoModelForCausalLM.from_pretrained(out / "base").eval()
        expected = [log_perplexity(base, j) for j in (0, 60, 119)]
        if (out / "tasks" / name / "adapter_config.json").exists():
            model = PeftModel.from_pretrained(base, out / "tasks" / name).eval()
        else:
            model = AutoModelForCausalLM.from_pretrained(out / "tasks" / name).eval()
        for j, before in zip((0, 60, 119), expected, strict=True):
            assert matrix.values[matrix.tasks.index(name), j] == pytest.approx(
                log_perplexity(model, j) - before, abs=1e-5
            )


def test_the_report_says_what_was_measured(stopped_and_continued):
    out, _ = stopped_and_continued
    matrix = ForgettingMatrix.load(out / "matrix")
    report = (out / "report.md").read_text(encoding="utf-8")
    for name, value in [
        ("additive", matrix.additive_r2()),
        *((f"rank {r}", matrix.low_rank_r2(r)) for r in range(1, 6)),
    ]:
        assert f"| {name} | {value:.3f} |" in report
    mean = matrix.values.mean()
    assert f"{'rose' if mean > 0 else 'fell'} by {abs(mean):.3f} nats per token" in report
    order = matrix.values.mean(0).argsort()
    for j in (order[0], order[-1]):
        assert f"**{matrix.examples[j]}, mean {matrix.values[:, j].mean():+.3f}" in report
        assert matrix.texts[j] in report
    assert f"rms {matrix.noise['batch_composition']['rms']:.1e}" in report
    assert (out / "heatmap.png").read_bytes().startswith(b"\x89PNG")


def test_the_reports_command_continues_the_matrix(stopped_and_continued):
    out, _ = stopped_and_continued
    report = (out / "report.md").read_text(encoding="utf-8")
    words = shlex.split(re.search(r"```bash\n(.*?)```", report, re.DOTALL)[1].replace("\\\n", ""))
    units = snapshot(out / "matrix/units")
    result = CliRunner().invoke(app, words[1:])
    assert result.exit_code == 0, result.output
    assert snapshot(out / "matrix/units") == units


def test_a_demo_with_other_settings_is_refused(stopped_and_continued):
    out, _ = stopped_and_continued
    before = snapshot(out)
    with pytest.raises(ValueError, match=r"out: .*seed 0 there, 7 here"):
        demo.run(out, device="cpu", seed=7, quick=True)
    with pytest.raises(ValueError, match="hidden 64 there, 256 here"):
        demo.run(out, device="cpu")
    assert snapshot(out) == before


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not touch")
    with pytest.raises(ValueError, match="out: expected a new folder"):
        demo.run(tmp_path, device="cpu", quick=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_machine_without_text_is_refused(tmp_path, monkeypatch):
    def missing():
        raise ModuleNotFoundError("no such module")

    domain = demo.TASKS[0]
    broken = demo.Domain(domain.name, domain.about, missing, domain.kind)
    monkeypatch.setattr(demo, "TASKS", (broken, *demo.TASKS[1:8]))
    with pytest.raises(ValueError, match="text: expected 8 kinds of text for tasks, got 7"):
        demo.run(tmp_path / "out", device="cpu", quick=True)
    assert not (tmp_path / "out/text").exists()


def test_examples_are_where_they_say():
    documents = library_files("textwrap.py", "string.py")
    lines = {document.source: document.text.split("\n") for document in documents}
    examples = split_examples(documents, seed=0)
    assert len(examples) > 20
    for place, text in examples:
        source, line = place.split(":")
        start = int(line) - 1
        assert "\n".join(lines[source][start : start + text.count("\n") + 1]).rstrip() == text
        assert 100 <= len(text) <= 600
    assert len({place for place, _ in examples}) == len(examples)


def test_text_is_sampled_whole_and_the_same_each_time():
    documents = [Document(str(i), f"{i}\n" * 1000) for i in range(10)]
    chosen = sample(documents, 4_100, seed=3)
    assert chosen == sample(reversed(documents), 4_100, seed=3)
    assert chosen != sample(documents, 4_100, seed=4)
    assert [len(document.text) for document in chosen] == [2000, 2000, 100]
    assert json.loads(unicode_records()[0].text.splitlines()[9])["name"] == "COPYRIGHT SIGN"
