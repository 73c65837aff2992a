"""Fused Triton kernels for measuring, predicting and steering what a language model forgets."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastforget import ops, optim, reference
    from fastforget.fisher.callback import FisherCallback
    from fastforget.fisher.estimator import DiagonalFisher
    from fastforget.fisher.files import combine_fishers, load_fisher
    from fastforget.fisher.rules import fisher_rule
    from fastforget.graceful.confidence import forgetting_confidence
    from fastforget.matrix import ForgettingMatrix, forgetting_matrix
    from fastforget.perplexity import log_perplexity
    from fastforget.prediction import ForgettingPredictor, analyse, example_representations
    from fastforget.replay import OnlineReplay, ReplayMixer, replay_weights
    from fastforget.update.dampening import selective_dampening_
    from fastforget.update.deltas import add_delta_, load_delta, parameter_delta, save_delta
    from fastforget.update.masks import load_mask, mask_updates, save_mask, trainable_mask
    from fastforget.update.merging import fisher_merge
    from fastforget.update.penalty import ewc_penalty

__version__ = "0.1.0"
__all__ = [
    "DiagonalFisher",
    "FisherCallback",
    "ForgettingMatrix",
    "ForgettingPredictor",
    "OnlineReplay",
    "ReplayMixer",
    "add_delta_",
    "analyse",
    "combine_fishers",
    "ewc_penalty",
    "example_representations",
    "fisher_merge",
    "fisher_rule",
    "forgetting_confidence",
    "forgetting_matrix",
    "load_delta",
    "load_fisher",
    "load_mask",
    "log_perplexity",
    "mask_updates",
    "ops",
    "optim",
    "parameter_delta",
    "reference",
    "replay_weights",
    "save_delta",
    "save_mask",
    "selective_dampening_",
    "trainable_mask",
]

_HOME = {
    "DiagonalFisher": "fastforget.fisher.estimator",
    "FisherCallback": "fastforget.fisher.callback",
    "combine_fishers": "fastforget.fisher.files",
    "fisher_rule": "fastforget.fisher.rules",
    "load_fisher": "fastforget.fisher.files",
    "forgetting_confidence": "fastforget.graceful.confidence",
    "ForgettingMatrix": "fastforget.matrix",
    "forgetting_matrix": "fastforget.matrix",
    "log_perplexity": "fastforget.perplexity",
    "ForgettingPredictor": "fastforget.prediction",
    "analyse": "fastforget.prediction",
    "example_representations": "fastforget.prediction",
    "OnlineReplay": "fastforget.replay",
    "ReplayMixer": "fastforget.replay",
    "replay_weights": "fastforget.replay",
    "ewc_penalty": "fastforget.update.penalty",
    "add_delta_": "fastforget.update.deltas",
    "fisher_merge": "fastforget.update.merging",
    "load_delta": "fastforget.update.deltas",
    "parameter_delta": "fastforget.update.deltas",
    "save_delta": "fastforget.update.deltas",
    "selective_dampening_": "fastforget.update.dampening",
    "load_mask": "fastforget.update.masks",
    "mask_updates": "fastforget.update.masks",
    "save_mask": "fastforget.update.masks",
    "trainable_mask": "fastforget.update.masks",
}


def __getattr__(name: str) -> Any:  # imports on first use, so that `import fastforget` costs nothing
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in __all__:
        return importlib.import_module(f"fastforget.{name}")
    raise AttributeError(f"module 'fastforget' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
