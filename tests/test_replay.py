"""Replay: its weights, its draws, its mixing into loaders, what it measures online, its command and its study."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import re
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from scipy import stats
from scipy.special import softmax
from test_cli import run_main
from tiny_models import build, matrix_of, save_world, tiny_model
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import fastforget as ff

EXAMPLES = Path(__file__).parent.parent / "docs/examples"
NAN, INF = float("nan"), float("inf")


# Weights --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.1, 2, 1e-300])
@pytest.mark.parametrize("shift", [0.0, 1e6, -1e300])
def test_weights_are_a_softmax(temperature, shift):
    forecast = np.array([0.25, -0.5, 1.0, 1.0]) + shift
    expected = softmax((forecast - forecast.max()) / temperature)
    np.testing.assert_allclose(ff.replay_weights(forecast, temperature), expected, rtol=1e-12)


def test_weights_of_everything_that_holds_a_row():
    row = [0.25, -0.5, 1.0]
    expected = ff.replay_weights(np.array(row))
    assert expected.dtype == np.float64
    assert expected.sum() == pytest.approx(1.0)
    matrix = matrix_of([row, [NAN, 0, 0]])
    frame = matrix.to_pandas().loc["task 0"]
    tensors = torch.tensor(row, requires_grad=True), torch.tensor(row, dtype=torch.bfloat16)
    for given in (row, matrix.values[0], frame, *tensors):
        np.testing.assert_array_equal(ff.replay_weights(given), expected)
    given = np.array(row)
    ff.replay_weights(given)
    np.testing.assert_array_equal(given, row)  # is not written to


def test_weights_at_the_limits():
    np.testing.assert_array_equal(ff.replay_weights([3.0, -INF, 5.0], temperature=INF), [0.5, 0, 0.5])
    np.testing.assert_array_equal(ff.replay_weights([3.0, 5.0, 4.0], temperature=1e-9), [0, 1, 0])


@pytest.mark.parametrize(
    ("forecast", "temperature", "error", "message"),
    [
        ([0.0, NAN, 1.0, NAN], 0.1, ValueError, r"forecast: expected finite numbers, got NaN at \[1, 3\]; predict"),
        ([0.0, *[NAN] * 12], 0.1, ValueError, "got NaN at .* 10] and 2 more;"),
        ([0.0, INF], 0.1, ValueError, r"forecast: expected finite numbers, got infinity at \[1\]"),
        ([-INF, -INF], 0.1, ValueError, "forecast: expected at least one finite number, got 2 times -inf"),
        ([], 0.1, ValueError, r"forecast: expected shape \[N\], got \(0,\)"),
        (np.zeros((2, 3)), 0.1, ValueError, r"forecast: expected shape \[N\], got \(2, 3\); pass one row"),
        ("row", 0.1, ValueError, r"forecast: expected numbers \[N\], got str"),
        ([0.0], 0, ValueError, "temperature: expected a number > 0, got 0"),
        ([0.0], -INF, ValueError, "temperature: expected a number > 0, got -inf"),
        ([0.0], NAN, ValueError, "temperature: expected a number > 0, got nan"),
        ([0.0], "0.1", TypeError, "temperature: expected a number, got str"),
    ],
)
def test_weights_refuse(forecast, temperature, error, message):
    with pytest.raises(error, match=message):
        ff.replay_weights(forecast, temperature)


# Draws ----------------------------------------------------------------------------------------------------------------


def test_draws_have_the_law_of_drawing_one_after_the_other():
    """All orders of four examples, over 3000 seeds, against the products of their shares of what is left."""
    forecast, seeds = [0.3, 0.2, 0.1, 0.35], 3000
    weights = ff.replay_weights(forecast, 0.2)
    found = Counter(tuple(ff.ReplayMixer(range(4), forecast, temperature=0.2, seed=s).next(4)) for s in range(seeds))
    orders = list(itertools.permutations(range(4)))
    expected = [math.prod(weights[i] / sum(weights[list(order[k:])]) for k, i in enumerate(order)) for order in orders]
    assert sum(expected) == pytest.approx(1)
    assert stats.chisquare([found[order] for order in orders], seeds * np.array(expected)).pvalue > 1e-3


def test_a_pass_takes_all_and_the_next_one_has_another_order():
    forecast = np.where(np.arange(50) % 5, np.linspace(0, 1, 50), -INF)
    mixer = ff.ReplayMixer(range(50), forecast, seed=3)
    first, second = mixer.next(40), mixer.next(40)
    assert sorted(first) == sorted(second) == np.flatnonzero(np.isfinite(forecast)).tolist()
    assert (first != second).any()
    assert (ff.ReplayMixer(range(50), forecast, seed=4).next(40) != first).any()
    in_parts = ff.ReplayMixer(range(50), forecast, seed=3)
    parts = np.concatenate([in_parts.next(count) for count in (0, 1, 38, 7, 34)])
    np.testing.assert_array_equal(parts, [*first, *second])
    assert np.corrcoef(np.arange(40), first)[0, 1] < -0.5  # what is forgotten more comes earlier


def test_far_apart_weights_still_order_the_draws():
    """Probabilities that are zero in floating point still are drawn, last."""
    mixer = ff.ReplayMixer(range(4), [0.0, 3e3, 1e3, 2e3], temperature=0.1)
    assert mixer.next(4).tolist() == [1, 3, 2, 0]
    coldest = ff.ReplayMixer(range(3), [0.0, 1e10, 2e10], temperature=1e-305)
    assert sorted(coldest.next(3)) == [0, 1, 2]


def test_new_weights_do_not_repeat_what_was_drawn():
    for drawn_before in (0, 4, 14, 20):  # at the start, in the first pass, in the second, between two
        mixer = ff.ReplayMixer(range(10), seed=1)
        before = mixer.next(drawn_before)
        mixer.set_forecast(-np.arange(10.0) * 10)
        mixer.order.draws(drawn_before, 1)  # a look at the next one is no draw
        mixer.set_forecast(np.arange(10.0) * 10)
        after = mixer.next(10)
        open_pass = set(before[drawn_before // 10 * 10 :])
        left = 10 - len(open_pass)
        assert after[:left].tolist() == sorted(set(range(10)) - open_pass, reverse=True)
        assert after[left:].tolist() == list(range(9, 9 - len(open_pass), -1))  # then a whole pass
        np.testing.assert_array_equal(mixer.order.draws(0, mixer.position), [*before, *after])


def test_weights_that_change_twice_within_a_pass():
    mixer = ff.ReplayMixer(range(12), seed=1)
    drawn = [mixer.next(3)]
    for seed in (0, 1):
        mixer.set_forecast(np.random.default_rng(seed).normal(size=12))
        drawn.append(mixer.next(4))
    assert len(set(np.concatenate(drawn))) == 11
    mixer.set_forecast([0.0] + [-INF] * 11)  # at most one of these is left
    assert set(mixer.next(3)) == {0}


def test_state_continues_exactly_and_is_json():
    def make(**changes):
        return ff.ReplayMixer(range(30), **({"forecast": np.linspace(0, 1, 30), "seed": 5, "ratio": 0.3} | changes))

    mixer = make()
    mixer.next(7)
    mixer.set_forecast(np.random.default_rng(0).normal(size=30))
    mixer.next(40)
    state = json.loads(json.dumps(mixer.state_dict()))
    other = make()
    other.next(3)
    other.load_state_dict(state)
    np.testing.assert_array_equal(other.next(60), mixer.next(60))
    assert other.state_dict() == mixer.state_dict()
    for changed, name in (({"seed": 6}, "seed"), ({"ratio": 0.2}, "ratio"), ({"forecast": None}, "forecast")):
        with pytest.raises(ValueError, match=f"state: expected one of a mixer with {name} "):
            make(**changed).load_state_dict(state)
    mixer.reset()
    np.testing.assert_array_equal(mixer.next(30), make().next(30))


def test_processes_share_one_order():
    whole = ff.ReplayMixer(range(20), seed=2).next(18)
    mixers = [ff.ReplayMixer(range(20), seed=2) for _ in range(3)]
    for part in (whole[:12], whole[12:]):
        shares = [mixer.next(len(part) // 3, rank=rank, world_size=3) for rank, mixer in enumerate(mixers)]
        np.testing.assert_array_equal(np.stack(shares, 1).ravel(), part)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"upstream": iter([])}, TypeError, "upstream: expected a map-style data set, got list_iterator"),
        ({"upstream": []}, ValueError, "upstream: expected at least one example, got none"),
        ({"forecast": [0.0]}, ValueError, r"forecast: expected shape \[N\] = \(3,\) like upstream, got \(1,\)"),
        ({"forecast": [0, NAN, 0]}, ValueError, "forecast: expected finite numbers, got NaN"),
        ({"temperature": 0}, ValueError, "temperature: "),
        ({"ratio": 0}, ValueError, "ratio: expected a finite number > 0, got 0"),
        ({"ratio": "1/32"}, TypeError, "ratio: expected a number, got str"),
        ({"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
        ({"seed": None}, TypeError, "seed: expected an integer, got NoneType"),
    ],
)
def test_mixer_refuses(arguments, error, message):
    with pytest.raises(error, match=message):
        ff.ReplayMixer(**({"upstream": range(3)} | arguments))


def test_next_refuses():
    mixer = ff.ReplayMixer(range(3))
    with pytest.raises(ValueError, match="count: expected an integer >= 0, got -1"):
        mixer.next(-1)
    with pytest.raises(ValueError, match="rank, world_size: expected both or none, got 1 and None"):
        mixer.next(1, rank=1)
    with pytest.raises(ValueError, match=r"rank: expected an integer in \[0, 2\), got 2"):
        mixer.next(1, rank=2, world_size=2)
    mixer.next(2)
    mixer.set_forecast(np.zeros(3))
    mixer.position = 1
    with pytest.raises(ValueError, match="position: expected at least 2, where the weights changed, got 1"):
        mixer.set_forecast(np.ones(3))


# Loaders --------------------------------------------------------------------------------------------------------------

TRAIN = torch.arange(64)
UPSTREAM = torch.arange(100, 120)


def shuffled(**settings) -> DataLoader:
    return DataLoader(
        TRAIN, **({"batch_size": 6, "shuffle": True, "generator": torch.Generator().manual_seed(1)} | settings)
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_mixing_into_a_loader(workers):
    """The training examples in their order, one replayed after each four, the same with workers that prefetch."""
    plain = shuffled()
    epochs = [torch.cat(list(plain)) for _ in range(3)]
    mixer = ff.ReplayMixer(UPSTREAM, ratio=1 / 4, seed=2)
    loader = mixer(shuffled(num_workers=workers))
    expected = UPSTREAM[ff.ReplayMixer(UPSTREAM, seed=2).next(48)].view(3, 16)
    for train, replayed in zip(epochs, expected, strict=True):
        batches = list(loader)
        assert [len(batch) for batch in batches] == [6] * 13 + [2]
        assert len(loader) == 14
        seen = torch.cat(batches).view(16, 5)
        assert torch.equal(seen[:, :4].flatten(), train)
        assert torch.equal(seen[:, 4], replayed)
    assert mixer.position == 48


@pytest.mark.parametrize("ratio", [Fraction(2, 3), 1 / 3, 1.5, 1 / 64])
def test_ratios(ratio):
    """At every place of an epoch there are as many replayed ones as the ratio says, to the last whole one."""
    is_replayed = torch.cat(list(ff.ReplayMixer(UPSTREAM, ratio=ratio)(shuffled()))) >= 100
    replayed = is_replayed.cumsum(0)
    train = torch.arange(1, len(is_replayed) + 1) - replayed
    before_next = ~is_replayed.roll(-1)
    assert train[-1] == 64
    assert replayed[before_next].tolist() == [math.floor(count * ratio + 1e-9) for count in train[before_next].tolist()]


def test_too_few_training_examples_for_the_ratio():
    with pytest.raises(ValueError, match="ratio: expected at least one replayed example in an epoch of 64 training"):
        ff.ReplayMixer(UPSTREAM, ratio=1 / 65)(shuffled())


def test_an_epoch_begun_again_is_the_same():
    """To resume, an epoch is begun again and what was trained on is skipped."""
    mixer = ff.ReplayMixer(UPSTREAM, ratio=1 / 4)
    loader = mixer(shuffled(shuffle=False))
    epochs = [torch.cat(list(loader)) for _ in range(3)]
    assert not torch.equal(epochs[1], epochs[2])
    loader.sampler.set_epoch(1)
    assert torch.equal(torch.cat(list(loader)), epochs[1])
    assert torch.equal(torch.cat(list(loader)), epochs[2])


def test_new_weights_reach_a_running_loader_and_its_resumed_copy():
    def epoch(mixer, skip, change_at=None):
        loader, seen = mixer(shuffled(shuffle=False, batch_size=5)), []
        for step, batch in enumerate(loader):
            if step == change_at:
                mixer.set_forecast(np.where(np.arange(20) < 8, -INF, 0.0))
            seen.append(batch)
        return torch.cat(seen[skip:])

    mixer = ff.ReplayMixer(UPSTREAM, ratio=1 / 4)
    whole = epoch(mixer, 0, change_at=5)
    replayed = whole[whole >= 100]
    assert (replayed[6:] >= 108).all()
    assert (replayed[:6] < 108).any()
    assert len(set(replayed[:6].tolist()) & set(replayed[6:16].tolist())) <= 6
    resumed = ff.ReplayMixer(UPSTREAM, ratio=1 / 4)
    resumed.load_state_dict(mixer.state_dict())
    assert torch.equal(epoch(resumed, 7), whole[35:])


def test_distributed_samplers_share_the_draws():
    mixed = []
    for rank in range(2):
        sampler = DistributedSampler(TRAIN, num_replicas=2, rank=rank, shuffle=True)
        loader = ff.ReplayMixer(UPSTREAM, ratio=1 / 4)(shuffled(shuffle=False, sampler=sampler))
        loader.sampler.set_epoch(1)
        assert sampler.epoch == 1
        mixed.append(torch.cat(list(loader)))
    seen = torch.stack(mixed, 1)
    assert sorted(seen[seen < 100].tolist()) == TRAIN.tolist()
    expected = UPSTREAM[ff.ReplayMixer(UPSTREAM).next(32)[16:]]  # the second epoch's
    assert torch.equal(seen[seen >= 100], expected)


def test_settings_of_a_loader_are_kept():
    def collate(items):
        return torch.stack(items) * 2

    loader = ff.ReplayMixer(UPSTREAM, ratio=1 / 4)(shuffled(batch_size=7, drop_last=True, collate_fn=collate))
    batches = list(loader)
    assert [len(batch) for batch in batches] == [7] * 11 == [7] * len(loader)
    assert all((batch % 2 == 0).all() for batch in batches)


def test_loaders_that_cannot_be_mixed_are_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(range(3))

    mixer = ff.ReplayMixer(UPSTREAM)
    with pytest.raises(TypeError, match="dataloader: expected a torch DataLoader, got list; use next"):
        mixer([1, 2])
    with pytest.raises(TypeError, match="dataloader: expected a map-style data set, got Stream; use next"):
        mixer(DataLoader(Stream()))
    for own in ({"batch_sampler": [[0], [1]]}, {"batch_size": None}):
        with pytest.raises(ValueError, match="dataloader: expected a batch_size, got "):
            mixer(DataLoader(TRAIN, **own))


# Online ---------------------------------------------------------------------------------------------------------------


def items(count: int) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(4)
    rows = [torch.randint(1, 384, (4 + j % 5,), generator=generator).tolist() for j in range(count)]
    return [
        {"input_ids": row, "labels": [-100, -100, *row[2:]]} if j % 2 else {"input_ids": row}
        for j, row in enumerate(rows)
    ]


def predictor(examples: int) -> ff.ForgettingPredictor:
    generator = np.random.default_rng(1)
    return ff.ForgettingPredictor().fit(generator.normal(size=(9, 2)) @ generator.normal(size=(2, examples)))


def alone(model, item) -> float:
    row = torch.tensor([item["input_ids"]])
    labels = torch.tensor([item["labels"]]) if "labels" in item else None
    with torch.no_grad():
        return ff.log_perplexity(model, row, labels=labels).item()


def test_online_measures_completes_and_replays_by_it():
    upstream, base, tuned = items(24), tiny_model(0), tiny_model(3)
    mixer = ff.ReplayMixer(upstream)
    online = ff.OnlineReplay(mixer, predictor(24), count=10, batch_size=4, seed=2)
    before = mixer.next(3)
    with pytest.raises(ValueError, match=r"base: expected to be measured, got none; call begin\(model\)"):
        online.update(tuned)
    tuned.train()
    online.begin(base)
    row = online.update(tuned)
    assert tuned.training
    chosen = predictor(24).choose_columns(10, seed=2).columns
    np.testing.assert_array_equal(online.columns, chosen)
    expected = [alone(tuned, upstream[j]) - alone(base, upstream[j]) for j in chosen]
    np.testing.assert_allclose(online.values, expected, atol=1e-6)
    np.testing.assert_array_equal(row, predictor(24).predict(chosen, online.values))
    same = ff.ReplayMixer(upstream)
    same.next(3)
    same.set_forecast(row)
    after = mixer.next(21)
    np.testing.assert_array_equal(after, same.next(21))
    assert sorted([*before, *after]) == list(range(24))
    perplexities = [alone(base, item) for item in upstream]
    given = ff.OnlineReplay(ff.ReplayMixer(upstream), predictor(24), count=10, seed=2, base=perplexities)
    given.begin(tuned)  # measures nothing
    np.testing.assert_allclose(given.update(tuned), row, atol=1e-5)


def test_online_state():
    upstream, base = items(24), tiny_model(0)
    online = ff.OnlineReplay(ff.ReplayMixer(upstream), predictor(24), count=6)
    online.begin(base)
    state = json.loads(json.dumps(online.state_dict()))
    assert state["values"] is None
    other = ff.OnlineReplay(ff.ReplayMixer(upstream), predictor(24), count=6)
    other.load_state_dict(state)
    np.testing.assert_array_equal(online.update(tiny_model(3)), other.update(tiny_model(3)))
    with pytest.raises(ValueError, match="state: expected the examples "):
        ff.OnlineReplay(ff.ReplayMixer(upstream), predictor(24), count=6, seed=1).load_state_dict(state)


def test_online_leaves_out_what_is_not_finite():
    broken = tiny_model(3)
    with torch.no_grad():
        broken.get_output_embeddings().weight[5] = NAN  # every example's
    online = ff.OnlineReplay(ff.ReplayMixer(items(24)), predictor(24), count=6)
    online.begin(tiny_model(0))
    assert np.isfinite(online.update(broken)).all()
    assert np.isnan(online.values).all()
    infinite = ff.OnlineReplay(ff.ReplayMixer(items(24)), predictor(24), count=6, base=np.full(24, INF))
    infinite.begin(tiny_model(0))
    assert np.isfinite(infinite.update(tiny_model(3))).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mixer": "m"}, TypeError, "mixer: expected a ReplayMixer, got str"),
        ({"predictor": np.zeros((2, 24))}, TypeError, "predictor: expected a ForgettingPredictor, got ndarray"),
        ({"predictor": predictor(23)}, ValueError, "predictor: expected one of 24 examples like the mixer's, got 23"),
        ({"predictor": ff.ForgettingPredictor()}, ValueError, "predictor: expected a fitted one"),
        ({"start": 1}, ValueError, r"start: expected a share of the steps in \[0, 1\), got 1"),
        ({"count": 25}, ValueError, "count: expected an integer from 0 to 24"),
        ({"base": np.zeros(3)}, ValueError, r"base: expected shape \[N\] = \(24,\) like upstream, got \(3,\)"),
        ({"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
    ],
)
def test_online_refuses(arguments, error, message):
    mixer = ff.ReplayMixer(items(24))
    with pytest.raises(error, match=message):
        ff.OnlineReplay(**({"mixer": mixer, "predictor": predictor(24), "count": 6} | arguments))


def test_online_refuses_items_without_tokens():
    online = ff.OnlineReplay(ff.ReplayMixer(["text"] * 24), predictor(24), count=6)
    with pytest.raises(ValueError, match="upstream: expected items with input_ids, got str; tokenize them"):
        online.begin(tiny_model(0))


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A matrix's."""
    world = save_world(tmp_path_factory.mktemp("world"))
    build(world, world / "matrix")
    return world / "matrix"


