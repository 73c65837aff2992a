"""`ForgettingMatrix.from_lm_eval`: samples as lm-evaluation-harness writes them, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastforget as ff

CHOICES = (" red", " green", " blue", " grün")


def choice(doc: int, losses: list[float], gold: int, **changes: Any) -> dict[str, Any]:
    """A sample of a multiple-choice evaluation: strings, as `save_results_samples` writes them."""
    right = float(np.argmin(losses)) == gold
    return {
        "doc_id": doc,
        "doc": {"question": f"colour {doc}?"},
        "target": str(gold),
        "arguments": {f"gen_args_{k}": {"arg_0": f"Q{doc}:", "arg_1": CHOICES[k]} for k in range(len(losses))},
        "resps": [[[str(-loss), "False"]] for loss in losses],
        "filtered_resps": [[str(-loss), "False"] for loss in losses],
        "filter": "none",
        "metrics": ["acc"],
        "doc_hash": f"d{doc}",
        "prompt_hash": f"p{doc}",
        "target_hash": f"t{doc}",
        "acc": float(right),
    } | changes


def write(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples), encoding="utf-8")
    return path


NAME = "samples_colours_2026-01-02T03-04-05.678901.jsonl"
BASE = [choice(0, [1.0, 2.0, 3.0], 0), choice(1, [2.0, 1.0, 4.0, 3.0], 3), choice(2, [5.0, 0.5, 6.0], 1)]
TUNED = [choice(2, [5.0, 7.5, 6.0], 1), choice(0, [1.5, 2.0, 3.0], 0), choice(1, [2.0, 1.0, 4.0, 2.5], 3)]


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    return write(tmp_path / "base" / NAME, BASE), write(tmp_path / "tuned" / NAME, TUNED)


def imported(base: Any, tuned: Any, **settings: Any) -> ff.ForgettingMatrix:
    return ff.ForgettingMatrix.from_lm_eval(base=base, tasks={"tuned": tuned}, **settings)


def test_gold_choices_are_matched_by_document(files: tuple[Path, Path]):
    for given in (files, tuple(file.parent for file in files), tuple([str(file)] for file in files)):
        matrix = imported(*given)
        assert matrix.examples == ["colours/0", "colours/1", "colours/2"]
        np.testing.assert_allclose(matrix.base, [1.0, 3.0, 0.5])
        np.testing.assert_allclose(matrix.values, [[0.5, -0.5, 7.0]])
    assert matrix.unit == "nats per example"
    assert matrix.summary()["unit"] == "nats per example"
    np.testing.assert_array_equal(matrix.base_exact, [True, False, True])
    np.testing.assert_array_equal(matrix.exact, np.array([[0, np.nan, 1]], np.float32))
    assert matrix.texts[1] == "Q1: grün"
    assert matrix.complete
    assert "1 tasks x 3 examples" in repr(matrix)
    assert ff.analyse(matrix).unit == "nats per example"


def test_per_byte_divides_by_the_gold_text(files: tuple[Path, Path]):
    matrix = imported(*files, per="byte")
    sizes = np.array([len(" red"), len(" grün".encode()), len(" green")])
    np.testing.assert_allclose(matrix.values, [np.array([0.5, -0.5, 7.0]) / sizes])
    assert matrix.unit == "nats per byte"
    bare = [{key: value for key, value in sample.items() if key != "arguments"} for sample in BASE]
    base = write(files[0].parent / "bare.jsonl", bare)
    with pytest.raises(
        ValueError, match=r'bare\.jsonl, line 1: expected the request\'s text with per="byte", got none'
    ):
        imported(base, base, per="byte")
    np.testing.assert_array_equal(imported(base, base).values, np.zeros((1, 3)))
    with pytest.raises(ValueError, match="per: expected one of 'example', 'byte', got 'token'"):
        imported(*files, per="token")


@pytest.mark.parametrize(
    ("sample", "loss"),
    [
        ({"arguments": {"gen_args_0": {"arg_0": "Paris is in", "arg_1": " France"}},
          "filtered_resps": [["-0.25", "True"]], "target": " France", "acc": 1}, 0.25),  # loglikelihood
        ({"arguments": {"gen_args_0": {"arg_0": "a whole text"}}, "filtered_resps": ["-12.5"],
          "target": "a whole text", "word_perplexity": [-12.5, 3]}, 12.5),  # loglikelihood_rolling
        ({"arguments": [["Q:", " 4"], ["Q:", " 7"]], "filtered_resps": [[-3.0, False], [-1.0, True]],
          "target": "7"}, 1.0),  # an old version: numbers and pairs; the target is a text, as index 7 is none
        ({"arguments": {f"gen_args_{k}": {"arg_0": "Q:" if k < 2 else "", "arg_1": [" yes", " no"][k % 2]} for k in range(4)},
          "filtered_resps": [["-2.0", "False"], ["-3.0", "False"], ["-4.0", "False"], ["-5.0", "False"]],
          "target": "no"}, 3.0),  # acc_mutual_info asks again without the context
    ],
)  # fmt: skip
def test_every_kind_of_request(tmp_path: Path, sample: dict[str, Any], loss: float):
    sample = {"doc_id": 0, "filter": "none"} | sample
    # A second filter of the same document is no second document.
    file = write(tmp_path / NAME, [sample, sample | {"filter": "other"}])
    matrix = imported(file, file)
    np.testing.assert_allclose(matrix.base, [loss])
    np.testing.assert_array_equal(matrix.values, [[0.0]])


def test_a_document_that_a_model_lacks_is_unfinished(files: tuple[Path, Path]):
    write(files[1], TUNED[:2])
    matrix = imported(*files)
    np.testing.assert_array_equal(matrix.unfinished, [[False, True, False]])
    assert np.isnan(matrix.values[0, 1])
    assert not matrix.complete
    with pytest.raises(ValueError, match="line 2: expected documents that the base was evaluated on, got colours/1"):
        imported(files[1], files[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"doc_hash": "other"}, "line 2: expected the document of .*, line 1, got another one for colours/0"),
        ({"prompt_hash": "other"}, "line 2: expected the prompt of .* evaluate both models with the same data, few-shot"),
        ({"target": "1"}, "line 2: expected the gold choice of .*, got another one for colours/0"),
        ({"target": "[0, 1]"}, r"line .: expected the target to be one of the . choices, got '.*'; the gold choice"),
        ({"filtered_resps": ["red"]}, "line 2: expected log-likelihoods, got 'red'; evaluations that generate text"),
        ({"filtered_resps": ["42"]}, "line 2: expected log-likelihoods, got '42'"),
        ({"filtered_resps": ["-42"], "arguments": {"gen_args_0": {"arg_0": "Q", "arg_1": {"until": ["."]}}}},
         "line 2: expected log-likelihoods, got '-42'"),
        ({"filtered_resps": []}, "line 2: expected log-likelihoods, got no responses"),
        ({"doc_id": 2}, "line 2: expected every document once, got doc_id 2 twice"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_by_line(files: tuple[Path, Path], changes: dict[str, Any], message: str):
    write(files[1], [TUNED[0], TUNED[1] | changes, TUNED[2]])
    with pytest.raises(ValueError, match=message):
        imported(*files)


def test_files_that_are_none(files: tuple[Path, Path], tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        ValueError, match=r"base: expected samples_\*\.jsonl in .*empty, got none; run lm_eval with --log"
    ):
        imported(tmp_path / "empty", files[1])
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{\n")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1: expected a sample of lm_eval, got no JSON object"):
        imported(files[0], broken)
    with pytest.raises(ValueError, match="line 1: expected a sample of lm_eval, got none of its filtered_resps"):
        imported(files[0], write(broken, [{"doc_id": 0}]))
    write(files[0].with_name(NAME.replace("05.6", "06.6")), BASE)
    with pytest.raises(
        ValueError, match=r"base: expected one file of colours, got samples_colours_.* and samples_colours_"
    ):
        imported(files[0].parent, files[1])
    with pytest.raises(ValueError, match=r"tasks: expected a dictionary of names and files, got \{\}"):
        ff.ForgettingMatrix.from_lm_eval(base=files[0], tasks={})
