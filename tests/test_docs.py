"""The code on every page runs: a page's Python blocks share one namespace, its commands run in the same folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[tuple[str, str, int]]:
    """Language, code and first line of the code, of every fenced block that a page promises to work."""
    text = page.read_text(encoding="utf-8")
    found = [(match[1], match[2], text.count("\n", 0, match.start(2))) for match in FENCE.finditer(text)]
    runnable = {"python"} if page.name == "README.md" else {"python", "bash"}
    return [block for block in found if block[0] in runnable]


def run_page(page: Path) -> None:
    namespace = {"__name__": "__main__"}
    for language, code, line in blocks(page):
        if language == "python":
            # Empty lines in front, so that a traceback names the line of the page.
            exec(compile("\n" * line + code, str(page), "exec"), namespace)
        else:
            run_shell(code, f"{page.name}, line {line}")


def run_shell(code: str, place: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", "-euo", "pipefail", "-c", code]
    result = subprocess.run(command, env=os.environ | {"PATH": path}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{place}: {result.stdout}{result.stderr}"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_code_on_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FASTFORGET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    run_page(page)


@pytest.mark.parametrize(
    ("text", "error"), [("```python\n1 / 0\n```\n", ZeroDivisionError), ("```bash\nfalse\n```\n", AssertionError)]
)
def test_a_page_whose_code_fails_is_caught(text, error, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    with pytest.raises(error):
        run_page(page)


def test_fences_are_balanced():
    # An unclosed or indented fence would hide the code behind it from the test above.
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        runnable = re.findall(r"^\s*```+\s*(?:python|bash)\b", text, re.MULTILINE)
        found = [match[1] for match in FENCE.finditer(text)]
        assert len(runnable) == found.count("python") + found.count("bash"), page.name
