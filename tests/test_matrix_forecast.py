"""A matrix of which a few columns are evaluated and the rest is predicted."""

import json
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import build, save_adapter, save_base, save_tuned, texts, units_of
from typer.testing import CliRunner

import fastforget as ff
from fastforget.cli import app
from fastforget.matrix.store import Store

pytestmark = pytest.mark.usefixtures("small_shards")
S = 24


def move(base, folder, *directions):
    """A checkpoint that lies away from the base in given directions: tasks then have factors in common."""
    folder.mkdir()
    for file in base.iterdir():
        if file.name != "model.safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(base / "model.safetensors")
    for seed, size in directions:
        generator = torch.Generator().manual_seed(seed)
        state = {name: value + size * torch.randn(value.shape, generator=generator) for name, value in state.items()}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A base, nine known tasks and two new ones, one of them an adapter, and the known matrix."""
    world = tmp_path_factory.mktemp("forecast")
    base = save_base(world / "base")
    (world / "upstream.jsonl").write_text("".join(json.dumps({"text": text[:90]}) + "\n" for text in texts()[:300]))
    known = [
        move(base, world / f"known-{i}", (1, 0.003 * (i % 4)), (2, 0.004 * (i % 3)), (50 + i, 0.002)) for i in range(12)
    ]
    move(base, world / "new", (1, 0.006), (2, 0.002), (99, 0.002))
    save_adapter(base, world / "lora", scale=0.03)
    build(world, world / "matrix", known)
    return world


@pytest.fixture(scope="module")
def predicted(tasks):
    """The new tasks, from some of their values."""
    return build(tasks, tasks / "predicted", [tasks / "new", "lora"], predict=S, known=tasks / "matrix")


@pytest.fixture(scope="module")
def whole(tasks):
    """The new tasks, evaluated."""
    return build(tasks, tasks / "whole", [tasks / "new", "lora"])


def test_what_is_evaluated_is_evaluated_and_the_rest_marked_as_predicted(tasks, predicted, whole):
    evaluated = ~predicted.predicted
    assert evaluated.sum(1).tolist() == [S, S]
    np.testing.assert_array_equal(evaluated[0], evaluated[1])
    np.testing.assert_allclose(predicted.values[evaluated], whole.values[evaluated], atol=2e-5)
    np.testing.assert_allclose(predicted.base, whole.base, atol=2e-5)
    assert np.isnan(predicted.uncertainty[evaluated]).all()
    assert (predicted.uncertainty[~evaluated] > 0).all()
    assert np.isnan(predicted.exact[~evaluated]).all()
    assert predicted.complete
    assert not predicted.unfinished.any()
    units = Store(tasks / "predicted").read_units(sorted(Store(tasks / "predicted").finished()))
    assert len(units) == 3 * S  # the base's, too


def test_the_predictions_are_those_of_the_predictor(tasks, predicted):
    known = ff.ForgettingMatrix.load(tasks / "matrix")
    predictor = ff.ForgettingPredictor().fit(known)
    columns, random = predictor.choose_columns(S)
    assert set(columns) == set(np.flatnonzero(~predicted.predicted[0]))
    order = np.argsort(columns)
    columns, random = columns[order], random[order]
    mean, std = predictor.predict(columns, predicted.values[0, columns], return_std=True)
    rest = predicted.predicted[0]
    np.testing.assert_array_equal(predicted.values[0, rest], mean[rest])
    np.testing.assert_array_equal(predicted.uncertainty[0, rest], std[rest])
    audit = predictor.audit(columns, predicted.values[0, columns], random, level=0.9).mean
    assert predicted.audits["new"] == {"mean": audit.value, "low": audit.low, "high": audit.high, "level": 0.9}
    assert predicted.summary()["per_task"]["new"]["audited_mean"]["mean"] == audit.value
    assert predicted.summary()["predicted"] == rest.sum() * 2


def test_they_are_worth_something(predicted, whole):
    rest = predicted.predicted[0]
    error = np.sqrt(np.mean((predicted.values[0, rest] - whole.values[0, rest]) ** 2))
    alone = np.sqrt(np.mean((predicted.values[0, ~rest].mean() - whole.values[0, rest]) ** 2))
    assert error < 0.8 * alone
    low, high = (predicted.values[0] + k * predicted.uncertainty[0] for k in (-3, 3))
    assert ((low <= whole.values[0]) & (whole.values[0] <= high))[rest].mean() > 0.8


def test_a_predictor_does_not_learn_from_predictions(predicted):
    fitted = ff.ForgettingPredictor("additive").fit(predicted)
    assert np.isnan(fitted._known).sum() == predicted.predicted.sum()


def test_it_continues_and_ends_with_the_same_bytes(tasks, predicted, tmp_path):
    build(tasks, tmp_path / "out", [tasks / "new", "lora"], predict=S, known=tasks / "matrix")
    first = {path.name: path.read_bytes() for path in (tmp_path / "out" / "predicted").iterdir()}
    (tmp_path / "out" / "predicted" / "task-0001.parquet").unlink()
    next((tmp_path / "out" / "units").glob("task-0000*")).unlink()
    again = build(tasks, tmp_path / "out", [tasks / "new", "lora"], predict=S, known=tasks / "matrix")
    assert first == {path.name: path.read_bytes() for path in (tmp_path / "out" / "predicted").iterdir()}
    assert units_of(tmp_path / "out") == units_of(tasks / "predicted")
    np.testing.assert_array_equal(again.values, predicted.values)


def test_a_row_is_predicted_when_all_its_shards_are_there(tasks, predicted, tmp_path):
    settings = {"predict": S, "known": tasks / "matrix"}
    half = build(tasks, tmp_path / "out", [tasks / "new", "lora"], shard="0/2", **settings)
    assert not half.complete
    assert half.unfinished.any()
    done = build(tasks, tmp_path / "out", [tasks / "new", "lora"], shard="1/2", **settings)
    assert done.complete
    np.testing.assert_array_equal(done.values, predicted.values)


def test_an_export_keeps_what_is_predicted(predicted, tmp_path):
    again = ff.ForgettingMatrix.load(predicted.export(tmp_path / "export"))
    np.testing.assert_array_equal(again.predicted, predicted.predicted)
    np.testing.assert_array_equal(again.uncertainty, predicted.uncertainty)
    np.testing.assert_array_equal(again.values, predicted.values)
    assert again.audits == predicted.audits


def test_an_exported_matrix_can_be_the_known_one(tasks, predicted, tmp_path):
    exported = ff.ForgettingMatrix.load(tasks / "matrix").export(tmp_path / "export")
    again = build(tasks, tmp_path / "out", [tasks / "new", "lora"], predict=S, known=exported)
    np.testing.assert_array_equal(again.values, predicted.values)


def test_a_row_without_a_finite_value_is_not_predicted(tasks, tmp_path):
    diverged = save_tuned(tasks / "base", tmp_path / "diverged", scale=float("nan"))
    with pytest.warns(RuntimeWarning, match="diverged: none of its values is finite; its row is not predicted"):
        matrix = build(tasks, tmp_path / "out", [diverged], predict=S, known=tasks / "matrix")
    assert np.isnan(matrix.values).all()
    assert not matrix.complete


def test_a_base_that_measures_otherwise_is_reported(tasks, tmp_path):
    known = ff.ForgettingMatrix.load(tasks / "matrix")
    known.base[:] += 0.3
    shifted = known.export(tmp_path / "shifted")
    with pytest.warns(RuntimeWarning, match="the base's log-perplexities differ .* by up to 0.3 nats"):
        build(tasks, tmp_path / "out", [tasks / "new"], predict=S, known=shifted)


def test_another_known_matrix_is_refused(tasks, tmp_path):
    base = save_base(tmp_path / "base", seed=5)
    tuned = save_tuned(base, tmp_path / "tuned")
    with pytest.raises(ValueError, match=r"known: expected a matrix of the same base.* weights"):
        build(tasks, tmp_path / "out", [tuned], base=base, predict=S, known=tasks / "matrix")
    with pytest.raises(ValueError, match=r"known: .*max_length"):
        build(tasks, tmp_path / "out", ["lora"], max_length=50, predict=S, known=tasks / "matrix")
    with pytest.raises(ValueError, match="prediction"):  # a folder of a run that evaluates everything
        build(tasks, tasks / "whole", [tasks / "new", "lora"], predict=S, known=tasks / "matrix")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"predict": 24}, "known: expected one with predict"),
        ({"known": "matrix"}, "predict: expected one with known"),
        ({"predict": 1, "known": "matrix"}, "predict: expected 2 to"),
        ({"predict": 10**6, "known": "matrix"}, "predict: expected 2 to"),
        ({"predict": True, "known": "matrix"}, "predict: expected 2 to"),
        ({"predict": 24, "known": "nowhere"}, "without a readable manifest"),
    ],
)
def test_bad_input(settings, message, tasks, tmp_path):
    settings = {k: tasks / v if k == "known" else v for k, v in settings.items()}
    with pytest.raises(ValueError, match=message):
        build(tasks, tmp_path / "out", ["lora"], **settings)


def test_the_command_prints_the_audited_mean(tasks, tmp_path):
    command = ["matrix", "--base", str(tasks / "base"), "--task", str(tasks / "new"), "--out", str(tmp_path / "out")]
    command += ["--upstream", str(tasks / "upstream.jsonl"), "--predict", str(S), "--known", str(tasks / "matrix")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = CliRunner().invoke(app, [*command, "--no-progress", "--noise-examples", "1"])
    assert result.exit_code == 0, result.output
    assert "entries are predicted" in result.output
    assert "audited mean of new: " in result.output
