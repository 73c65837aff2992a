"""The demo's report: what the numbers say, on the terminal and as `report.md` with a heatmap."""

from __future__ import annotations

import dataclasses
import json
import platform
import re
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fastforget._files import write_atomically
from fastforget.demo.text import UPSTREAM, Domain
from fastforget.demo.training import ADAPTER, LEARNING_RATES
from fastforget.matrix import ForgettingMatrix, plot_heatmap

RANKS = (1, 2, 3, 4, 5)
SHOWN = 3  # most and least forgotten examples


def matrix_settings(out: Path, tasks: Sequence[Domain], device: str) -> dict[str, Any]:
    """Returns the arguments of `forgetting_matrix`; on a GPU the models run in bfloat16."""
    return {
        "base": out / "base",
        "tasks": {task.name: out / "tasks" / task.name for task in tasks},
        "upstream": out / "upstream.jsonl",
        "out": out / "matrix",
        "device": device,
        "dtype": "bfloat16" if torch.device(device).type == "cuda" else "float32",
    }


def matrix_command(settings: dict[str, Any]) -> str:
    """Returns the command line that builds the same matrix, for a POSIX shell."""
    words = [["fastforget", "matrix"]]
    for key, value in settings.items():
        if key == "tasks":
            words += [["--task", f"{name}={path}"] for name, path in value.items()]
        else:
            words.append([f"--{key}", str(value)])
    return " \\\n  ".join(map(shlex.join, words))


