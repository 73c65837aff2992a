"""The Fisher of a model on a data set: one command, resumable."""

from fastforget.fisher_run.options import Options
from fastforget.fisher_run.runner import run_fisher

__all__ = ["Options", "run_fisher"]
