"""The command line. Commands import what they run, so that `fastforget --help` answers at once."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from fastforget import __version__

if TYPE_CHECKING:
    from fastforget.fisher.names import Fisher
    from fastforget.matrix.result import ForgettingMatrix
    from fastforget.update.changes import Changes

Result = TypeVar("Result")

app = typer.Typer(
    help="Measure what a language model forgets when it is fine-tuned.",
    epilog="FASTFORGET_TRACEBACK=1 in the environment shows where in the code an error came from.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # its tables cut the names of options off
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; bad input and failing files end in one line on standard error and exit code 2."""
    try:
        app(prog_name="fastforget")
    except (ValueError, TypeError, OSError, ImportError) as error:
        if os.environ.get("FASTFORGET_TRACEBACK") == "1":
            raise
        raise SystemExit(_fail(f"{error or type(error).__name__}")) from None


def _fail(message: str) -> int:
    print(f"fastforget: error: {message}", file=sys.stderr)
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("demo"),
    device: Annotated[str | None, typer.Option(help="torch device; default: the GPU if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the models and of the text that is sampled.")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="Smaller models and less text, for a first look.")] = False,
) -> None:
    """Show a forgetting matrix of real text in minutes.

    Trains a small model on text of this machine, fine-tunes it on twelve tasks, and shows what each made it forget.
    """
    from fastforget.demo import run

    run(out, device=device, seed=seed, quick=quick)


@app.command()
def matrix(
    base: Annotated[str, typer.Option(help="Folder or hub id of the base model.")],
    task: Annotated[
        list[str], typer.Option(metavar="[NAME=]DIR_OR_ID", help="Checkpoint or PEFT adapter, as often as needed.")
    ],
    upstream: Annotated[str, typer.Option(help="Upstream examples: .jsonl, .parquet, .txt, or a datasets id.")],
    out: Annotated[str, typer.Option(help="Folder or URL of the results; the same command continues a stopped run.")],
    max_length: Annotated[int | None, typer.Option(help="Tokens an example may have; default: the model's.")] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="Token budget of a batch; default: by device.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the base's.")] = None,
    device: Annotated[
        str | None, typer.Option(help="torch device; auto: all GPUs; default: one GPU or the CPU.")
    ] = None,
    eos: Annotated[bool, typer.Option("--eos", help="Count the end-of-sequence token after a response.")] = False,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Leave out rows that have no target token.")] = False,
    split: Annotated[str, typer.Option(help="Split of a datasets id.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a datasets id.")] = None,
    noise_examples: Annotated[int, typer.Option(help="Examples that measure the noise floor; 0: none.")] = 32,
    check_adapter_base: Annotated[bool, typer.Option(help="Refuse adapters that name another base.")] = True,
    progress: Annotated[bool, typer.Option(help="Show the progress bar.")] = True,
    compile: Annotated[bool, typer.Option("--compile", help="Compile the models with torch.compile.")] = False,
    tensor_parallel: Annotated[
        bool, typer.Option("--tensor-parallel", help="Divide every model among torchrun's processes.")
    ] = False,
    predict: Annotated[int | None, typer.Option(metavar="S", help="Evaluate S examples, predict the rest.")] = None,
    known: Annotated[str | None, typer.Option(help="Finished matrix of other tasks, for --predict.")] = None,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Compute block I of N, from 0; auto: of torchrun or a SLURM array."),
    ] = None,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Ray cluster, auto or local: compute there.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Ray workers; default: one a GPU, or one a node.")] = None,
) -> None:
    """Build a forgetting matrix, or continue one.

    Its values are the increase of every upstream example's log-perplexity under every task's model, in nats per token.
    """
    from fastforget.matrix import forgetting_matrix

    is_url = "://" in out
    run = partial(
        forgetting_matrix,
        base=base,
        tasks=task,
        upstream=upstream,
        out=out if is_url else Path(out),
        max_length=max_length,
        tokens_per_batch=tokens_per_batch,
        dtype=dtype,
        device=device,
        eos=eos,
        skip_empty=skip_empty,
        split=split,
        config=config,
        noise_examples=noise_examples,
        check_adapter_base=check_adapter_base,
        progress=progress,
        compile=compile,
        tensor_parallel=tensor_parallel,
        predict=predict,
        known=known,
        shard=shard,
        ray=ray,
        workers=workers,
    )
    result = _stoppable(run)
    if shard and not result.complete:
        typer.echo(f"shard {shard} is finished; {result.unfinished.sum():,} values of {out} wait for other drivers")
        return
    if tensor_parallel and os.environ.get("RANK", "0") != "0":
        return
    _print_summary(result)
    if is_url:
        typer.echo(f"`fastforget plot {out} --to heatmap.png` draws it")
    else:
        _draw(result, Path(out) / "heatmap.png")


