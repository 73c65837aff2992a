"""`ff.analyse`: what a matrix is made of, on matrices that are made so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastforget as ff

REAL = Path(os.environ.get("FASTFORGET_MATRIX", Path(__file__).parents[2] / "shared/data/olmo_7b_forgetting.npz"))
GENERATOR = np.random.default_rng(0)
ADDITIVE = GENERATOR.normal(size=(9, 1)) + GENERATOR.normal(size=40) + 3.0
RANK_2 = GENERATOR.normal(size=(9, 2)) @ GENERATOR.normal(size=(2, 40))


def test_shares_of_the_variance_are_those_of_the_full_decompositions():
    values = ADDITIVE + RANK_2 + 0.3 * GENERATOR.normal(size=(9, 40))
    found = ff.analyse(values, rank=4)
    variance = np.square(values - values.mean()).sum()
    fit = values.mean(1, keepdims=True) + values.mean(0) - values.mean()
    assert found.additive_r2 == pytest.approx(1 - np.square(values - fit).sum() / variance)
    left, singular, right = np.linalg.svd(values, full_matrices=False)
    for r in range(1, 5):
        fit = (left[:, :r] * singular[:r]) @ right[:r]
        assert found.rank_r2[r - 1] == pytest.approx(1 - np.square(values - fit).sum() / variance)
    np.testing.assert_allclose(found.task_effects, values.mean(1) - values.mean())
    np.testing.assert_allclose(found.example_effects, values.mean(0) - values.mean())
    centred = values - values.mean(0)
    np.testing.assert_allclose(found.task_similarity, np.corrcoef(centred), atol=1e-12)


@pytest.mark.parametrize(("values", "explains"), [(ADDITIVE, "additive"), (RANK_2, "rank 2")])
def test_unknown_entries_are_filled_by_the_fit(values: np.ndarray, explains: str):
    holes = values.copy()
    holes[np.random.default_rng(1).random(values.shape) < 0.15] = np.nan
    found = ff.analyse(holes, rank=2)
    assert (found.additive_r2 if explains == "additive" else found.rank_r2[1]) > 0.999
    if explains == "additive":
        np.testing.assert_allclose(found.task_effects, values.mean(1) - values.mean(), atol=1e-3)
    assert found.to_dict()["unknown"] == np.isnan(holes).sum()


def test_examples_and_their_neighbours():
    values = RANK_2.copy()
    values[:, 7] = 2 * values[:, 3]
    matrix = SimpleNamespace(
        values=values + np.linspace(0, 30, 40), tasks=[f"t{i}" for i in range(9)], examples=[f"e{j}" for j in range(40)],
        texts=[f"text {j}" for j in range(40)], exact=np.full((9, 40), np.nan),
    )  # fmt: skip
    assert ff.analyse(values).similar_examples(3, 1).tolist() == [7]
    found = ff.analyse(matrix)
    assert found.most_forgotten(1)[0] == np.argmax(matrix.values.mean(0))
    assert found.least_forgotten(1)[0] == np.argmin(matrix.values.mean(0))
    assert found.exact_f1 is None
    report = json.loads(json.dumps(found.to_dict(2)))
    assert report["most_forgotten"][0]["text"] == f"text {np.argmax(matrix.values.mean(0))}"
    assert len(report["least_forgotten"]) == 2
    assert "9 tasks x 40 examples" in repr(found)


def test_exact_matches_are_factorised():
    generator = np.random.default_rng(2)
    logits = 4 * generator.normal(size=(20, 1)) @ generator.normal(size=(1, 60))
    exact = (logits > 1).astype(np.float32)
    exact[:, :5] = np.nan  # the base is wrong there
    matrix = SimpleNamespace(values=logits, exact=exact)
    found = ff.analyse(matrix, rank=2).exact_f1
    assert found is not None
    assert found[0] > 0.9
    always = 2 * np.nanmean(exact) / (1 + np.nanmean(exact))
    assert found[0] > always + 0.2


def test_a_constant_matrix_and_bad_input():
    assert np.isnan(ff.analyse(np.ones((3, 4))).additive_r2)
    with pytest.raises(ValueError, match=r"matrix: expected values \[M, N\], got shape \(4,\)"):
        ff.analyse(np.ones(4))
    with pytest.raises(ValueError, match="rank: expected an integer >= 1, got 0"):
        ff.analyse(np.ones((3, 4)), rank=0)


def test_many_examples():
    """Nothing is as large as examples x examples, which would be 80 GB here."""
    values = np.random.default_rng(3).normal(size=(20, 100_000))
    values[0, :50] = np.nan
    found = ff.analyse(values)
    assert np.all(np.diff([0.0, *found.rank_r2]) > 0)
    assert len(found.similar_examples(0)) == 10


@pytest.mark.skipif(not REAL.exists(), reason="needs the published matrix: set FASTFORGET_MATRIX to its npz")
def test_the_published_matrix():
    found = ff.analyse(np.load(REAL, allow_pickle=False)["values"])
    assert [round(value, 3) for value in found.rank_r2] == [0.685, 0.783, 0.821, 0.841, 0.859]
    assert round(found.additive_r2, 3) == 0.615
