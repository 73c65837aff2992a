"""The robust predictor, its choices, intervals and audits, on matrices whose truth is known."""

from __future__ import annotations

import importlib
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import fastforget as ff
from fastforget.prediction.robust import RobustFactors, Settings

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("FASTFORGET_MATRIX", ROOT.parent / "shared/data/olmo_7b_forgetting.npz"))
METHODS = ["robust", "additive", "knn", "svd", "similarity"]


def low_rank(tasks: int, examples: int, rank: int = 3, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """Means, offsets, `rank` factors, and Gaussian noise."""
    generator = np.random.default_rng(seed)
    factors = generator.normal(size=(tasks, rank)) @ generator.normal(size=(rank, examples))
    base = 2.0 + generator.normal(size=examples) + 0.5 * generator.normal(size=(tasks, 1))
    return base + factors + noise * generator.normal(size=(tasks, examples))


def fitted(method: str, values: np.ndarray, **settings: Any) -> ff.ForgettingPredictor:
    if method == "similarity":
        settings["representations"] = np.random.default_rng(1).normal(size=(values.shape[1], 5))
    return ff.ForgettingPredictor(method, **settings).fit(values)


def root(errors: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(errors))))


VALUES = low_rank(41, 400)
NEW, KNOWN = VALUES[0], VALUES[1:]
SEEN = np.random.default_rng(2).choice(400, 30, replace=False)


