"""Import of the samples that lm-evaluation-harness logs (`lm_eval --log_samples`, one JSON object a document and filter).

A sample has `doc_id`, `doc_hash`, `prompt_hash`, `arguments` of the requests (`{"gen_args_0": {"arg_0": context, "arg_1":
continuation}, ...}`; lists of pairs in old versions), `filtered_resps` (`[log-likelihood, is greedy]` of each request, as
strings; one number where a whole text is scored), `target` (the gold choice's index or text), `filter` and the metrics. The
evaluation's name is in the file's name: `samples_<evaluation>_<date>.jsonl`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from fastforget.matrix.result import ForgettingMatrix

__all__ = ["read_lm_eval"]

NAME = re.compile(r"samples_(.+)_\d{4}-\d\d-\d\dT.*")
UNITS = {"example": "nats per example", "byte": "nats per byte"}


class _Sample(NamedTuple):
    """A document under a model."""

    where: str
    hashes: tuple[Any, Any]  # of the document and of the prompt
    loss: float  # nats
    size: int  # bytes
    right: float  # 1, 0, or NaN where it was not logged
    text: str


def read_lm_eval(base: Any, tasks: Mapping[str, Any], per: str = "example") -> ForgettingMatrix:
    """Read a matrix; see `ForgettingMatrix.from_lm_eval`.

    Args:
        base: A file, several, or a folder.
        tasks: The same of every model.
        per: "example" or "byte".

    Returns:
        The matrix.

    Raises:
        ValueError: The files do not make a matrix.
    """
    from fastforget.matrix.result import ForgettingMatrix

    if per not in UNITS:
        raise ValueError(f"per: expected one of {', '.join(map(repr, UNITS))}, got {per!r}")
    if not isinstance(tasks, Mapping) or not tasks:
        raise ValueError(f"tasks: expected a dictionary of names and files, got {tasks!r}")
    known = _model("base", base)
    ids = list(known)
    place = {name: j for j, name in enumerate(ids)}
    sizes = np.array([known[name].size for name in ids])
    if per == "byte" and not sizes.all():
        where = known[ids[int(sizes.argmin())]].where
        raise ValueError(f'{where}: expected the request\'s text with per="byte", got none; use per="example"')
    losses, right = np.full((1 + len(tasks), len(ids)), np.nan), np.full((1 + len(tasks), len(ids)), np.nan)
    seen = np.zeros(losses.shape, bool)
    for i, samples in enumerate([known, *(_model(name, files) for name, files in tasks.items())]):
        for name, sample in samples.items():
            _check_same(name, known.get(name), sample)
            losses[i, place[name]], right[i, place[name]], seen[i, place[name]] = sample.loss, sample.right, True
    scaled = losses / sizes if per == "byte" else losses
    asked = (right[0] == 1) & np.isfinite(right[1:])
    return ForgettingMatrix.from_values(
        scaled[1:] - scaled[0],
        tasks=list(tasks),
        examples=ids,
        texts=[known[name].text for name in ids],
        unit=UNITS[per],
        base=scaled[0],
        exact=np.where(asked, right[1:] == 0, np.nan).astype(np.float32),
        base_exact=right[0] == 1,
        unfinished=~seen[1:],
        about={"source": "lm-evaluation-harness"},
    )


def _check_same(name: str, base: _Sample | None, sample: _Sample) -> None:
    if base is None:
        raise ValueError(
            f"{sample.where}: expected documents that the base was evaluated on, got {name}; evaluate the base on it too"
        )
    for what, there, here in zip(("document", "prompt"), base.hashes, sample.hashes, strict=True):
        if None not in (there, here) and there != here:
            raise ValueError(
                f"{sample.where}: expected the {what} of {base.where}, got another one for {name}; evaluate both models with "
                "the same data, few-shot examples and chat template"
            )
    if base.size != sample.size:
        raise ValueError(f"{sample.where}: expected the gold choice of {base.where}, got another one for {name}")


def _model(name: str, given: Any) -> dict[str, _Sample]:
    """The samples of a model, by "evaluation/doc_id"."""
    samples: dict[str, _Sample] = {}
    sources: dict[str, Path] = {}
    for path in _files(name, given):
        match = NAME.fullmatch(path.stem)
        evaluation = match[1] if match else path.stem.removeprefix("samples_")
        if evaluation in sources:
            raise ValueError(
                f"{name}: expected one file of {evaluation}, got {sources[evaluation].name} and {path.name}; pass the files "
                "themselves"
            )
        sources[evaluation] = path
        for document, sample in _samples(path):
            samples[f"{evaluation}/{document}"] = sample
    return samples


def _files(name: str, given: Any) -> list[Path]:
    paths = [given] if isinstance(given, str | os.PathLike) else list(given)
    files = []
    for path in map(Path, paths):
        files += sorted(path.rglob("samples_*.jsonl")) if path.is_dir() else [path]
    if not files:
        raise ValueError(
            f"{name}: expected samples_*.jsonl in {paths[0] if paths else 'the list'}, got none; run lm_eval with "
            "--log_samples"
        )
    return files


def _samples(path: Path) -> Iterator[tuple[Any, _Sample]]:
    """The samples of the file's first filter: log-likelihoods are the same in all of them."""
    lines = list(_lines(path))
    lines = [(where, line) for where, line in lines if line.get("filter") == lines[0][1].get("filter")]
    rows = [(where, line, _requests(where, line)) for where, line in lines]
    # The gold choice is an index in all lines of a file, or a text in all of them.
    by_index = all(_index(line, len(requests)) is not None for _, line, requests in rows)
    seen = set()
    for where, line, requests in rows:
        if line["doc_id"] in seen:
            raise ValueError(
                f"{where}: expected every document once, got doc_id {line['doc_id']} twice; pass one run's file"
            )
        seen.add(line["doc_id"])
        gold = requests[_gold(where, line, requests, by_index)]
        loss, prompt, answer = gold
        right = line.get("exact_match", line.get("acc"))
        right = float(right) if isinstance(right, int | float) and right in {0, 1} else float("nan")
        hashes = line.get("doc_hash"), line.get("prompt_hash")
        yield line["doc_id"], _Sample(where, hashes, loss, len(answer.encode()), right, prompt + answer)


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with open(path, encoding="utf-8") as file:
        for number, text in enumerate(file, 1):
            where = f"{path}, line {number}"
            try:
                line = json.loads(text)
                missing = {"doc_id", "filtered_resps"} - set(line)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{where}: expected a sample of lm_eval, got no JSON object ({error})") from None
            if missing:
                raise ValueError(
                    f"{where}: expected a sample of lm_eval, got none of its {' and '.join(sorted(missing))}; pass files of "
                    "--log_samples"
                )
            yield where, line


