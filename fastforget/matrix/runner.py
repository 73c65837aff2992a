"""The run: every model over every shard, resumable, one unit at a time."""

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from fastforget.matrix import plan, shares
from fastforget.matrix.checkpoints import (
    check_tokenizer,
    find_checkpoint,
    load_config,
    load_tokenizer,
    named_tasks,
)
from fastforget.matrix.folders import LocalFolder
from fastforget.matrix.job import Job
from fastforget.matrix.local import LocalRun
from fastforget.matrix.plan import Unit
from fastforget.matrix.result import ForgettingMatrix
from fastforget.matrix.shares import Share, parse_share
from fastforget.matrix.store import Store
from fastforget.matrix.upstream import Upstream, load_upstream, tokenizer_fingerprint

PathLike = str | os.PathLike[str]
TOKENIZER_SAMPLES = 32
BYTES_A_VALUE = 26  # a row of a unit file, before Parquet packs it
BYTES_A_UNIT = 4096
TABLES = ("examples.parquet", "tasks.parquet")
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
    compile: bool = False,
    predict: int | None = None,
    known: PathLike | None = None,
    shard: str | None = None,
    ray: str | None = None,
    workers: int | None = None,
    tensor_parallel: bool = False,
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
        out: the folder of the results, or a URL that fsspec knows, such as `s3://bucket/matrix`.
        max_length: examples are cut on the right to so many tokens; default: the model's limit.
        tokens_per_batch: padded tokens that one forward takes; default: by device and dtype. Halved by itself when
            memory runs out.
        dtype: of the parameters, such as "bfloat16"; default: as the base was saved.
        device: default: the GPU if there is one, else the CPU. `auto` puts a model on all GPUs, layer by layer, as
            transformers' `device_map="auto"` does, for one that is too large for a single GPU.
        eos: append the end-of-sequence token to every `response`, as a target.
        skip_empty: leave out rows without a target token instead of refusing them.
        split: the split of a data set.
        config: the configuration of a data set.
        progress: show a progress bar on standard error.
        noise_examples: on so many examples the run measures its own noise floor; 0 leaves that out.
        check_adapter_base: refuse adapters that name another base.
        compile: compile the models with torch.compile, for batches padded to a few lengths. Values move by rounding; the
            first batches of every length, and of every form of adapters, wait for the compiler.
        predict: evaluate only so many examples, those that tell most, and predict the rest of every row, with its
            uncertainty. Needs `known`.
        known: folder or URL of a finished matrix of other tasks, with the same base, examples and settings.
        shard: `i/n`: compute the i-th of n blocks of the units, with i from 0 to n - 1; n such calls, on any machines,
            with the same `out`, make the matrix. `auto` takes i and n from torchrun or a SLURM array.
        ray: compute on a Ray cluster: its address, `auto` for the one of this machine, `local` for a new one. The
            checkpoints have to be readable on every node, under the same paths.
        workers: how many Ray workers; default: one a GPU, or one a node where there are none.
        tensor_parallel: every process that torchrun has started holds a part of each model, by the plan that
            transformers has for it. For full checkpoints.

    Returns:
        The matrix; with `shard` it is partial until every driver has finished, see its `complete`.

    Raises:
        ValueError: if an input is wrong, or `out` belongs to another run; nothing is written then.
        TypeError: if an argument has the wrong type.
        ImportError: if the package of an adapter, a URL or Ray is not installed.

    References:
        Jin and Ren, Demystifying Language Model Forgetting with Low-rank Example Associations, arXiv 2406.14026.
    """
    numbers = (("max_length", max_length, 2), ("tokens_per_batch", tokens_per_batch, 1), ("workers", workers, 1))
    for name, value, least in numbers:
        if value is not None and (not isinstance(value, int) or value < least):
            what = "" if name == "workers" else " tokens"
            raise ValueError(f"{name}: expected {least}{what} or more, got {value!r}; leave it out for the default")
    if not isinstance(noise_examples, int) or noise_examples < 0:
        raise ValueError(f"noise_examples: expected 0 or more, got {noise_examples!r}; 0 measures no noise floor")
    if workers is not None and ray is None:
        raise ValueError(f"workers: expected none without ray, got {workers}; pass ray='local' or a cluster's address")
    if (predict is None) != (known is None):
        given, other = ("predict", "known") if known is None else ("known", "predict")
        raise ValueError(f"{other}: expected one with {given}, got none; predictions need both")
    forecast = None if predict is None or known is None else _forecast(known, predict)
    if device == "auto" and (ray is not None or tensor_parallel):
        raise ValueError(
            f"device: expected none with {'ray' if ray is not None else 'tensor_parallel'}, got 'auto'; it is for one process"
        )
    store = Store(out, parse_share(shard))
    with contextlib.ExitStack() as stack:
        if tensor_parallel:
            on, run, progress = _in_step(store, device, progress, shard=shard, ray=ray, compile=compile)
        elif ray is None:
            on = choose_device(None if device == "auto" else device, one_of_many=shard == "auto")

            def run(*args: Any) -> Any:
                return LocalRun(*args, spread=device == "auto")
        else:
            on, run = _on_cluster(stack, ray, workers, device, store.share)
        paths = named_tasks(tasks)
        models = [find_checkpoint("base", os.fspath(base), is_base=True)]
        models += [find_checkpoint(name, path) for name, path in paths.items()]
        base_config = load_config(models[0])
        kind = choose_dtype(dtype, base_config)
        tokenizer = load_tokenizer(models[0])
        settings = {"max_length": choose_max_length(max_length, base_config), "eos": eos, "skip_empty": skip_empty}
        examples = load_upstream(os.fspath(upstream), tokenizer, **settings, split=split, config=config)
        check_vocabulary(examples, base_config)
        step = max(1, len(examples.texts) // TOKENIZER_SAMPLES)
        for task in models[1:]:
            check_tokenizer(task, tokenizer, examples.texts[::step])
        job = Job(
            models=models,
            examples=examples,
            device=on,
            dtype=kind,
            tokens_per_batch=tokens_per_batch or plan.default_tokens_per_batch(torch.device(on).type, kind),
            noise_examples=noise_examples,
            buckets=plan.Buckets(choose_max_length(None, base_config)) if compile else None,
            upstream=os.fspath(upstream),
            forecast=forecast,
        )
        manifest = job.manifest(settings, tokenizer_fingerprint(tokenizer))
        _execute(job, store, manifest, run, progress=progress, check_adapter_base=check_adapter_base)
    return ForgettingMatrix.load(out)


def _in_step(store: Store, device: Any, progress: bool, **others: Any) -> tuple[str, Callable[..., Any], bool]:
    from fastforget.matrix import parallel

    for name, value in others.items():
        if value:
            raise ValueError(
                f"{name}: expected none with tensor_parallel, got {value!r}; its processes share every model"
            )
    on = parallel.begin(device)
    store.folder = parallel.FolderInStep(store.folder)
    return on, partial(LocalRun, load=parallel.ParallelModel), progress and store.folder.first


def _forecast(known: PathLike, count: int) -> Any:
    from fastforget.matrix.forecast import Forecast  # with SciPy

    return Forecast(known, count)


def _on_cluster(
    stack: contextlib.ExitStack, ray: str, workers: int | None, device: Any, share: Share
) -> tuple[str, Callable[..., Any]]:
    from fastforget.matrix import ray_driver

    if share != Share():
        raise ValueError(f"shard: expected none with ray, got {share}; the Ray driver divides the run itself")
    cluster = stack.enter_context(ray_driver.connected(ray, workers, device and str(device)))
    return cluster.device, partial(ray_driver.RayRun, cluster=cluster)


def _execute(
    job: Job,
    store: Store,
    manifest: dict[str, Any],
    make_run: Callable[..., Any],
    *,
    progress: bool,
    check_adapter_base: bool,
) -> None:
    """Compute what is left of this driver's units."""
    store.check(manifest)
    units = shares.units_of(store.share, job.units, job.tokens(job.units))
    if _nothing_left(job, store, units):
        if job.forecast is not None and job.forecast.missing(store, job):
            with _opened(job, store, manifest, units):
                pass
        return
    _check_disk(job, store, units)
    with contextlib.closing(make_run(job, store, units)) as run:
        run.check(check_adapter_base=check_adapter_base)
        manifest["environment"] = run.environment()
        with _opened(job, store, manifest, units):
            run.execute(progress=progress)


