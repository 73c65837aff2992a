from typing import Any

import numpy as np
import pytest
import torch
from architectures.families import build

from fastforget.prediction.baselines import Additive, BiasedFactors, LogisticFactors, Neighbours, Similarity
from fastforget.prediction.representations import example_representations

EXAMPLES = 40
KINDS = {"additive": Additive, "neighbours": Neighbours, "factors": BiasedFactors, "logistic": LogisticFactors}
METHODS = (*KINDS, "similarity")


def representations(examples=EXAMPLES):
    return np.random.default_rng(9).normal(size=(examples, 6)).astype(np.float32)


def fit(method, values):
    if method == "similarity":
        return Similarity(values, representations(values.shape[-1]))
    return KINDS[method](values)


def matrix(tasks=12, examples=EXAMPLES, rank=2, missing=0.0, binary=False, noise=0.1):
    rng = np.random.default_rng(0)
    values = 0.3 + rng.normal(size=(tasks, 1)) + rng.normal(size=examples)
    values += rng.normal(size=(tasks, rank)) @ rng.normal(size=(rank, examples))
    values += noise * rng.normal(size=values.shape)
    values = (values > 0.5).astype(np.float64) if binary else values
    values[rng.random(values.shape) < missing] = np.nan
    return values


def overall_mean(method, values):
    """What an example that no task knows gets without revealed entries."""
    mean = np.nanmean(values)
    if method != "logistic":
        return mean
    ones, count = np.nansum(values), np.isfinite(values).sum()
    return (ones + 1) / (count + 2)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tasks", [1, 2, 12])
@pytest.mark.parametrize("revealed", [0, 1, 7])
def test_of_any_size_and_with_unknown_entries_the_prediction_is_finite(method, tasks, revealed):
    values = matrix(tasks, missing=0.3, binary=method == "logistic")
    columns = np.arange(revealed, dtype=np.int64) * 3
    model = fit(method, values)
    prediction = model.predict(columns, np.ones(revealed))
    assert prediction.shape == (EXAMPLES,)
    assert prediction.dtype == np.float64
    assert np.isfinite(prediction).all()
    assert np.array_equal(prediction, fit(method, values).predict(columns, np.ones(revealed)))


@pytest.mark.parametrize("method", METHODS)
def test_an_example_that_no_task_knows_gets_the_overall_mean(method):
    values = matrix(missing=0.2, binary=method == "logistic")
    values[:, 5] = np.nan
    prediction = fit(method, values).predict(np.array([], np.int64), np.array([]))
    assert prediction[5] == pytest.approx(overall_mean(method, values), rel=1e-9)
    assert np.std(prediction) > 0.01


@pytest.mark.parametrize("method", METHODS)
def test_unknown_tasks_and_constant_matrices_do_no_harm(method):
    values = matrix(binary=method == "logistic")
    values[3], values[4] = np.nan, 1.0
    assert np.isfinite(fit(method, values).predict(np.array([2, 8]), np.array([1.0, 0.0]))).all()
    for constant in (0.0, 1.0):
        prediction = fit(method, np.full((4, EXAMPLES), constant)).predict(np.array([2, 8]), np.full(2, constant))
        np.testing.assert_allclose(prediction, constant, atol=0.02 if method == "logistic" else 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_revealed_entries_that_are_nan_are_left_out(method):
    model = fit(method, matrix(binary=method == "logistic"))
    with_nan = model.predict(np.array([2, 8, 30]), np.array([1.0, np.nan, 0.0]))
    assert np.array_equal(with_nan, model.predict(np.array([2, 30]), np.array([1.0, 0.0])))


@pytest.mark.parametrize("method", METHODS)
def test_the_matrix_is_not_written_to(method):
    values = matrix(missing=0.2, binary=method == "logistic")
    before = values.copy()
    fit(method, values).predict(np.array([1, 2]), np.array([0.0, 1.0]))
    np.testing.assert_array_equal(values, before)


@pytest.mark.parametrize("method", ["additive", "neighbours", "factors", "similarity"])
def test_the_unit_of_the_values_does_not_matter(method):
    values, revealed = matrix(missing=0.2), np.array([0.3, -1.0, 2.0])
    one = fit(method, values).predict(np.array([3, 9, 21]), revealed)
    thousand = fit(method, values * 1000).predict(np.array([3, 9, 21]), revealed * 1000)
    np.testing.assert_allclose(thousand, 1000 * one, rtol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.zeros(3), r"values: expected shape \[M, N\]"),
        (np.zeros((0, 3)), r"values: expected shape \[M, N\]"),
        (np.full((2, 3), np.nan), "values: expected at least one known entry"),
        (np.array([[0.0, np.inf, 1.0]]), r"values: expected finite numbers or NaN, got infinity at \[0, 1\]"),
    ],
)
def test_a_bad_matrix_is_refused(method, values, message):
    with pytest.raises(ValueError, match=message):
        fit(method, values)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("columns", "values", "message"),
    [
        ([1, 2], [1.0], r"values: expected shape \[S\] = \(2,\), got \(1,\)"),
        ([[1]], [[1.0]], r"columns: expected integers \[S\], got int64 \(1, 1\)"),
        ([1.5], [1.0], r"columns: expected integers \[S\], got float64"),
        ([1, 40], [1.0, 0.0], r"columns: expected indices in \[0, 40\), got 40"),
        ([-1], [1.0], r"columns: expected indices in \[0, 40\), got -1"),
        ([3, 4], [0.0, -np.inf], "values: expected finite numbers or NaN, got infinity at 1"),
    ],
)
def test_bad_entries_are_refused(method, columns, values, message):
    model = fit(method, matrix(3, binary=method == "logistic"))
    with pytest.raises(ValueError, match=message):
        model.predict(np.array(columns), np.array(values))