@app.command()
def fisher(
    out: Annotated[Path, typer.Option(help="The .safetensors file; the same command continues a stopped run.")],
    model: Annotated[str | None, typer.Option(help="Folder or hub id of the model.")] = None,
    data: Annotated[str | None, typer.Option(help="Examples: .jsonl, .parquet, .txt, or a datasets id.")] = None,
    adapter: Annotated[str | None, typer.Option(help="PEFT adapter; its parameters are the measured ones.")] = None,
    per: Annotated[str, typer.Option(help="example, position or batch_mean: what is squared.")] = "example",
    batch_size: Annotated[int | None, typer.Option(help="Examples of a batch, with --per batch_mean.")] = None,
    labels: Annotated[str, typer.Option(help="data, or sampled from the model's own distribution.")] = "data",
    loss: Annotated[str, typer.Option(help="mean or sum over an example's targets.")] = "mean",
    samples: Annotated[int, typer.Option(help="Draws an example, with --labels sampled.")] = 1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
    parameters: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Measure parameters whose names match, such as '*.mlp.*'."),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use so many of the first examples.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Tokens an example may have; default: the model's.")] = None,
    tokens_per_batch: Annotated[int | None, typer.Option(help="Token budget of a batch; default: by device.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; default: the model's.")] = None,
    device: Annotated[str | None, typer.Option(help="torch device; default: the GPU if there is one.")] = None,
    offload: Annotated[bool, typer.Option("--offload", help="Keep the sums in the CPU's memory.")] = False,
    eos: Annotated[bool, typer.Option("--eos", help="Count the end-of-sequence token after a response.")] = False,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Leave out rows that have no target token.")] = False,
    split: Annotated[str, typer.Option(help="Split of a datasets id.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a datasets id.")] = None,
    check_adapter_base: Annotated[bool, typer.Option(help="Refuse an adapter that names another base.")] = True,
    save_every: Annotated[float, typer.Option(help="Seconds between two writes of the state; 0: every batch.")] = 60.0,
    progress: Annotated[bool, typer.Option(help="Show the progress bar.")] = True,
    summary: Annotated[
        bool, typer.Option("--summary", help="Print where the Fisher lies, and draw it; alone, of an existing file.")
    ] = False,
) -> None:
    """Compute the exact diagonal Fisher of a model on a data set, or continue.

    F is the mean over the examples of the squared gradient of each example's own loss. Without --model and --data,
    --summary describes an existing file.
    """
    options = locals().copy()
    options.pop("summary")  # the rest is what `Options` takes, by the same names
    from fastforget.fisher.files import load_fisher

    if summary and model is None and data is None:
        _summarise(load_fisher(out), out)
        return
    for name in ("model", "data"):
        if options[name] is None:
            raise ValueError(f"{name}: expected --{name}, got none; or pass --summary alone for an existing file")
    from fastforget.fisher.summary import remarks
    from fastforget.fisher_run.options import Options
    from fastforget.fisher_run.runner import run_fisher

    result = _stoppable(lambda: run_fisher(Options(**options)))
    typer.echo(f"{out}: {result}")
    if summary:
        _summarise(result, out)
        return
    for line in remarks(result.metadata):
        typer.echo(line)


