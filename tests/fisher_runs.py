"""A small world for runs of `fastforget fisher`, and the Fisher that they have to find."""

import json
from pathlib import Path

import torch
from tiny_models import save_adapter, save_base, texts, tiny_tokenizer
from transformers import AutoModelForCausalLM

from fastforget.fisher.names import Fisher
from fastforget.fisher_run import Options, run_fisher

BATCH = 600  # padded tokens: several batches a run


def save_fisher_world(folder: Path) -> Path:
    """A model, an adapter and 60 examples of two kinds, for tests that only read them."""
    base = save_base(folder / "base")
    save_adapter(base, folder / "lora")
    rows = [{"text": text[:200]} for text in texts()[:40]]
    rows += [{"prompt": text[:30], "response": text[30:90]} for text in texts()[40:60]]
    write(folder / "data.jsonl", rows)
    return folder


def rows_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(world, out, **settings) -> Fisher:
    given = {"model": world / "base", "data": world / "data.jsonl", "progress": False}
    given |= {} if "batch_size" in settings else {"tokens_per_batch": BATCH}
    return run_fisher(Options(**(given | settings), out=out))


def looped(world, data, *, parameters=None) -> dict[str, torch.Tensor]:
    """The Fisher by one ordinary backward an example, in float64."""
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.float64).eval()
    tokenizer = tiny_tokenizer()
    named = {name: p for name, p in model.named_parameters() if parameters is None or parameters in name}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    rows = rows_of(data)
    for row in rows:
        if "text" in row:
            ids, first = tokenizer(row["text"])["input_ids"], 1
        else:
            prompt = tokenizer(row["prompt"])["input_ids"]
            ids, first = prompt + tokenizer(row["response"], add_special_tokens=False)["input_ids"], len(prompt)
        labels = torch.tensor([[-100] * first + ids[first:]])
        model.zero_grad()
        model(torch.tensor([ids]), labels=labels).loss.backward()
        for name, p in named.items():
            total[name] += p.grad**2
    return {name: value / len(rows) for name, value in total.items()}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
