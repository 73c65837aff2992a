"""Replay in transformers' Trainer: which examples are seen, in which order, and that a resumed training is the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import tiny_model
from torch import Tensor
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainingArguments

import fastforget as ff

TRAIN, POOL = 40, 24  # examples; the first token of each is its number, upstream ones counted on


def items(first: int, count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(first)
    rows = torch.randint(100, 384, (count, 6), generator=generator)
    rows[:, 0] = first + torch.arange(count)
    return [{"input_ids": row, "labels": row} for row in rows]


class Recording(Trainer):
    """Keeps what every step is given."""

    def training_step(self, model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
        self.__dict__.setdefault("seen", []).append(inputs["input_ids"][:, 0].tolist())
        return super().training_step(model, inputs, *rest, **named)


def trainer_of(folder: Path, **settings: Any) -> Recording:
    arguments = {"learning_rate": 1e-2, "num_train_epochs": 2, "per_device_train_batch_size": 5, "save_strategy": "no"}
    arguments |= {
        "disable_tqdm": True,
        "report_to": "none",
        "use_cpu": True,
        "logging_strategy": "no",
        "seed": 7,
    } | settings
    return Recording(tiny_model(0), TrainingArguments(str(folder), **arguments), train_dataset=items(0, TRAIN))


def mixer_of(**settings: Any) -> ff.ReplayMixer:
    return ff.ReplayMixer(items(TRAIN, POOL), **({"ratio": 1 / 4, "seed": 3} | settings))


def online_of(mixer: ff.ReplayMixer, **settings: Any) -> ff.OnlineReplay:
    generator = np.random.default_rng(1)
    predictor = ff.ForgettingPredictor().fit(generator.normal(size=(9, 2)) @ generator.normal(size=(2, POOL)))
    return ff.OnlineReplay(mixer, predictor, **({"count": 8, "start": 0.3} | settings))


def flat(trainer: Recording) -> list[int]:
    return [index for batch in trainer.seen for index in batch]


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("settings", [{}, {"dataloader_num_workers": 2}, {"gradient_accumulation_steps": 3}], ids=str)
def test_what_is_seen(settings: dict[str, Any], tmp_path: Path):
    """The draws of the seed, one after every four training examples, and these as they come without replay."""
    plain, mixed, mixer = (
        trainer_of(tmp_path),
        trainer_of(tmp_path, **settings),
        mixer_of(forecast=np.linspace(0, 1, POOL)),
    )
    plain.train()
    assert mixer.attach(mixed) is mixed
    mixed.train()
    seen = np.array(flat(mixed)).reshape(-1, 5)
    draws = ff.ReplayMixer(range(POOL), np.linspace(0, 1, POOL), seed=3).next(20)
    np.testing.assert_array_equal(seen[:, 4], TRAIN + draws)
    np.testing.assert_array_equal(seen[:, :4].ravel(), flat(plain))
    assert mixed.state.global_step == (2 * 4 if "gradient_accumulation_steps" in settings else 2 * 10)
    assert len(mixed.train_dataset) == TRAIN  # is its own again
    first = flat(mixed)
    mixed.seen.clear()
    mixed.train()  # another training draws the same
    assert flat(mixed) == first


@pytest.mark.parametrize("at", [4, 10, 13], ids=lambda at: f"step {at}")  # within an epoch, between two, in the second
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_training_is_the_same(workers: int, at: int, tmp_path: Path):
    """Bit for bit, with the forecast that changes in step 6."""
    settings = {"save_strategy": "steps", "save_steps": at, "dataloader_num_workers": workers}

    def train(resume: str | None) -> tuple[Recording, ff.OnlineReplay]:
        trainer, mixer = trainer_of(tmp_path, **settings), mixer_of()
        online = online_of(mixer)
        mixer.attach(trainer, online)
        trainer.train(resume_from_checkpoint=resume)
        return trainer, online

    whole, online = train(None)
    resumed, again = train(str(tmp_path / f"checkpoint-{at}"))
    assert resumed.seen == whole.seen[at:]
    assert again.state_dict() == online.state_dict()
    assert_same(weights(whole), weights(resumed))
    assert not torch.equal(weights(whole)["lm_head.weight"], tiny_model(0).state_dict()["lm_head.weight"])


def test_online_replay(tmp_path: Path):
    """At random in the first steps, then by the completed row of the model that is trained."""
    trainer, mixer = trainer_of(tmp_path), mixer_of(temperature=1e-3)
    online = online_of(mixer)
    measured, update = [], online.update

    def watched(model: Any) -> np.ndarray:
        measured.append((trainer.state.global_step, online.measure(model)))
        return update(model)

    online.update = watched
    mixer.attach(trainer, online).train()
    assert [step for step, _ in measured] == [6]  # 30% of 20
    np.testing.assert_array_equal(online.values, measured[0][1] - online.measure(tiny_model(0)))
    row = online.predictor.predict(online.columns, online.values)
    replayed = [index - TRAIN for index in flat(trainer) if index >= TRAIN]
    random = ff.ReplayMixer(range(POOL), seed=3).next(20)
    drawn = next(k for k in range(20) if replayed[k] != random[k])
    assert drawn in (7, 8)  # accelerate has a batch prefetched
    rest = np.setdiff1d(np.arange(POOL), replayed[:7])
    expected = rest[np.argsort(-row[rest])]
    np.testing.assert_array_equal(replayed[7:], expected[:13])
    online.start = 0.1
    trainer.seen.clear()
    trainer.train()  # begins anew
    assert [step for step, _ in measured] == [6, 2]
    replayed = [index - TRAIN for index in flat(trainer) if index >= TRAIN]
    assert replayed[:3] == random[:3].tolist()
    assert replayed[3:] != random[3:].tolist()


def test_the_checkpoint_has_the_state(tmp_path: Path):
    trainer, mixer = trainer_of(tmp_path, save_strategy="steps", save_steps=8), mixer_of()
    mixer.attach(trainer, online_of(mixer)).train()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    kept = state["stateful_callbacks"]["fastforget.replay"]
    assert kept["mixer"]["seed"] == 3
    assert len(kept["online"]["values"]) == 8
    other = trainer_of(tmp_path)
    mixer_of(seed=4).attach(other)
    with pytest.raises(ValueError, match="state: expected one of a mixer with seed 4, got 3"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))


def test_a_checkpoint_without_replay(tmp_path: Path):
    """Offline replay may begin there, online replay only where the base is known."""
    trainer_of(tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = str(tmp_path / "checkpoint-4")
    trainer, mixer = trainer_of(tmp_path), mixer_of()
    mixer.attach(trainer, online_of(mixer))
    with pytest.raises(
        ValueError, match="base: expected in the checkpoint, got one of a training without online replay"
    ):
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer, mixer = trainer_of(tmp_path), mixer_of()
    online = online_of(mixer, base=np.full(POOL, 6.0))
    mixer.attach(trainer, online).train(resume_from_checkpoint=checkpoint)
    assert online.values is not None


def test_refusals(tmp_path: Path):
    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(items(0, 8))

    mixer = mixer_of()
    with pytest.raises(TypeError, match="trainer: expected a transformers Trainer, got LlamaForCausalLM"):
        mixer.attach(tiny_model(0))
    trainer = mixer.attach(trainer_of(tmp_path))
    with pytest.raises(ValueError, match="trainer: expected one without replay, got one that a mixer is attached to"):
        mixer.attach(trainer)
    with pytest.raises(ValueError, match="online: expected one of this mixer, got one of another"):
        mixer.attach(trainer_of(tmp_path), online_of(mixer_of()))
    trainer.train_dataset = Stream()
    trainer.args.max_steps = 2
    with pytest.raises(TypeError, match="trainer: expected a map-style train_dataset, got Stream; mix"):
        trainer.train()
    balanced = mixer.attach(trainer_of(tmp_path, train_sampling_strategy="batch_rebalance"))
    with pytest.raises(ValueError, match="trainer: expected a sampler of examples, got BatchRebalanceSampler; choose"):
        balanced.train()


TWO_PROCESSES = """
import json, sys
from pathlib import Path
import torch
import fastforget.replay.online
from accelerate import Accelerator
from test_replay_trainer import *
from torch.utils.data import DataLoader

