"""`fastforget predict`: analysis, choice and prediction on a matrix whose truth is known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from matplotlib.image import imread
from tiny_models import matrix_of

import fastforget as ff
from fastforget import cli
from fastforget.prediction import report
from fastforget.prediction.files import load_matrix, read_values
from fastforget.prediction.predictor import DRAWS

M, N = 12, 300
GENERATOR = np.random.default_rng(0)
TRUTH = 0.5 * GENERATOR.normal(size=(M + 2, 2)) @ GENERATOR.normal(size=(2, N)) + GENERATOR.normal(size=N)
TRUTH += 0.5 + 0.02 * GENERATOR.normal(size=TRUTH.shape)
IDS = [f"e{j}" for j in range(N)]
TEXTS = [f"[bold]text[/] $x^$ {j}\n\x00 " + "word " * 40 for j in range(N)]


@pytest.fixture
def matrix(tmp_path: Path) -> Path:
    path = tmp_path / "known.npz"
    tasks = np.array([f"task [{i}]" for i in range(M)])
    np.savez(path, values=TRUTH[:M], tasks=tasks, examples=np.array(IDS), texts=np.array(TEXTS))
    return path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """What a command prints; of one that fails its error."""
    monkeypatch.setattr(sys, "argv", ["fastforget", "predict", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    out, err = capsys.readouterr()
    assert (ended.value.code or 0) == (2 if err else 0), err
    return err or out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def measured(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_from_choice_to_prediction(matrix: Path, tmp_path: Path, monkeypatch, capsys):
    chosen = tmp_path / "new" / "columns.jsonl"
    out = run(monkeypatch, capsys, matrix, "--choose", 20, "--random", 8, "--seed", 3, "--out", chosen)
    assert "20 examples to evaluate, 8 of them drawn at random" in out
    rows = lines(chosen)
    expected = ff.ForgettingPredictor().fit(TRUTH[:M]).choose_columns(20, random=8, seed=3)
    assert [row["column"] for row in rows] == expected.columns.tolist()
    assert [row["random"] for row in rows] == expected.random.tolist()
    assert rows[0]["id"] == IDS[rows[0]["column"]]
    assert rows[0]["text"] == TEXTS[rows[0]["column"]]

    # Two new tasks, the ids of the one and the columns of the other alone.
    given = [{"id": row["id"], "random": row["random"], "value": TRUTH[M, row["column"]], "task": "a"} for row in rows]
    given += [
        {key: row[key] for key in ("column", "random")} | {"value": TRUTH[M + 1, row["column"]], "task": "b"}
        for row in rows
    ]
    given[0]["value"] = None
    values = measured(tmp_path / "measured.jsonl", given)
    out = run(monkeypatch, capsys, matrix, "--values", values, "--out", tmp_path / "p", "--threshold", 1, "--top", 6)
    table = pq.read_table(tmp_path / "p" / "prediction.parquet")
    assert table.column_names == ["task", "column", "id", "mean", "std", "low", "high", "evaluated"]
    assert table["task"].to_pylist() == ["a"] * N + ["b"] * N
    assert table["id"].to_pylist() == IDS * 2
    mean, evaluated = table["mean"].to_numpy().reshape(2, N), table["evaluated"].to_numpy().reshape(2, N)
    assert evaluated.sum(1).tolist() == [19, 20]
    assert np.sqrt(np.square(mean - TRUTH[M:]).mean()) < 0.1
    low, high = (table[name].to_numpy().reshape(2, N) for name in ("low", "high"))
    assert 0.8 < ((low <= TRUTH[M:]) & (TRUTH[M:] <= high)).mean() <= 1
    record = json.loads((tmp_path / "p" / "prediction.json").read_text())
    for i, task in enumerate(record["tasks"]):
        bounds = task["audited"]["mean"]
        assert bounds["low"] <= TRUTH[M + i].mean() <= bounds["high"]
        assert f"{bounds['value']:+.4f}" in out
        assert f"{task['audited']['share']['value']:.1%}" in out
        assert [row["column"] for row in task["worst"]] == np.argsort(-mean[i], kind="stable")[:6].tolist()
        assert f"Predicted 6 most forgotten; {task['expected_recall']:.0%} of the true 6" in out
    assert "[bold]text[/]" in out  # a text is no markup

    second = tmp_path / "second.jsonl"
    one = measured(tmp_path / "one.jsonl", given[:20])
    assert "10 examples to evaluate, 0 of them drawn" in run(
        monkeypatch, capsys, matrix, "--choose", 10, "--values", one, "--out", second
    )
    assert not {row["column"] for row in lines(second)} & {row["column"] for row in rows}
    error = run(monkeypatch, capsys, matrix, "--choose", 10, "--values", values, "--out", second)
    assert "values: expected one task with --choose, got 2" in error


def test_without_flags_nothing_is_audited(matrix: Path, tmp_path: Path, monkeypatch, capsys):
    values = measured(tmp_path / "v.jsonl", [{"id": IDS[j], "value": TRUTH[M, j]} for j in range(0, N, 20)])
    out = run(monkeypatch, capsys, matrix, "--values", values, "--out", tmp_path, "--method", "additive")
    assert "audited, nats" not in out
    assert 'no line says "random"' in out
    table = pq.read_table(tmp_path / "prediction.parquet")
    assert "task" not in table.column_names
    expected = ff.ForgettingPredictor("additive").fit(TRUTH[:M]).predict(np.arange(0, N, 20), TRUTH[M, ::20])
    np.testing.assert_array_equal(table["mean"].to_numpy(), expected)
    assert json.loads((tmp_path / "prediction.json").read_text())["tasks"][0]["audited"] is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: expected a JSON object, got '{'"),
        ("[1]", r"line 2: expected a JSON object, got '\[1\]'; write"),
        ('{"value": 1}', "line 2: expected id or column, got neither"),
        ('{"id": "nope", "value": 1}', "line 2: expected the id of an example of the matrix, got 'nope'"),
        ('{"column": 300, "value": 1}', "line 2: expected a column from 0 to 299, got 300"),
        ('{"column": 1.0, "value": 1}', "line 2: expected a column from 0 to 299, got 1.0"),
        ('{"column": 4, "id": "e5", "value": 1}', "line 2: expected column 5 for id 'e5', got 4; leave one of the two out"),
        ('{"id": "e5"}', "line 2: expected a value, got none; add the measured forgetting, or null"),
        ('{"id": "e5", "value": "1"}', "line 2: expected a finite value or null, got '1'"),
        ('{"id": "e5", "value": NaN}', "line 2: expected a finite value or null, got nan"),
        ('{"id": "e5", "value": 1, "random": 1}', "line 2: expected random to be true or false, got 1"),
        ('{"id": "e0", "value": 1}', "line 2: expected every example once, got 'e0' twice; delete a line"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str):
    path = tmp_path / "values.jsonl"
    path.write_text('{"id": "e0", "value": 0.5}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"values\.jsonl, {message}"):
        read_values(path, IDS)
    path.write_text('{"id": "e0", "value": null}\n')
    with pytest.raises(ValueError, match="expected a value of task '' that is a number, got none"):
        read_values(path, IDS)
    path.write_text("\n")
    with pytest.raises(ValueError, match="expected lines with id and value, got none"):
        read_values(path, IDS)


def test_bad_calls(matrix: Path, tmp_path: Path, monkeypatch, capsys):
    none = "expected --analyse, --choose or --values, got none or two"
    assert none in run(monkeypatch, capsys, matrix)
    assert none in run(monkeypatch, capsys, matrix, "--analyse", "--choose", 3)
    assert "out: expected --out, got none" in run(monkeypatch, capsys, matrix, "--choose", 3)
    assert "out: expected --out, got none" in run(monkeypatch, capsys, "memory://run", "--analyse")
    assert "which does not exist" in run(monkeypatch, capsys, tmp_path / "no.npz", "--analyse")
    np.savez(tmp_path / "bare.npz", Z=TRUTH)
    assert "expected an array `values` in" in run(monkeypatch, capsys, tmp_path / "bare.npz", "--analyse")
    np.savez(tmp_path / "objects.npz", values=TRUTH, tasks=np.array([{}] * (M + 2)))
    error = run(monkeypatch, capsys, tmp_path / "objects.npz", "--analyse")
    assert "expected an .npz of plain arrays" in error
    assert "np.array(names, dtype=str)" in error
    values = measured(tmp_path / "v.jsonl", [{"id": "e3", "value": 1.0}])
    assert "top: expected 1 to 300, got 301" in run(
        monkeypatch, capsys, matrix, "--values", values, "--out", tmp_path, "--top", 301
    )
    assert not list(tmp_path.glob("prediction.*"))


def test_the_analysis_is_printed_and_written(matrix: Path, tmp_path: Path, monkeypatch, capsys):
    out = run(monkeypatch, capsys, matrix, "--analyse", "--rank", 3, "--out", tmp_path / "a")
    found = ff.analyse(load_matrix(matrix), rank=3)
    record = json.loads((tmp_path / "a" / "analysis.json").read_text())
    assert record["rank_r2"] == found.rank_r2
    assert record["additive_r2"] == found.additive_r2
    assert sorted(record["task_clusters"]) == sorted(found.tasks)
    np.testing.assert_array_equal(record["task_similarity"], found.task_similarity)
    for part in (f"{found.additive_r2:.3f}", *(f"{share:.3f}" for share in found.rank_r2), "rank 3", "task [0]"):
        assert part in out
    worst = found.most_forgotten(1)[0]
    assert f"{found.example_effects[worst]:+.4f}" in out
    assert f"[bold]text[/] $x^$ {worst} word" in out
    assert imread(tmp_path / "a" / "analysis.png").shape[1] > 1200
    run(monkeypatch, capsys, matrix, "--analyse")
    assert (tmp_path / "analysis.json").exists()  # beside the matrix


def drawn(monkeypatch: pytest.MonkeyPatch, matrix: Any, path: Path) -> Any:
    """The figure of a page."""
    from matplotlib.figure import Figure

    figures, real = [], Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *a, **k: (figures.append(self), real(self, *a, **k))[1])
    report.plot_analysis(matrix, ff.analyse(matrix), path)
    return figures[0]


def test_the_page_shows_the_numbers(tmp_path: Path, monkeypatch):
    values = TRUTH[:M].copy()
    values[2, :150] = np.nan
    values[:, 7] = np.nan
    values[0, 9] = 50.0  # one entry may not set the colours
    figure = drawn(monkeypatch, matrix_of(values, texts=TEXTS), tmp_path / "page.png")
    heat, _, ranks, effects, similarity, *_ = figure.get_axes()
    picture = heat.images[0]
    low, high = picture.get_clim()
    assert low == -high
    assert high < 5
    found = ff.analyse(values)
    shown = np.ma.filled(picture.get_array(), np.nan)
    rows, columns = (np.argsort(-side[:, 0], kind="stable") for side in (found.directions, found.loadings))
    np.testing.assert_allclose(shown, values[np.ix_(rows, columns)])
    np.testing.assert_allclose(ranks.lines[0].get_ydata(), found.rank_r2)
    assert ranks.lines[1].get_ydata()[0] == found.additive_r2
    widths = [bar.get_width() for bar in effects.patches]
    np.testing.assert_allclose(widths, found.mean + np.sort(found.task_effects)[::-1])
    order = report.task_clusters(found)
    np.testing.assert_allclose(similarity.images[0].get_array(), found.task_similarity[np.ix_(order, order)])
    renderer = figure.canvas.get_renderer()
    for axes in figure.get_axes():  # nothing lies outside the page
        box = axes.get_tightbbox(renderer)
        assert min(box.x0, box.y0) >= -1
        assert box.x1 <= figure.bbox.x1 + 1
        assert box.y1 <= figure.bbox.y1 + 1


def test_tasks_that_are_alike_stand_together():
    found = ff.analyse(np.concatenate([TRUTH[:3], -TRUTH[:3] + 0.01, TRUTH[:3] + 0.1])[[0, 3, 1, 4, 6, 2, 5, 7, 8]])
    order = report.task_clusters(found)
    groups = np.sign(found.task_similarity[order[0]][order])
    assert np.count_nonzero(np.diff(groups)) == 1


def test_many_tasks_and_examples_fit_on_the_page(tmp_path: Path, monkeypatch):
    generator = np.random.default_rng(1)
    values = generator.normal(size=(40, 1)) + generator.normal(size=4000)
    figure = drawn(monkeypatch, values, tmp_path / "page.png")
    heat, _, _, effects, *_ = figure.get_axes()
    shown = heat.images[0].get_array()
    assert shown.shape == (40, report.COLUMNS)
    assert heat.get_xlim() == (0, 4000)
    assert "a column is the mean of about 3" in heat.get_xlabel()
    assert len(effects.get_yticklabels()) == 2 * report.EXTREMES + 1
    assert figure.get_figheight() < 16
    for m in (1, 2):
        drawn(monkeypatch, values[:m, :3], tmp_path / "small.png")
    with pytest.raises(ValueError, match=r"path: expected a file ending in \.png, got .*page\.pdf; rename it"):
        report.plot_analysis(values, ff.analyse(values), tmp_path / "page.pdf")


def test_ids_stand_for_columns():
    matrix = matrix_of(TRUTH[:M], examples=IDS)
    predictor = ff.ForgettingPredictor().fit(matrix)
    columns, random = predictor.choose_columns(12)
    ids, values = [IDS[j] for j in columns], TRUTH[M, columns]
    np.testing.assert_array_equal(predictor.predict(ids, values), predictor.predict(columns, values))
    np.testing.assert_array_equal(predictor.predict_interval(ids, values), predictor.predict_interval(columns, values))
    assert predictor.audit(ids, values, random, threshold=1.0) == predictor.audit(
        columns, values, random, threshold=1.0
    )
    by_id, by_column = predictor.screen(np.array(ids), values, 5), predictor.screen(columns, values, 5)
    assert by_id.columns.tolist() == by_column.columns.tolist()
    again = predictor.choose_columns(5, columns=ids, values=values)
    assert again.columns.tolist() == predictor.choose_columns(5, columns=columns, values=values).columns.tolist()
    with pytest.raises(ValueError, match=r"columns: expected ids of the fitted matrix, got 'nope'; see its \.examples"):
        predictor.predict(["e1", "nope"], [0.0, 0.0])
    with pytest.raises(ValueError, match="columns: expected integers after a fit to plain values, got 'e1'"):
        ff.ForgettingPredictor().fit(TRUTH).predict(["e1"], [0.0])
    predictor.fit(matrix_of(TRUTH[:M], examples=IDS[::-1]))
    assert predictor.predict(["e0"], [7.0])[N - 1] == 7.0


def test_a_predictor_says_what_it_is():
    predictor = ff.ForgettingPredictor("svd", rank=2)
    assert repr(predictor) == "ForgettingPredictor('svd', rank=2), not fitted"
    assert repr(predictor.fit(TRUTH)) == "ForgettingPredictor('svd', rank=2), fitted to 14 tasks x 300 examples"
    similar = ff.ForgettingPredictor("similarity", representations=np.ones((N, 4)))
    assert repr(similar) == "ForgettingPredictor('similarity', representations=[300 x 4]), not fitted"


def test_long_rows_are_screened_with_fewer_draws(monkeypatch: pytest.MonkeyPatch):
    class Counted:
        def __init__(self) -> None:
            self.calls = 0

        def standard_t(self, freedom: float, size: int) -> np.ndarray:
            self.calls += 1
            return np.zeros(size)

    for length, draws in ((1000, DRAWS), (400_000, DRAWS // 4)):
        predictor, counted = ff.ForgettingPredictor().fit(TRUTH), Counted()
        monkeypatch.setattr(predictor, "predict", lambda *a, n=length, **k: (np.arange(n), np.ones(n)))
        monkeypatch.setattr(np.random, "default_rng", lambda seed, c=counted: c)
        monkeypatch.setattr(np, "partition", lambda row, kth: row[kth - 1 :])
        predictor.screen([], [], 1)
        monkeypatch.undo()
        assert counted.calls == draws
