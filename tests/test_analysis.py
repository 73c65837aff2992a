"""`ff.analyse`: what a matrix is made of, on matrices that are made so."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import fastforget as ff
from fastforget.prediction import analysis

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


@pytest.mark.parametrize("holes", [False, True])
def test_blocks_and_samples_change_nothing(holes: bool, monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(5)
    values = generator.normal(size=(8, 2)) @ generator.normal(size=(2, 900)) + 0.1 * generator.normal(size=(8, 900))
    if holes:
        values[generator.random(values.shape) < 0.1] = np.nan
        values[:, 5] = np.nan
    whole = analysis.analyse(values, rank=3)
    monkeypatch.setattr(analysis, "BLOCK", 7)
    blocks = analysis.analyse(values, rank=3)
    np.testing.assert_allclose(blocks.rank_r2, whole.rank_r2, rtol=1e-12)
    for name in ("additive_r2", "mean", "task_effects", "example_effects", "task_similarity", "directions", "loadings"):
        np.testing.assert_allclose(getattr(blocks, name), getattr(whole, name), atol=1e-4 if holes else 1e-9)
    np.testing.assert_allclose(whole.directions.T @ whole.directions, np.eye(3), atol=1e-12)
    assert (whole.directions.sum(0) > 0).all()
    fit = whole.loadings @ whole.directions.T
    known = np.isfinite(values)
    left = np.square(np.where(known, values - fit.T, 0)).sum() / np.square(values[known] - values[known].mean()).sum()
    assert 1 - left == pytest.approx(whole.rank_r2[2], abs=1e-4)

    monkeypatch.setattr(analysis, "SAMPLE", 200)
    sample = analysis.analyse(values, rank=3)
    np.testing.assert_allclose(sample.rank_r2, whole.rank_r2, atol=0.03 if holes else 1e-12)
    assert sample.rank_r2[1:] == pytest.approx(whole.rank_r2[1:], abs=1e-3)
    assert holes == (sample.rank_r2 != blocks.rank_r2)
    np.testing.assert_allclose(sample.loadings @ sample.directions.T, fit, atol=0.3 if holes else 1e-9)


def test_additive_effects_with_holes_are_least_squares():
    generator = np.random.default_rng(6)
    values = ADDITIVE + generator.normal(size=(9, 40))
    values[generator.random(values.shape) < 0.4] = np.nan
    values[:, 3] = np.nan
    found = ff.analyse(values)
    row, column = np.nonzero(np.isfinite(values))
    design = np.zeros((len(row), 49))
    design[np.arange(len(row)), row] = design[np.arange(len(row)), 9 + column] = 1
    target = values[row, column]
    fit = design @ np.linalg.lstsq(design, target)[0]
    variance = np.square(target - target.mean()).sum()
    assert found.additive_r2 == pytest.approx(1 - np.square(target - fit).sum() / variance, abs=1e-12)
    np.testing.assert_allclose((found.mean + found.task_effects[:, None] + found.example_effects)[row, column], fit)


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


def test_exact_matches_are_factorised(monkeypatch: pytest.MonkeyPatch):
    generator = np.random.default_rng(2)
    logits = 4 * generator.normal(size=(20, 1)) @ generator.normal(size=(1, 60))
    exact = (logits > 1).astype(np.float32)
    exact[:, :5] = np.nan  # the base is wrong there
    matrix = SimpleNamespace(values=logits, exact=exact)
    found = ff.analyse(matrix, rank=2).exact_f1
    assert found is not None
    assert found[0] > 0.9
    shapes, real = [], analysis.LogisticFactors
    record = lambda values, **settings: (shapes.append(values.shape), real(values, **settings))[1]  # noqa: E731
    monkeypatch.setattr(analysis, "LogisticFactors", record)
    wide = SimpleNamespace(values=np.tile(logits, (1, 60)), exact=np.tile(exact, (1, 60)))  # of a sample
    assert ff.analyse(wide, rank=1).exact_f1 == pytest.approx(found[:1], abs=0.03)
    assert shapes == [(20, analysis.EXACT_SAMPLE)]
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
