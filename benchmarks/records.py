"""Tables of the README from the records: `python benchmarks/records.py` rewrites the part between the two markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- records: begin -->", "<!-- records: end -->"


def tables(record: dict[str, Any]) -> str:
    """Markdown of one record: a table for every group."""
    versions = f"torch {record['torch']}, triton {record['triton']}, commit {record['commit']}, {record['date']}"
    where = f"{record['device']}; {versions}"
    parts = []
    for group in dict.fromkeys(row["group"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["group"] == group]
        timed = [row for row in rows if "seconds" in row]
        ours = next(row for row in timed if row["name"] == "fastforget")
        unit = ours["unit"]
        ceiling = max((row["rate"] for row in timed if "ceiling" in row["name"]), default=None)
        lines = [f"**{group}** ({where})", "", f"| | seconds (fastest to slowest) | {unit} | peak MB | fastforget is |"]
        lines.append("|---|---:|---:|---:|---:|")
        for row in sorted(timed, key=lambda row: -row["seconds"]):
            spread = f"{row['fastest']:.3f} to {row['slowest']:.3f}"
            ratio = "" if row is ours else f"{row['seconds'] / ours['seconds']:.2f}x as fast"
            rate = f"{row['rate']:,.0f}" if row["rate"] >= 100 else f"{row['rate']:.3g}"
            name = f"**{row['name']}**" if row is ours else row["name"]
            rate += f" ({row['rate'] / ceiling:.0%} of the ceiling)" if ceiling else ""
            lines.append(f"| {name} | {row['seconds']:.3f} ({spread}) | {rate} | {row['peak_mb']:,.0f} | {ratio} |")
        lines += [
            f"| {row['name']} | not measured: {row['unavailable']} | | | |" for row in rows if "unavailable" in row
        ]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def section() -> str:
    """The README's part that comes from the committed records."""
    records = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("*.json"))]
    records = [record for record in records if "rows" in record]  # pytest-benchmark's raw file may lie beside them
    parts = [tables(record) for record in records]
    if all(record["device"].startswith("CPU") for record in records):
        parts.append("No GPU record exists yet: the Triton kernels' speed is unmeasured.")
    return f"{BEGIN}\n\n" + "\n\n".join(parts) + f"\n\n{END}"


def updated(readme: str) -> str:
    """The README with that part replaced."""
    return readme[: readme.index(BEGIN)] + section() + readme[readme.index(END) + len(END) :]


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(updated(path.read_text()))