def _nothing_left(job: Job, store: Store, units: list[Unit]) -> bool:
    finished = store.finished()
    if not all(store.folder.exists(name) for name in TABLES) or any(u.file_name not in finished for u in units):
        return False
    return len(finished) < len(job.units) or store.has_noise()  # the others measure the noise, or have done so


@contextlib.contextmanager
def _opened(job: Job, store: Store, manifest: dict[str, Any], units: list[Unit]) -> Iterator[None]:
    """Claim the folder, write what names tasks and examples, and say how a disk that fills up left the run."""
    with store.opened(manifest, None if store.share == Share() else units):
        _check_environment(store, manifest)
        try:
            for name, table in job.tables().items():
                store.write_table(name, table)
            yield
            if job.forecast is not None:
                job.forecast.write(store, job)
            if not store.events("finished"):
                store.record("finished", units=len(units))
        except OSError as error:
            raise ValueError(
                f"out: cannot write to {store}: {error}; {len(store.finished())} of {len(job.units)} units "
                f"are finished and kept; {DISK_FIX}"
            ) from error


def _check_disk(job: Job, store: Store, units: list[Unit]) -> None:
    own = getattr(store.folder, "folder", store.folder)  # of processes in step
    if not isinstance(own, LocalFolder):
        return
    path = own.path
    folder = next(f for f in (path, *path.absolute().parents) if f.exists())
    left = len({unit.file_name for unit in units} - store.finished())
    values = left * (len(job.examples.ids) / len(job.shards) * BYTES_A_VALUE + BYTES_A_UNIT)
    needed = int(values) + sum(len(text.encode()) for text in job.examples.texts) + 2**20
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ValueError(
            f"out: expected {needed / 1e6:.1f} MB of free space in {folder}, got {free / 1e6:.1f} MB; {DISK_FIX}"
        )


def _check_environment(store: Store, manifest: dict[str, Any]) -> None:
    first, now = store.manifest()["environment"], manifest["environment"]
    changed = [f"{name} {first.get(name)} -> {now[name]}" for name in now if first.get(name) != now[name]]
    if changed:
        warnings.warn(
            f"{store} was begun in another environment ({', '.join(changed)}): the units of this run may "
            "differ from the finished ones by rounding",
            RuntimeWarning,
            stacklevel=6,
        )


def choose_device(device: str | torch.device | None, *, one_of_many: bool = False) -> str:
    """The device that is asked for, or the GPU if there is one; of many processes on a node, each its own."""
    if device is None and one_of_many and torch.cuda.device_count() > 1 and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
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
