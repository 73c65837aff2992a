"""A forgetting matrix as a data set: a folder that `datasets` reads, and its way to the Hugging Face hub and back.

`values.parquet` has one row an example: `id`, `text` if wanted, `tokens`, `targets`, `base`, `base_exact`, and of every task
`forgetting/<task>` (null: not measured yet; NaN: not finite) and `exact/<task>` (null: the base does not know the answer), and
where values are predictions `std/<task>`, their uncertainty (null: measured).
`matrix.json` has the rest, and the format's version.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastforget._files import write_atomically

if TYPE_CHECKING:
    from fastforget.matrix.result import ForgettingMatrix

__all__ = ["export", "fetch", "is_export", "push", "read_export"]

FORMAT_VERSION = 1
FILES = ("README.md", "matrix.json", "values.parquet")
TASKS_LISTED = 200  # on the card
PREDICTED = (
    "**Some values are predictions**, not measurements: those with a `std/<task>`, their standard deviation, which is null "
    "where a value was measured. Means of such rows are means of measured and predicted values; `matrix.json` has the means "
    "that the examples drawn at random confirm."
)
SIZES = [(1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"), (1e300, "n>10M")]


def is_export(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an export.

    Args:
        folder: Any path or URL.

    Returns:
        Whether it does.
    """
    return (Path(os.fspath(folder)) / "matrix.json").is_file()


def export(matrix: ForgettingMatrix, folder: str | os.PathLike[str], *, texts: bool = False) -> Path:
    """Write the files of a data set; see `ForgettingMatrix.export`.

    Args:
        matrix: The matrix.
        folder: New, empty, or of an earlier export.
        texts: Also the examples' texts.

    Returns:
        The folder.

    Raises:
        ValueError: The folder holds something else, or there are no texts.
    """
    folder = Path(os.fspath(folder))
    foreign = sorted(set(os.listdir(folder)) - set(FILES)) if folder.exists() else []
    if foreign:
        raise ValueError(
            f"folder: expected a new or empty folder, got {folder} with {', '.join(foreign[:5])}; choose another one"
        )
    if texts and not any(matrix.texts):
        raise ValueError("texts: expected a matrix with texts, got one without any; leave texts=True out")
    folder.mkdir(parents=True, exist_ok=True)
    table = _table(matrix, texts)
    sidecar = json.dumps(_sidecar(matrix, texts), indent=2, ensure_ascii=False) + "\n"
    card = _card(matrix, texts)
    write_atomically(folder / "values.parquet", lambda path: pq.write_table(table, path, row_group_size=1 << 16))
    write_atomically(folder / "README.md", lambda path: path.write_text(card, encoding="utf-8"))
    write_atomically(folder / "matrix.json", lambda path: path.write_text(sidecar, encoding="utf-8"))
    return folder


def read_export(folder: str | os.PathLike[str]) -> ForgettingMatrix:
    """Read what `export` has written.

    Args:
        folder: The folder.

    Returns:
        The matrix; its texts are empty where they were not exported.

    Raises:
        ValueError: The folder holds no matrix, or one of another format, or a file is damaged.
    """
    from fastforget.matrix.result import ForgettingMatrix

    folder = Path(os.fspath(folder))
    try:
        sidecar = json.loads((folder / "matrix.json").read_text(encoding="utf-8"))
        version = sidecar["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"matrix: expected the export of a forgetting matrix, got {folder} without a readable matrix.json; check the path"
        ) from error
    if version != FORMAT_VERSION:
        raise ValueError(
            f"matrix: expected an export of format {FORMAT_VERSION}, got format {version!r} in {folder}; use the version of "
            "fastforget that wrote it, or a newer one"
        )
    try:
        table = pq.ParquetFile(folder / "values.parquet").read()
        tasks = sidecar["tasks"]
        forgetting = [table[f"forgetting/{task}"] for task in tasks]
        exact = [table[f"exact/{task}"] for task in tasks]
        own: dict[str, Any] = {n: table[n].to_numpy() for n in ("tokens", "targets", "base", "base_exact")}
        std = [table[f"std/{task}"] for task in tasks if f"std/{task}" in table.column_names]
        if std:
            own["uncertainty"] = np.stack([column.to_numpy() for column in std])
            own["predicted"] = np.stack([column.is_valid().to_numpy() for column in std])
        ids = table["id"].to_pylist()
    except (OSError, KeyError, pa.ArrowException) as error:
        raise ValueError(f"matrix: cannot read {folder / 'values.parquet'} ({error}); get it again") from error
    return ForgettingMatrix.from_values(
        np.stack([column.to_numpy() for column in forgetting]),
        tasks=tasks,
        examples=ids,
        texts=table["text"].to_pylist() if "text" in table.column_names else None,
        unit=sidecar["unit"],
        exact=np.stack([column.cast(pa.float32()).to_numpy() for column in exact]),
        unfinished=np.stack([column.is_null().to_numpy() for column in forgetting]),
        noise=sidecar["noise"],
        audits=sidecar.get("audits", {}),
        about=sidecar["about"],
        **own,
    )


def push(matrix: ForgettingMatrix, repo_id: str, *, private: bool | None, token: str | None, texts: bool) -> str:
    """Export a matrix to the hub; see `ForgettingMatrix.push_to_hub`.

    Args:
        matrix: The matrix.
        repo_id: "user/name".
        private: Of a new data set.
        token: Or None.
        texts: Also the examples' texts.

    Returns:
        The address of the data set.
    """
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as folder:
        export(matrix, folder, texts=texts)  # before anything is made on the hub
        api = HfApi(token=token)
        url = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
        message = f"Forgetting matrix of {len(matrix.tasks)} tasks x {len(matrix.examples):,} examples"
        api.upload_folder(repo_id=repo_id, folder_path=folder, repo_type="dataset", commit_message=message)
    return str(url)


