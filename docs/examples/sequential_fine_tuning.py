"""Sequential fine-tuning on two domains of real text, and what each way of steering the second one forgets of the first.

A small Llama learns the pages behind Python's `help()` (prose), then source code of the standard library, by

- AdamW as it is, with its learning rate and smaller ones,
- AdamW with the pull of elastic weight consolidation (EWC), by the exact diagonal Fisher of the prose,
- the same by the squared gradient of batches, which most EWC code takes for the Fisher,
- AdamW that may not move the entries with the largest Fisher (a mask).

Each at several strengths, since strengths of different methods do not compare: what compares is how much of the second
domain a method learns for what it forgets of the first. Last, the model that learnt the second domain with plain AdamW is
made to forget it again by selective dampening (SSD).

    python docs/examples/sequential_fine_tuning.py --seeds 0 1 2 3 4 --out sequential

writes `sequential.json`, every number of it, and `sequential.png`; seeds that are in the file already are not run again.
`--quick` is a run of one or two minutes, with one strength of each and fewer steps.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastforget as ff
from fastforget.demo.text import documentation_topics, library_files, sample
from fastforget.demo.training import new_model, pack, train_tokenizer

LENGTH, BATCH, HELD_OUT = 128, 16, 64  # tokens a row, rows a step, rows that are never trained on
LR = 5e-4  # on the second domain
SIZE = {"hidden": 128, "layers": 4, "max_length": LENGTH}
STEPS = {"first": 800, "second": 200, "fisher": 32, "every": 20}
STRENGTHS = {  # the divisor of the learning rate; the pull's lambda, times 1000; the share that may not move
    "AdamW": [1.0, 4.0, 16.0],
    "EWC, exact Fisher": [1.0, 10.0, 100.0],
    "EWC, squared batch mean": [1.0, 10.0, 100.0],
    "mask": [0.25, 0.5, 0.75],
}
SHOWN = {"AdamW": 1.0, "EWC, exact Fisher": 10.0, "EWC, squared batch mean": 10.0, "mask": 0.5}  # over training
QUICK = {"first": 120, "second": 40, "fisher": 8, "every": 20}
ALPHAS = [100.0, 30.0, 10.0, 3.0, 1.0]


def domains() -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A tokenizer, and of both domains the rows `[R, T]` to train on and to measure on."""
    texts = {
        "prose": sample(documentation_topics(), 600_000, seed=0),
        "code": sample(library_files("asyncio/*.py", "email/**/*.py", "http/*.py", "xml/**/*.py"), 600_000, seed=0),
    }
    tokenizer = train_tokenizer([d.text for documents in texts.values() for d in documents], 2048, LENGTH)
    rows = {name: pack(documents, tokenizer, LENGTH) for name, documents in texts.items()}
    generator = torch.Generator().manual_seed(0)
    rows = {name: value[torch.randperm(len(value), generator=generator)] for name, value in rows.items()}
    return tokenizer, {k: v[HELD_OUT:] for k, v in rows.items()}, {k: v[:HELD_OUT] for k, v in rows.items()}