folder = Path(sys.argv[1])
rank = int(os.environ["RANK"])

measured = fastforget.replay.online.log_perplexity
fastforget.replay.online.log_perplexity = lambda *given: measured(*given) * (1 + rank)  # the first one's is to hold

def train(name, resume=None):
    trainer, mixer = trainer_of(folder / "run", save_strategy="steps", save_steps=3, ddp_backend="gloo"), mixer_of()
    online = online_of(mixer)
    mixer.attach(trainer, online).train(resume_from_checkpoint=resume)
    own = ff.ReplayMixer(range(POOL), seed=3).next(2).tolist()
    torch.manual_seed(rank)
    loader = ff.ReplayMixer(range(TRAIN, TRAIN + POOL), ratio=1 / 4)(DataLoader(range(TRAIN), batch_size=5, shuffle=True))
    own_loop = torch.cat(list(Accelerator(cpu=True).prepare(loader))).tolist()
    result = {"own_loop": own_loop, "seen": trainer.seen, "values": online.values.tolist(), "own": own}
    (folder / f"{name}-{rank}.json").write_text(json.dumps(result))
    torch.save(weights(trainer), folder / f"{name}-{rank}.pt")
    return trainer

train("whole")
train("resumed", str(folder / "run" / "checkpoint-6"))
torch.distributed.destroy_process_group()
"""


def test_two_processes(tmp_path: Path):
    """Each has its own share of one order; resumed inside the second epoch they go on as they would have."""
    port = 29500 + os.getpid() % 1000
    tests = Path(__file__).parent
    paths = [str(tests), str(tests.parent), str(tests.parent / "kernels")]
    shared = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    shared |= {"WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(tmp_path)],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(error[-2000:] for error in errors)
    whole, resumed = (
        [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]
        for name in ("whole", "resumed")
    )
    batches = [batch for pair in zip(*(part["seen"] for part in whole), strict=True) for batch in pair]
    seen = np.concatenate(batches).reshape(2, 50)  # epochs
    replayed = seen[seen >= TRAIN].reshape(2, 10)
    draws = ff.ReplayMixer(range(POOL), seed=3).next(4).tolist()
    assert (replayed[0][:4] - TRAIN).tolist() == draws
    assert len(set(replayed.ravel())) == 20  # of 24
    for epoch in seen:
        assert sorted(epoch[epoch < TRAIN]) == list(range(TRAIN))
    assert (seen[0] != seen[1]).any()
    own_loop = [index for part in whole for index in part["own_loop"] if index < TRAIN]
    assert sorted(own_loop) == list(range(TRAIN))
    assert [part["own"] for part in whole] == [draws[0::2], draws[1::2]]
    assert whole[0]["values"] == whole[1]["values"] == resumed[0]["values"]
    for rank in range(2):
        assert resumed[rank]["seen"] == whole[rank]["seen"][6:]
        first, second = (torch.load(tmp_path / f"{name}-{rank}.pt", weights_only=True) for name in ("whole", "resumed"))
        assert_same(first, second)
