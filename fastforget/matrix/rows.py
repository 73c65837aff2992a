"""The rows of an upstream file or data set, checked and named."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

FILE_SUFFIXES = (".jsonl", ".json", ".parquet", ".txt")
FIELDS = ("id", "text", "prompt", "response", "messages")


@dataclass(frozen=True)
class Row:
    """One row as it was read: where it stands, and its fields without nulls."""

    where: str
    fields: dict[str, Any]


def read_rows(upstream: str | Path, *, split: str = "train", config: str | None = None) -> list[Row]:
    """Read the rows of a file, of a folder written by `datasets`, or of a data set on the hub.

    Args:
        upstream: a `.jsonl`, `.json`, `.parquet` or `.txt` file, a folder of `Dataset.save_to_disk`, or a
            datasets id.
        split: the split of a data set; files have none.
        config: the configuration of a data set on the hub.

    Returns:
        The rows, in order, each checked to hold exactly one kind of example.

    Raises:
        ValueError: if the source cannot be read, holds no rows, or a row has not the fields of one kind.
    """
    path = Path(upstream)
    if path.is_file():
        if path.suffix.lower() not in FILE_SUFFIXES:
            raise ValueError(f"upstream: expected a file ending in {', '.join(FILE_SUFFIXES)}, got {path}; convert it")
        try:
            rows = list(_file_rows(path))
        except (UnicodeDecodeError, pa.ArrowException, OSError) as error:
            raise ValueError(f"upstream: cannot read {path}: {error}; write it again, text as UTF-8") from error
    elif path.is_dir() or path.suffix.lower() not in FILE_SUFFIXES:
        rows = list(_dataset_rows(upstream, split, config))
    else:
        raise ValueError(f"upstream: expected an existing file, got {path}; check the path")
    if not rows:
        raise ValueError(f"upstream: expected at least one row, got none in {path}; choose another file or split")
    for row in rows:
        _check_row(row)
    return rows


def _file_rows(path: Path) -> Iterator[Row]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        schema = pq.read_schema(path)
        columns = [name for name in FIELDS if name in schema.names]
        if columns:
            yield from _numbered(path.name, pq.read_table(path, columns=columns).to_pylist())
        elif pq.read_metadata(path).num_rows:
            raise ValueError(
                f"upstream: expected a column named text, prompt and response, or messages, got "
                f"{', '.join(schema.names)} in {path}; rename the columns"
            )
        return
    content = path.read_text(encoding="utf-8-sig")
    if suffix == ".json" and content.lstrip().startswith("["):
        try:
            yield from _numbered(path.name, json.loads(content))
        except json.JSONDecodeError as error:
            raise ValueError(f"upstream: expected JSON, got {error} in {path}; correct the file") from error
        return
    # Not splitlines: it also breaks at characters that are legal inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        where = f"{path.name} line {number}"
        if not line.strip():
            continue
        if suffix == ".txt":
            yield Row(where, {"text": line.removesuffix("\r")})
            continue
        try:
            yield _row(where, json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"upstream: {where}: expected a JSON object, got {error}; correct the line") from error


def _dataset_rows(upstream: str | Path, split: str, config: str | None) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"upstream: expected a file ending in {', '.join(FILE_SUFFIXES)}, got {upstream}; for a data set install "
            "the extra: pip install 'fastforget[data]'"
        ) from error
    try:
        if Path(upstream).is_dir() and (
            Path(upstream, "state.json").exists() or Path(upstream, "dataset_dict.json").exists()
        ):
            loaded = datasets.load_from_disk(str(upstream))
        else:
            loaded = datasets.load_dataset(str(upstream), config, split=split)
    except Exception as error:  # whatever a data set's own code raises
        raise ValueError(
            f"upstream: cannot load the data set {upstream} (split {split}, config {config}): {error}; "
            "check the id or path, the split and the configuration"
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise ValueError(
                f"split: expected one of {', '.join(map(str, loaded))}, got {split}; choose a split of {upstream}"
            )
        loaded = loaded[split]
    assert isinstance(loaded, datasets.Dataset)
    columns = [name for name in FIELDS if name in loaded.column_names]
    if not columns:
        raise ValueError(
            f"upstream: expected a column named text, prompt and response, or messages, got "
            f"{', '.join(loaded.column_names)} in {upstream}; rename the columns"
        )
    yield from _numbered(str(upstream), loaded.select_columns(columns))


def _numbered(source: str, values: Iterable[Any]) -> Iterator[Row]:
    for number, value in enumerate(values, start=1):
        yield _row(f"{source} row {number}", value)


def _row(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"upstream: {where}: expected a JSON object, got {type(value).__name__}; correct the row")
    fields = {name: value[name] for name in FIELDS if value.get(name) is not None}
    if isinstance(fields.get("messages"), list):  # Parquet gives every message every key of the schema
        fields["messages"] = [
            {key: entry for key, entry in message.items() if entry is not None}
            if isinstance(message, dict)
            else message
            for message in fields["messages"]
        ]
    return Row(where, fields)


def _check_row(row: Row) -> None:
    fields = row.fields
    kinds = set(fields) - {"id"}
    if kinds not in ({"text"}, {"prompt", "response"}, {"messages"}):
        got = ", ".join(sorted(kinds)) or "none of them"
        raise ValueError(
            f"upstream: {row.where}: expected text, or prompt and response, or messages, got {got}; correct the row"
        )
    for name in kinds - {"messages"}:
        if not isinstance(fields[name], str):
            raise ValueError(
                f"upstream: {row.where}: expected {name} to be a string, got {type(fields[name]).__name__}; "
                "correct the row"
            )
    if "id" in fields and (isinstance(fields["id"], bool) or not isinstance(fields["id"], str | int)):
        raise ValueError(
            f"upstream: {row.where}: expected id to be a string or an integer, got {fields['id']!r}; correct the row"
        )
    if "messages" in fields:
        messages = fields["messages"]
        if not isinstance(messages, list) or not all(isinstance(m, dict) and m.get("role") for m in messages):
            raise ValueError(
                f"upstream: {row.where}: expected messages to be a list of objects with role and content, got "
                f"{str(messages)[:80]}; correct the row"
            )
        last = next((m for m in reversed(messages) if m["role"] == "assistant"), None)
        if last is None or not isinstance(last.get("content"), str):
            raise ValueError(
                f"upstream: {row.where}: expected an assistant turn whose content is a string, got "
                f"{'none' if last is None else repr(last.get('content'))}; correct the row"
            )


def row_ids(rows: list[Row]) -> list[str]:
    """The rows' ids: their own, or 16 hexadecimal digits of the content's sha256 (repeats get #2, #3, ...).

    Args:
        rows: the rows.

    Returns:
        One unique id a row.

    Raises:
        ValueError: if two rows have the same id.
    """
    ids: list[str] = []
    where: dict[str, str] = {}
    repeats: dict[str, int] = {}
    for row in rows:
        if "id" in row.fields:
            name = str(row.fields["id"])
        else:
            name = content_hash(row.fields)[:16]
            repeats[name] = repeats.get(name, 0) + 1
            if repeats[name] > 1:
                name = f"{name}#{repeats[name]}"
        if name in where:
            raise ValueError(
                f"upstream: expected unique ids, got {name!r} at {where[name]} and again at {row.where}; "
                "rename one or remove the ids"
            )
        where[name] = row.where
        ids.append(name)
    return ids


def content_hash(value: Any) -> str:
    """The sha256 of a JSON value, whatever the order of its keys.

    Args:
        value: what `json.dumps` takes.

    Returns:
        64 hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()
