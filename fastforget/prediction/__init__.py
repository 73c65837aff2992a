"""Prediction of forgetting: from a matrix of known tasks, and a few evaluations of a new one, to its whole row."""

from fastforget.prediction.analysis import analyse
from fastforget.prediction.predictor import ForgettingPredictor
from fastforget.prediction.representations import example_representations

__all__ = ["ForgettingPredictor", "analyse", "example_representations"]
