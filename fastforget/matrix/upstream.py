"""The upstream examples: read from a file or a data set, tokenised once, cached by content.

A row holds `text` (every token but the first is a target), `prompt` and `response` (the response's tokens are the
targets), or `messages` (the last assistant turn's tokens are the targets). In each case the targets are the last
tokens of the example, so an example is its tokens and the position of its first target.
"""

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastforget._files import write_atomically
from fastforget.matrix.rows import Row, content_hash, read_rows, row_ids

CACHE_VERSION = 1  # raise it when the same rows would give other tokens
ROWS_AT_ONCE = 1000
EMPTY_FIX = "remove these rows, raise max_length, or pass skip_empty=True (--skip-empty)"


@dataclass(frozen=True)
class Upstream:
    """N tokenised examples.

    Attributes:
        ids: N names, unique.
        texts: N source texts, for reports.
        tokens: N arrays of token ids, int32 `[T_j]`.
        first_target: int32 `[N]`; the tokens from here to the end are targets. At least 1: nothing predicts token 0.
        truncated: how many examples were cut to `max_length`.
        skipped: ids of the rows without a target token that `skip_empty` left out.
        fingerprint: sha256 of the rows' content.
    """

    ids: list[str]
    texts: list[str]
    tokens: list[np.ndarray]
    first_target: np.ndarray
    truncated: int
    skipped: list[str]
    fingerprint: str

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 `[N]`."""
        return np.array([len(tokens) for tokens in self.tokens], dtype=np.int64)

    @property
    def targets(self) -> np.ndarray:
        """Target tokens of each example, int64 `[N]`."""
        return self.lengths - self.first_target


def load_upstream(
    upstream: str | Path,
    tokenizer: Any,
    *,
    max_length: int | None,
    eos: bool = False,
    skip_empty: bool = False,
    split: str = "train",
    config: str | None = None,
) -> Upstream:
    """Read and tokenise the upstream examples, from the cache where the same content was tokenised before.

    Args:
        upstream: see `read_rows`.
        tokenizer: the base model's transformers tokenizer.
        max_length: examples are cut on the right to so many tokens; None cuts nothing.
        eos: append the end-of-sequence token to every response, as a target.
        skip_empty: leave out the rows without a target token instead of refusing them.
        split: the split of a data set.
        config: the configuration of a data set.

    Returns:
        The examples.

    Raises:
        ValueError: if the rows cannot be read, an id repeats, or a row has no target token.
    """
    rows = read_rows(upstream, split=split, config=config)
    ids = row_ids(rows)
    fingerprint = content_hash([content_hash(row.fields) for row in rows])
    key = content_hash([CACHE_VERSION, fingerprint, tokenizer_fingerprint(tokenizer), max_length, eos])
    table = _cached(key)
    if table is None:
        table = _tokenise(rows, tokenizer, max_length, eos)
        _write_cache(key, table)
    length = table["length"].to_numpy()
    first_target = table["first_target"].to_numpy()
    keep = length > first_target
    empty = [f"{ids[j]} ({rows[j].where})" for j in np.flatnonzero(~keep)]
    if empty and not skip_empty:
        shown = ", ".join(empty[:10]) + (f" and {len(empty) - 10} more" if len(empty) > 10 else "")
        raise ValueError(
            f"upstream: expected a target token in every row, got {len(empty)} rows without one: {shown}; {EMPTY_FIX}"
        )
    kept = np.flatnonzero(keep)
    if not len(kept):
        raise ValueError("upstream: expected at least one row with a target token, got none; check the rows")
    flat, offsets = _flat(table["tokens"])
    texts = table["text"].to_pylist()
    return Upstream(
        ids=[ids[j] for j in kept],
        texts=[texts[j] for j in kept],
        tokens=[flat[offsets[j] : offsets[j + 1]] for j in kept],
        first_target=first_target[kept],
        truncated=int(table["truncated"].to_numpy(zero_copy_only=False)[kept].sum()),
        skipped=[ids[j] for j in np.flatnonzero(~keep)],
        fingerprint=fingerprint,
    )


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    lists = column.combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    return lists.values.to_numpy(), lists.offsets.to_numpy()


def _tokenise(rows: list[Row], tokenizer: Any, max_length: int | None, eos: bool) -> pa.Table:
    if eos and tokenizer.eos_token_id is None:
        raise ValueError("eos: expected a tokenizer with an end-of-sequence token, got none; pass eos=False")
    prefix = _leading_special_tokens(tokenizer)
    texts, tokens, first_target, truncated = [], [], [], []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        chunk = rows[start : start + ROWS_AT_ONCE]
        parts = [_context_and_target(row, tokenizer) for row in chunk]
        whole = _encode(tokenizer, [row.fields.get("text", "") for row in chunk], special=True)
        contexts = _encode(tokenizer, [context for context, _ in parts])
        answers = _encode(tokenizer, [answer for _, answer in parts])
        for row, part, text_ids, context, answer in zip(chunk, parts, whole, contexts, answers, strict=True):
            if "text" in row.fields:
                ids, first = text_ids, 1
            elif "prompt" in row.fields:
                context = prefix + context
                ids, first = context + answer + ([tokenizer.eos_token_id] if eos else []), len(context)
            else:
                ids, first = context + answer, len(context)
            cut = ids[:max_length]
            texts.append("".join(part) or row.fields.get("text", ""))
            tokens.append(np.array(cut, dtype=np.int32))  # a list of ints takes ten times the memory
            first_target.append(max(1, first))
            truncated.append(len(cut) < len(ids))
    return pa.table(
        {
            "text": pa.array(texts, pa.large_string()),
            "tokens": pa.array(tokens, pa.large_list(pa.int32())),
            "length": pa.array([len(ids) for ids in tokens], pa.int32()),
            "first_target": pa.array(first_target, pa.int32()),
            "truncated": pa.array(truncated, pa.bool_()),
        }
    )


def _encode(tokenizer: Any, texts: list[str], *, special: bool = False) -> list[list[int]]:
    return tokenizer(texts, add_special_tokens=special, verbose=False)["input_ids"]


def _leading_special_tokens(tokenizer: Any) -> list[int]:
    # What the tokenizer puts before a text, such as the beginning-of-sequence token.
    (plain,), (full,) = _encode(tokenizer, ["a"]), _encode(tokenizer, ["a"], special=True)
    starts = (start for start in range(len(full)) if full[start : start + len(plain)] == plain)
    return full[: next(starts, 0)]


def _context_and_target(row: Row, tokenizer: Any) -> tuple[str, str]:
    # The two texts that are tokenised apart; both empty for a row of plain text.
    fields = row.fields
    if "text" in fields:
        return "", ""
    if "prompt" in fields:
        return fields["prompt"], fields["response"]
    messages = fields["messages"]
    last = max(index for index, message in enumerate(messages) if message["role"] == "assistant")
    try:
        context = tokenizer.apply_chat_template(messages[:last], tokenize=False, add_generation_prompt=True)
        full = tokenizer.apply_chat_template(messages[: last + 1], tokenize=False)
    except Exception as error:  # a template raises what it likes
        raise ValueError(
            f"upstream: {row.where}: the base's chat template cannot render the messages: {error}; correct the row, "
            "or write prompt and response"
        ) from error
    if not full.startswith(context):
        raise ValueError(
            f"upstream: {row.where}: expected a chat template that renders the turns before the last assistant turn "
            f"as the conversation's beginning, got {context[-60:]!r} against {full[: len(context)][-60:]!r}; write "
            "prompt and response"
        )
    answer = full[len(context) :]
    if not answer.endswith(messages[last]["content"]):
        answer = answer.rstrip()  # white space that follows the end-of-turn
    return context, answer


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """The sha256 of everything that decides which tokens a row becomes.

    Args:
        tokenizer: a transformers tokenizer.

    Returns:
        64 hexadecimal digits.
    """
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, getattr(tokenizer, "chat_template", None)]
    return content_hash([tokenizer_parts(tokenizer, added_tokens=True), special])


def tokenizer_parts(tokenizer: Any, *, added_tokens: bool = False) -> dict[str, Any]:
    """The parts of a tokenizer that decide how it cuts plain text (padding and truncation do not).

    Args:
        tokenizer: a transformers tokenizer.
        added_tokens: whether added tokens, which fine-tuning often extends by a padding token, are a part.

    Returns:
        The parts by name.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return {"class": type(tokenizer).__name__, "vocab": tokenizer.get_vocab()}
    parts = json.loads(backend.to_str())
    names = ["normalizer", "pre_tokenizer", "model", "post_processor", *(["added_tokens"] if added_tokens else [])]
    return {name: parts.get(name) for name in names}


def _cache_file(key: str) -> Path:
    folder = os.environ.get("FASTFORGET_CACHE") or Path.home() / ".cache" / "fastforget"
    return Path(folder) / f"tokens-{key}.parquet"


def _cached(key: str) -> pa.Table | None:
    try:
        return pq.read_table(_cache_file(key)).combine_chunks()
    except (OSError, pa.ArrowException):  # absent, or damaged: tokenise again
        return None


def _write_cache(key: str, table: pa.Table) -> None:
    try:
        _cache_file(key).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(_cache_file(key), lambda path: pq.write_table(table, path))
    except OSError as error:
        warnings.warn(f"the token cache could not be written, the run goes on without it: {error}", stacklevel=2)
