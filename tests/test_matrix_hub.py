"""Matrices without a run: from values, exported as a data set, and to the hub and back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tiny_models import matrix_of

import fastforget as ff
from fastforget.matrix import hub

VALUES = np.random.default_rng(0).normal(size=(3, 20))
VALUES[1, 4] = np.nan  # not finite
UNFINISHED = np.zeros((3, 20), bool)
UNFINISHED[2, 10:] = True
VALUES[UNFINISHED] = np.nan
EXACT = np.where(np.arange(20) < 15, np.random.default_rng(1).random((3, 20)) < 0.5, np.nan).astype(np.float32)
EXACT[UNFINISHED] = np.nan
ABOUT = {
    "format": 1,
    "inputs": {"settings": {"max_length": 64, "dtype": "bfloat16"}, "base": {"weights": "abc"}},
    "about": {"base": "/home/someone/models/base", "upstream": "org/dolma", "truncated": 2, "skipped": []},
}


def matrix(**changes: Any) -> ff.ForgettingMatrix:
    fields = {
        "tasks": ["plain", "with | pipe", "org/name"], "unfinished": UNFINISHED, "complete": False, "exact": EXACT,
        "base": np.arange(20.0), "base_exact": np.arange(20) < 15, "tokens": np.arange(20) + 5,
        "targets": np.arange(20) + 4, "texts": [f"text {j}" for j in range(20)], "about": ABOUT,
        "noise": {"unit": "nats per token", "batch_composition": {"rms": 1e-4, "max": 2e-4}},
    }  # fmt: skip
    return matrix_of(VALUES, **(fields | changes))


def assert_same(found: ff.ForgettingMatrix, expected: ff.ForgettingMatrix, *, texts: bool) -> None:
    for name in ("values", "base", "exact", "base_exact", "tokens", "targets", "unfinished"):
        value = getattr(found, name)
        assert value.dtype == getattr(expected, name).dtype, name
        np.testing.assert_array_equal(value, getattr(expected, name), err_msg=name)
    for name in ("tasks", "examples", "noise", "complete", "unit"):
        assert getattr(found, name) == getattr(expected, name)
    assert found.texts == (expected.texts if texts else [""] * 20)


@pytest.mark.parametrize("texts", [False, True])
def test_an_export_comes_back_bit_for_bit(tmp_path: Path, texts: bool):
    folder = matrix().export(tmp_path / "data", texts=texts)
    found = ff.ForgettingMatrix.load(folder)
    assert_same(found, matrix(), texts=texts)
    assert found.summary() == matrix().summary()
    assert ("text" in pq.read_schema(folder / "values.parquet").names) == texts
    assert all("/home/someone" not in file.read_text() for file in (folder / "matrix.json", folder / "README.md"))
    found.export(folder, texts=texts)  # over an earlier one
    assert_same(ff.ForgettingMatrix.load(folder), matrix(), texts=texts)
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "matrix.json", "values.parquet"]


def test_the_card_and_datasets_read_it(tmp_path: Path):
    import datasets

    folder = matrix().export(tmp_path / "data")
    card = (folder / "README.md").read_text(encoding="utf-8")
    parts = ["# Forgetting matrix: 3 fine-tuned models x 20 upstream examples", "| base model | base |", "n<1K"]
    parts += ["| max length | 64 |", "| upstream | org/dolma |", r"| with \| pipe | ", "no, 10 values are missing"]
    parts += ["| texts | not included |", "nats per token", "choose_columns(30)", "| format | 1 |", "(rms) | 1.0e-04 |"]
    for part in parts:
        assert part in card, part
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows.num_rows == 20
    assert rows["forgetting/org/name"][9:11] == [VALUES[2, 9], None]
    assert rows["exact/plain"][14:16] == [bool(EXACT[0, 14]), None]
    assert "included, under the licence of the upstream data" in hub._card(matrix(), texts=True)


class FakeHub:
    """What `huggingface_hub` does, in a folder."""

    def __init__(self, root: Path) -> None:
        self.root, self.calls = root, []

    def api(self, token: str | None = None) -> FakeHub:
        self.calls.append(("token", token))
        return self

    def create_repo(self, repo_id: str, *, repo_type: str, private: bool | None, exist_ok: bool) -> str:
        self.calls.append(("create", repo_id, repo_type, private, exist_ok))
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return f"https://huggingface.co/datasets/{repo_id}"

    def upload_folder(self, *, repo_id: str, folder_path: str, repo_type: str, commit_message: str) -> None:
        assert repo_type == "dataset"
        assert "3 tasks x 20 examples" in commit_message
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def download(
        self, repo_id: str, *, repo_type: str, revision: str | None, token: str | None, allow_patterns: Any
    ) -> str:
        self.calls.append(("download", repo_id, repo_type, revision, token))
        return str(self.root / repo_id)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    import huggingface_hub

    made = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", made.api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    return made


def test_to_the_hub_and_back(fake: FakeHub):
    url = matrix().push_to_hub("user/name", private=True, token="secret", texts=True)
    assert url == "https://huggingface.co/datasets/user/name"
    assert_same(ff.ForgettingMatrix.from_hub("user/name", revision="v1", token="t"), matrix(), texts=True)
    assert fake.calls == [
        ("token", "secret"),
        ("create", "user/name", "dataset", True, True),
        ("download", "user/name", "dataset", "v1", "t"),
    ]
    with pytest.raises(ValueError, match="texts: expected a matrix with texts, got one without any"):
        matrix(texts=[""] * 20).push_to_hub("user/other", texts=True)
    assert not (fake.root / "user" / "other").exists()  # refused before anything was made


def test_the_calls_are_those_of_the_installed_hub():
    """The fake above takes what the real functions take."""
    import inspect

    import huggingface_hub

    for real, names in (
        (huggingface_hub.HfApi.create_repo, {"repo_type", "private", "exist_ok"}),
        (huggingface_hub.HfApi.upload_folder, {"repo_id", "folder_path", "repo_type", "commit_message"}),
        (huggingface_hub.snapshot_download, {"repo_type", "revision", "token", "allow_patterns"}),
    ):
        assert names <= set(inspect.signature(real).parameters)


def test_what_cannot_be_exported_or_read(tmp_path: Path, fake: FakeHub):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match=r"folder: expected a new or empty folder, got .*run with manifest\.json"):
        matrix().export(tmp_path / "run")
    folder = matrix().export(tmp_path / "data")
    sidecar = json.loads((folder / "matrix.json").read_text())
    for version in (2, "new"):
        (folder / "matrix.json").write_text(json.dumps(sidecar | {"format": version}))
        with pytest.raises(
            ValueError, match=f"matrix: expected an export of format 1, got format {version!r} in .*; use the"
        ):
            ff.ForgettingMatrix.load(folder)
    (folder / "matrix.json").write_text(json.dumps(sidecar))
    (folder / "values.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"matrix: cannot read .*values\.parquet"):
        ff.ForgettingMatrix.load(folder)
    (fake.root / "user" / "empty").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"without a readable matrix\.json; check the path"):
        ff.ForgettingMatrix.from_hub("user/empty")


def test_a_matrix_of_values_alone():
    found = ff.ForgettingMatrix.from_values([[0.0, np.inf, 2.0], [1.0, 1.0, 1.0]], tasks=["a", "b"])
    np.testing.assert_array_equal(found.values, [[0.0, np.nan, 2.0], [1.0, 1.0, 1.0]])
    assert found.examples == ["0", "1", "2"]
    assert found.texts == [""] * 3
    assert found.complete
    assert found.unit == "nats per token"
    assert found.summary()["nan"]["entries"] == [["a", "1"]]
    assert found.summary()["exact_forgotten"] is None
    for values, names, message in (
        ([1.0], {}, r"values: expected shape \[M, N\], got \(1,\)"),
        ([[1.0, 2.0]], {"examples": ["x"]}, "examples: expected 2, as values have, got 1"),
        ([[1.0, 2.0]], {"examples": ["x", "x"]}, "examples: expected different names, got 'x' twice"),
        ([[1.0], [2.0]], {"tasks": ["t", "t"]}, "tasks: expected different names, got 't' twice"),
        ([[1.0]], {"texts": []}, "texts: expected 1, as values have, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.ForgettingMatrix.from_values(values, **names)
