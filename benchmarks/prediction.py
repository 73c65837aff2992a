"""How well `ForgettingPredictor` predicts a published forgetting matrix, by the protocol of its paper (arXiv 2406.14026).

    python benchmarks/prediction.py --matrix olmo_7b_forgetting.npz --out benchmarks/results/prediction.json

The matrix is OLMo-7B's, 76 tasks (66 FLAN, 10 Tulu) x 1000 Dolma chunks, as its authors publish it; the file holds `values`.
Known tasks are 46 of FLAN; new ones the other 20 (in-domain) and all of Tulu (out-of-domain). Of a new task S = 30 entries are
revealed, drawn anew for each of 10 seeds and each task; the error is pooled over the others. `--validate` is the
leave-one-task-out cross-validation inside the 46 known tasks that the defaults come from.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import fastforget as ff

IN_DOMAIN = [6, 65, 18, 8, 60, 13, 37, 22, 30, 19, 64, 50, 25, 31, 32, 61, 16, 5, 53, 49]
KNOWN = sorted(set(range(66)) - set(IN_DOMAIN))
SPLITS = {"in-domain": IN_DOMAIN, "out-of-domain": list(range(66, 76))}
REVEALED, SEEDS, LEVEL, THRESHOLD, WORST = 30, range(10), 0.9, 0.1, 0.05
METHODS = ("additive", "knn", "svd", "robust")
GRID: dict[str, list[Any]] = {
    "rank": [5, 10, 15],
    "freedom": [3.0, 5.0, 10.0],
    "shrinkage": [0.25, 0.5, 1.0],
    "pooling": [0.0, 0.25, 0.5],
    "inflation": [1.0, 1.5, 2.5],
    "steadiness": [2.0, 5.0, 15.0],
    "outlier": [3.0, 6.0, 8.0, 10.0, 15.0, 1e9],
}


def random_columns(predictor: Any, values: np.ndarray, row: int, generator: np.random.RandomState) -> np.ndarray:
    """As in the paper: drawn with replacement."""
    return np.unique(generator.choice(values.shape[1], REVEALED))


def chosen_columns(predictor: Any, values: np.ndarray, row: int, generator: np.random.RandomState) -> np.ndarray:
    """Half chosen, half random."""
    return predictor.choose_columns(REVEALED, seed=int(generator.randint(2**31))).columns


def errors(
    predictor: Any, values: np.ndarray, rows: Sequence[int], columns: Callable[..., np.ndarray]
) -> dict[str, Any]:
    """Squared errors `[seed, row]`, coverage, and seconds a row."""
    squares, counts, inside, start = [], [], [], time.perf_counter()
    for seed in SEEDS:
        generator = np.random.RandomState(seed)
        for row in rows:
            seen = columns(predictor, values, row, generator)
            mean, low, high = _prediction(predictor, seen, values[row, seen])
            hidden = np.setdiff1d(np.arange(values.shape[1]), seen)
            squares.append(float(np.square(mean - values[row])[hidden].sum()))
            counts.append(len(hidden))
            inside.append(float(((low <= values[row]) & (values[row] <= high))[hidden].mean()))
    shape = len(SEEDS), len(rows)
    seconds = (time.perf_counter() - start) / len(squares)
    found = {"squares": np.reshape(squares, shape), "counts": np.reshape(counts, shape)}
    return found | {"inside": np.reshape(inside, shape), "seconds": seconds}


def _prediction(predictor: Any, seen: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean = predictor.predict(seen, values)
    return mean, *predictor.predict_interval(seen, values, level=LEVEL)


def pooled(found: dict[str, Any]) -> np.ndarray:
    """RMSE x 100 of each seed."""
    return 100 * np.sqrt(found["squares"].sum(1) / found["counts"].sum(1))


def difference(found: dict[str, Any], other: dict[str, Any]) -> list[float]:
    """Mean over seeds of the difference in RMSE x 100, with a 95% interval from tasks drawn anew (bootstrap)."""
    generator, draws = np.random.default_rng(0), []
    count = found["squares"].shape[1]
    for rows in [np.arange(count), *generator.integers(0, count, (2000, count))]:
        parts = [{key: value[key][:, rows] for key in ("squares", "counts")} for value in (found, other)]
        draws.append(float((pooled(parts[0]) - pooled(parts[1])).mean()))
    return [draws[0], *np.quantile(draws[1:], [0.025, 0.975]).tolist()]


def audits(predictor: Any, values: np.ndarray, rows: Sequence[int]) -> dict[str, Any]:
    """Coverage of the audited intervals, and errors of the mean beside those of a plain sample and of the predictions."""
    covered, misses, recall = [], [], []
    for seed, row in itertools.product(SEEDS, rows):
        truth = values[row]
        columns, random = predictor.choose_columns(REVEALED, seed=1000 * seed + row)
        found = predictor.audit(columns, truth[columns], random, threshold=THRESHOLD, level=LEVEL, seed=seed)
        share = float((truth > THRESHOLD).mean())
        covered.append([e.low <= t <= e.high for e, t in ((found.mean, truth.mean()), (found.share, share))])
        guesses = found.mean.value, found.sampled_mean, found.predicted_mean
        misses.append([guess - truth.mean() for guess in guesses])
        k = round(WORST * len(truth))
        screened = predictor.screen(columns, truth[columns], 4 * k)
        worst = set(np.argsort(-truth)[:k].tolist())
        recall.append(len(worst & set(screened.columns.tolist())) / k)
    shares, roots = np.mean(covered, 0), 100 * np.sqrt(np.square(misses).mean(0))
    return {
        "coverage of the mean": float(shares[0]),
        "coverage of the share": float(shares[1]),
        "mean, audited": float(roots[0]),
        "mean, random entries alone": float(roots[1]),
        "mean, predictions alone": float(roots[2]),
        "recall of the worst 5% among the predicted worst 20%": float(np.mean(recall)),
    }


def surprise_models() -> dict[str, Callable[[], Any]] | None:
    """The paper's library with the settings of its code (SVD with the 5 factors of its text), where it is installed."""
    if importlib.util.find_spec("surprise") is None:
        return None
    from surprise import SVD, BaselineOnly, KNNBaseline

    return {
        "BaselineOnly, ALS": lambda: BaselineOnly({"n_epochs": 100}, verbose=False),
        "BaselineOnly, SGD": lambda: BaselineOnly({"method": "sgd", "n_epochs": 100}, verbose=False),
        "KNNBaseline": lambda: KNNBaseline(verbose=False),
        "SVD": lambda: SVD(n_factors=5, n_epochs=100, random_state=0),
    }