def test_the_logistic_model_refuses_numbers_other_than_0_and_1():
    with pytest.raises(ValueError, match=r"values: expected 0, 1 or NaN, got 0\.5; use BiasedFactors"):
        LogisticFactors(np.array([[0.0, 1.0, 0.5]]))
    with pytest.raises(ValueError, match="values: expected 0, 1 or NaN, got 2"):
        LogisticFactors(matrix(binary=True)).predict(np.array([1]), np.array([2.0]))


@pytest.mark.parametrize(
    ("method", "setting"),
    [
        (Additive, {"row_penalty": 0.0}),
        (Additive, {"column_penalty": -1.0}),
        (Neighbours, {"neighbours": 0}),
        (Neighbours, {"floor": 0.0}),
        (BiasedFactors, {"penalty": np.nan}),
        (BiasedFactors, {"rank": -1}),
        (LogisticFactors, {"bias_penalty": 0.0}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(method, setting):
    with pytest.raises(ValueError, match=f"{next(iter(setting))}: expected"):
        method(matrix(binary=True), **setting)


def test_bad_representations_are_refused():
    values, broken = matrix(), representations()
    with pytest.raises(ValueError, match=r"representations: expected \[N, H\] with N = 40, got \(39, 6\)"):
        Similarity(values, representations(39))
    with pytest.raises(ValueError, match=r"representations: expected \[N, H\] with N = 40, got \(40,\)"):
        Similarity(values, np.zeros(40))
    broken[7, 2] = np.nan
    with pytest.raises(ValueError, match="representations: expected finite rows, got NaN or infinity in row 7"):
        Similarity(values, broken)
    with pytest.raises(ValueError, match="temperature: expected a finite number above 0"):
        Similarity(values, representations(), temperature=0.0)


@pytest.mark.parametrize("missing", [0.0, 0.4])
def test_the_additive_model_is_the_ridge_regression_on_indicators(missing):
    values = matrix(missing=missing)
    rows, columns = np.nonzero(np.isfinite(values))
    design = np.concatenate([np.eye(len(values))[rows], np.eye(EXAMPLES)[columns]], 1)
    penalty = np.diag([3.0] * len(values) + [0.7] * EXAMPLES)
    target = values[rows, columns] - np.nanmean(values)
    expected = np.linalg.solve(design.T @ design + penalty, design.T @ target)
    model = Additive(values, row_penalty=3.0, column_penalty=0.7)
    np.testing.assert_allclose(np.concatenate([model.rows, model.columns]), expected, atol=1e-10)
    columns, revealed = np.array([4, 11]), np.array([2.0, 3.0])
    offset = (revealed - model.mean - model.columns[columns]).sum() / (2 + 3.0)
    np.testing.assert_allclose(model.predict(columns, revealed), model.mean + model.columns + offset)


def test_without_a_penalty_an_additive_matrix_is_recovered():
    values = matrix(rank=0, noise=0.0)
    known = values[:-1].copy()
    known[np.random.default_rng(1).random(known.shape) < 0.5] = np.nan
    columns = np.array([5, 6])
    prediction = Additive(known, 1e-9, 1e-9).predict(columns, values[-1, columns])
    np.testing.assert_allclose(prediction, values[-1], atol=1e-6)


@pytest.mark.parametrize("missing", [0.0, 0.2])
def test_without_a_penalty_a_matrix_of_the_rank_is_recovered(missing):
    values, columns = matrix(tasks=30, noise=0.0), np.arange(0, EXAMPLES, 3)
    known = values[:-1].copy()
    known[np.random.default_rng(1).random(known.shape) < missing] = np.nan
    prediction = BiasedFactors(known, rank=2, penalty=1e-10, sweeps=300).predict(columns, values[-1, columns])
    np.testing.assert_allclose(prediction, values[-1], atol=1e-5)


def neighbours_by_loops(values, columns, revealed, count, floor):
    additive, known = Additive(values), np.isfinite(values)
    prediction = additive.predict(columns, revealed)
    similarities = []
    for row in values:
        common = [(row[j] - z) ** 2 for j, z in zip(columns, revealed, strict=True) if np.isfinite(row[j])]
        similarities.append(1 / (np.mean(common) / np.nanvar(values) + floor) if common else 0.0)
    for j in range(values.shape[1]):
        nearest = sorted((i for i in range(len(values)) if known[i, j]), key=lambda i: -similarities[i])[:count]
        total = sum(similarities[i] for i in nearest)
        for i in nearest:
            away = values[i, j] - additive.mean - additive.rows[i] - additive.columns[j]
            prediction[j] += similarities[i] * away / total if total else 0.0
    return prediction


@pytest.mark.parametrize("missing", [0.0, 0.5])
@pytest.mark.parametrize("count", [1, 4, 50])
def test_neighbours_are_those_of_a_loop(missing, count):
    values, columns = matrix(missing=missing), np.array([30, 2, 17])
    values[6, columns] = np.nan
    revealed = np.array([0.5, -1.0, 1.5])
    prediction = Neighbours(values, count, floor=0.05).predict(columns, revealed)
    expected = neighbours_by_loops(values, columns, revealed, count, 0.05)
    np.testing.assert_allclose(prediction, expected, atol=1e-12)


def factor_loss(model: Any, values, sides, penalty, logistic):
    """Of the docstrings, with the penalty counted once an entry, for torch."""
    rows, columns = sides
    known = torch.from_numpy(np.isfinite(values))
    z = torch.from_numpy(np.nan_to_num(values))
    fit = model.mean + rows[:, :1] + columns[:, 0] + rows[:, 1:] @ columns[:, 1:].T
    sizes = (rows**2)[:, None] + (columns**2)[None]  # [M, N, 1 + r]
    if not logistic:
        return ((z / model.scale - fit) ** 2 + penalty * sizes.sum(2))[known].sum()
    entries = torch.nn.functional.softplus(fit) - z * fit + penalty / 2 * sizes[:, :, 1:].sum(2)
    return entries[known].sum() + model.bias_penalty / 2 * ((rows[:, 0] ** 2).sum() + (columns[:, 0] ** 2).sum())


@pytest.mark.parametrize("missing", [0.0, 0.3])
@pytest.mark.parametrize("logistic", [False, True])
def test_factors_are_at_a_minimum_of_the_penalised_loss(missing, logistic):
    values = matrix(missing=missing, binary=logistic)
    kind = LogisticFactors if logistic else BiasedFactors
    model = kind(values, rank=2, penalty=0.07, sweeps=2000)
    sides = [torch.from_numpy(side).requires_grad_() for side in (model.rows, model.columns)]
    loss = factor_loss(model, values, sides, 0.07, logistic)
    assert max(float(gradient.abs().max()) for gradient in torch.autograd.grad(loss, sides)) < 1e-6
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        near = [s + 0.03 * torch.randn(s.shape, generator=generator, dtype=s.dtype) for s in sides]
        assert factor_loss(model, values, near, 0.07, logistic) > loss


@pytest.mark.parametrize("logistic", [False, True])
def test_a_new_row_is_at_the_minimum_given_the_columns(logistic):
    values = matrix(missing=0.1, binary=logistic)
    model: Any = (LogisticFactors if logistic else BiasedFactors)(values, rank=2, penalty=0.02)
    columns, revealed = np.array([3, 9, 14, 22, 35]), np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    row = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    side = torch.from_numpy(model.columns)
    exact = {"tolerance_grad": 1e-12, "tolerance_change": 1e-15, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([row], max_iter=200, **exact)

    def closure():
        optimizer.zero_grad()
        loss = factor_loss(model, revealed[None], (row, side[columns]), 0.02, logistic)
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (model.mean + row[:, :1] + side[:, 0] + row[:, 1:] @ side[:, 1:].T)[0].detach()
    expected = expected.sigmoid() if logistic else model.scale * expected
    np.testing.assert_allclose(model.predict(columns, revealed), expected.numpy(), atol=1e-6)


def test_newton_steps_converge_where_undamped_ones_would_cycle():
    values = np.zeros((20, EXAMPLES))
    values[:, ::2] = 1.0
    model = LogisticFactors(values, rank=3, penalty=1e-4, bias_penalty=1e-3, sweeps=60)
    assert model.probabilities()[:, ::2].min() > 0.99
    assert model.probabilities()[:, 1::2].max() < 0.01
    columns = np.arange(0, EXAMPLES, 2)
    prediction = model.predict(columns, np.zeros(len(columns)))  # of a task unlike all others
    assert prediction[columns].max() < 0.01
    model.sweeps += 1
    np.testing.assert_allclose(model.predict(columns, np.zeros(len(columns))), prediction, rtol=1e-9)


def test_logistic_probabilities_are_those_of_the_parameters():
    model = LogisticFactors(matrix(binary=True), rank=2)
    logits = model.mean + model.rows[:, :1] + model.columns[:, 0] + model.rows[:, 1:] @ model.columns[:, 1:].T
    np.testing.assert_allclose(model.probabilities(), 1 / (1 + np.exp(-logits)), atol=1e-14)


def test_similarity_is_that_of_a_loop(monkeypatch):
    monkeypatch.setattr(Similarity, "BLOCK", 7)
    values, vectors = matrix(missing=0.2), representations()
    vectors[11] = 0
    columns, revealed = np.array([1, 11, 30]), np.array([0.5, -2.0, 1.0])
    mean = np.nanmean(values, 0)
    expected = mean.copy()
    for j in range(EXAMPLES):
        weights = []
        for k in columns:
            size = np.linalg.norm(vectors[j]) * np.linalg.norm(vectors[k])
            weights.append(np.exp(vectors[j] @ vectors[k] / size / 0.3) if size else 1.0)
        expected[j] += np.dot(weights, revealed - mean[columns]) / np.sum(weights)
    prediction = Similarity(values, vectors, temperature=0.3).predict(columns, revealed)
    np.testing.assert_allclose(prediction, expected, atol=1e-6)


def test_the_temperature_is_low_where_similarity_tells_something_and_high_where_not():
    rng = np.random.default_rng(3)
    kinds = np.repeat(np.eye(4), 25, 0)[rng.permutation(100)]  # [N, 4]
    values = rng.normal(size=(20, 4)) @ kinds.T + 0.05 * rng.normal(size=(20, 100))
    assert Similarity(values, kinds).temperature <= 0.2
    assert Similarity(values, rng.normal(size=(100, 50))).temperature >= 0.5


IDS = torch.randint(3, 131, (5, 9), generator=torch.Generator().manual_seed(0))
LENGTHS = (9, 4, 1, 7, 3)


def alone(model, ids):
    """The mean of one example's last hidden states, without padding."""
    with torch.no_grad():
        return model.model(input_ids=ids[None]).last_hidden_state[0].float().mean(0)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_representations_are_those_of_each_example_alone(left, batch_size):
    model = build("Llama")
    spans = [slice(9 - n, 9) if left else slice(0, n) for n in LENGTHS]
    mask = torch.zeros_like(IDS)
    for row, span in zip(mask, spans, strict=True):
        row[span] = 1
    model.train()
    result = example_representations(model, IDS, mask, batch_size=batch_size)
    assert model.training
    assert not result.requires_grad
    assert result.shape == (5, 32)
    assert result.dtype == torch.float32
    assert result.device.type == "cpu"
    model.eval()
    expected = torch.stack([alone(model, ids[span]) for ids, span in zip(IDS, spans, strict=True)])
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_representations_without_a_mask_are_of_all_tokens():
    model = build("Llama").eval()
    expected = torch.stack([alone(model, ids) for ids in IDS])
    torch.testing.assert_close(example_representations(model, IDS), expected, atol=1e-5, rtol=1e-5)


def test_an_example_without_tokens_is_represented_by_zeros():
    mask = torch.ones_like(IDS)
    mask[1] = 0
    result = example_representations(build("Llama"), IDS, mask)
    assert not result[1].any()
    assert result[0].any()


def test_adapters_are_applied_and_dropout_is_not():
    peft = pytest.importorskip("peft")
    base = build("Llama").eval()
    without = example_representations(base, IDS)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, lora_dropout=0.5)
    model = peft.get_peft_model(base, config)
    model.train()
    result = example_representations(model, IDS)
    assert torch.equal(result, example_representations(model, IDS))
    assert not torch.allclose(result, without, atol=1e-3)
    with model.disable_adapter():
        torch.testing.assert_close(example_representations(model, IDS), without)


def test_bad_arguments_are_refused():
    model = build("Llama")
    with pytest.raises(ValueError, match="batch_size: expected 1 or more, got 0"):
        example_representations(model, IDS, batch_size=0)
    with pytest.raises(ValueError, match=r"attention_mask: expected shape \[B, T\]"):
        example_representations(model, IDS, torch.ones(5, 8))
    with pytest.raises(ValueError, match="model: expected a causal language model"):
        example_representations(torch.nn.Linear(2, 2), IDS)
