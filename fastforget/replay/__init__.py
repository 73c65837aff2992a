"""Replay of the upstream examples that a fine-tuning is predicted to forget.

`replay_weights` turns forecasts of forgetting into probabilities, `ReplayMixer` mixes upstream examples into a training by
them, and `OnlineReplay` gets the forecast from the model while it trains.

References:
    Jin and Ren, "Demystifying language model forgetting with low-rank example associations", arXiv 2406.14026.
"""

from fastforget.replay.mixer import ReplayMixer
from fastforget.replay.online import OnlineReplay
from fastforget.replay.weights import replay_weights

__all__ = ["OnlineReplay", "ReplayMixer", "replay_weights"]
