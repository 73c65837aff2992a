"""The Fisher of a model on a data set, as one run that can be stopped and continued: what `fastforget fisher` does."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastforget.fisher.estimator import DiagonalFisher, NonFiniteError
from fastforget.fisher.files import check_path, check_space, load_fisher, save_fisher
from fastforget.fisher.names import Fisher, canonical_name
from fastforget.fisher_run.partial import RunFiles, State, environment
from fastforget.matrix import plan
from fastforget.matrix.checkpoints import Checkpoint, find_checkpoint, load_config, load_tokenizer
from fastforget.matrix.models import ResidentModel
from fastforget.matrix.progress import ProgressBar
from fastforget.matrix.rows import read_rows, row_ids
from fastforget.matrix.runner import check_vocabulary, choose_device, choose_dtype, choose_max_length
from fastforget.matrix.scoring import IGNORE, free_memory, is_out_of_memory
from fastforget.matrix.upstream import Upstream, load_upstream, tokenizer_fingerprint

__all__ = ["run_fisher"]

PathLike = str | os.PathLike[str]
BACKWARD = 8  # a token's activations for the backward take so many times the memory of a forward alone, or more
WRITING = 0.1  # share of the time that may go into writing the state
# What the shared loading code calls its inputs, and what they are called here.
WORDS = {"base:": "model:", "task 'adapter':": "adapter:", "upstream:": "data:", "path:": "out:"}


def run_fisher(
    model: PathLike,
    data: PathLike,
    out: PathLike,
    *,
    adapter: PathLike | None = None,
    per: str = "example",
    labels: str = "data",
    loss: str = "mean",
    samples: int = 1,
    seed: int = 0,
    parameters: Sequence[str] | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    offload: bool = False,
    eos: bool = False,
    skip_empty: bool = False,
    split: str = "train",
    config: str | None = None,
    check_adapter_base: bool = True,
    save_every: float = 60.0,
    progress: bool = True,
) -> Fisher:
    """Compute the diagonal Fisher of a model on a data set and save it; the same call continues a stopped run.

    The sums so far, and how far they go, are written to `<out>.partial` from time to time. A run that was stopped at
    any moment ends with the same bits as one that was not.

    Args:
        model: folder or hub id of a full checkpoint; its tokenizer cuts the data.
        data: as `upstream` of `forgetting_matrix`.
        out: the file, `.safetensors`.
        adapter: folder or hub id of a PEFT adapter; the Fisher is that of the adapter's parameters.
        per: "example", "position" or "batch_mean".
        labels: "data" or "sampled".
        loss: "mean" or "sum".
        samples: draws an example, with labels="sampled".
        seed: of the draws.
        parameters: patterns such as `*.mlp.*`; only parameters whose canonical name matches one are measured.
        limit: use so many of the first examples.
        max_length: examples are cut on the right to so many tokens; default: the model's limit.
        tokens_per_batch: padded tokens of a batch; default: by device and dtype. Halved by itself when memory runs out.
        dtype: of the parameters; default: as the model was saved.
        device: default: the GPU if there is one, else the CPU.
        offload: keep the sums in the CPU's memory.
        eos: append the end-of-sequence token to every `response`, as a target.
        skip_empty: leave out rows without a target token instead of refusing them.
        split: the split of a data set.
        config: the configuration of a data set.
        check_adapter_base: refuse an adapter that names another base.
        save_every: seconds between two writes of the state, more where writing takes long; 0: after every batch.
        progress: show a progress bar on standard error.

    Returns:
        The Fisher, as `load_fisher(out)` gives it.

    Raises:
        ValueError: if an input is wrong, or `out` belongs to another run.
    """
    for name, value, least in (("max_length", max_length, 2), ("tokens_per_batch", tokens_per_batch, 1)):
        _check_count(name, value, least, "tokens")
    _check_count("limit", limit, 1, "examples")
    with _own_words():
        path = check_path(out)
        on = choose_device(device)
        base = find_checkpoint("model", os.fspath(model), is_base=True)
        tuned = None if adapter is None else _find_adapter(os.fspath(adapter))
        model_config = load_config(base)
        kind = choose_dtype(dtype, model_config)
        tokenizer = load_tokenizer(base)
        length = choose_max_length(max_length, model_config)
        source = {"split": split, "config": config}
        examples = load_upstream(
            os.fspath(data), tokenizer, max_length=length, eos=eos, skip_empty=skip_empty, **source
        )
        check_vocabulary(examples, model_config)
        budget = plan.default_tokens_per_batch(torch.device(on).type, kind)
        budget = budget if torch.device(on).type == "cpu" else budget // BACKWARD
        convention = {"per": per, "labels": labels, "loss": loss, "samples": samples, "seed": seed}
        settings = {
            **convention,
            "parameters": list(parameters or []),
            "limit": limit,
            "max_length": length,
            "eos": eos,
            "skip_empty": skip_empty,
            "device": torch.device(on).type,
            "dtype": str(kind).removeprefix("torch."),
            "tokens_per_batch": tokens_per_batch or budget,
        }
        inputs = {
            "model": {"weights": base.fingerprint, "tokenizer": tokenizer_fingerprint(tokenizer)},
            "adapter": tuned and tuned.fingerprint,
            "data": {"content": examples.fingerprint, "examples": len(examples.ids)},
            "settings": settings,
        }
        about = {"data": os.fspath(data), **({"adapter": tuned.path} if tuned else {}), "model": base.path}
        run = _Run(
            path, base, tuned, _first(examples, limit), source, on, kind, convention, offload, inputs, about, save_every
        )
        return run.execute(progress, check_adapter_base)


def _check_count(name: str, value: Any, least: int, what: str) -> None:
    if value is not None and (not isinstance(value, int) or value < least):
        raise ValueError(f"{name}: expected {least} {what} or more, got {value!r}; leave it out for the default")


@contextlib.contextmanager
def _own_words() -> Iterator[None]:
    """Errors of the code that is shared with the matrix name the arguments of this command."""
    try:
        yield
    except (ValueError, TypeError) as error:
        theirs = next((word for word in WORDS if str(error).startswith(word)), None)
        if theirs is None or type(error) not in (ValueError, TypeError):
            raise
        raise type(error)(WORDS[theirs] + str(error).removeprefix(theirs)) from error


def _find_adapter(path: str) -> Checkpoint:
    found = find_checkpoint("adapter", path)
    if found.kind != "adapter":
        raise ValueError(f"adapter: expected a PEFT adapter, got the full checkpoint {path}; pass it as the model")
    return found


def _first(examples: Upstream, limit: int | None) -> Upstream:
    parts = {name: getattr(examples, name)[:limit] for name in ("ids", "texts", "tokens", "first_target")}
    return replace(examples, **parts)


@dataclass
class _Run:
    """What a run works on; `execute` does it."""

    out: Path
    base: Checkpoint
    adapter: Checkpoint | None
    examples: Upstream
    source: dict[str, Any]
    device: str
    dtype: torch.dtype
    convention: dict[str, Any]
    offload: bool
    inputs: dict[str, Any]  # what has to be the same to continue
    about: dict[str, Any]
    save_every: float

    def __post_init__(self) -> None:
        self.files = RunFiles(self.out, self.inputs, environment(self.device))
        self.lengths = self.examples.lengths
        self.order = plan.length_order(self.lengths)
        self.descending = self.lengths[self.order]
        self.state = State()
        self.saved = time.monotonic()
        self.saving = 0.0  # seconds that the last write took

    def execute(self, progress: bool, check_adapter_base: bool) -> Fisher:
        if self.files.finished():
            print(f"{self.out}: finished, by the same command on the same inputs; nothing to do", file=sys.stderr)
            return load_fisher(self.out)
        self.files.check()
        resident = ResidentModel(self.base, self.device, self.dtype)
        if self.adapter:
            resident.check(self.adapter, check_adapter_base=check_adapter_base)
        with resident.holding(self.adapter or self.base) as model:
            self.model = model
            select_parameters(model, self.inputs["settings"]["parameters"], adapter=self.adapter is not None)
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            check_space(self.out, 2 * parameters * max(4, self.dtype.itemsize))  # a file, and the one that replaces it
            self.estimator = self._new_estimator()
            with self.files.opened():
                self._restore()
                self._accumulate(progress)
                self._finish()
        return load_fisher(self.out)

    # Sums

    def _new_estimator(self) -> DiagonalFisher:
        return DiagonalFisher(self.model, **self.convention, offload=self.offload)

    def _restore(self) -> None:
        """Go back to the sums on the disk, or to none; failed examples and budgets that are known stay known."""
        self.state.position = 0
        found = self.files.read()
        if found is not None:
            sums, there = found
            self.estimator.load_state_dict(sums)
            self.state = there.joined(self.state)

    def _save(self) -> None:
        start = time.monotonic()
        self.files.write(self.estimator.state_dict(), self.state)
        self.saved = time.monotonic()
        self.saving = self.saved - start

    def _accumulate(self, progress: bool) -> None:
        tokens = np.concatenate([[0], self.descending.cumsum()])  # before each position
        done = self.state.position
        if progress and done:
            print(f"{self.out}: continuing, {done:,} of {len(self.order):,} examples are done", file=sys.stderr)
        self.saved = time.monotonic()
        with ProgressBar(int(tokens[-1]), int(tokens[done]), shown=progress) as bar:
            bar.describe("Fisher")
            while self.state.position < len(self.order):
                before = self.state.position
                self._step()
                after = self.state.position
                bar.advance(after - before, int(tokens[after] - tokens[before]))
                wait = self.save_every and max(self.save_every, self.saving / WRITING)
                if time.monotonic() - self.saved >= wait:
                    self._save()

    def _step(self) -> None:
        """One batch, or what has to change before it is tried again."""
        start = self.state.position
        stop = start + next(plan.batches(self.descending[start:], self._budget())).stop
        rows = [int(j) for j in self.order[start:stop] if int(j) not in self.state.failed]
        problem = self._update(rows) if rows else None
        if problem is None:
            self.state.position = stop
        if problem == "memory":
            self._halve_budget(rows)
        if problem == "memory" or self.estimator.invalid:
            # The sums may hold a part of the batch. The old ones go first: there may be no room for two.
            del self.estimator
            free_memory()
            self.estimator = self._new_estimator()
            self._restore()
            self._save()  # before the retry: a run that dies now continues with the same batches

    def _update(self, rows: list[int]) -> str | None:
        # Which rows failed is remembered, so that the next try leaves them out.
        try:
            self.estimator.update(*self._batch(rows), example_ids=rows)
        except NonFiniteError as error:
            failed = {int(j) for j in error.examples}
            if not failed or not failed <= set(rows):
                raise
            self.state.failed = sorted({*self.state.failed, *failed})
            return "failed rows"
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            return "memory"
        return None

    def _batch(self, rows: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens, mask and labels of some examples, padded on the right, `[B, T]` each."""
        longest = int(self.lengths[rows].max())
        input_ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask, labels = torch.zeros_like(input_ids), torch.full_like(input_ids, IGNORE)
        for b, j in enumerate(rows):
            tokens = torch.from_numpy(self.examples.tokens[j].astype(np.int64))
            first = int(self.examples.first_target[j])
            input_ids[b, : len(tokens)] = tokens
            mask[b, : len(tokens)] = 1
            labels[b, first : len(tokens)] = tokens[first:]
        return input_ids.to(self.device), mask.to(self.device), labels.to(self.device)

    def _budget(self) -> int:
        smaller = (tokens for start, tokens in self.state.budgets if start <= self.state.position)
        return min(smaller, default=self.inputs["settings"]["tokens_per_batch"])

    def _halve_budget(self, rows: list[int]) -> None:
        before = budget = self._budget()
        longest = int(self.lengths[rows].max())
        if len(rows) == 1:
            raise ValueError(
                f"data: expected every example to fit in memory, got {self.examples.ids[rows[0]]!r} of {longest} "
                f"tokens, which does not fit alone on {self.device}; choose a smaller max_length or dtype, offload, "
                "or another device"
            )
        while budget >= len(rows) * longest:  # a halving that leaves the batch as it was does not help
            budget //= 2
        self.state.budgets.append([self.state.position, budget])
        warnings.warn(
            f"out of memory on {self.device} with {before} tokens per batch; the run goes on with {budget}",
            RuntimeWarning,
            stacklevel=6,
        )

    def _finish(self) -> None:
        if len(self.state.failed) == len(self.order):
            raise ValueError(
                "data: expected an example with a finite loss, got none; check the weights, or choose a wider dtype"
            )
        metadata = dict(self.estimator.metadata)
        metadata |= {**self.about, "run": self.inputs, "environment": self.files.environment}
        metadata["skipped"] = metadata.get("skipped", 0) + len(self.examples.skipped)
        metadata |= {"truncated": self.examples.truncated, "failed": self._failed_rows()}
        save_fisher(self.out, self.estimator.diagonal(), metadata)
        self.files.partial.unlink(missing_ok=True)

    def _failed_rows(self) -> list[dict[str, str]]:
        if not self.state.failed:
            return []
        rows = read_rows(self.about["data"], **self.source)
        where = dict(zip(row_ids(rows), (row.where for row in rows), strict=True))
        ids = [self.examples.ids[j] for j in self.state.failed]
        return [{"id": name, "where": where.get(name, "no longer in the data")} for name in ids]


def select_parameters(model: Any, patterns: Sequence[str], *, adapter: bool) -> None:
    """Choose the parameters that are measured: those require gradients afterwards, and no others.

    Args:
        model: the model.
        patterns: shell patterns of canonical names; none for the model's own choice.
        adapter: whether the model has an adapter, whose parameters are the default.

    Raises:
        ValueError: if a pattern matches no parameter.
    """
    if adapter:
        model.set_adapter("default")
    if not patterns:
        return
    # The frozen original of a module that PEFT replaces has its copy's canonical name.
    named = [
        (canonical_name(name), parameter)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if ".original_module." not in name and parameter.is_floating_point()
    ]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(
                f"parameters: expected patterns of parameter names, got {pattern!r}, which matches none of "
                f"{', '.join(name for name, _ in named[:3])}, ...; write it with *, as in '*.{named[0][0]}'"
            )
    chosen = {id(parameter) for name, parameter in named if any(fnmatchcase(name, pattern) for pattern in patterns)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
