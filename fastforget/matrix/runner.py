"""The run: every model over every shard, resumable, one unit at a time."""

import itertools
import os
import shutil
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from torch import nn

from fastforget._files import write_atomically
from fastforget.matrix import plan
from fastforget.matrix.checkpoints import (
    Checkpoint,
    check_tokenizer,
    find_checkpoint,
    load_config,
    load_tokenizer,
    named_tasks,
)
from fastforget.matrix.models import ResidentModel
from fastforget.matrix.noise import measure_noise
from fastforget.matrix.progress import ProgressBar
from fastforget.matrix.result import ForgettingMatrix
from fastforget.matrix.scoring import Scores, free_memory, is_out_of_memory, joined, score
from fastforget.matrix.store import FORMAT_VERSION, Store
from fastforget.matrix.upstream import Upstream, load_upstream, tokenizer_fingerprint

PathLike = str | os.PathLike[str]
TOKENIZER_SAMPLES = 32
BYTES_A_VALUE = 26  # a row of a unit file, before Parquet packs it
BYTES_A_UNIT = 4096
DISK_FIX = "free some space, or choose another folder, and give the same command again"


def forgetting_matrix(
    *,
    base: PathLike,
    tasks: Iterable[PathLike] | Mapping[str, PathLike],
    upstream: PathLike,
    out: PathLike,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    eos: bool = False,
    skip_empty: bool = False,
    split: str = "train",
    config: str | None = None,
    progress: bool = True,
    noise_examples: int = 32,
    check_adapter_base: bool = True,
) -> ForgettingMatrix:
    """Build the forgetting matrix Z[i, j] = lp_j(task i) - lp_j(base), in nats per token.

    lp_j is the log-perplexity of upstream example j. The base stays resident; adapters are put on it and full
    checkpoints are read into it. Every finished unit (a model, a shard of the examples) is a file in `out`: a run
    that was stopped at any moment continues with the same call, and gives the same bits as one that was not.

    Args:
        base: folder or hub id of the base model; its tokenizer cuts the upstream examples.
        tasks: folders or hub ids of full checkpoints and PEFT adapters, each perhaps as `NAME=PATH`; or a mapping
            from names to them.
        upstream: `.jsonl`, `.json`, `.parquet` or `.txt` file, or a datasets id. A row has `text`, or `prompt` and
            `response`, or `messages`, and perhaps an `id`.
        out: the folder of the results.
        max_length: examples are cut on the right to so many tokens; default: the model's limit.
        tokens_per_batch: padded tokens that one forward takes; default: by device and dtype. Halved by itself when
            memory runs out.
        dtype: of the parameters, such as "bfloat16"; default: as the base was saved.
        device: default: the GPU if there is one, else the CPU.
        eos: append the end-of-sequence token to every `response`, as a target.
        skip_empty: leave out rows without a target token instead of refusing them.
        split: the split of a data set.
        config: the configuration of a data set.
        progress: show a progress bar on standard error.
        noise_examples: on so many examples the run measures its own noise floor; 0 leaves that out.
        check_adapter_base: refuse adapters that name another base.

    Returns:
        The matrix.

    Raises:
        ValueError: if an input is wrong, or `out` belongs to another run; nothing is written then.
        TypeError: if an argument has the wrong type.

    References:
        Jin and Ren, Demystifying Language Model Forgetting with Low-rank Example Associations, arXiv 2406.14026.
    """
    for name, value, least in (("max_length", max_length, 2), ("tokens_per_batch", tokens_per_batch, 1)):
        if value is not None and (not isinstance(value, int) or value < least):
            raise ValueError(f"{name}: expected {least} tokens or more, got {value!r}; leave it out for the default")
    if not isinstance(noise_examples, int) or noise_examples < 0:
        raise ValueError(f"noise_examples: expected 0 or more, got {noise_examples!r}; 0 measures no noise floor")
    paths = named_tasks(tasks)
    on = choose_device(device)
    models = [find_checkpoint("base", os.fspath(base), is_base=True)]
    models += [find_checkpoint(name, path) for name, path in paths.items()]
    base_config = load_config(models[0])
    kind = choose_dtype(dtype, base_config)
    tokenizer = load_tokenizer(models[0])
    limit = choose_max_length(max_length, base_config)
    examples = load_upstream(
        os.fspath(upstream),
        tokenizer,
        max_length=limit,
        eos=eos,
        skip_empty=skip_empty,
        split=split,
        config=config,
    )
    check_vocabulary(examples, base_config)
    step = max(1, len(examples.texts) // TOKENIZER_SAMPLES)
    for task in models[1:]:
        check_tokenizer(task, tokenizer, examples.texts[::step])
    run = _Run(
        store=Store(os.fspath(out)),
        models=models,
        examples=examples,
        device=on,
        dtype=kind,
        tokens_per_batch=tokens_per_batch or plan.default_tokens_per_batch(torch.device(on).type, kind),
        noise_examples=noise_examples,
        upstream=os.fspath(upstream),
    )
    settings = {"max_length": limit, "eos": eos, "skip_empty": skip_empty}
    run.execute(run.manifest(settings, tokenizer_fingerprint(tokenizer)), progress, check_adapter_base)
    return ForgettingMatrix.load(run.store.out)


@dataclass
class _Run:
    """What a run works on; `execute` does it."""

    store: Store
    models: list[Checkpoint]  # the base, then the tasks in the caller's order
    examples: Upstream
    device: str
    dtype: torch.dtype
    tokens_per_batch: int
    noise_examples: int
    upstream: str

    def __post_init__(self) -> None:
        self.lengths = self.examples.lengths
        self.shards = plan.shards(self.lengths)
        kinds = ("base", "adapter", "full")  # adapters want the base's weights, which checkpoints overwrite
        order = sorted(range(-1, len(self.models) - 1), key=lambda task: kinds.index(self.models[task + 1].kind))
        self.units = plan.units(order, len(self.shards))

    def manifest(self, settings: dict[str, Any], tokenizer: str) -> dict[str, Any]:
        # `inputs` have to be the same to continue a run; the rest is for the reader.
        import transformers

        examples = self.examples
        models = {model.name: {"kind": model.kind, "weights": model.fingerprint} for model in self.models[1:]}
        inputs = {
            "base": {"weights": self.models[0].fingerprint, "tokenizer": tokenizer},
            "tasks": models,
            "task order": list(models),
            "upstream": {"content": examples.fingerprint, "examples": len(examples.ids)},
            "settings": {
                **settings,
                "device": torch.device(self.device).type,
                "dtype": str(self.dtype).removeprefix("torch."),
                "tokens_per_batch": self.tokens_per_batch,
                "noise_examples": self.noise_examples,
            },
            "plan": {"units": len(self.units), "shards": len(self.shards), "tokens": int(self.lengths.sum())},
        }
        cuda = torch.device(self.device).type == "cuda"
        environment = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name(self.device) if cuda else f"cpu, {torch.get_num_threads()} threads",
        }
        about = {
            "base": self.models[0].path,
            "upstream": self.upstream,
            "truncated": examples.truncated,
            "skipped": examples.skipped,
        }
        return {"format": FORMAT_VERSION, "inputs": inputs, "environment": environment, "about": about}

    def execute(self, manifest: dict[str, Any], progress: bool, check_adapter_base: bool) -> None:
        store = self.store
        store.check(manifest)
        left = {unit.file_name for unit in self.units} - store.finished()
        tables = [store.out / "examples.parquet", store.out / "tasks.parquet"]
        if not left and all(file.exists() for file in (store.noise_file, *tables)):
            return
        self._check_disk(len(left))
        resident = ResidentModel(self.models[0], self.device, self.dtype)
        for task in self.models[1:]:
            resident.check(task, check_adapter_base=check_adapter_base)
        with store.opened(manifest):
            self._check_environment(manifest)
            try:
                self._write_tables()
                self._score_units(resident, progress)
            except OSError as error:
                raise ValueError(
                    f"out: cannot write to {store.out}: {error}; {len(store.finished())} of {len(self.units)} units "
                    f"are finished and kept; {DISK_FIX}"
                ) from error

    def _check_disk(self, units: int) -> None:
        folder = next(f for f in (self.store.out, *self.store.out.absolute().parents) if f.exists())
        values = units * (len(self.examples.ids) / len(self.shards) * BYTES_A_VALUE + BYTES_A_UNIT)
        needed = int(values) + sum(len(text.encode()) for text in self.examples.texts) + 2**20
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ValueError(
                f"out: expected {needed / 1e6:.1f} MB of free space in {folder}, got {free / 1e6:.1f} MB; {DISK_FIX}"
            )

    def _check_environment(self, manifest: dict[str, Any]) -> None:
        first, now = self.store.manifest()["environment"], manifest["environment"]
        changed = [f"{name} {first.get(name)} -> {now[name]}" for name in now if first.get(name) != now[name]]
        if changed:
            warnings.warn(
                f"{self.store.out} was begun in another environment ({', '.join(changed)}): the units of this run may "
                "differ from the finished ones by rounding",
                RuntimeWarning,
                stacklevel=4,
            )

    def _write_tables(self) -> None:
        """The tables that name tasks and examples; written once, they depend on the inputs alone."""
        examples, models = self.examples, self.models
        tables = {
            "examples.parquet": {
                "index": pa.array(range(len(examples.ids)), pa.int32()),
                "id": pa.array(examples.ids, pa.string()),
                "tokens": pa.array(self.lengths, pa.int32()),
                "targets": pa.array(examples.targets, pa.int32()),
                "text": pa.array(examples.texts, pa.large_string()),
            },
            "tasks.parquet": {
                "index": pa.array(range(-1, len(models) - 1), pa.int32()),
                **{
                    name: pa.array([getattr(model, name) for model in models], pa.string())
                    for name in ("name", "kind", "path", "fingerprint")
                },
            },
        }
        for name, columns in tables.items():
            if not (self.store.out / name).exists():
                table = pa.table(columns)
                write_atomically(self.store.out / name, lambda path, table=table: pq.write_table(table, path))

    def _score_units(self, resident: ResidentModel, progress: bool) -> None:
        store = self.store
        finished = store.finished()
        tokens = np.array([self.lengths[shard].sum() for shard in self.shards])
        done = sum(int(tokens[unit.shard]) for unit in self.units if unit.file_name in finished)
        if progress and finished:
            Console(stderr=True).print(
                f"{store.out}: continuing, {len(finished)} of {len(self.units)} units are finished"
            )
        with ProgressBar(int(tokens.sum()) * len(self.models), done, shown=progress) as bar:
            for task, units in itertools.groupby(self.units, key=lambda unit: unit.task):
                left = [unit for unit in units if unit.file_name not in finished]
                is_base = task < 0
                if not left and not (is_base and not store.noise_file.exists()):
                    continue
                bar.describe(self.models[task + 1].name)
                with resident.holding(self.models[task + 1]) as model:
                    for unit in left:
                        scores = self._score_unit(model, unit, bar)
                        store.write_unit(unit, self.shards[unit.shard], vars(scores))
                    if is_base and not store.noise_file.exists():
                        bar.describe("noise floor")
                        store.write_json(store.noise_file, self._noise(model))
        if not store.events("finished"):
            store.record("finished", units=len(self.units))

    def _score_unit(self, model: nn.Module, unit: plan.Unit, bar: ProgressBar) -> Scores:
        # Where memory runs out, the whole shard is done again, so that its batches depend on the budget alone.
        shard = self.shards[unit.shard]
        lengths = self.lengths[shard]
        budget = self.store.budget(unit, self.tokens_per_batch)
        while True:
            parts, failed = [], None
            for rows in plan.batches(lengths, budget):
                try:
                    parts.append(score(model, self.examples, shard[rows], self.device))
                except (RuntimeError, MemoryError) as error:
                    if not is_out_of_memory(error):
                        raise
                    failed = rows
                    break
                bar.advance(rows.stop - rows.start, int(lengths[rows].sum()))
            if failed is None:
                return joined(parts)
            free_memory()
            bar.advance(-failed.start, -int(lengths[: failed.start].sum()))
            budget = self._smaller_budget(unit, budget, failed)

    def _smaller_budget(self, unit: plan.Unit, budget: int, failed: slice) -> int:
        shard = self.shards[unit.shard]
        rows, longest = failed.stop - failed.start, int(self.lengths[shard[failed.start]])
        if rows == 1:
            raise ValueError(
                f"upstream: expected every example to fit in memory, got {self.examples.ids[shard[failed.start]]!r} of "
                f"{longest} tokens, which does not fit alone on {self.device}; choose a smaller max_length or dtype, "
                "or another device, and another out folder"
            )
        before = budget
        while budget >= rows * longest:  # a halving that leaves the batch as it was does not help
            budget //= 2
        # On the disk before the retry: a run that dies now continues with the same batches.
        self.store.record("budget", from_unit=unit.index, tokens_per_batch=budget)
        warnings.warn(
            f"out of memory on {self.device} with {before} tokens per batch; the run goes on with {budget}",
            RuntimeWarning,
            stacklevel=6,
        )
        return budget

    def _noise(self, model: nn.Module) -> dict[str, Any]:
        base = [unit.file_name for unit in self.units if unit.task < 0]
        table = self.store.read_units(base)
        recorded = np.full(len(self.lengths), np.nan)
        recorded[table["example"].to_numpy()] = table["nll_sum"].to_numpy() / table["tokens"].to_numpy()
        return measure_noise(
            model, self.examples, recorded, count=self.noise_examples, device=self.device, dtype=self.dtype
        )


