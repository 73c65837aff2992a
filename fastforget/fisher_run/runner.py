"""The Fisher of a model on a data set, as one run that can be stopped and continued: what `fastforget fisher` does."""

from __future__ import annotations

import contextlib
import os
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastforget.fisher.estimator import DiagonalFisher, NonFiniteError
from fastforget.fisher.files import check_space, load_fisher, save_fisher
from fastforget.fisher.names import Fisher, canonical_name, matching_names
from fastforget.fisher_run.options import Options
from fastforget.fisher_run.partial import RunFiles, State, environment
from fastforget.fisher_run.plan import Plan, make_plan
from fastforget.matrix.models import ResidentModel
from fastforget.matrix.progress import ProgressBar
from fastforget.matrix.scoring import free_memory, is_out_of_memory

__all__ = ["run_fisher"]

WRITING = 0.1  # share of the time that may go into writing the state
# What the shared loading code calls its inputs, and what they are called here.
WORDS = {"base:": "model:", "task 'model':": "model:", "task 'adapter':": "adapter:"}
WORDS |= {"upstream:": "data:", "path:": "out:"}


def run_fisher(options: Options) -> Fisher:
    """Compute the diagonal Fisher of a model on a data set and save it; the same call continues a stopped run.

    The sums so far, and how far they go, are written to `<out>.partial` from time to time. A run that was stopped at
    any moment ends with the same bits as one that was not.

    Args:
        options: the model, the data, the file, and which Fisher.

    Returns:
        The Fisher, as `load_fisher(out)` gives it.

    Raises:
        ValueError: if an input is wrong, or `out` belongs to another run.
    """
    with _own_words():
        return _Run(make_plan(options)).execute()


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


class _Run:
    """The loop over the batches, and what has to change where one fails."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.options = plan, plan.options
        self.files = RunFiles(plan.out, plan.inputs, environment(plan.device))
        self.state = State()
        self.saved = time.monotonic()
        self.saving = 0.0  # seconds that the last write took

    def execute(self) -> Fisher:
        plan = self.plan
        if self.files.finished():
            print(f"{plan.out}: finished, by the same command on the same inputs; nothing to do", file=sys.stderr)
            return load_fisher(plan.out)
        self.files.check()
        resident = ResidentModel(plan.base, plan.device, plan.dtype)
        if plan.adapter:
            resident.check(plan.adapter, check_adapter_base=self.options.check_adapter_base)
        with resident.holding(plan.adapter or plan.base) as model:
            self.model = model
            select_parameters(model, self.options.parameters or (), adapter=plan.adapter is not None)
            parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
            check_space(plan.out, 2 * parameters * max(4, plan.dtype.itemsize))  # a file, and the one that replaces it
            self.estimator = self._new_estimator()
            with self.files.opened():
                self._restore()
                self._accumulate()
                self._finish()
        return load_fisher(plan.out)

    def _new_estimator(self) -> DiagonalFisher:
        convention = {name: getattr(self.options, name) for name in ("per", "labels", "loss", "samples", "seed")}
        return DiagonalFisher(self.model, **convention, offload=self.options.offload)

    # The files

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

    def _finish(self) -> None:
        plan, options = self.plan, self.options
        if len(self.state.failed) == len(plan.order):
            raise ValueError(
                "data: expected an example with a finite loss, got none; check the weights, or choose a wider dtype"
            )
        metadata = dict(self.estimator.metadata)
        metadata |= {"model": plan.base.path, "data": os.fspath(options.data)}
        metadata["parameters"] = plan.inputs["settings"]["parameters"] or None
        metadata |= {"adapter": plan.adapter.path} if plan.adapter else {}
        metadata |= {"batch_size": options.batch_size} if options.batch_size else {}
        metadata |= {"run": plan.inputs, "environment": self.files.environment}
        metadata["skipped"] = metadata.get("skipped", 0) + len(plan.examples.skipped)
        metadata |= {"truncated": plan.examples.truncated, "failed": plan.where(self.state.failed)}
        save_fisher(plan.out, self.estimator.diagonal(), metadata)
        self.files.partial.unlink(missing_ok=True)

    # The batches

    def _accumulate(self) -> None:
        order = self.plan.order
        tokens = np.concatenate([[0], self.plan.lengths[order].cumsum()])  # before each position
        done = self.state.position
        if self.options.progress and done:
            print(f"{self.plan.out}: continuing, {done:,} of {len(order):,} examples are done", file=sys.stderr)
        self.saved = time.monotonic()
        with ProgressBar(int(tokens[-1]), int(tokens[done]), shown=self.options.progress) as bar:
            bar.describe("Fisher")
            while self.state.position < len(order):
                before = self.state.position
                self._step()
                after = self.state.position
                bar.advance(after - before, int(tokens[after] - tokens[before]))
                every = self.options.save_every
                if time.monotonic() - self.saved >= (every and max(every, self.saving / WRITING)):
                    self._save()

    def _step(self) -> None:
        """One batch, or what has to change before it is tried again."""
        start = self.state.position
        stop = self.plan.batch_end(start, self._budget())
        rows = [int(j) for j in self.plan.order[start:stop] if int(j) not in self.state.failed]
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
            self.estimator.update(*self.plan.batch(rows), example_ids=rows)
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

    def _budget(self) -> int:
        smaller = (tokens for start, tokens in self.state.budgets if start <= self.state.position)
        return min(smaller, default=self.plan.inputs["settings"]["tokens_per_batch"])

    def _halve_budget(self, rows: list[int]) -> None:
        plan = self.plan
        longest = int(plan.lengths[rows].max())
        remedy = "choose a smaller max_length or dtype, offload, or another device"
        if len(rows) == 1:
            raise ValueError(
                f"data: expected every example to fit in memory, got {plan.examples.ids[rows[0]]!r} of {longest} "
                f"tokens, which does not fit alone on {plan.device}; {remedy}"
            )
        if self.options.batch_size:
            raise ValueError(
                f"batch_size: expected a batch that fits in memory, got {len(rows)} examples of up to {longest} tokens, "
                f"which do not fit on {plan.device}, and smaller batches would be another quantity; choose a smaller "
                f"batch_size, or {remedy}"
            )
        before = budget = self._budget()
        while budget >= len(rows) * longest:  # a halving that leaves the batch as it was does not help
            budget //= 2
        self.state.budgets.append([self.state.position, budget])
        warnings.warn(
            f"out of memory on {plan.device} with {before} tokens per batch; the run goes on with {budget}",
            RuntimeWarning,
            stacklevel=6,
        )


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
    matching = matching_names({name: () for name, _ in named}, patterns)
    chosen = {id(parameter) for name, parameter in named if name in matching}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in chosen)