@app.command()
def merge(
    model: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Two or more checkpoints, or hub ids.")],
    fisher: Annotated[list[Path], typer.Option(help="Fisher of each model, in their order.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="New folder for the merged checkpoint.")] = None,
    weight: Annotated[list[float] | None, typer.Option(help="Factor of each model; default: equal ones.")] = None,
    floor: Annotated[float, typer.Option(help="Least value of a Fisher.")] = 1e-6,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of the checkpoint.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would change.")] = False,
    progress: Annotated[bool, typer.Option(help="Show the progress bar.")] = True,
) -> None:
    """Merge models by the average of their parameters, weighted by their Fishers.

    Tensors are read and written one by one. The configuration and the tokenizer are those of the first model.
    """
    from fastforget.update.changes import Changes
    from fastforget.update.merging import fisher_merge

    _check_out(out, dry_run)
    for option, given in (("--fisher", fisher), ("--weight", weight)):
        if given and len(given) != len(model) > 1:
            raise ValueError(
                f"{option}: expected {len(model)}, one for each of {', '.join(model)}, got {len(given)}; repeat the option"
            )
    settings: dict[str, Any] = {"floor": floor, "max_shard_size": max_shard_size, "progress": progress}
    changes = fisher_merge(model, fisher, weight or None, out=out, dry_run=dry_run, **settings)
    if isinstance(changes, Changes):  # always, with these arguments
        _print_changes(changes, "Entries that differ from the first model's", None if dry_run else out)


@app.command()
def dampen(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the checkpoint.")],
    forget: Annotated[Path, typer.Option(help="Fisher of what is to be forgotten.")],
    retain: Annotated[Path, typer.Option(help="Fisher of what is to be kept.")],
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="New folder for the dampened checkpoint.")] = None,
    alpha: Annotated[float, typer.Option(help="Least ratio of the Fishers that is dampened.")] = 10.0,
    lam: Annotated[float, typer.Option(help="Factor of the ratio that an entry shrinks by.")] = 1.0,
    max_shard_size: Annotated[str, typer.Option(help="Of a file of the checkpoint.")] = "5GB",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count what would change.")] = False,
    progress: Annotated[bool, typer.Option(help="Show the progress bar.")] = True,
) -> None:
    """Make a model forget by selective synaptic dampening.

    Parameters that matter for what is to be forgotten, and little for the rest, shrink by the ratio of the two Fishers.
    """
    from fastforget.update.dampening import dampen_checkpoint

    _check_out(out, dry_run)
    settings: dict[str, Any] = {"alpha": alpha, "lam": lam, "max_shard_size": max_shard_size, "progress": progress}
    changes = dampen_checkpoint(model, out, forget=forget, retain=retain, dry_run=dry_run, **settings)
    _print_changes(changes, "Dampened entries", None if dry_run else out)


@app.command()
def replay(
    source: Annotated[Path, typer.Argument(help="Folder of a forgetting matrix, or a prediction.parquet.")],
    count: Annotated[int, typer.Option(help="How many examples are drawn.")],
    out: Annotated[Path, typer.Option(help="JSONL of the drawn examples.")] = Path("replay.jsonl"),
    task: Annotated[str | None, typer.Option(help="Which row; needless where there is one.")] = None,
    matrix: Annotated[Path | None, typer.Option(help="Folder that has the texts of a prediction's examples.")] = None,
    temperature: Annotated[float, typer.Option(help="Of the softmax; lower ones prefer what is forgotten most.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Seed of the draws.")] = 0,
) -> None:
    """Draw the upstream examples to replay, without replacement, by how much they are or will be forgotten."""
    from fastforget.replay.drawing import draw_to_file

    rows = draw_to_file(source, out, count=count, task=task, matrix=matrix, temperature=temperature, seed=seed)
    typer.echo(f"wrote {out}: {len(rows)} examples, {sum(row['weight'] for row in rows):.1%} of the weight")