def test_command_draws_from_a_matrix(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "replay.jsonl"
    options = ["--task", "lora", "--count", "7", "--seed", "3", "--temperature", "0.05", "--out", str(out)]
    assert run_main(monkeypatch, "replay", str(folder), *options) == 0
    matrix = ff.ForgettingMatrix.load(folder)
    row = matrix.values[matrix.tasks.index("lora")]
    drawn = ff.ReplayMixer(range(40), row, temperature=0.05, seed=3).next(7)
    weights = ff.replay_weights(row, 0.05)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert lines == [
        {"id": matrix.examples[j], "text": matrix.texts[j], "forecast": row[j], "weight": weights[j]} for j in drawn
    ]
    assert f"wrote {out}: 7 examples, {weights[drawn].sum():.1%} of the weight" in capsys.readouterr().out


def test_command_draws_from_a_prediction(folder, tmp_path, monkeypatch):
    matrix = ff.ForgettingMatrix.load(folder)
    out, file = tmp_path / "replay.jsonl", tmp_path / "prediction.parquet"
    mean = np.linspace(0, 1, 40)
    columns = {"column": np.arange(40), "id": matrix.examples, "mean": mean}
    pq.write_table(pa.table(columns), file)
    drawn = ff.ReplayMixer(range(40), mean).next(5)
    for options, extra in (([], {}), (["--matrix", str(folder)], {"text": matrix.texts})):
        assert run_main(monkeypatch, "replay", str(file), "--count", "5", "--out", str(out), *options) == 0
        lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [line["id"] for line in lines] == [matrix.examples[j] for j in drawn]
        assert [line.get("text") for line in lines] == [extra["text"][j] if extra else None for j in drawn]
    pq.write_table(pa.table({**columns, "text": [f"own {j}" for j in range(40)]}), file)
    run_main(monkeypatch, "replay", str(file), "--count", "5", "--out", str(out))
    assert json.loads(out.read_text().splitlines()[0])["text"] == f"own {drawn[0]}"


def test_command_takes_what_predict_writes(tmp_path, monkeypatch):
    """Of several tasks, or of one without a name."""
    from fastforget.prediction.files import Prediction, write_predictions

    ids, out, zeros = [f"{j}" for j in range(9)], tmp_path / "replay.jsonl", np.zeros(9)
    rows = {name: np.random.default_rng(i).normal(size=9) for i, name in enumerate(("one", "two"))}
    rest = {"std": zeros, "low": zeros, "high": zeros, "evaluated": zeros > 0}
    predictions = [Prediction(task=name, mean=row, **rest) for name, row in rows.items()]
    for given, options in ((predictions, ["--task", "two"]), ([predictions[1]._replace(task="")], [])):
        write_predictions(tmp_path / "prediction.parquet", ids, given)
        arguments = [str(tmp_path / "prediction.parquet"), "--count", "4", "--out", str(out), *options]
        assert run_main(monkeypatch, "replay", *arguments) == 0
        drawn = [json.loads(line)["id"] for line in out.read_text().splitlines()]
        assert drawn == [str(j) for j in ff.ReplayMixer(range(9), rows["two"]).next(4)]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("matrix", [], "task: expected --task with one of full, lora, got None"),
        ("matrix", ["--task", "none"], "task: expected --task with one of full, lora, got none"),
        ("matrix", ["--task", "lora", "--count", "41"], "count: expected 1 to 40 examples, as "),
        ("matrix", ["--task", "lora", "--temperature", "0"], "temperature: expected a number > 0, got 0.0"),
        ("units", ["--task", "lora"], "matrix"),
        ("whole", ["--task", "lora"], "task: expected none, since .* names no task, got lora"),
        ("tasks", [], "task: expected --task with one of one, two, got None"),
        ("prediction", [], "source: expected columns id and mean in .* got none named mean"),
        ("text", [], "source: expected the folder of a matrix or a prediction.parquet, got "),
        ("gone", [], "source: expected the folder of a matrix or a prediction.parquet, got "),
    ],
)
def test_command_refuses(source, options, message, folder, tmp_path, monkeypatch, capsys):
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / "prediction")
    pq.write_table(pa.table({"id": ["a"], "mean": [0.0]}), tmp_path / "whole")
    pq.write_table(pa.table({"id": ["a"] * 2, "mean": [0.0] * 2, "task": ["one", "two"]}), tmp_path / "tasks")
    (tmp_path / "text").write_text("text")
    path = {"matrix": folder, "units": folder / "units"}.get(source, tmp_path / source)
    arguments = [str(path), "--count", "1", "--out", str(tmp_path / "out"), *options]
    assert run_main(monkeypatch, "replay", *arguments) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


