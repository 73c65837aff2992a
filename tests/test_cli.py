"""The command line: what it passes on, what it prints, and how it fails."""

import importlib
import inspect
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from fastforget import cli, doctor, ops

runner = CliRunner()


def run_main(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["fastforget", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code or 0


@pytest.fixture
def recorded(monkeypatch):
    """Calls of the functions behind the commands, made to return nothing."""
    calls = []

    def replace(module: str, name: str) -> None:
        signature = inspect.signature(getattr(importlib.import_module(module), name))

        def record(*args, **kwargs):
            calls.append(signature.bind(*args, **kwargs).arguments)

        monkeypatch.setattr(module + "." + name, record)

    replace("fastforget.matrix", "forgetting_matrix")
    replace("fastforget.demo", "run")
    monkeypatch.setattr(cli, "_print_summary", lambda result: None)
    monkeypatch.setattr(cli, "_draw", lambda result, to: None)
    return calls


def test_help_names_every_command():
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("demo", "matrix", "plot", "bench", "doctor"):
        assert command in result.output


def test_module_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastforget", "--version"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module("fastforget.__main__")
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == __import__("fastforget").__version__


MATRIX = ["matrix", "--base", "b", "--task", "one=x", "--task", "y", "--upstream", "u.jsonl", "--out", "o"]


def test_matrix_passes_every_option_on(recorded, monkeypatch):
    options = ["--max-length", "64", "--tokens-per-batch", "128", "--dtype", "bfloat16", "--device", "cpu", "--eos"]
    options += ["--skip-empty", "--split", "test", "--config", "en", "--noise-examples", "5"]
    options += ["--no-check-adapter-base", "--no-progress", "--compile", "--ray", "auto", "--workers", "3"]
    options += ["--predict", "30", "--known", "k"]
    assert run_main(monkeypatch, *MATRIX, *options) == 0
    assert recorded == [
        {
            "base": "b", "tasks": ["one=x", "y"], "upstream": "u.jsonl", "out": Path("o"), "max_length": 64,
            "tokens_per_batch": 128, "dtype": "bfloat16", "device": "cpu", "eos": True, "skip_empty": True,
            "split": "test", "config": "en", "noise_examples": 5, "check_adapter_base": False, "progress": False,
            "compile": True, "tensor_parallel": False, "predict": 30, "known": "k", "shard": None, "ray": "auto", "workers": 3,
        }
    ]  # fmt: skip


def test_matrix_defaults_are_those_of_the_function(recorded, monkeypatch):
    from fastforget.matrix.runner import forgetting_matrix

    assert run_main(monkeypatch, *MATRIX) == 0
    parameters = inspect.signature(forgetting_matrix).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    assert set(defaults) == set(recorded[0]) - {"base", "tasks", "upstream", "out"}
    assert {name: recorded[0][name] for name in defaults} == defaults


@pytest.mark.parametrize(
    ("flag", "changed"),
    [
        ("--eos", {"eos": True}),
        ("--skip-empty", {"skip_empty": True}),
        ("--no-check-adapter-base", {"check_adapter_base": False}),
        ("--no-progress", {"progress": False}),
        ("--compile", {"compile": True}),
        ("--tensor-parallel", {"tensor_parallel": True}),
    ],
)
def test_matrix_flag_changes_one_argument(flag, changed, recorded, monkeypatch):
    assert run_main(monkeypatch, *MATRIX) == run_main(monkeypatch, *MATRIX, flag) == 0
    assert recorded[1] == recorded[0] | changed
    assert recorded[1] != recorded[0]


def test_demo_passes_its_options_on(recorded, monkeypatch):
    assert run_main(monkeypatch, "demo", "--out", "d", "--device", "cpu", "--seed", "3", "--quick") == 0
    assert recorded == [{"out": Path("d"), "device": "cpu", "seed": 3, "quick": True}]


@pytest.mark.parametrize("error", [ValueError, TypeError, FileNotFoundError, ImportError])
def test_errors_are_one_line_and_exit_2(error, monkeypatch, capsys):
    def fail(folder):
        raise error(f"out: expected a forgetting matrix, got {folder}")

    monkeypatch.setattr("fastforget.matrix.ForgettingMatrix.load", fail)
    assert run_main(monkeypatch, "plot", "nowhere") == 2
    captured = capsys.readouterr()
    assert captured.err == "fastforget: error: out: expected a forgetting matrix, got nowhere\n"
    monkeypatch.setenv("FASTFORGET_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["fastforget", "plot", "nowhere"])
    with pytest.raises(error):
        cli.main()


def test_other_errors_keep_their_traceback(monkeypatch):
    def fail(folder):
        raise KeyError("a defect")

    monkeypatch.setattr("fastforget.matrix.ForgettingMatrix.load", fail)
    monkeypatch.setattr(sys, "argv", ["fastforget", "plot", "nowhere"])
    with pytest.raises(KeyError):
        cli.main()


def test_interrupted_matrix_says_how_to_continue(recorded, monkeypatch, capsys):
    def interrupt(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastforget.matrix.forgetting_matrix", interrupt)
    assert run_main(monkeypatch, *MATRIX) == 130
    assert "same command" in capsys.readouterr().err


def test_summary_shows_every_task_and_every_caveat(capsys):
    row = {"mean": 0.25, "median": -0.5, "share_increased": 0.75, "exact_forgotten": None}
    summary = row | {
        "examples": 1200,
        "per_task": {"[bold]odd": row},
        "noise": {"batch_composition": {"rms": 0.002, "max": 0.01}, "wider_dtype": {"unmeasured": "no memory"}},
        "predicted": 0,
        "nan": {"count": 7, "entries": [["one", "example-3"]]},
        "truncated": 4,
        "skipped": 2,
    }
    cli._print_summary(SimpleNamespace(summary=lambda: summary))
    output = capsys.readouterr().out
    for expected in (
        "1,200 upstream examples", "[bold]odd", "+0.2500", "-0.5000", "75.0%",
        "another batch composition: rms 2.0e-03, largest 1.0e-02", "not measured: no memory",
        "7 entries are NaN", "example-3 under one", "4 examples were truncated", "2 rows without",
    ):  # fmt: skip
        assert expected in output


def test_plot_of_a_real_folder_without_a_matrix(tmp_path, monkeypatch, capsys):
    assert run_main(monkeypatch, "plot", str(tmp_path)) == 2
    error = capsys.readouterr().err
    assert str(tmp_path) in error
    assert "Traceback" not in error


def test_bench_names_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert run_main(monkeypatch, "bench") == 2
    assert "pip install 'fastforget[bench]'" in capsys.readouterr().err


def test_bench_without_benchmarks(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "fastforget" / "cli.py"))
    assert run_main(monkeypatch, "bench") == 2
    assert "bench_*.py" in capsys.readouterr().err


def test_doctor_reports_every_operation_on_every_device():
    text = doctor.report()
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        implementation, reason = ops.resolve("auto", device)
        assert f"linear_cross_entropy on {device}: {implementation} ({reason})" in text
    assert f"torch         {torch.__version__}" in text


def test_doctor_finds_an_operation_by_its_impl_argument(monkeypatch):
    def fisher(activations, *, impl="auto"):
        pass

    monkeypatch.setattr(ops, "fisher", fisher, raising=False)
    monkeypatch.setattr(ops, "__all__", [*ops.__all__, "fisher"])
    assert "fisher on cpu: torch" in doctor.report()


@pytest.mark.parametrize(
    ("package", "version", "warning"),
    [
        ("torch", "2.9.1", "torch: expected 2.11 or newer, got 2.9.1; pip install -U torch"),
        ("transformers", None, "transformers is missing; pip install 'transformers>=5.10.2'"),
        ("torch", "2.11.0+cu130", None),
        ("peft", None, None),
        pytest.param(
            "triton",
            None,
            "triton is missing; pip install 'triton>=3.6'",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="Triton exists for Linux only"),
        ),
    ],
)
def test_doctor_warns_about_versions(package, version, warning, monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: version if name == package else real(name))
    warnings = doctor.report().split("warnings\n")[1]
    assert (warning in warnings) if warning else (package not in warnings)


def test_doctor_warns_about_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "TRITON_INTERPRET" not in doctor.report()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "Triton kernels run in the interpreter" in doctor.report().split("warnings\n")[1]
