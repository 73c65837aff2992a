"""What an installation contains, what it imports, and that it imports where Triton does not exist."""

import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import pytest

import fastforget
from fastforget import doctor

ROOT = Path(__file__).parents[1]
PUBLIC_MODULES = ["fastforget", "fastforget.matrix", "fastforget.ops", "fastforget.perplexity", "fastforget.reference"]
HEAVY = {"transformers", "pyarrow", "matplotlib", "peft", "datasets", "pandas", "triton", "torch"}

WITHOUT_TRITON = """
import sys

class WithoutTriton:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = [WithoutTriton(finder) for finder in sys.meta_path]
"""


def run_python(code: str, *, path: Sequence[Path] = (ROOT, ROOT / "kernels"), cwd: Path = ROOT) -> str:
    code = f"import sys\nsys.path[:0] = {[str(folder) for folder in path]}\n{code}"
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light():
    code = "import json, sys, fastforget, fastforget.cli; print(json.dumps(sorted(sys.modules)))"
    assert not HEAVY & set(json.loads(run_python(code)))


def test_operations_work_without_triton():
    code = """
import fastforget as ff, torch
hidden, head, target = torch.randn(5, 8), torch.randn(11, 8), torch.arange(5)
result = ff.ops.linear_cross_entropy(hidden, head, target)
torch.testing.assert_close(result.loss, torch.nn.functional.cross_entropy(hidden @ head.T, target, reduction="none"))
assert ff.log_perplexity and ff.forgetting_matrix
try:
    ff.ops.linear_cross_entropy(hidden, head, target, impl="triton")
except ValueError as error:
    assert "impl: " in str(error) and "triton" in str(error), error
else:
    raise SystemExit("an explicit impl fell back")
from fastforget.doctor import report
print(report())
"""
    report = run_python(WITHOUT_TRITON + code)
    assert "linear_cross_entropy on cpu: torch" in report


@pytest.mark.parametrize("module", PUBLIC_MODULES)
def test_public_names_exist_and_are_documented(module):
    names = import_module(module).__all__
    assert names
    assert len(names) == len(set(names))
    for name in names:
        value = getattr(import_module(module), name)
        assert inspect.getdoc(value), f"{module}.{name}"


def test_public_names_are_on_the_api_page():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    for name in fastforget.__all__:
        assert re.search(rf"auto\w+:: fastforget\.{name}\b", page), name


def test_unknown_public_name_is_refused():
    with pytest.raises(AttributeError, match="no_such_name"):
        fastforget.no_such_name  # noqa: B018


def test_versions_agree_with_pyproject():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["version"] == fastforget.__version__
    required = [*project["dependencies"], *project["optional-dependencies"]["peft"]]
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", requirement).groups() for requirement in required)
    assert {name: doctor.MINIMUM_VERSIONS.get(name) for name in ("torch", "triton", "transformers", "peft")} == {
        name: bounds[name] for name in ("torch", "triton", "transformers", "peft")
    }


def test_kernels_is_a_folder_and_no_package():
    # A package of this name would shadow the PyPI package that transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built from a copy, so that nothing is left in the checkout."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("fastforget", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    run_python(f"from setuptools import build_meta\nbuild_meta.build_wheel({str(built)!r})", path=(), cwd=source)
    return next(built.glob("*.whl"))


def test_wheel_contains_every_module(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in (("fastforget", ""), ("kernels/fastforget_kernels", ""), ("benchmarks", "fastforget/")):
        parent = (ROOT / folder).parent
        expected = {package + path.relative_to(parent).as_posix() for path in (ROOT / folder).rglob("*.py")}
        assert expected
        assert not expected - names
    assert {"fastforget/py.typed", "fastforget_kernels/py.typed"} <= names
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fastforget", "fastforget_kernels", f"fastforget-{fastforget.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_benchmarks_run_from_the_wheel(wheel, tmp_path):
    installed = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(installed)
    probe = """
import torch
from conftest import TURNS

def test_probe(measure):
    ones = torch.ones(2)
    measure("group", "ones", lambda: ones + 0, ones, tolerance=0.0, work=TURNS, unit="ones/s")
"""
    (installed / "fastforget" / "benchmarks" / "bench_probe.py").write_text(probe, encoding="utf-8")
    # A pytest configuration where the command is called must not matter.
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n", encoding="utf-8")
    arguments = ["fastforget", "bench", "-k", "test_probe", "--out", "records"]
    code = f"""
import os, sys
os.environ["PYTHONPATH"] = {str(installed)!r}
sys.argv = {arguments}
from fastforget import cli
assert cli.__file__.startswith({str(installed)!r})
cli.main()
"""
    assert "1 passed" in run_python(code, path=(installed,), cwd=tmp_path)
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "records").glob("*.json")]
    assert any("rows" in record and record["device"] for record in records)