class Report:
    """Reads the finished demo and says what was measured.

    Args:
        matrix: the forgetting matrix.
        out: the demo's folder.
        tasks: the domains of its rows.
        device: torch device.
        seed: of the shuffled comparison.
        seconds: of every stage.
    """

    def __init__(
        self,
        matrix: ForgettingMatrix,
        out: Path,
        tasks: Sequence[Domain],
        device: str,
        seed: int,
        seconds: dict[str, float],
    ):
        self.matrix, self.out, self.tasks, self.device, self.seconds = matrix, out, tasks, device, seconds
        self.summary = matrix.summary()
        self.values = matrix.values  # [M, N], nats per token
        self.example_domains = np.array([name.split("/")[0] for name in matrix.examples])  # [N]
        self.domains = [domain for domain in UPSTREAM if domain.name in self.example_domains]
        self.base = _training(out / "base")
        self.training = {task.name: _training(out / "tasks" / task.name) for task in tasks}
        rng = np.random.default_rng(seed)
        shuffled = dataclasses.replace(matrix, values=rng.permuted(matrix.values, axis=1))
        self.r2 = [("additive", matrix.additive_r2(), shuffled.additive_r2())]
        self.r2 += [(f"rank {r}", matrix.low_rank_r2(r), shuffled.low_rank_r2(r)) for r in RANKS]

    def write(self, console: Console) -> Path:
        """Print the results, and write `heatmap.png` and `report.md`.

        Args:
            console: where they are printed.

        Returns:
            The report's path.
        """
        plot_heatmap(self.matrix, self.out / "heatmap.png")
        path = self.out / "report.md"
        text = self._markdown()
        write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        table = Table("model of the matrix", "R²", "R² with each row shuffled", title="How much of it is low-rank")
        for name, *scores in self.r2:
            table.add_row(name, *(f"{score:.3f}" for score in scores))
        console.print(table)
        for title, chosen in (("Most forgotten", self._extremes()[0]), ("Least forgotten", self._extremes()[1])):
            for j in chosen[:2]:
                console.print(Text(f"{title}: {self._caption(j)}"))
                console.print(Panel(Text(self.matrix.texts[j])))
        for sentence in self._findings():
            console.print(Text(f"- {sentence}"))
        console.print(Text(f"\nReport: {path}\nHeatmap: {self.out / 'heatmap.png'}"))
        return path

    def _findings(self) -> list[str]:
        """Returns sentences that follow from the numbers, whatever these are."""
        mean, median = self.summary["mean"], self.summary["median"]
        rows = {name: row["mean"] for name, row in self.summary["per_task"].items()}
        columns = {d.name: float(np.nanmean(self.values[:, self.example_domains == d.name])) for d in self.domains}
        kinds = {kind: [rows[task.name] for task in self.tasks if task.kind == kind] for kind in ("full", "adapter")}
        surprise = [self.training[task.name]["loss_before"] for task in self.tasks]
        correlation = np.corrcoef(surprise, [rows[task.name] for task in self.tasks])[0, 1]
        _, rank_1, by_chance = self.r2[1]
        extra = rank_1 - by_chance
        return [
            f"The log-perplexity of the {self.values.shape[1]} upstream examples {'rose' if mean > 0 else 'fell'} by "
            f"{abs(mean):.3f} nats per token on average over the {len(rows)} fine-tuned models (median {median:+.3f}); "
            f"{self.summary['share_increased']:.0%} of all entries rose.",
            f"Most is forgotten under {_extreme(rows, max)}, least under {_extreme(rows, min)}.",
            f"The upstream domain that loses most is {_extreme(columns, max)}; least, {_extreme(columns, min)}.",
            f"Over the tasks, forgetting and the base's loss on the task before fine-tuning correlate with "
            f"r = {correlation:+.2f} ({len(rows)} tasks).",
            f"On average the full checkpoints forget {np.mean(kinds['full']):+.3f}, the adapters "
            f"{np.mean(kinds['adapter']):+.3f}; they learned different texts, so this compares no methods.",
            f"A rank-1 model explains {rank_1:.1%} of the matrix's variance. With the entries of each row shuffled it "
            f"explains {by_chance:.1%}: "
            + (
                f"the {extra:.1%} between them is a pattern over the examples that the models share."
                if extra > 0.01
                else "the models share hardly any pattern over the examples."
            ),
            self._noise(),
        ]

    def _noise(self) -> str:
        parts, largest = [], 0.0
        for key, what in (("batch_composition", "in other batches"), ("wider_dtype", "with wider parameters")):
            found = self.matrix.noise.get(key, {"unmeasured": "it was left out"})
            if "rms" in found:
                largest = max(largest, found["max"])
                parts.append(f"{what}: rms {found['rms']:.1e}, largest {found['max']:.1e} nats per token")
            else:
                parts.append(f"{what}: not measured ({found['unmeasured']})")
        count = self.matrix.noise.get("examples", 0)
        above = np.mean(np.abs(self.values[np.isfinite(self.values)]) > largest)
        return (
            f"Noise floor, from {count} examples scored again by the base in {self.matrix.noise.get('dtype', '?')}: "
            + "; ".join(parts)
            + (f". {above:.1%} of the matrix's entries are larger than the largest of these." if largest else ".")
        )

    def _extremes(self) -> tuple[np.ndarray, np.ndarray]:
        finite = np.flatnonzero(np.isfinite(self.values).all(0))
        order = finite[np.argsort(-self.values[:, finite].mean(0), kind="stable")]
        return order[:SHOWN], order[::-1][:SHOWN]

    def _caption(self, j: int) -> str:
        column = self.values[:, j]
        return (
            f"{self.matrix.examples[j]}, mean {column.mean():+.3f}, from {column.min():+.3f} "
            f"({self.matrix.tasks[column.argmin()]}) to {column.max():+.3f} ({self.matrix.tasks[column.argmax()]})"
        )

    def _markdown(self) -> str:
        most, least = self._extremes()
        command = matrix_command(matrix_settings(self.out, self.tasks, self.device))
        return (
            "\n\n".join(
                [
                    "# What a small language model forgets",
                    f"A Llama of {self.base['parameters'] / 1e6:.1f} million parameters was trained on "
                    f"{len(self.domains)} kinds of text and then fine-tuned on each of {len(self.tasks)} others. The "
                    "matrix holds, for every fine-tuned model and every upstream example, the increase of the "
                    "example's log-perplexity over the base's, in nats per token: positive means forgotten. Every "
                    "number and sentence here comes from this run.",
                    "![Heatmap of the forgetting matrix](heatmap.png)",
                    "## Findings",
                    "\n".join(f"- {sentence}" for sentence in self._findings()),
                    "## Forgetting by task and upstream domain",
                    "Means, nats per token. The losses are those of the task's own held-out text, before and after "
                    "fine-tuning on it.",
                    self._task_table(),
                    "## How much of the matrix is low-rank",
                    "R² = 1 - MSE / variance. Additive: mu + a_i + b_j; rank r: the best approximation of that rank. "
                    f"A few ranks fit any matrix of {len(self.tasks)} rows well, so the last column gives the same for "
                    "the matrix with the entries of each row shuffled.",
                    _table(("model", "R²", "R², rows shuffled"), [(n, f"{a:.3f}", f"{b:.3f}") for n, a, b in self.r2]),
                    *self._examples("Most forgotten examples", most),
                    *self._examples("Least forgotten examples", least),
                    "## The models",
                    self._models(),
                    "## Time and machine",
                    self._machine(),
                    self._time_table(),
                    "## Continue",
                    "The same `fastforget demo` command keeps what is finished. This command builds the matrix alone; "
                    "while its folder is there, it continues or confirms it, and without the folder it starts anew:",
                    f"```bash\n{command}\n```",
                ]
            )
            + "\n"
        )

    def _task_table(self) -> str:
        domains = [domain.name for domain in self.domains]
        rows = []
        for i, task in enumerate(self.tasks):
            record = self.training[task.name]
            means = [np.nanmean(self.values[i, self.example_domains == name]) for name in domains]
            losses = f"{record['loss_before']:.2f} → {record['loss_after']:.2f}"
            rows.append(
                (task.name, task.kind, losses, f"{np.nanmean(self.values[i]):+.3f}", *map("{:+.3f}".format, means))
            )
        return _table(("task", "kind", "its own loss", "all upstream", *domains), rows)

    def _examples(self, title: str, chosen: Iterable[int]) -> list[str]:
        parts = [f"## {title}", "By their mean over the models."]
        for j in chosen:
            text = self.matrix.texts[j]
            fence = "`" * (max([2, *map(len, re.findall("`+", text))]) + 1)
            parts += [
                f"**{self._caption(j)}**; base log-perplexity {self.matrix.base[j]:.3f}",
                f"{fence}text\n{text}\n{fence}",
            ]
        return parts

    def _models(self) -> str:
        tasks = "\n".join(f"- {task.name} ({task.kind}): {task.about}" for task in self.tasks)
        upstream = "\n".join(f"- {domain.name}: {domain.about}" for domain in self.domains)
        trained = {task.kind: self.training[task.name]["trained"] for task in self.tasks}
        steps = {task.kind: len(self.training[task.name]["losses"]) for task in self.tasks}
        return (
            f"Base: {self.base['tokens']:,} tokens, learning rate {LEARNING_RATES['base']:g}, held-out loss "
            f"{self.base['loss_after']:.3f} nats per token. Its domains:\n\n{upstream}\n\n"
            f"Fine-tuning: {steps['full']} steps of AdamW with one cycle of the learning rate, up to "
            f"{LEARNING_RATES['full']:g} for full checkpoints ({trained['full']:,} parameters) and "
            f"{LEARNING_RATES['adapter']:g} for adapters (LoRA of rank {ADAPTER['r']} on every linear layer but the "
            f"head, {trained['adapter']:,} parameters); the same for every task. The tasks:\n\n{tasks}"
        )

    def _machine(self) -> str:
        cuda = torch.device(self.device).type == "cuda"
        device = torch.cuda.get_device_name(self.device) if cuda else f"CPU, {torch.get_num_threads()} threads"
        return (
            f"{device}; {platform.system()} {platform.machine()}, Python {platform.python_version()}, torch "
            f"{torch.__version__}, transformers {transformers.__version__}. Seconds are those of the run that finished "
            "the stage."
        )

    def _time_table(self) -> str:
        fine_tuning = sum(seconds for name, seconds in self.seconds.items() if name in self.training)
        rows = [(name, f"{seconds:.1f}") for name, seconds in self.seconds.items() if name not in self.training]
        rows.insert(-1, ("fine-tuning", f"{fine_tuning:.1f}"))
        rows.append(("all", f"{sum(self.seconds.values()):.1f}"))
        return _table(("stage", "seconds"), rows)


def _training(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "training.json").read_text(encoding="utf-8"))


def _extreme(means: dict[str, float], choose: Any) -> str:
    name = choose(means, key=means.__getitem__)
    return f"`{name}` ({means[name]:+.3f})"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table; columns after the first are aligned to the right."""
    ruler = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ruler, *rows))
