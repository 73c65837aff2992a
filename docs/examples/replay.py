"""Replay of upstream examples, chosen in several ways, while a small Llama learns other text: what is kept of the rest?

A model is trained once on six kinds of text, the upstream. Then it is fine-tuned on one of four tasks, other kinds of text,
while one upstream example is replayed for every 32 training examples, drawn from one half of the upstream examples. The other
half, which is never replayed, tells what is kept. The ways to draw:

- none: no replay,
- random: all examples equally,
- predicted: by the forgetting that a predictor completes from 30 entries, measured after a first fine-tuning without replay,
  and a forgetting matrix of ten other tasks,
- online: at random in the first tenth of the steps, then by what the predictor completes from 30 entries measured then,
- ground truth: by the measured forgetting of the fine-tuning without replay,
- perplexity: by how close the base's log-perplexity of the example is to the median.

    python docs/examples/replay.py --seeds 0 1 2 3 4 --out replay

writes `replay.json`, every number of it, `replay.png`, and the folder `replay` with the base model and the matrix. A run that
is in the record already is not run again. `--quick` is one seed of one task with small sizes, in seconds.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import platform
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM
from transformers.utils import logging

import fastforget as ff
from fastforget._files import write_atomically
from fastforget.demo.text import TASKS, UPSTREAM, Domain, library_files, sample
from fastforget.demo.training import new_model, pack, train_tokenizer

METHODS = ["none", "random", "predicted", "online", "ground truth", "perplexity"]
TESTED = ["email", "web", "bytecode", "html"]  # every third task
OTHERS = [
    *(domain for domain in TASKS if domain.name not in TESTED),
    Domain(
        "imports", "", partial(library_files, "importlib/**/*.py", "pkgutil.py", "runpy.py", "site.py", "zipimport.py")
    ),
    Domain("sockets", "", partial(library_files, "ssl.py", "socket*.py", "selectors.py", "wsgiref/*.py", "poplib.py")),
]
SETTINGS: dict[str, Any] = {
    "hidden": 128,
    "layers": 4,
    "vocabulary": 2048,
    "length": 64,  # tokens of an example
    "batch": 16,
    "base_steps": 2400,
    "base_lr": 2e-3,
    "upstream_characters": 300_000,  # of each kind of text
    "examples": 960,  # one half to replay, the other to measure on
    "task_examples": 480,
    "task_held_out": 64,
    "epochs": 2,
    "lr": 5e-4,
    "ratio": 1 / 32,
    "temperature": 0.1,
    "revealed": 30,
    "others": len(OTHERS),
    "tasks": TESTED,
}
QUICK = SETTINGS | {
    "hidden": 64,
    "layers": 2,
    "vocabulary": 512,
    "base_steps": 100,
    "upstream_characters": 30_000,
    "examples": 120,
    "task_examples": 160,
    "task_held_out": 16,
    "epochs": 1,
    "lr": 2e-3,
    "ratio": 1 / 4,
    "revealed": 10,
    "others": 3,
    "tasks": TESTED[-1:],
}


class Study:
    """Text, base model and forgetting matrix; made once and kept in a folder."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        folder.mkdir(parents=True, exist_ok=True)
        upstream = [sample(domain.find(), settings["upstream_characters"], seed=0) for domain in UPSTREAM]
        texts = [document.text for documents in upstream for document in documents]
        self.tokenizer = train_tokenizer(texts, settings["vocabulary"], settings["length"])
        rows = [self._shuffled(pack(documents, self.tokenizer, settings["length"])) for documents in upstream]
        self.upstream_rows = torch.cat(rows)
        self.examples = torch.cat([part[: settings["examples"] // len(rows)] for part in rows])  # [N, T]
        self.domains = {domain.name: domain for domain in TASKS} | {domain.name: domain for domain in OTHERS}
        self._tasks: dict[str, Tensor] = {}
        self.base_folder = folder / "base"
        if not self.base_folder.exists():
            self._train_base()
        self._base = LlamaForCausalLM.from_pretrained(self.base_folder, dtype=torch.float32)
        self.base_perplexity = self.log_perplexity(self.base(), self.examples)
        self.matrix = np.stack(
            [self.forgetting(domain.name, seed=0) for domain in OTHERS[: settings["others"]]]
        )  # [M, N]

    def base(self) -> Any:
        """A copy of the base model."""
        return copy.deepcopy(self._base)

    def task(self, name: str) -> tuple[Tensor, Tensor]:
        """Rows to train on and rows to measure on."""
        if name not in self._tasks:
            count = self.settings["task_examples"] + self.settings["task_held_out"]
            documents = self.domains[name].find()
            documents = sample(documents, 8 * count * self.settings["length"], seed=0)
            self._tasks[name] = self._shuffled(pack(documents, self.tokenizer, self.settings["length"]))[:count]
        rows = self._tasks[name]
        return rows[self.settings["task_held_out"] :], rows[: self.settings["task_held_out"]]

    def halves(self, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The upstream examples that may be replayed, and those to measure on."""
        order = np.random.default_rng(seed).permutation(len(self.examples))
        return np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])

    def loader(self, name: str, seed: int) -> DataLoader[Any]:
        """The task's training examples; the same order for every method."""
        items = [{"input_ids": row} for row in self.task(name)[0]]
        generator = torch.Generator().manual_seed(seed)
        return DataLoader(items, batch_size=self.settings["batch"], shuffle=True, generator=generator)

    def fine_tune(self, name: str, seed: int, mixer: Any = None, online: Any = None) -> Any:
        """Plain AdamW, with replay if there is a mixer."""
        model, loader = self.base(), self.loader(name, seed)
        loader = loader if mixer is None else mixer(loader)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.settings["lr"], weight_decay=0.01, fused=True)
        steps, step = self.settings["epochs"] * len(loader), 0
        if online is not None:
            online.begin(model)
        for _ in range(self.settings["epochs"]):
            for batch in loader:
                self._step(model, optimizer, batch["input_ids"])
                step += 1
                if online is not None and step == -(-steps // 10):
                    online.update(model)
        return model.eval()

    def log_perplexity(self, model: Any, rows: Tensor) -> np.ndarray:
        """Of every row, nats per token."""
        with torch.no_grad():
            return torch.cat([ff.log_perplexity(model, part) for part in rows.split(64)]).double().numpy()

    def forgetting(self, name: str, seed: int) -> np.ndarray:
        """Forgetting of all upstream examples by a fine-tuning without replay, `[N]`."""
        path = self.folder / f"{name}-{seed}.safetensors"
        if not path.exists():
            model = self.fine_tune(name, seed)
            found = {
                "forgetting": self.log_perplexity(model, self.examples) - self.base_perplexity,
                "task": self.log_perplexity(model, self.task(name)[1]),
            }
            write_atomically(path, lambda temporary: save_file(found, temporary))
        return load_file(path)["forgetting"]

    def mixer(self, method: str, name: str, seed: int) -> tuple[Any, Any]:
        """A mixer over the replayed half, and what makes its forecast while training, if anything does."""
        pool, _ = self.halves(seed)
        items = [{"input_ids": self.examples[j]} for j in pool]
        make = partial(
            ff.ReplayMixer, items, temperature=self.settings["temperature"], ratio=self.settings["ratio"], seed=seed
        )
        if method == "random":
            return make(None), None
        if method == "ground truth":
            return make(self.forgetting(name, seed)[pool]), None
        if method == "perplexity":
            perplexity = self.base_perplexity[pool]
            return make(-np.abs(perplexity - np.median(perplexity))), None
        predictor = ff.ForgettingPredictor().fit(self.matrix[:, pool])
        if method == "predicted":
            columns = predictor.choose_columns(self.settings["revealed"], seed=seed).columns
            return make(predictor.predict(columns, self.forgetting(name, seed)[pool][columns])), None
        mixer = make(None)
        return mixer, ff.OnlineReplay(mixer, predictor, count=self.settings["revealed"], seed=seed)

    def run(self, method: str, name: str, seed: int) -> dict[str, Any]:
        """One fine-tuning, and what is left."""
        start, (pool, held_out) = time.perf_counter(), self.halves(seed)
        found: dict[str, Any] = {"base": float(self.base_perplexity[held_out].mean())}
        if method == "none":
            forgotten = self.forgetting(name, seed)
            found["upstream"] = found["base"] + float(forgotten[held_out].mean())
            found["task"] = float(load_file(self.folder / f"{name}-{seed}.safetensors")["task"].mean())
            return found | {"seconds": time.perf_counter() - start}
        mixer, online = self.mixer(method, name, seed)
        model = self.fine_tune(name, seed, mixer, online)
        found["upstream"] = float(self.log_perplexity(model, self.examples[held_out]).mean())
        found["task"] = float(self.log_perplexity(model, self.task(name)[1]).mean())
        draws = mixer.order.draws(0, mixer.position)
        assert not set(pool[draws]) & set(held_out)
        truth = self.forgetting(name, seed)[pool]
        found |= {"replayed": pool[draws].tolist(), "their_forgetting": float(truth[draws].mean())}
        if method in ("predicted", "online"):
            forecast = mixer.order.stretches[-1].log_weights
            found["correlation"] = float(stats.spearmanr(forecast, truth).statistic)
        return found | {"seconds": time.perf_counter() - start}

    # Inside -----------------------------------------------------------------------------------------------------------

    def _shuffled(self, rows: Tensor) -> Tensor:
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]

    def _step(self, model: Any, optimizer: Any, input_ids: Tensor) -> None:
        model.train()
        model(input_ids=input_ids, labels=input_ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    def _train_base(self) -> None:
        settings = self.settings
        size = {"hidden": settings["hidden"], "layers": settings["layers"], "max_length": settings["length"]}
        model: Any = new_model(self.tokenizer, seed=0, **size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings["base_lr"], weight_decay=0.01, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, settings["base_lr"], total_steps=settings["base_steps"] + 1, cycle_momentum=False
        )
        generator = torch.Generator().manual_seed(0)
        for _ in range(settings["base_steps"]):
            chosen = torch.randint(len(self.upstream_rows), (settings["batch"],), generator=generator)
            self._step(model, optimizer, self.upstream_rows[chosen])
            schedule.step()
        unfinished = self.base_folder.with_suffix(".part")
        model.save_pretrained(unfinished)
        unfinished.replace(self.base_folder)


def differences(record: dict[str, Any], method: str, other: str, task: str | None = None) -> np.ndarray:
    """Of the log-perplexity of the held-out upstream examples, for each task and seed."""
    pairs = [(t, seed) for t in record["settings"]["tasks"] for seed in record["seeds"] if task in (None, t)]
    runs = record["runs"]
    return np.array([runs[f"{s}/{t}/{method}"]["upstream"] - runs[f"{s}/{t}/{other}"]["upstream"] for t, s in pairs])


def interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean, 95%, by Student's t."""
    if len(values) < 2:
        return float("nan"), float("nan")
    found = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    return float(found.low), float(found.high)


def mean_of(record: dict[str, Any], method: str, key: str) -> float:
    """Over all tasks and seeds."""
    return float(np.mean([run[key] for name, run in record["runs"].items() if name.endswith(f"/{method}")]))


def table(record: dict[str, Any]) -> str:
    """Every method against no replay and random replay, in Markdown."""
    lines = [
        "| replay | upstream, held out | against none | against random | better in | replayed | task |",
        "|---|---:|---:|---:|---:|---:|---:|",
        f"| (before) | {mean_of(record, 'none', 'base'):.3f} | | | | | |",
    ]
    for method in METHODS:
        cells = [f"{mean_of(record, method, 'upstream'):.3f}"]
        for other in ("none", "random"):
            values = differences(record, method, other)
            low, high = interval(values)
            cells.append("" if method in (other, "none") else f"{values.mean():+.4f} ({low:+.4f} to {high:+.4f})")
        tasks = record["settings"]["tasks"]
        better = sum(differences(record, method, "random", task).mean() < 0 for task in tasks)
        cells.append("" if method in ("none", "random") else f"{better} of {len(tasks)} tasks")
        cells.append("" if method == "none" else f"{mean_of(record, method, 'their_forgetting'):+.3f}")
        lines.append(f"| {method} | {' | '.join(cells)} | {mean_of(record, method, 'task'):.3f} |")
    return "\n".join(lines)


def draw(record: dict[str, Any], path: Path) -> None:
    """What is forgotten with each method, and the paired differences to random replay."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    tasks, colors = record["settings"]["tasks"], ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]
    for axis, methods in zip(axes, (METHODS, METHODS[2:]), strict=True):
        for place, method in enumerate(methods):
            for i, task in enumerate(tasks):
                runs = [record["runs"][f"{seed}/{task}/{method}"] for seed in record["seeds"]]
                forgotten = np.array([run["upstream"] - run["base"] for run in runs])
                values = forgotten if axis is axes[0] else differences(record, method, "random", task)
                offset = place + 0.12 * (i - (len(tasks) - 1) / 2)
                label = task if place == 0 else None
                axis.plot([offset] * len(values), values, ".", color=colors[i], alpha=0.6, label=label)
            if axis is axes[1]:
                values = differences(record, method, "random")
                low, high = interval(values)
                axis.errorbar(
                    place + 0.33,
                    values.mean(),
                    [[values.mean() - low], [high - values.mean()]],
                    fmt="ok",
                    ms=4,
                    capsize=3,
                    label="mean, 95%" if place == 0 else None,
                )
            else:
                mean = mean_of(record, method, "upstream") - mean_of(record, method, "base")
                axis.plot([place - 0.35, place + 0.35], [mean, mean], color="black", lw=1)
        axis.set_xticks(range(len(methods)), [method.replace(" ", "\n") for method in methods])
    axes[1].axhline(0, color="black", lw=0.8)
    axes[0].set(ylabel="increase of log-perplexity, nats per token", title="forgetting of upstream text, held out")
    axes[1].set(ylabel="difference to random replay", title="against random replay (down is better)")
    axes[0].set_ylim(bottom=0)
    axes[1].legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


def save(record: dict[str, Any], path: Path) -> None:
    """Whole or not at all, one run a line."""
    runs = ",\n".join(f"  {json.dumps(name)}: {json.dumps(run)}" for name, run in record["runs"].items())
    text = json.dumps(record | {"runs": {}}, indent=1).replace('"runs": {}', f'"runs": {{\n{runs}\n }}') + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main() -> None:
    """Run what is missing, write the record and the picture, print a table."""
    parser = argparse.ArgumentParser(description="Replay of upstream examples, chosen in several ways.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("replay"), help="path of the results, without ending")
    parser.add_argument("--quick", action="store_true", help="one task, small sizes")
    given = parser.parse_args()
    path = given.out.with_suffix(".json")
    record: dict[str, Any] = {
        "settings": QUICK if given.quick else SETTINGS,
        "fastforget": ff.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seeds": [],
        "runs": {},
    }
    if path.exists():
        before = json.loads(path.read_text())
        if before | {"seeds": [], "runs": {}} != record:
            raise SystemExit(f"--out: expected a new file, or a record of the same settings and versions, got {path}")
        record = before
    record["seeds"] = sorted({*record["seeds"], *given.seeds})
    save(record, path)  # before the folder, so that one of other settings is never taken for this one's
    logging.disable_progress_bar()
    keys = itertools.product(given.seeds, record["settings"]["tasks"], METHODS)
    missing = [key for key in keys if "/".join(map(str, key)) not in record["runs"]]
    start = time.perf_counter()
    study = Study(given.out, record["settings"]) if missing else None
    for seed, task, method in missing:
        found = record["runs"][f"{seed}/{task}/{method}"] = study.run(method, task, seed)
        save(record, path)
        print(f"{seed}/{task}/{method}: {found['upstream']:.4f} ({time.perf_counter() - start:.0f} s)", flush=True)
    draw(record, given.out.with_suffix(".png"))
    print(table(record))


if __name__ == "__main__":
    main()