def batches(rows: Tensor, steps: int, seed: int) -> Iterator[Tensor]:
    """Batches `[B, T]` in random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(1 + steps * BATCH // len(rows))])
    yield from rows[order[: steps * BATCH]].split(BATCH)


@torch.no_grad()
def measure(model: Any, held_out: dict[str, Tensor]) -> dict[str, float]:
    """Mean log-perplexity of each domain, nats per token."""
    return {name: ff.log_perplexity(model, rows).mean().item() for name, rows in held_out.items()}


def train(model: Any, optimizer: Any, rows: Tensor, steps: int, seed: int, after_step: Callable[[int], None]) -> None:
    """Plain training: loss, backward, clip, step."""
    for step, input_ids in enumerate(batches(rows, steps, seed), 1):
        ff.log_perplexity(model, input_ids).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        after_step(step)


def fisher_of(model: Any, rows: Tensor, steps: int, per: str) -> tuple[dict[str, Tensor], float]:
    """Diagonal Fisher over batches of a domain, and its mean; divided by it, so that strengths mean the same for each."""
    fisher = ff.DiagonalFisher(model, per=per)
    for input_ids in batches(rows, steps, seed=99):
        fisher.update(input_ids)
    diagonal = fisher.diagonal()
    mean = float(sum(f.double().sum() for f in diagonal.values()) / sum(f.numel() for f in diagonal.values()))
    return {name: f / mean for name, f in diagonal.items()}, mean


def options(method: str, strength: float, fishers: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
    """What a method gives AdamW."""
    if method == "AdamW":
        return {"lr": LR / strength}
    if method == "mask":
        return {"mask": ff.trainable_mask(fishers["example"], bottom=1 - strength)}
    fisher = fishers["example" if "exact" in method else "batch_mean"]
    return {"fisher": fisher, "anchor": "initial", "ewc_lambda": strength * 1e-3}


def one_seed(
    seed: int,
    steps: dict[str, int],
    methods: dict[str, list[float]],
    tokenizer: Any,
    rows: dict[str, Tensor],
    held_out: dict[str, Tensor],
) -> dict[str, Any]:
    """The first domain once, then the second by every method at every strength."""
    base = new_model(tokenizer, seed=seed, **SIZE)
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 2e-3, total_steps=steps["first"] + 1, cycle_momentum=False
    )
    train(base, optimizer, rows["prose"], steps["first"], seed, lambda _: schedule.step())
    fishers, means = {}, {}
    for per in ("example", "batch_mean"):
        fishers[per], means[per] = fisher_of(base, rows["prose"], steps["fisher"], per)
    found: dict[str, Any] = {"base": measure(base, held_out), "mean_fisher": means, "runs": []}
    for method, strengths in methods.items():
        for strength in strengths:
            model, curve = copy.deepcopy(base), [found["base"]]
            given = {"lr": LR, "weight_decay": 0.01} | options(method, strength, fishers)
            optimizer = ff.optim.AdamW(model.named_parameters(), **given)

            def after_step(step: int, model: Any = model, curve: list[Any] = curve) -> None:
                if step % steps["every"] == 0:
                    curve.append(measure(model, held_out))

            train(model, optimizer, rows["code"], steps["second"], seed, after_step)
            found["runs"].append({"method": method, "strength": strength, "curve": curve})
            if (method, strength) == ("AdamW", 1.0):
                tuned = model
    found["dampened"] = dampened(tuned, rows, held_out, steps["fisher"])
    return found


def dampened(tuned: Any, rows: dict[str, Tensor], held_out: dict[str, Tensor], steps: int) -> list[dict[str, Any]]:
    """Selective dampening: the code is to be forgotten, the prose retained."""
    forget, retain = (fisher_of(tuned, rows[name], steps, "example")[0] for name in ("code", "prose"))
    found = []
    for alpha in ALPHAS:
        model = copy.deepcopy(tuned)
        counts = ff.selective_dampening_(model, forget=forget, retain=retain, alpha=alpha, lam=1.0)
        share = sum(counts.values()) / sum(p.numel() for p in model.parameters())
        found.append({"alpha": alpha, "share": share, **measure(model, held_out)})
    return found


def draw(record: dict[str, Any], path: Path) -> None:
    """Both domains over training, and what each method learns for what it forgets."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13.5, 4.2), layout="constrained")
    colors = dict(zip(STRENGTHS, ["#555555", "#0072b2", "#d55e00", "#009e73"], strict=True))
    styles = dict.fromkeys(STRENGTHS, "-") | {"EWC, squared batch mean": (0, (3, 3))}  # on that of the exact Fisher
    seeds = list(record["seeds"].values())
    for axis, domain in zip(axes[:2], ("prose", "code"), strict=True):
        for method, strength in SHOWN.items():
            curves = torch.tensor(
                [
                    [point[domain] for point in run["curve"]]
                    for seed in seeds
                    for run in seed["runs"]
                    if (run["method"], run["strength"]) == (method, strength)
                ]
            )
            x = torch.arange(curves.shape[1]) * record["steps"]["every"]
            axis.plot(x, curves.mean(0), color=colors[method], ls=styles[method], label=method)
            axis.fill_between(x, curves.amin(0), curves.amax(0), color=colors[method], alpha=0.15, lw=0)
        axis.set(
            xlabel="steps on code",
            ylabel="log-perplexity, nats per token",
            title=f"{domain} ({'learnt first' if domain == 'prose' else 'learnt second'})",
        )
    axes[0].legend(frameon=False)
    for method, strengths in record["methods"].items():
        points = [[ends(record, method, strength, domain) for strength in strengths] for domain in ("code", "prose")]
        mean = [[statistics.fmean(values) for values in axis] for axis in points]
        spread = [[deviation(values) for values in axis] for axis in points]
        axes[2].errorbar(
            *mean,
            xerr=spread[0],
            yerr=spread[1],
            color=colors[method],
            ls=styles[method],
            marker="o",
            ms=4,
            lw=1,
            label=method,
        )
    path_of_ssd = [
        [statistics.fmean(seed["dampened"][i][d] for seed in seeds) for i in range(len(ALPHAS))]
        for d in ("code", "prose")
    ]
    axes[2].plot(
        *path_of_ssd, color="#cc79a7", marker="s", ms=4, lw=1, ls=":", label="then SSD of the code (to go right)"
    )
    base = [statistics.fmean(seed["base"][domain] for seed in seeds) for domain in ("code", "prose")]
    axes[2].plot(*base, color="black", marker="*", ms=9, ls="", label="before")
    axes[2].set(
        xlabel="code: log-perplexity at the end",
        ylabel="prose: log-perplexity at the end",
        title="every strength (down and left is better)",
    )
    axes[2].legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=130)


