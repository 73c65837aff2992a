"""The documentation's page of tested families: `python tests/architectures/families_page.py` writes it."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/families.md"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from architectures.families import FAMILIES  # noqa: E402
from architectures.fisher_steps import SLOW  # noqa: E402


def page() -> str:
    """Markdown: a row for every family of the tests."""
    rows = [
        f"| {family} | `{model_type}` | {', '.join(f'`{name}`' for name in SLOW.get(family, ()))} |"
        for family, (model_type, _) in FAMILIES.items()
    ]
    return "\n".join(
        [
            "# Tested families",
            "",
            f"{len(FAMILIES)} tiny models of transformers' causal language model families. For each, right-padded,",
            "left-padded and packed, `pytest tests/architectures` measures",
            "",
            "- the log-perplexity in float32 and bfloat16, against the unpadded example's own logits;",
            "- the diagonal Fisher of every parameter, and of every slice of fused weights, against a batch-size-1 loop of",
            "  ordinary backwards over the unpadded examples: 1e-5 in float32, 1e-10 in float64, in norm relative to the",
            "  tensor's (casts to float32 inside a float64 model are taken out for that), by `update`;",
            "- the same of an observed step, right-padded, in float64 and eval mode (but BART's, whose own loss is another).",
            "",
            "The last column names the modules whose parameters no fast rule covers: they are exact, but computed again",
            "example by example. This page is written from the tests, which fail where it is not true, by",
            "`python tests/architectures/families_page.py`.",
            "",
            "| family | model type | slow modules |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page())