def _requests(where: str, line: dict[str, Any]) -> list[tuple[float, str, str]]:
    """Loss, context and scored text of every request."""
    responses, arguments = line["filtered_resps"], line.get("arguments", {})
    arguments = [list(one.values()) for one in arguments.values()] if isinstance(arguments, dict) else arguments
    requests = []
    for k, response in enumerate(responses):
        own = arguments[k] if k < len(arguments) else []
        texts = [text for text in own if isinstance(text, str)][:2]
        try:
            loss = -float(response[0] if isinstance(response, list | tuple) else response)
            generated = loss < -1e-6 or any(isinstance(one, dict) for one in own)  # settings of a generation
        except (TypeError, ValueError, IndexError):
            loss, generated = 0.0, True
        if generated:
            raise ValueError(
                f"{where}: expected log-likelihoods, got {str(response)[:40]!r}; evaluations that generate text have none, "
                "leave their files out"
            )
        requests.append((loss, "".join(texts[:-1]), texts[-1] if texts else ""))
    if not requests:
        raise ValueError(f"{where}: expected log-likelihoods, got no responses; leave the file out")
    return requests


def _index(line: dict[str, Any], count: int) -> int | None:
    text = str(line.get("target", ""))
    return int(text) if text.isdecimal() and int(text) < count else None


def _gold(where: str, line: dict[str, Any], requests: list[tuple[float, str, str]], by_index: bool) -> int:
    """Which request is the gold choice."""
    if len(requests) == 1:
        return 0
    if by_index:
        return int(line["target"])
    target = str(line.get("target", "")).strip()
    found = [k for k, (_, _, answer) in enumerate(requests) if answer.strip() == target]
    # With acc_mutual_info the choices come a second time, without the context.
    found = found[:1] if len(found) == 2 and not requests[found[-1]][1] else found
    if len(found) != 1:
        raise ValueError(
            f"{where}: expected the target to be one of the {len(requests)} choices, got {target[:40]!r}; the gold choice of "
            "this evaluation cannot be told, leave its file out"
        )
    return found[0]
