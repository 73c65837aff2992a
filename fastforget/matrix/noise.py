"""The noise floor of a run: how far the base's log-perplexities move where nothing but the arithmetic changes."""

from typing import Any

import numpy as np
import torch
from torch import nn

from fastforget.matrix.models import eager, parameters_as
from fastforget.matrix.scoring import free_memory, joined, score
from fastforget.matrix.upstream import Upstream


def measure_noise(
    model: nn.Module, examples: Upstream, recorded: np.ndarray, *, count: int, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    """Score some examples again, each alone in its batch, and again with wider parameters.

    Args:
        model: the base.
        examples: the upstream examples.
        recorded: the run's log-perplexities of the base, nats per token, float64 `[N]`.
        count: how many examples, evenly spaced over the lengths.
        device: the model's device.
        dtype: the model's dtype.

    Returns:
        `unit`, `dtype`, `examples` and, under `batch_composition` and `wider_dtype`, the `rms` and `max` difference
        from the recorded values, or the reason why it is `unmeasured`. `wider_dtype` differs in the batch, too.
    """
    finite = np.flatnonzero(np.isfinite(recorded))
    finite = finite[np.argsort(examples.lengths[finite], kind="stable")]
    chosen = finite[np.unique(np.linspace(0, len(finite) - 1, min(count, len(finite))).round().astype(int))]
    noise: dict[str, Any] = {
        "unit": "nats per token",
        "dtype": str(dtype).removeprefix("torch."),
        "examples": len(chosen),
    }
    if not len(chosen):
        reason = {"unmeasured": "no example was asked for" if count == 0 else "no example has a finite log-perplexity"}
        return noise | {"batch_composition": reason, "wider_dtype": reason}
    with eager(model):  # a compiled model would be compiled for these shapes, too
        return noise | _measure(model, examples, recorded, chosen, device, dtype)


def _measure(
    model: nn.Module, examples: Upstream, recorded: np.ndarray, chosen: np.ndarray, device: str, dtype: torch.dtype
) -> dict[str, Any]:
    noise: dict[str, Any] = {"batch_composition": _compare(model, examples, recorded, chosen, device)}
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    if dtype == torch.float64 or (wider == torch.float64 and torch.device(device).type != "cpu"):
        noise["wider_dtype"] = {
            "unmeasured": f"{dtype} is the widest that scoring takes on {torch.device(device).type}"
        }
        return noise
    try:
        with parameters_as(model, wider):
            found = _compare(model, examples, recorded, chosen, device)
    except (RuntimeError, ValueError, MemoryError) as error:
        found = {"unmeasured": str(error).split("\n")[0]}
    free_memory()
    noise["wider_dtype"] = {"dtype": str(wider).removeprefix("torch."), **found}
    return noise


def _compare(model: nn.Module, examples: Upstream, recorded: np.ndarray, chosen: np.ndarray, device: str) -> dict:
    try:
        again = joined([score(model, examples, chosen[k : k + 1], device) for k in range(len(chosen))]).log_perplexity
    except (RuntimeError, ValueError, MemoryError) as error:
        return {"unmeasured": str(error).split("\n")[0]}
    difference = again - recorded[chosen]
    return {"rms": float(np.sqrt(np.mean(difference**2))), "max": float(np.abs(difference).max())}
