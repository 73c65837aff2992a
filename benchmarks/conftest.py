"""Shared by the benchmarks: device, correctness before time, peak memory, and one compact record a run.

Run with `make bench`, `make gpu` or `fastforget bench`. Variants of a group take turns, so that all see the same noise;
pytest-benchmark times one call a turn. Beside its raw JSON lies `<device>.json`, the record that README's tables come
from: device, versions, commit, and per variant the median, spread, rate and peak memory.
"""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

TURNS = 5
ROWS = pytest.StashKey[list[dict[str, Any]]]()
_checked: dict[tuple[str, str], float] = {}  # (group, variant) -> peak memory, once its result was right
_unavailable: list[dict[str, str]] = []


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def peak_memory(function: Callable[[], Any], device: torch.device) -> float:
    """Megabytes that one call needs above what is held before it: allocated ones on a GPU, resident ones on a CPU."""
    gc.collect()
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL(None).malloc_trim(0)  # memory that an earlier variant left in the heap would hide this one's
    before = peak = _resident()
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(5e-4):
            peak = max(peak, _resident())

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        function()
    finally:
        done.set()
        sampler.join()
    return (peak - before) / 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def measure(benchmark: Any, device: torch.device) -> Callable[..., None]:
    """One timed call of a variant, after its first result was compared with a reference."""

    def run(
        group: str,
        variant: str,
        function: Callable[[], torch.Tensor],
        reference: torch.Tensor | None,
        *,
        tolerance: float,
        work: float,
        unit: str,
        warm_up: bool = False,
    ) -> None:
        """Time `function` once.

        Args:
            group: Title of the table.
            variant: Name of the row.
            function: What is timed; gives the result to compare.
            reference: The right result, or None for a ceiling that has none.
            tolerance: Largest difference from it; beyond, nothing is timed and the test fails.
            work: Units of work in one call.
            unit: One unit of work a second, such as "tokens/s".
            warm_up: On a CPU, call it once before: a system may have put away gigabytes that only this variant uses.
        """
        if (group, variant) not in _checked:
            result = function()  # compiles, too
            if reference is not None:
                error = float((result.double().cpu() - reference.double().cpu()).abs().max())
                assert error <= tolerance, f"{variant}: off by {error:.3g}, {tolerance:.3g} allowed; not timed"
            del result
            _checked[group, variant] = peak_memory(function, device)

        def timed() -> None:
            function()
            if device.type == "cuda":
                torch.cuda.synchronize()

        benchmark.group = group
        benchmark.name = variant
        benchmark.extra_info.update(work=work, unit=unit, peak_mb=_checked[group, variant])
        on_gpu = device.type == "cuda"  # its clock rises under load: a lone call would be timed at an idle clock
        if on_gpu:
            torch.cuda.synchronize()
        warm_ups = 3 if on_gpu else int(warm_up)
        benchmark.pedantic(timed, rounds=10 if on_gpu else 1, iterations=1, warmup_rounds=warm_ups)

    return run


@pytest.fixture(scope="session")
def unavailable() -> Callable[[str, str, str], None]:
    """Note in the record that a variant could not run here, and why; then skip."""

    def note(group: str, variant: str, reason: str) -> None:
        row = {"group": group, "name": variant, "unavailable": reason}
        if row not in _unavailable:
            _unavailable.append(row)
        pytest.skip(reason)

    return note


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: Any, output_json: dict[str, Any]) -> None:
    """Write the compact record beside pytest-benchmark's own."""
    turns: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in output_json["benchmarks"]:
        turns.setdefault((entry["group"], entry["name"]), []).append(entry)
    rows = []
    for (group, name), entries in turns.items():
        seconds = [entry["stats"]["median"] for entry in entries]
        info = entries[0]["extra_info"]
        rows.append(
            {"group": group, "name": name, "seconds": statistics.median(seconds), "fastest": min(seconds)}
            | {"slowest": max(seconds), "turns": len(seconds), "rate": info["work"] / statistics.median(seconds)}
            | {"unit": info["unit"], "peak_mb": info["peak_mb"]}
        )
    config.stash[ROWS] = rows
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    record = {
        "device": gpu or f"CPU, {_processor()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": time.strftime("%Y-%m-%d"),
        "rows": rows + _unavailable,
    }
    slug = gpu.lower().replace(" ", "-") if gpu else "cpu"
    raw = config.getoption("benchmark_json")  # a path, or an open file before pytest-benchmark 5.3
    folder = (raw if isinstance(raw, Path) else Path(raw.name)).parent
    (folder / f"{slug}.json").write_text(json.dumps(record, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the record as a table; pytest-benchmark's own would have a line for every turn."""
    for row in config.stash.get(ROWS, []):
        seconds = f"{row['seconds']:8.3f} s  {row['rate']:10.4g} {row['unit']:9s}  {row['peak_mb']:8.0f} MB peak"
        terminalreporter.write_line(f"{row['group']} | {row['name']:52s} {seconds}")


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()
