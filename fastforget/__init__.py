"""Fused Triton kernels for measuring, predicting and steering what a language model forgets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastforget import ops, reference
    from fastforget.fisher.callback import FisherCallback
    from fastforget.fisher.estimator import DiagonalFisher
    from fastforget.fisher.files import combine_fishers, load_fisher
    from fastforget.fisher.rules import fisher_rule
    from fastforget.matrix import ForgettingMatrix, forgetting_matrix
    from fastforget.perplexity import log_perplexity

__version__ = "0.1.0"
__all__ = [
    "DiagonalFisher",
    "FisherCallback",
    "ForgettingMatrix",
    "combine_fishers",
    "fisher_rule",
    "forgetting_matrix",
    "load_fisher",
    "log_perplexity",
    "ops",
    "reference",
]

_HOME = {
    "DiagonalFisher": "fastforget.fisher.estimator",
    "FisherCallback": "fastforget.fisher.callback",
    "combine_fishers": "fastforget.fisher.files",
    "fisher_rule": "fastforget.fisher.rules",
    "load_fisher": "fastforget.fisher.files",
    "ForgettingMatrix": "fastforget.matrix",
    "forgetting_matrix": "fastforget.matrix",
    "log_perplexity": "fastforget.perplexity",
}


def __getattr__(name: str) -> Any:  # imports on first use, so that `import fastforget` costs nothing
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"fastforget.{name}")
    raise AttributeError(f"module 'fastforget' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