def test_the_posterior_is_that_of_the_documented_model():
    """With Gaussian noise of known size, against the conditional of the whole joint distribution."""
    model = RobustFactors(KNOWN, Settings(freedom=1e12, steadiness=1e12))
    posterior = model.posterior(SEEN, NEW[SEEN])
    joint = model.loadings @ model.loadings.T + np.diag(model.noise)
    gain = joint[:, SEEN] @ np.linalg.inv(joint[np.ix_(SEEN, SEEN)])
    hidden = np.setdiff1d(np.arange(400), SEEN)
    expected = model.mean + gain @ (NEW - model.mean)[SEEN]
    variance = np.diag(joint - gain @ joint[SEEN])
    np.testing.assert_allclose(posterior.mean[hidden], expected[hidden], rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(posterior.std[hidden] ** 2, variance[hidden], rtol=1e-6)
    assert posterior.spread == pytest.approx(1.0)


def variance_left(model: RobustFactors, columns: np.ndarray) -> float:
    """Of all entries together, once some are seen."""
    joint = model.loadings @ model.loadings.T
    noisy = joint[np.ix_(columns, columns)] + np.diag(model.noise[columns])
    return float(np.trace(joint - joint[:, columns] @ np.linalg.solve(noisy, joint[columns])))


def test_each_choice_takes_away_most_of_the_variance():
    """Against trying every column by itself."""
    model = RobustFactors(low_rank(12, 25))
    known = np.array([3])
    for chosen in model.choose(4, known):
        others = np.setdiff1d(np.arange(25), known)
        left = [variance_left(model, np.append(known, j)) for j in others]
        assert chosen == others[np.argmin(left)]
        known = np.append(known, chosen)


def test_factors_are_found():
    predictor = fitted("robust", KNOWN)
    error = predictor.predict(SEEN, NEW[SEEN]) - NEW
    assert root(error) < 0.15  # the noise is 0.1
    assert root(fitted("additive", KNOWN).predict(SEEN, NEW[SEEN]) - NEW) > 0.4
    assert np.array_equal(predictor.predict(SEEN, NEW[SEEN])[SEEN], NEW[SEEN])


def test_a_shifted_task_is_followed():
    """All entries of the new task are higher by far more than any known task's."""
    error = fitted("robust", KNOWN).predict(SEEN, NEW[SEEN] + 10) - NEW - 10
    assert root(error) < 0.5


def test_outliers_are_withstood():
    generator = np.random.default_rng(3)
    wrong, seen = KNOWN.copy(), NEW[SEEN].copy()
    wrong[generator.random(wrong.shape) < 0.01] += 30.0
    seen[:2] += 30.0
    plain = fitted("robust", wrong, freedom=1e9, outlier=1e9, steadiness=1e9).predict(SEEN, seen) - NEW
    robust = fitted("robust", wrong).predict(SEEN, seen) - NEW
    clean = fitted("robust", KNOWN).predict(SEEN, NEW[SEEN]) - NEW
    hidden = np.setdiff1d(np.arange(400), SEEN)
    assert root(robust[hidden]) < 1.1 * root(clean[hidden])
    assert root(plain[hidden]) > 10 * root(robust[hidden])


def test_unknown_entries_are_no_zeros():
    holes = KNOWN.copy()
    holes[np.random.default_rng(4).random(holes.shape) < 0.3] = np.nan
    full, missing = (root(fitted("robust", v).predict(SEEN, NEW[SEEN]) - NEW) for v in (KNOWN, holes))
    assert missing < 1.5 * full


def test_intervals_hold():
    inside = []
    for seed in range(6):
        values = low_rank(40, 300, seed=seed)
        predictor = fitted("robust", values[10:])
        for row in range(10):
            columns, _ = predictor.choose_columns(30, seed=row)
            low, high = predictor.predict_interval(columns, values[row, columns], level=0.9)
            hidden = np.setdiff1d(np.arange(300), columns)
            inside.append(((low <= values[row]) & (values[row] <= high))[hidden].mean())
    assert 0.85 < np.mean(inside) < 0.97


@pytest.mark.parametrize("shift", [0.0, 3.0], ids=["like the known", "unlike"])
def test_audits_hold(shift: float):
    """Also where the predictions are wrong: here every second example of the new tasks moves by itself."""
    held, misses = [], []
    predictor = fitted("robust", KNOWN)
    for seed in range(150):
        generator = np.random.default_rng(seed)
        row = NEW + shift * generator.normal(size=400) * (np.arange(400) % 2)
        columns, random = predictor.choose_columns(40, seed=seed)
        audit = predictor.audit(columns, row[columns], random, threshold=3.0, seed=seed)
        held.append([e.low <= t <= e.high for e, t in ((audit.mean, row.mean()), (audit.share, (row > 3.0).mean()))])
        misses.append([audit.mean.value - row.mean(), audit.sampled_mean - row.mean()])
    assert (np.mean(held, 0) > 0.84).all()
    audited, sampled = np.sqrt(np.square(misses).mean(0))
    assert audited < (0.3 if not shift else 1.0) * sampled


def test_screening_says_how_much_it_finds():
    predictor, found, expected = fitted("robust", KNOWN), [], []
    for seed in range(30):
        columns, _ = predictor.choose_columns(20, seed=seed)
        worst, recall = predictor.screen(columns, NEW[columns], 40)
        found.append(np.isin(np.argsort(-NEW)[:40], worst).mean())
        expected.append(recall)
    assert np.mean(found) > 0.85
    assert np.mean(expected) == pytest.approx(np.mean(found), abs=0.1)


def test_the_next_choice_sees_the_first():
    predictor = fitted("robust", KNOWN)
    first = predictor.choose_columns(10, seed=1)
    assert first.random.sum() == 5
    second = predictor.choose_columns(10, columns=first.columns, values=NEW[first.columns])
    assert not second.random.any()
    assert not np.isin(second.columns, first.columns).any()
    both = np.concatenate([first.columns, second.columns])
    error = predictor.predict(both, NEW[both]) - NEW
    before = predictor.predict(first.columns, NEW[first.columns]) - NEW
    assert root(error) < root(before)


@pytest.mark.parametrize("method", METHODS)
def test_everything_is_repeatable(method: str):
    results = []
    for _ in range(2):
        predictor = fitted(method, KNOWN)
        columns, random = predictor.choose_columns(12, seed=5)
        audit = predictor.audit(columns, NEW[columns], random, threshold=2.0)
        results.append(
            [*predictor.predict(columns, NEW[columns], return_std=True), *predictor.screen(columns, NEW[columns], 9)]
        )
        results[-1].append(np.array([*audit.mean, *audit.share]))
    assert all(np.array_equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [(1, 7), (2, 7), (3, 1), (5, 9)])
def test_small_matrices(method: str, shape: tuple[int, int]):
    """Fewer tasks than factors, a single example, constant rows, unknown columns, no revealed entry."""
    values = np.random.default_rng(0).normal(size=shape)
    values[0] = 1.0
    if shape[1] > 2:
        values[:, 1] = np.nan
    predictor = fitted(method, values)
    for columns in ([], [0]):
        result = predictor.predict(columns, [0.5] * len(columns))
        assert result.shape == shape[1:]
        assert np.isfinite(result).all()
    chosen, random = predictor.choose_columns(shape[1])
    assert sorted(chosen.tolist()) == list(range(shape[1]))
    assert random.shape == chosen.shape


@pytest.mark.parametrize("shape", [(20, 100), (7, 50), (5, 1), (3, 3)])
def test_rows_that_are_all_constant(shape: tuple[int, int]):
    """Nothing tells examples apart, and nothing is noise: what is seen of a row is all of it."""
    for seed in range(20):
        values = np.repeat(np.random.default_rng(seed).normal(size=(shape[0], 1)), shape[1], 1)
        predictor = ff.ForgettingPredictor().fit(values)
        columns, _ = predictor.choose_columns(min(3, shape[1]))
        mean, std = predictor.predict(columns, np.full(len(columns), 0.7), return_std=True)
        assert np.abs(mean - 0.7).max() < 0.02
        assert np.isfinite(std).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: ff.ForgettingPredictor("forest"), "method: expected one of 'robust', .*, got 'forest'"),
        (lambda p: ff.ForgettingPredictor("similarity"), r"representations: expected \[N, H\]"),
        (lambda p: ff.ForgettingPredictor(ranks=3), "ranks: expected a setting of method='robust'"),
        (lambda p: ff.ForgettingPredictor("knn", k=0), r"k: expected a setting of method='knn' \(neighbours, floor\)"),
        (lambda p: ff.ForgettingPredictor(rank=-1), "rank: expected an integer >= 0, got -1"),
        (lambda p: ff.ForgettingPredictor(shrinkage=math.nan), "shrinkage: expected a number > 0, got nan"),
        (
            lambda p: ff.ForgettingPredictor().fit("matrix"),
            "matrix: expected a ForgettingMatrix or values .* got str .*load",
        ),
        (
            lambda p: p.audit([0], [1.0], [True], threshold=math.nan),
            "threshold: expected a finite number or None, got nan",
        ),
        (lambda p: ff.ForgettingPredictor().predict([0], [1.0]), "predictor: expected a fitted one; call fit"),
        (
            lambda p: ff.ForgettingPredictor().fit(np.full((3, 4), np.nan)),
            "expected at least one finite value, got none",
        ),
        (lambda p: ff.ForgettingPredictor().fit(np.zeros(4)), r"matrix: expected values \[M, N\], got shape \(4,\)"),
        (lambda p: p.predict([400], [1.0]), r"columns: expected indices in \[0, 400\), got 400"),
        (lambda p: p.predict([-1], [1.0]), r"columns: expected indices in \[0, 400\), got -1"),
        (lambda p: p.predict([1, 1], [1.0, 2.0]), "columns: expected one value a column, got a column with two"),
        (lambda p: p.predict([0.5], [1.0]), r"columns: expected integers \[S\], got float64"),
        (lambda p: p.predict([0, 1], [1.0]), r"values: expected shape \[S\] = \(2,\), got \(1,\)"),
        (lambda p: p.predict([0, 1], [1.0, math.inf]), "values: expected finite numbers or NaN, got infinity at 1"),
        (lambda p: p.predict_interval([0], [1.0], level=90), "level: expected a number between 0 and 1, got 90"),
        (lambda p: p.choose_columns(401), "count: expected an integer from 0 to 400 examples not seen, got 401"),
        (lambda p: p.choose_columns(4, random=5), "random: expected an integer from 0 to count = 4, got 5"),
        (lambda p: p.screen([0], [1.0], 0), "k: expected an integer from 1 to N = 400, got 0"),
        (lambda p: p.audit([0, 1, 2], [1.0] * 3, [True] * 2), r"random: expected bool \(3,\) like columns"),
        (lambda p: p.audit([0, 1, 2], [1.0] * 3, [True, True, False]), "expected at least 3 random entries, got 2"),
    ],
)
def test_bad_input(call: Any, message: str):
    with pytest.raises(ValueError, match=message):
        call(fitted("robust", KNOWN))