# The study ------------------------------------------------------------------------------------------------------------


def test_study(tmp_path):
    """One seed in small: any replay keeps more of the text that is never replayed than none, and a second call runs nothing."""
    pytest.importorskip("matplotlib", reason="the example draws")
    command = [sys.executable, str(EXAMPLES / "replay.py"), "--quick", "--out", str(tmp_path / "record")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "record.json").read_text())
    (task,) = record["settings"]["tasks"]
    runs = {name.removeprefix(f"0/{task}/"): run for name, run in record["runs"].items()}
    assert set(runs) == {"none", "random", "predicted", "online", "ground truth", "perplexity"}
    assert runs["none"]["upstream"] > runs["none"]["base"] + 0.1  # it forgets
    order = np.random.default_rng(0).permutation(record["settings"]["examples"])
    held_out = set(order[len(order) // 2 :].tolist())
    for method, run in runs.items():
        if method == "none":
            continue
        assert run["upstream"] < runs["none"]["upstream"] - 0.05, method
        assert len(run["replayed"]) == record["settings"]["task_examples"] * record["settings"]["ratio"]
        assert len(set(run["replayed"])) == len(run["replayed"])
        assert not held_out & set(run["replayed"])
    forgotten = {method: run["their_forgetting"] for method, run in runs.items() if method != "none"}
    assert max(forgotten, key=forgotten.get) == "ground truth"
    assert forgotten["predicted"] > forgotten["random"]
    assert (tmp_path / "record.png").stat().st_size > 10_000
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 0
    assert f"{task}/none" not in again.stdout  # is in the record
    assert json.loads((tmp_path / "record.json").read_text()) == record


def test_the_page_has_the_record(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("replay")
    record = json.loads((EXAMPLES / "replay.json").read_text())
    assert record["settings"] == example.SETTINGS
    assert record["seeds"] == [0, 1, 2, 3, 4]
    pairs = itertools.product(record["seeds"], example.TESTED, example.METHODS)
    assert list(record["runs"]) == ["/".join(map(str, key)) for key in pairs]
    page = (EXAMPLES.parent / "replay.md").read_text(encoding="utf-8")
    assert example.table(record) in page
    for method in ("predicted", "online"):
        assert f"a rank correlation of {example.mean_of(record, method, 'correlation'):.2f}" in page
