"""The README's figures are those of the committed records."""

from __future__ import annotations

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_figures_come_from_the_records():
    spec = importlib.util.spec_from_file_location("records", ROOT / "benchmarks/records.py")
    assert spec is not None
    assert spec.loader is not None
    records = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(records)
    readme = (ROOT / "README.md").read_text()
    assert records.updated(readme) == readme, "run: python benchmarks/records.py"


def test_every_tested_family_is_named():
    from architectures.families import FAMILIES

    readme = (ROOT / "README.md").read_text()
    text = " ".join(readme.split())
    names = {name.split(",")[0] for name in FAMILIES}
    assert not [name for name in names if name not in text]


def test_the_page_of_families_is_that_of_the_tests():
    from architectures import families_page

    assert families_page.PAGE.read_text() == families_page.page(), "run: python tests/architectures/families_page.py"
