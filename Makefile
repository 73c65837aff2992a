# The commands of this repository. `make demo` and `make test` work on a fresh machine with Python 3.11 or newer.
#
#   make demo     a forgetting matrix from real text, on this machine, in minutes; OUT= chooses the folder (demo)
#   make test     every test that this machine can run
#   make lint     ruff and pyright
#   make docs     the documentation, without warnings, and the code on its pages
#   make bench    the benchmarks; OUT= chooses the folder of the records (benchmarks/results)
#   make gpu      the tests marked gpu, then the benchmarks; installs nothing; OUT= chooses the folder (records)
#   make clean    removes what the commands above have made, .venv included, records excepted
#
# PYTHON= chooses the interpreter; ARGS= is passed on to pytest or to the demo.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help demo test lint docs bench gpu clean

PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$python" && break; done)
BIN := .venv/bin

help:
	@sed -n 's/^#   //p' Makefile

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "PYTHON: expected Python 3.11 or newer on PATH, got none; install one or pass PYTHON=/path/to/python3" >&2; exit 2; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "PYTHON: expected Python 3.11 or newer, got " + sys.version)'
	$(PYTHON) -m venv .venv || { rm -rf .venv; echo "PYTHON: $(PYTHON) cannot create virtual environments; on Debian and Ubuntu install python3-venv" >&2; exit 2; }

# One stamp for each extra of pyproject.toml. torch goes first, so that nothing else decides which torch it is.
.venv/.installed-%: pyproject.toml tests/constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install -c tests/constraints.txt torch | { grep -v '^Requirement already' || true; }
	$(BIN)/python -m pip install -c tests/constraints.txt -e '.[$*]' | { grep -v '^Requirement already' || true; }
	@touch $@

demo: .venv/.installed-demo
	$(BIN)/fastforget demo --out $(or $(OUT),demo) $(ARGS)

test: .venv/.installed-test
	$(BIN)/python -m pytest $(ARGS)

lint: .venv/.installed-test .venv/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

docs: .venv/.installed-test .venv/.installed-docs
	$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going --fresh-env -b html docs docs/_build/html
	$(BIN)/python -m pytest tests/test_docs.py

bench: .venv/.installed-test
	$(BIN)/fastforget bench --out $(or $(OUT),benchmarks/results) $(ARGS)

# Nothing is installed here: the checkout and the machine's own Python. The benchmarks run even where a test fails.
gpu: export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels$(if $(PYTHONPATH),:$(PYTHONPATH))
gpu:
	@mkdir -p $(or $(OUT),records)
	@status=0; \
	$(PYTHON) -m fastforget doctor | tee $(or $(OUT),records)/doctor.txt || status=1; \
	$(PYTHON) -m pytest -m gpu -W default tests | tee $(or $(OUT),records)/tests.txt || status=1; \
	$(PYTHON) -m fastforget bench --out $(or $(OUT),records) | tee $(or $(OUT),records)/benchmarks.txt || status=1; \
	exit $$status

clean:
	rm -rf .venv build dist demo docs/_build .pytest_cache .ruff_cache .benchmarks .hypothesis *.egg-info
	find fastforget kernels benchmarks tests docs -name __pycache__ -type d -prune -exec rm -rf {} +