def surprise_errors(values: np.ndarray, rows: Sequence[int], model: Callable[[], Any]) -> dict[str, Any]:
    """Squared errors as of `errors`; every new row is another fit, whose seconds count."""
    import pandas as pd
    from surprise import Dataset, Reader

    task, example = np.meshgrid(KNOWN, np.arange(values.shape[1]), indexing="ij")
    known = np.stack([task.ravel(), example.ravel(), values[KNOWN].ravel()], 1)
    squares, counts, start = [], [], time.perf_counter()
    for seed in SEEDS:
        generator = np.random.RandomState(seed)
        for row in rows:
            seen = random_columns(None, values, row, generator)
            own = np.stack([np.full(len(seen), row), seen, values[row, seen]], 1)
            frame = pd.DataFrame(np.concatenate([known, own]), columns=["user", "item", "rating"])
            fitted = model().fit(Dataset.load_from_df(frame, Reader(rating_scale=(-100, 100))).build_full_trainset())
            hidden = np.setdiff1d(np.arange(values.shape[1]), seen)
            predicted = np.array([fitted.predict(float(row), float(j)).est for j in hidden])
            squares.append(float(np.square(predicted - values[row, hidden]).sum()))
            counts.append(len(hidden))
    shape = len(SEEDS), len(rows)
    seconds = (time.perf_counter() - start) / len(squares)
    return {"squares": np.reshape(squares, shape), "counts": np.reshape(counts, shape), "seconds": seconds}