def test_matrices_of_other_kinds():
    expected = fitted("robust", KNOWN).predict(SEEN, NEW[SEEN])
    for matrix in (torch.tensor(KNOWN), KNOWN.tolist(), SimpleNamespace(values=KNOWN, tasks=[])):
        predictor = ff.ForgettingPredictor().fit(matrix)
        assert np.array_equal(predictor.predict(torch.tensor(SEEN), NEW[SEEN].tolist()), expected)


def test_intervals_of_audits_end_at_what_the_entries_say():
    """Many entries of a task that the known ones say nothing about: what the predictions expect does not count any more."""
    generator, held = np.random.default_rng(6), []
    predictor = fitted("robust", KNOWN)
    for seed in range(60):
        row = 0.1 * generator.normal(size=400) + 3.0 * (generator.random(400) < 0.1)
        columns, random = predictor.choose_columns(200, seed=seed)
        audit = predictor.audit(columns, row[columns], random, threshold=1.0)
        held.append([e.low <= t <= e.high for e, t in ((audit.mean, row.mean()), (audit.share, (row > 1.0).mean()))])
    assert (np.mean(held, 0) > 0.82).all()
    rare = predictor.audit(np.arange(15), np.zeros(15), np.ones(15, bool), threshold=50.0).share
    assert rare.low == 0.0
    assert rare.high > 0.04