def choose_device(device: str | torch.device | None) -> str:
    """The device that is asked for, or the GPU if there is one."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        reason = str(error).split("\n")[0]
        raise ValueError(f"device: expected a device of this machine, got {device}: {reason}; try 'cpu'") from error
    return str(device)


def choose_dtype(dtype: str | torch.dtype | None, config: Any) -> torch.dtype:
    """The dtype that is asked for, or that of the config."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if dtype is None:
        dtype = getattr(config, "dtype", None) or "float32"
    name = str(dtype).removeprefix("torch.")
    if name not in known:
        raise ValueError(f"dtype: expected one of {', '.join(known)}, got {name}; leave it out for the base's own")
    return known[name]


def choose_max_length(max_length: int | None, config: Any) -> int | None:
    """The number of tokens that is asked for, or the model's limit, if it has one."""
    limit = getattr(config.get_text_config(), "max_position_embeddings", None)
    if max_length is not None and limit is not None and max_length > limit:
        raise ValueError(
            f"max_length: expected at most {limit}, the model's limit, got {max_length}; choose a smaller one"
        )
    return limit if max_length is None else max_length


def check_vocabulary(examples: Upstream, config: Any) -> None:
    """Refuse token ids that the model does not have."""
    size = getattr(config.get_text_config(), "vocab_size", None)
    for name, tokens in zip(examples.ids, examples.tokens, strict=True):
        if size is not None and tokens.max() >= size:
            raise ValueError(
                f"base: expected a tokenizer of at most vocab_size = {size} tokens, got token {tokens.max()} in "
                f"example {name!r}; the tokenizer in the base's folder belongs to another model"
            )
