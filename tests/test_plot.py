import numpy as np
import pytest
from matplotlib.image import imread
from tiny_models import matrix_of

from fastforget.matrix import plot, plot_heatmap
from fastforget.matrix.result import singular_order

RED, BLUE, GREY = (0.40, 0.0, 0.12), (0.02, 0.19, 0.38), (0.8, 0.8, 0.8)


def share(picture, colour):
    """The share of a picture's pixels that are near a colour."""
    return float((np.abs(picture[..., :3] - colour).max(-1) < 0.02).mean())


def drawn(monkeypatch, matrix, path):
    """The picture, and the axes and figure that it was drawn from."""
    from matplotlib.figure import Figure

    figures = []
    real = Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *a, **k: (figures.append(self), real(self, *a, **k))[1])
    assert plot_heatmap(matrix, path) == path
    return imread(path), figures[0]


def test_the_order_follows_the_first_singular_vectors():
    rng = np.random.default_rng(0)
    rows, columns = np.array([0.2, 3.0, 1.0]), rng.normal(1.0, 1.0, 20)
    by_row, by_column = singular_order(np.outer(rows, columns))
    assert by_row.tolist() == [1, 2, 0]
    assert by_column.tolist() == np.argsort(-columns).tolist()
    values = np.outer(rows, columns)
    values[0, 4] = np.nan
    by_row, by_column = singular_order(values)
    assert by_column[-1] == 4
    assert sorted(by_column) == list(range(20))
    assert singular_order(np.full((2, 3), np.nan))[1].tolist() == [0, 1, 2]


def test_the_picture_says_what_it_shows(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    values = np.outer([1.0, 3.0, -2.0], rng.normal(0.5, 0.5, 90))
    values[2, 5] = np.nan
    names = ["arithmetic", "poetry", "a" * 60]
    noise = {"batch_composition": {"rms": 0.0012, "max": 0.004}, "wider_dtype": {"unmeasured": "memory"}}
    matrix = matrix_of(values, tasks=names, noise=noise)
    picture, figure = drawn(monkeypatch, matrix, tmp_path / "heatmap.png")
    assert picture.shape[1] > 1200
    main, side, bar = figure.axes
    assert figure.get_suptitle() == "Forgetting of 90 upstream examples by 3 fine-tuned models"
    assert bar.get_ylabel() == "log-perplexity increase (nats per token)"
    labels = [text.get_text() for text in main.get_yticklabels()]
    assert labels[0] == "poetry"
    assert all(len(label) <= 40 for label in labels)
    assert main.get_xlabel() == "90 upstream examples, ordered by first singular vector"
    for part in ("1.2e-03", "1 NaN (grey)", "of entries rose"):
        assert part in figure.get_supxlabel()
    image = main.images[0]
    low, high = image.get_clim()
    assert low == -high  # white is no change
    assert high == pytest.approx(np.nanpercentile(np.abs(values), 99))
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), values[np.ix_(*singular_order(values))])
    assert min(share(picture, colour) for colour in (RED, BLUE, GREY)) > 1e-4
    assert len(side.patches) == 3


def test_many_columns_are_averaged_and_still_labelled_by_their_number(tmp_path, monkeypatch):
    values = np.random.default_rng(0).normal(size=(40, 5000))
    picture, figure = drawn(monkeypatch, matrix_of(values, complete=False), tmp_path / "heatmap.png")
    main = figure.axes[0]
    assert main.images[0].get_array().shape == (40, plot.COLUMNS)
    assert main.get_xlim() == (0, 5000)
    assert "unfinished run" in figure.get_supxlabel()
    assert picture.shape[0] < 2200


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"path: expected a file ending in \.png, got .*heatmap\.pdf; rename it"):
        plot_heatmap(matrix_of(np.ones((2, 3))), tmp_path / "heatmap.pdf")
    with pytest.raises(ValueError, match="expected at least one finite value, got none; finish the run first"):
        plot_heatmap(matrix_of(np.full((2, 3), np.nan)), tmp_path / "heatmap.png")
    assert not list(tmp_path.iterdir())
