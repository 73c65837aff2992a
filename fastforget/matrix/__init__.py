"""Forgetting matrices: how much every upstream example was forgotten by every fine-tuned model."""

from fastforget.matrix.plot import plot_heatmap
from fastforget.matrix.result import ForgettingMatrix
from fastforget.matrix.runner import forgetting_matrix

__all__ = ["ForgettingMatrix", "forgetting_matrix", "plot_heatmap"]