@app.command()
def predict(
    matrix: Annotated[str, typer.Argument(help="Folder or URL of a forgetting matrix, or an .npz with `values`.")],
    analyse: Annotated[bool, typer.Option("--analyse", help="Show what the matrix is made of.")] = False,
    choose: Annotated[
        int | None, typer.Option(metavar="S", help="Choose S examples to evaluate for a new task.")
    ] = None,
    values: Annotated[
        Path | None,
        typer.Option(help="JSONL with id or column, and value: predict the rest; with --choose: choose more."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results; of --choose, the JSONL. Default of --analyse: beside the matrix."),
    ] = None,
    rank: Annotated[int, typer.Option(help="Largest rank of --analyse.")] = 5,
    random: Annotated[int | None, typer.Option(help="How many of --choose are drawn at random; default: half.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of that draw.")] = 0,
    method: Annotated[
        str, typer.Option(help="robust, svd, additive, knn, or logistic for a binary matrix.")
    ] = "robust",
    level: Annotated[float, typer.Option(help="Of the intervals.")] = 0.9,
    threshold: Annotated[float | None, typer.Option(help="Also estimate the share forgotten by more.")] = None,
    top: Annotated[int, typer.Option(help="How many of the predicted most forgotten examples are listed.")] = 20,
) -> None:
    """Analyse a forgetting matrix, choose what to evaluate for a new task, or predict its whole row from that."""
    if analyse + (choose is not None or values is not None) != 1:
        raise ValueError("predict: expected --analyse, --choose or --values, got none or two; give one of them")
    if out is None and (not analyse or "://" in matrix):
        raise ValueError("out: expected --out, got none; name the file of --choose, or the folder of the results")
    from fastforget.prediction import command
    from fastforget.prediction.files import load_matrix

    known = load_matrix(matrix)
    if analyse:
        command.run_analysis(known, out or (Path(matrix) if Path(matrix).is_dir() else Path(matrix).parent), rank)
    elif choose is not None and out:
        command.run_choice(known, out, choose, random=random, seed=seed, values=values)
    elif values is not None and out:
        settings: dict[str, Any] = {"method": method, "level": level, "threshold": threshold, "top": top}
        command.run_prediction(known, values, out, **settings)


@app.command()
def plot(
    out: Annotated[str, typer.Argument(help="Folder or URL of a forgetting matrix.")],
    to: Annotated[Path | None, typer.Option(help="PNG to write; default: heatmap.png in the folder.")] = None,
) -> None:
    """Draw the heatmap of a forgetting matrix."""
    from fastforget.matrix import ForgettingMatrix

    if to is None and "://" in out:
        raise ValueError(f"to: expected --to for the matrix at {out}, got none; pass --to heatmap.png")
    _draw(ForgettingMatrix.load(out), to or Path(out) / "heatmap.png")


@app.command()
def bench(
    expression: Annotated[str | None, typer.Option("-k", help="Run the benchmarks that match (as pytest -k).")] = None,
    out: Annotated[Path, typer.Option(help="Folder of the records.")] = Path("records"),
) -> None:
    """Run the benchmarks and write their records."""
    missing = [name for name in ("pytest", "pytest_benchmark") if find_spec(name) is None]
    if missing:
        raise ImportError(f"bench: expected {' and '.join(missing)}, got none; pip install 'fastforget[bench]'")
    folder = benchmarks_folder()
    out.mkdir(parents=True, exist_ok=True)
    # No settings of the place where it is called: the same run from a wheel, a checkout or someone's project.
    command = [sys.executable, "-m", "pytest", str(folder), "-c", os.devnull, "--rootdir", str(folder)]
    command += ["-o", "python_files=bench_*.py", "--import-mode=prepend", "-p", "no:cacheprovider"]
    command += ["--benchmark-json", str(out / "benchmarks.json"), "--benchmark-quiet"]
    command += ["-k", expression] if expression else []
    raise typer.Exit(subprocess.run(command, check=False).returncode)


@app.command()
def doctor() -> None:
    """Print what a bug report needs.

    Versions, devices, which implementation each operation uses on them and why, and what is wrong, if anything.
    """
    from fastforget.doctor import report

    typer.echo(report())


def _stoppable(run: Callable[[], Result]) -> Result:
    try:
        return run()
    except KeyboardInterrupt:
        typer.echo("stopped; finished work is kept, and the same command continues", err=True)
        raise typer.Exit(130) from None


def benchmarks_folder() -> Path:
    """Find the benchmarks: inside the package in a wheel, beside it in a checkout.

    Returns:
        The folder of the `bench_*.py` files.

    Raises:
        FileNotFoundError: If neither exists.
    """
    package = Path(__file__).parent
    candidates = [package / "benchmarks", package.parent / "benchmarks"]
    for folder in candidates:
        if any(folder.glob("bench_*.py")):
            return folder
    raise FileNotFoundError(f"bench: expected bench_*.py in {candidates[0]} or {candidates[1]}, got none; reinstall")


def _print_summary(matrix: ForgettingMatrix) -> None:
    """Print a table of the tasks, and below it what a reader has to know before believing it."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    summary = matrix.summary()
    title = f"Forgetting of {summary['examples']:,} upstream examples, nats per token"
    table = Table("task", "mean", "median", "share increased", "exact match lost", title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in summary["per_task"].items():
        table.add_row(escape(name), *_cells(row))
    table.add_section()
    table.add_row("all tasks", *_cells(summary), style="bold")
    Console().print(table)
    for line in _remarks(summary):
        typer.echo(line)


def _cells(row: dict[str, Any]) -> list[str]:
    formats = {"mean": "+.4f", "median": "+.4f", "share_increased": ".1%", "exact_forgotten": ".1%"}
    return ["-" if row[name] is None else format(row[name], spec) for name, spec in formats.items()]


def _remarks(summary: dict[str, Any]) -> list[str]:
    remarks = []
    for name, what in (("batch_composition", "another batch composition"), ("wider_dtype", "a wider dtype")):
        noise = summary["noise"].get(name)
        if noise and "rms" in noise:
            remarks.append(f"noise floor, {what}: rms {noise['rms']:.1e}, largest {noise['max']:.1e} nats per token")
        elif noise:
            remarks.append(f"noise floor, {what}: not measured: {noise['unmeasured']}")
    if summary["predicted"]:
        remarks.append(f"{summary['predicted']:,} entries are predicted; the statistics above take them as they are")
    for name, row in summary["per_task"].items():
        audit = row.get("audited_mean")
        if audit:
            interval = (
                f"{audit['mean']:+.4f}, {audit['level']:.0%} interval {audit['low']:+.4f} to {audit['high']:+.4f}"
            )
            remarks.append(f"audited mean of {name}: {interval}")
    if summary["nan"]["count"]:
        first = ", ".join(f"{example} under {task}" for task, example in summary["nan"]["entries"][:5])
        remarks.append(f"{summary['nan']['count']} entries are NaN and are left out above, first {first}")
    if summary["truncated"]:
        remarks.append(f"{summary['truncated']} examples were truncated to the maximal length")
    if summary["skipped"]:
        remarks.append(f"{summary['skipped']} rows without a target token were left out")
    return remarks


def _summarise(fisher: Fisher, out: Path) -> None:
    """Print a Fisher by layer and by kind of parameter, and draw it beside its file."""
    from rich.console import Console

    from fastforget.fisher.summary import summarise

    summary = summarise(fisher)
    Console().print(*summary.tables(), sep="\n")
    for line in summary.remarks():
        typer.echo(line)
    typer.echo(f"wrote {summary.plot(out.with_suffix('.png'))}")


def _check_out(out: Path | None, dry_run: bool) -> None:
    if out is None and not dry_run:
        raise ValueError("out: expected --out, got none; or pass --dry-run to count only")


def _print_changes(changes: Changes, title: str, written: Path | None) -> None:
    """Print what changes, by layer and by kind of parameter."""
    from rich.console import Console

    Console().print(*changes.tables(title), sep="\n")
    if changes.averaged:
        first = ", ".join(changes.averaged[:3])
        typer.echo(f"{len(changes.averaged)} tensors have no Fisher and are the weighted mean, first {first}")
    typer.echo(f"wrote {written}" if written else "nothing was written")


def _draw(matrix: ForgettingMatrix, to: Path) -> None:
    from fastforget.matrix.plot import plot_heatmap

    typer.echo(f"wrote {plot_heatmap(matrix, to)}")