def summarised(own: dict[str, Any], svd: dict[str, Any]) -> dict[str, Any]:
    """A row of the table."""
    each = pooled(own)
    row = {"rmse": float(each.mean()), "deviation": float(each.std(ddof=1)), "against svd": difference(own, svd)}
    coverage = {"coverage": float(own["inside"].mean())} if "inside" in own else {}
    return row | coverage | {"seconds": own["seconds"]}


def measured(values: np.ndarray) -> dict[str, Any]:
    """Everything of the record."""
    record: dict[str, Any] = {"matrix": list(values.shape), "revealed": REVEALED, "seeds": len(SEEDS), "splits": {}}
    predictors = {method: ff.ForgettingPredictor(method).fit(values[KNOWN]) for method in METHODS}
    for split, rows in SPLITS.items():
        found = {method: errors(predictors[method], values, rows, random_columns) for method in METHODS}
        found["robust, chosen columns"] = errors(predictors["robust"], values, rows, chosen_columns)
        theirs = surprise_models()
        for name, model in (theirs or {}).items():
            found[f"scikit-surprise {name}"] = surprise_errors(values, rows, model)
        table: dict[str, Any] = {name: summarised(own, found["svd"]) for name, own in found.items()}
        if theirs is None:
            table["scikit-surprise"] = {"unavailable": "not installed"}
        record["splits"][split] = {"table": table, "audit": audits(predictors["robust"], values, rows)}
    return record


def table(record: dict[str, Any]) -> str:
    """The record's errors in Markdown."""
    lines = ["| | in-domain | against svd | out-of-domain | against svd | intervals of 90% hold | ms a row |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    splits = [record["splits"][split]["table"] for split in SPLITS]
    for name in splits[0]:
        rows = [split[name] for split in splits]
        if "unavailable" in rows[0]:
            lines.append(f"| {name} | {rows[0]['unavailable']} | | | | | |")
            continue
        cells = [name]
        for row in rows:
            mean, low, high = row["against svd"]
            against = "" if low == high else f"{mean:+.2f} ({low:+.2f} to {high:+.2f})"
            cells += [f"{row['rmse']:.2f} +- {row['deviation']:.2f}", against]
        held = ", ".join(f"{row['coverage']:.0%}" for row in rows if "coverage" in row)
        speed = f"{1000 * max(row['seconds'] for row in rows):.0f}"
        lines.append(f"| {' | '.join(cells)} | {held} | {speed} |")
    return "\n".join(lines)


def validated(values: np.ndarray) -> Iterator[dict[str, Any]]:
    """Leave one known task out, with one setting changed at a time: RMSE x 100 with random and with chosen columns."""
    for name, value in [("defaults", None), *((n, v) for n, options in GRID.items() for v in options)]:
        settings = {} if value is None else {name: value}
        roots = []
        for columns in (random_columns, chosen_columns):
            squares, count = 0.0, 0
            for row in KNOWN:
                predictor = ff.ForgettingPredictor(**settings).fit(values[[i for i in KNOWN if i != row]])
                for seed in range(3):
                    seen = columns(predictor, values, row, np.random.RandomState(1000 * seed + row))
                    hidden = np.setdiff1d(np.arange(values.shape[1]), seen)
                    error = (predictor.predict(seen, values[row, seen]) - values[row])[hidden]
                    squares, count = squares + float(error @ error), count + len(hidden)
            roots.append(100 * float(np.sqrt(squares / count)))
        yield {"setting": name, "value": value, "random": roots[0], "chosen": roots[1]}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Prediction of a published forgetting matrix.")
    parser.add_argument("--matrix", type=Path, required=True, help="npz with `values` [76, 1000]")
    parser.add_argument("--out", type=Path, help="the record, JSON")
    parser.add_argument("--validate", action="store_true", help="cross-validate the settings instead")
    given = parser.parse_args()
    with np.load(given.matrix, allow_pickle=False) as file:
        values = file["values"].astype(np.float64)
    if given.validate:
        record: Any = []
        for line in validated(values):
            record.append(line)
            print(
                f"{line['setting']:12} {line['value']!s:8} random {line['random']:.3f}  chosen {line['chosen']:.3f}",
                flush=True,
            )
    else:
        record = measured(values)
        print(json.dumps(record, indent=1))
    if given.out:
        given.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
