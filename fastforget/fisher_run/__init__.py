"""The Fisher of a model on a data set: one command, resumable."""

from fastforget.fisher_run.runner import run_fisher

__all__ = ["run_fisher"]
