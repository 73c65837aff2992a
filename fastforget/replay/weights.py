"""From forecasts of forgetting to probabilities: a softmax with a temperature."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["log_weights", "replay_weights"]

SHOWN = 10  # positions that an error lists


def replay_weights(forecast: Any, temperature: float = 0.1) -> np.ndarray:
    """How probable the replay of each upstream example is: `p_j = softmax(forecast_j / temperature)`.

    NaN is refused: an example whose log-perplexity is not finite any more may be the one that is forgotten most, so what it is
    worth is for the caller to say.

    Args:
        forecast: `[N]` predicted or measured forgetting, nats per token: a row of a `ForgettingMatrix`, what
            `ForgettingPredictor.predict` gives, an array, a tensor or a list. -inf is never replayed.
        temperature: tau > 0; infinity makes all equally probable.

    Returns:
        `[N]` float64, the sum is 1.

    Raises:
        ValueError: A forecast is NaN or infinite, all are -inf, or the temperature is outside its range.
        TypeError: The temperature is no number.

    References:
        Jin and Ren, arXiv 2406.14026, section 5.
    """
    weights = np.exp(log_weights(forecast, temperature))
    return weights / weights.sum()


def log_weights(forecast: Any, temperature: float) -> np.ndarray:
    """Logarithms of unnormalised weights: what is finite stays finite, whatever the temperature.

    Args:
        forecast: As for `replay_weights`.
        temperature: As for `replay_weights`.

    Returns:
        `[N]` float64, the largest is 0; -inf where the forecast is.

    Raises:
        ValueError: As for `replay_weights`.
        TypeError: As for `replay_weights`.
    """
    if isinstance(temperature, bool) or not isinstance(temperature, int | float | np.number):
        raise TypeError(f"temperature: expected a number, got {type(temperature).__name__}; the paper's is 0.1")
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number > 0, got {temperature}; the paper's is 0.1")
    values = _as_array(forecast)
    never = np.isneginf(values)
    for wrong, name in ((np.isnan(values), "NaN"), (np.isposinf(values), "infinity")):
        if wrong.any():
            places = np.flatnonzero(wrong)
            more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
            raise ValueError(
                f"forecast: expected finite numbers, got {name} at {places[:SHOWN].tolist()}{more}; predict them by "
                "ForgettingPredictor, or set them to -inf, which is never replayed"
            )
    if never.all():
        raise ValueError(f"forecast: expected at least one finite number, got {len(values)} times -inf")
    with np.errstate(over="ignore"):
        scaled = (values[~never] - values[~never].max()) / temperature
    values[~never] = np.maximum(scaled, np.finfo(np.float64).min)
    return values


def _as_array(forecast: Any) -> np.ndarray:
    """A copy, float64."""
    if hasattr(forecast, "detach"):  # a tensor: bfloat16 ones, and those of a GPU, are none that NumPy reads
        forecast = forecast.detach().cpu().double().numpy()
    try:
        values = np.array(forecast, np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"forecast: expected numbers [N], got {type(forecast).__name__} ({error})") from None
    if values.ndim != 1 or not len(values):
        raise ValueError(f"forecast: expected shape [N], got {values.shape}; pass one row, such as matrix.values[0]")
    return values