def fetch(repo_id: str, *, revision: str | None, token: str | None) -> ForgettingMatrix:
    """Read a matrix from the hub; see `ForgettingMatrix.from_hub`.

    Args:
        repo_id: "user/name".
        revision: Branch, tag or commit.
        token: Or None.

    Returns:
        The matrix.
    """
    from huggingface_hub import snapshot_download

    return read_export(
        snapshot_download(
            repo_id, repo_type="dataset", revision=revision, token=token, allow_patterns=["matrix.json", "*.parquet"]
        )
    )


def _table(matrix: ForgettingMatrix, texts: bool) -> pa.Table:
    columns: dict[str, Any] = {"id": pa.array(matrix.examples, pa.string())}
    if texts:
        columns["text"] = pa.array(matrix.texts, pa.large_string())
    for name in ("tokens", "targets", "base", "base_exact"):
        columns[name] = pa.array(getattr(matrix, name))
    for i, task in enumerate(matrix.tasks):
        columns[f"forgetting/{task}"] = pa.array(matrix.values[i], mask=matrix.unfinished[i])
    for i, task in enumerate(matrix.tasks):
        columns[f"exact/{task}"] = pa.array(matrix.exact[i] == 1, mask=np.isnan(matrix.exact[i]))
    if matrix.predicted is not None and matrix.uncertainty is not None:
        for i, task in enumerate(matrix.tasks):
            columns[f"std/{task}"] = pa.array(matrix.uncertainty[i], mask=~matrix.predicted[i])
    return pa.table(columns)


def _sidecar(matrix: ForgettingMatrix, texts: bool) -> dict[str, Any]:
    return {
        "format": FORMAT_VERSION,
        "unit": matrix.unit,
        "tasks": matrix.tasks,
        "examples": len(matrix.examples),
        "complete": matrix.complete,
        "texts": texts,
        "noise": matrix.noise,
        "audits": matrix.audits,
        "about": _public(matrix.about),
    }


def _public(value: Any) -> Any:
    """A record without the folders of the machine that wrote it."""
    if isinstance(value, dict):
        return {key: _public(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_public(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value


def _card(matrix: ForgettingMatrix, texts: bool) -> str:
    """The data set's README.md."""
    summary, m, n = matrix.summary(), len(matrix.tasks), len(matrix.examples)
    about = _public(matrix.about)
    inputs, source = about.get("inputs", {}), about.get("about", {})
    size = next(name for bound, name in SIZES if n < bound)
    lines = [
        "---",
        f"pretty_name: {json.dumps(f'Forgetting of {n:,} upstream examples by {m} fine-tuned models')}",
        "tags:\n- fastforget\n- forgetting-matrix",
        f"size_categories:\n- {size}",
        "configs:\n- config_name: default\n  data_files: values.parquet",
        "---",
        "",
        f"# Forgetting matrix: {m} fine-tuned models x {n:,} upstream examples",
        "",
        f"`forgetting/<task>` is the increase of an example's log-perplexity from the base model to the model fine-tuned "
        f"on a task, in {matrix.unit}; positive is forgotten. Null is not measured, NaN not finite. `exact/<task>` is true "
        "where the base gives the right answer and the fine-tuned model does not, null where the base does not. `base` is "
        "the base's log-perplexity.",
        *(["", PREDICTED] if matrix.predicted is not None and matrix.predicted.any() else []),
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {_cell(value)} |" for key, value in _facts(matrix, summary, inputs, source, texts)),
        "",
        "## Use",
        "",
        "```python",
        "import fastforget as ff",
        "",
        'matrix = ff.ForgettingMatrix.from_hub("user/name")  # or load(folder)',
        "predictor = ff.ForgettingPredictor().fit(matrix)",
        "columns, random = predictor.choose_columns(30)",
        "# Measure the forgetting of these 30 examples under a new model, then:",
        "row = predictor.predict(columns, values)",
        "```",
        "",
        "So a new model's forgetting of all examples takes 30 evaluations. Without the library: "
        '`datasets.load_dataset("user/name")`.',
        "",
        "## Tasks",
        "",
        f"| task | mean, {matrix.unit} | share of examples forgotten |",
        "|---|---:|---:|",
        *(
            f"| {_cell(name)} | {_number(row['mean'], '+.4f')} | {_number(row['share_increased'], '.1%')} |"
            for name, row in list(summary["per_task"].items())[:TASKS_LISTED]
        ),
        *([f"\nand {m - TASKS_LISTED} more."] if m > TASKS_LISTED else []),
        "",
    ]
    return "\n".join(lines)


def _facts(
    matrix: ForgettingMatrix, summary: dict[str, Any], inputs: dict[str, Any], source: dict[str, Any], texts: bool
) -> list[tuple[str, str]]:
    facts = [("base model", source.get("base")), ("upstream", source.get("upstream"))]
    facts += [("examples", f"{len(matrix.examples):,}, {summary['tokens']:,} tokens")]
    facts += [(name.replace("_", " "), value) for name, value in inputs.get("settings", {}).items()]
    noise = matrix.noise.get("batch_composition", {}).get("rms")
    facts += [("noise floor (rms)", None if noise is None else f"{noise:.1e}")]
    facts += [("finished", "yes" if matrix.complete else f"no, {summary['unfinished']:,} values are missing")]
    facts += [("texts", "included, under the licence of the upstream data" if texts else "not included")]
    facts += [("format", f"{FORMAT_VERSION}")]
    return [(name, str(value)) for name, value in facts if value is not None]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
