"""The demo: what does a small language model forget when it is fine-tuned?

It trains a tokenizer and a small Llama on text of this machine, fine-tunes the model on other kinds of text, builds the
forgetting matrix and writes a report. Every stage is kept: a run that was stopped continues with the same call.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from fastforget.demo.text import MIN_CHARACTERS, TASKS, UPSTREAM, Document, Domain, sample, split_examples

if TYPE_CHECKING:
    from torch import Tensor

    from fastforget.matrix import ForgettingMatrix

MIN_TASKS = 8
MIN_UPSTREAM_DOMAINS = 3


@dataclass(frozen=True)
class Size:
    """How large the demo is.

    Attributes:
        vocabulary: entries of the tokenizer.
        hidden: the model's width.
        layers: the model's depth.
        max_length: tokens that the model takes.
        row: tokens of a training row.
        batch_size: rows of a training step.
        base_tokens: tokens that the base is trained on.
        task_tokens: tokens of each fine-tuning.
        upstream_characters: text of each upstream domain, at most.
        task_characters: text of each task, at most.
        tasks: fine-tuned models, at most.
        examples: upstream examples.
    """

    vocabulary: int = 4096
    hidden: int = 256
    layers: int = 2
    max_length: int = 256
    row: int = 128
    batch_size: int = 4
    base_tokens: int = 600_000
    task_tokens: int = 36_000
    upstream_characters: int = 480_000
    task_characters: int = 150_000
    tasks: int = len(TASKS)
    examples: int = 600


QUICK = Size(
    vocabulary=1024,
    hidden=64,
    base_tokens=150_000,
    task_tokens=6_000,
    upstream_characters=60_000,
    task_characters=30_000,
    tasks=MIN_TASKS,
    examples=120,
)


def run(out: str | os.PathLike[str], *, device: str | None = None, seed: int = 0, quick: bool = False) -> Path:
    """Run the demo, or what is left of it.

    Args:
        out: folder of everything that the demo writes.
        device: torch device; default: the GPU if there is one, else the CPU.
        seed: of the models and of the text that is sampled.
        quick: smaller models and less text.

    Returns:
        The report's path, `out/report.md`.

    Raises:
        ImportError: if PEFT is not installed.
        ValueError: if the device is not there, if `out` is not the folder of a demo with the same settings, or if this
            machine has too little text.
    """
    if find_spec("peft") is None:
        raise ImportError("peft: expected to be installed, got none; pip install 'fastforget[demo]'")
    # Threads that wait are to sleep: where other programs share the cores, spinning made training at least four times
    # slower. The variable is read once, when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: expected one that torch sees, got {device!r}; leave it out for the default")
    demo = _Demo(Path(out), device, seed, QUICK if quick else Size())
    with _quiet_transformers():
        return demo.run()


class _Demo:
    """The stages, in order; each leaves a file or folder in `out`, and is skipped where that exists."""

    def __init__(self, out: Path, device: str, seed: int, size: Size):
        self.out, self.device, self.seed, self.size = out, device, seed, size
        self.console = Console()
        self._check_settings()
        self.seconds: dict[str, float] = _read_json(out / "seconds.json", {})

    def run(self) -> Path:
        from fastforget.demo.report import Report

        self.console.print("\n[bold]What does a small language model forget when it is fine-tuned?[/bold]")
        self.console.print(f"Everything is written to {self.out}. Stop at any time: the same command continues.")
        self._title(1, "Text", "real text, found on this machine")
        self._stage("text", self.out / "text", self._collect_text)
        upstream, tasks = self._domains("upstream", UPSTREAM), self._domains("tasks", TASKS)
        self._title(2, "Tokenizer", f"byte-level BPE, and {self.size.examples} upstream examples")
        self._stage("tokenizer", self.out / "tokenizer", partial(self._train_tokenizer, upstream))
        self._stage("upstream", self.out / "upstream.jsonl", partial(self._choose_examples, upstream))
        self._title(3, "Base model", "a small Llama learns the upstream domains from scratch")
        self._stage("base", self.out / "base", partial(self._train_base, upstream))
        self._title(4, "Fine-tuning", f"{len(tasks)} copies of it each learn one other kind of text")
        for task in tasks:
            self._stage(task.name, self._task_folder(task), partial(self._fine_tune, task))
        self._title(5, "Forgetting matrix", f"{len(tasks)} models x {self.size.examples} upstream examples")
        matrix = self._matrix(tasks)
        self._title(6, "Report", "what the numbers say")
        return Report(matrix, self.out, tasks, self.device, self.seed, self.seconds).write(self.console)

    def _check_settings(self) -> None:
        path = self.out / "settings.json"
        here = {"device": self.device, "seed": self.seed, **asdict(self.size)}
        if not path.exists():
            if self.out.is_file() or (self.out.is_dir() and any(self.out.iterdir())):
                raise ValueError(
                    f"out: expected a new folder or one of an earlier demo, got {self.out}; choose another"
                )
            self.out.mkdir(parents=True, exist_ok=True)
            _write_text(path, json.dumps(here, indent=1))
        there = _read_json(path, {})
        differences = [f"{key} {there.get(key)} there, {here[key]} here" for key in here if there.get(key) != here[key]]
        if differences:
            raise ValueError(
                f"out: expected a demo with the same settings, got {self.out} with {', '.join(differences)}; "
                "choose another folder or delete it"
            )

    def _collect_text(self, folder: Path) -> str:
        chosen = [("upstream", domain, self.size.upstream_characters) for domain in UPSTREAM]
        chosen += [("tasks", domain, self.size.task_characters) for domain in TASKS[: self.size.tasks]]
        for group, domain, characters in chosen:
            try:
                documents = sample(domain.find(), characters, self.seed)
            except (ImportError, OSError, SyntaxError) as error:  # some distributions leave modules out
                documents = []
                self._say(domain.name, f"{type(error).__name__}: {error}")
            total = sum(len(document.text) for document in documents)
            if total < MIN_CHARACTERS:
                self._say(domain.name, "left out: there is too little of it here")
                continue
            rows = [json.dumps(asdict(document)) for document in documents]
            (folder / group).mkdir(parents=True, exist_ok=True)
            (folder / group / f"{domain.name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
            self._say(domain.name, f"{total:>7,} characters: {domain.about}")
        found = {group: len(list((folder / group).glob("*"))) for group in ("upstream", "tasks")}
        for group, least in (("upstream", MIN_UPSTREAM_DOMAINS), ("tasks", MIN_TASKS)):
            if found[group] < least:
                raise ValueError(
                    f"text: expected {least} kinds of text for {group}, got {found[group]}; "
                    "use a Python whose standard library is installed with its source"
                )
        return f"{found['upstream']} upstream domains for the base, {found['tasks']} tasks for fine-tuning"

    def _domains(self, group: str, known: tuple[Domain, ...]) -> list[Domain]:
        return [domain for domain in known if (self.out / "text" / group / f"{domain.name}.jsonl").exists()]

    def _documents(self, group: str, domain: Domain) -> list[Document]:
        rows = (self.out / "text" / group / f"{domain.name}.jsonl").read_text(encoding="utf-8").split("\n")
        return [Document(**json.loads(row)) for row in rows]

    def _train_tokenizer(self, domains: list[Domain], folder: Path) -> str:
        from fastforget.demo.training import train_tokenizer

        texts = [document.text for domain in domains for document in self._documents("upstream", domain)]
        train_tokenizer(texts, self.size.vocabulary, self.size.max_length).save_pretrained(folder)
        return f"{self.size.vocabulary:,} entries"

    def _choose_examples(self, domains: list[Domain], path: Path) -> str:
        rows = []
        for i, domain in enumerate(domains):
            examples = split_examples(self._documents("upstream", domain), self.seed)
            count = self.size.examples * (i + 1) // len(domains) - len(rows)  # the shares add up exactly
            for k in range(count):  # evenly spaced
                place, text = examples[k * len(examples) // count]
                rows.append(json.dumps({"id": f"{domain.name}/{place}", "text": text}))
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")
        return f"{len(rows)} examples out of the base's training text"

    def _tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.out / "tokenizer")

    def _rows(self, documents: list[Document], tokenizer: Any) -> Tensor:
        import torch

        from fastforget.demo.training import pack

        rows = pack(documents, tokenizer, self.size.row)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))]

    def _train_base(self, domains: list[Domain], folder: Path) -> str:
        from fastforget.demo.training import train_base

        tokenizer = self._tokenizer()
        documents = [document for domain in domains for document in self._documents("upstream", domain)]
        size = {key: getattr(self.size, key) for key in ("hidden", "layers", "max_length")}
        rows = self._rows(documents, tokenizer)
        with self._bar("base", self.size.base_tokens) as on_step:
            record = train_base(folder, tokenizer, rows, size, **self._training(self.size.base_tokens, on_step))
        return (
            f"{record['parameters'] / 1e6:.1f} M parameters, {record['tokens']:,} tokens, "
            f"held-out loss {record['loss_after']:.2f}"
        )

    def _fine_tune(self, task: Domain, folder: Path) -> str:
        from fastforget.demo.training import fine_tune

        tokenizer = self._tokenizer()
        rows, base = self._rows(self._documents("tasks", task), tokenizer), (self.out / "base").resolve()
        with self._bar(task.name, self.size.task_tokens) as on_step:
            settings = self._training(self.size.task_tokens, on_step)
            record = fine_tune(folder, base, tokenizer, rows, task.kind, **settings)
        return f"{task.kind:9}its held-out loss {record['loss_before']:.2f} -> {record['loss_after']:.2f}"

    def _training(self, tokens: int, on_step: Callable[[int, float], None]) -> dict[str, Any]:
        return {
            "tokens": tokens,
            "batch_size": self.size.batch_size,
            "seed": self.seed,
            "device": self.device,
            "on_step": on_step,
        }

    def _task_folder(self, task: Domain) -> Path:
        return self.out / "tasks" / task.name

    def _matrix(self, tasks: list[Domain]) -> ForgettingMatrix:
        from fastforget.demo.report import matrix_settings
        from fastforget.matrix import forgetting_matrix

        start = time.perf_counter()
        matrix = forgetting_matrix(**matrix_settings(self.out, tasks, self.device))
        self._finished("matrix", f"mean {np.nanmean(matrix.values):+.3f} nats per token", start)
        return matrix

    def _title(self, number: int, name: str, about: str) -> None:
        self.console.print(f"\n[bold]{number}/6 {name}[/bold]: {about}", highlight=False)

    def _stage(self, name: str, target: Path, build: Callable[[Path], str]) -> None:
        """Build a file or a folder under a temporary name, unless it is there; `build` returns what to say about it."""
        if target.exists():
            self._say(name, "finished earlier, kept")
            return
        start = time.perf_counter()
        temporary = target.with_name(f".tmp-{target.name}")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.unlink(missing_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        about = build(temporary)
        for path in (temporary, *temporary.rglob("*")):
            if path.is_file():
                with open(path, "rb+") as file:
                    os.fsync(file.fileno())
        temporary.replace(target)
        self._finished(name, about, start)

    def _finished(self, name: str, about: str, start: float) -> None:
        seconds = time.perf_counter() - start
        if name not in self.seconds:  # a second visit only looks at what is there
            self.seconds[name] = seconds
            _write_text(self.out / "seconds.json", json.dumps(self.seconds, indent=1))
        self._say(name, f"{about} ({seconds:.1f} s)")

    def _say(self, name: str, about: str) -> None:
        self.console.print(f"    {name:15}{about}", highlight=False, markup=False)

    @contextmanager
    def _bar(self, name: str, tokens: int):
        columns = [TextColumn("    {task.description:12}"), BarColumn(), TaskProgressColumn()]
        columns += [TextColumn("{task.fields[state]}"), TimeRemainingColumn()]
        with Progress(*columns, console=self.console, transient=True, disable=not self.console.is_terminal) as bar:
            task, start, seen = bar.add_task(name, total=tokens, state=""), time.perf_counter(), 0

            def on_step(step_tokens: int, loss: float) -> None:
                nonlocal seen
                seen += step_tokens
                speed = seen / (time.perf_counter() - start)
                bar.update(task, completed=seen, state=f"loss {loss:.2f}  {speed:,.0f} tokens/s")

            yield on_step


@contextmanager
def _quiet_transformers():
    """Hides the progress bars of transformers, which would break ours, for a while."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def _write_text(path: Path, text: str) -> None:
    from fastforget._files import write_atomically

    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
