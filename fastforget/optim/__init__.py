"""Optimizers of `torch.optim` whose step a Fisher, an anchor or a mask steers, in the same one pass over the parameters."""

from fastforget.optim._adamw import AdamW
from fastforget.optim._sgd import SGD

__all__ = ["SGD", "AdamW"]