def test_tasks_without_values_are_left_out_with_a_warning():
    with pytest.warns(RuntimeWarning, match="matrix: 2 tasks without a finite value are left out"):
        predictor = ff.ForgettingPredictor().fit(np.concatenate([KNOWN, np.full((2, 400), math.inf)]))
    same = fitted("robust", KNOWN)
    assert np.array_equal(predictor.predict(SEEN, NEW[SEEN]), same.predict(SEEN, NEW[SEEN]))


def test_the_page_has_the_record(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("prediction")
    record = json.loads((ROOT / "benchmarks/results/prediction.json").read_text())
    assert benchmark.table(record) in (ROOT / "docs/prediction.md").read_text(encoding="utf-8")


@pytest.mark.skipif(not REAL.exists(), reason="needs the published matrix: set FASTFORGET_MATRIX to its npz")
def test_the_published_matrix():
    """The bars of `benchmarks/prediction.py`, for three seeds."""
    values = np.load(REAL, allow_pickle=False)["values"].astype(np.float64)
    inner = [6, 65, 18, 8, 60, 13, 37, 22, 30, 19, 64, 50, 25, 31, 32, 61, 16, 5, 53, 49]
    predictor = fitted("robust", values[np.setdiff1d(np.arange(66), inner)])
    for rows, bars in ((inner, (3.2, 2.8)), (range(66, 76), (4.6, 4.4))):
        for choose, bar in zip((False, True), bars, strict=True):
            squares, count, inside = 0.0, 0, []
            for seed in range(3):
                generator = np.random.RandomState(seed)
                for row in rows:
                    seen = np.unique(generator.choice(1000, 30))
                    if choose:
                        seen = predictor.choose_columns(30, seed=1000 * seed + row).columns
                    hidden = np.setdiff1d(np.arange(1000), seen)
                    error = (predictor.predict(seen, values[row, seen]) - values[row])[hidden]
                    low, high = predictor.predict_interval(seen, values[row, seen])
                    squares, count = squares + float(error @ error), count + len(hidden)
                    inside.append(((low <= values[row]) & (values[row] <= high))[hidden].mean())
            assert 100 * math.sqrt(squares / count) < bar
            assert 0.85 < np.mean(inside) < 0.95