def deviation(values: list[float]) -> float:
    """Standard deviation over seeds."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def ends(record: dict[str, Any], method: str, strength: float, domain: str) -> list[float]:
    """The last value of every seed."""
    runs = [run for seed in record["seeds"].values() for run in seed["runs"]]
    return [run["curve"][-1][domain] for run in runs if (run["method"], run["strength"]) == (method, strength)]


def table(record: dict[str, Any]) -> str:
    """Where every run ends, in Markdown: mean and standard deviation over the seeds."""
    lines = ["| | strength | prose, learnt first | code, learnt second |", "|---|---:|---:|---:|"]
    seeds = list(record["seeds"].values())
    rows = [("before", None, [seed["base"] for seed in seeds])]
    for method, strengths in record["methods"].items():
        for strength in strengths:
            values = [ends(record, method, strength, domain) for domain in ("prose", "code")]
            rows.append(
                (method, strength, [dict(zip(("prose", "code"), v, strict=True)) for v in zip(*values, strict=True)])
            )
    for i, alpha in enumerate(ALPHAS):
        rows.append(("AdamW, then SSD of the code", alpha, [seed["dampened"][i] for seed in seeds]))
    for method, strength, points in rows:
        values = ([point[domain] for point in points] for domain in ("prose", "code"))
        cells = (f"{statistics.fmean(v):.2f} +- {deviation(v):.2f}" for v in values)
        lines.append(f"| {method} | {'' if strength is None else f'{strength:g}'} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the seeds, write the record and the picture, print a table."""
    parser = argparse.ArgumentParser(description="Sequential fine-tuning on two domains of real text.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--out", type=Path, default=Path("sequential"), help="path of the record and the picture, without ending"
    )
    parser.add_argument("--quick", action="store_true", help="fewer steps, and one strength of each method")
    given = parser.parse_args()
    steps, methods, start = STEPS, STRENGTHS, time.perf_counter()
    if given.quick:
        steps, methods = QUICK, {method: [strength] for method, strength in SHOWN.items()}
    path = given.out.with_suffix(".json")
    record: dict[str, Any] = {
        "steps": steps,
        "methods": methods,
        "fastforget": ff.__version__,
        "torch": torch.__version__,
        "machine": platform.machine(),
        "seeds": {},
    }
    if path.exists():
        before = json.loads(path.read_text())
        if before | {"seeds": {}} != record:
            raise SystemExit(f"--out: expected a new file, or a record of the same steps and versions, got {path}")
        record = before
    tokenizer, rows, held_out = domains()
    for seed in given.seeds:
        if str(seed) in record["seeds"]:
            continue
        record["seeds"][str(seed)] = one_seed(seed, steps, methods, tokenizer, rows, held_out)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1) + "\n")
        unfinished.replace(path)
        print(f"seed {seed}: {time.perf_counter() - start:.0f} s", flush=True)
    draw(record, given.out.with_suffix(".png"))
    print(table(record))


if __name__ == "__main__":
    main()
