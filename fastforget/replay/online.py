"""`OnlineReplay`: the forecast comes from the model that is trained, a short while after the beginning."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastforget.perplexity import log_perplexity
from fastforget.prediction import ForgettingPredictor
from fastforget.replay.mixer import ReplayMixer

__all__ = ["OnlineReplay"]

IGNORE = -100


class OnlineReplay:
    """Replay at random first, then by what the model has begun to forget.

    The steps, which `ReplayMixer.attach(trainer, online)` takes by itself:

    1. `begin(model)` before the training measures the base's log-perplexity on S upstream examples, unless it is given.
    2. The mixer replays by its first forecast: at random, if it has none.
    3. `update(model)`, after the first 10% of the steps, measures the same examples again, completes the row of all N by
       the predictor, and sets it as the mixer's forecast.

    Args:
        mixer: Its `upstream` items have `input_ids`, and `labels` where not every token is a target.
        predictor: Fitted on a matrix of the same N examples, in the same order.
        count: S, how many examples are measured; `ForgettingPredictor.choose_columns` chooses them.
        start: Share of the steps before `update`, for the trainer.
        base: `[N]` the base's log-perplexities, such as `ForgettingMatrix.base`; None: measured by `begin`.
        batch_size: Examples in a forward pass.
        seed: Of the choice.

    Raises:
        TypeError: `mixer` or `predictor` is something else.
        ValueError: A number is outside its range, or the predictor is of other examples.
    """

    def __init__(
        self,
        mixer: ReplayMixer,
        predictor: ForgettingPredictor,
        *,
        count: int = 30,
        start: float = 0.1,
        base: Any = None,
        batch_size: int = 8,
        seed: int = 0,
    ) -> None:
        for name, value, kind in (("mixer", mixer, ReplayMixer), ("predictor", predictor, ForgettingPredictor)):
            if not isinstance(value, kind):
                raise TypeError(f"{name}: expected a {kind.__name__}, got {type(value).__name__}")
        if not 0 <= start < 1:
            raise ValueError(f"start: expected a share of the steps in [0, 1), got {start}")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size: expected an integer >= 1, got {batch_size!r}")
        total, known = len(mixer.upstream), len(predictor.predict([], []))
        if known != total:
            raise ValueError(f"predictor: expected one of {total} examples like the mixer's, got {known}")
        self.mixer, self.predictor, self.start, self.batch_size = mixer, predictor, start, batch_size
        self.columns = predictor.choose_columns(count, seed=seed).columns
        self.given = None if base is None else _base(base, total)[self.columns]
        self.base, self.values = self.given, None

    def begin(self, model: nn.Module) -> None:
        """Measure the base, unless it is given, and forget an earlier training.

        Args:
            model: As it is before the first step.
        """
        self.base, self.values = self.measure(model) if self.given is None else self.given, None

    def update(self, model: nn.Module) -> np.ndarray:
        """Measure the model, and replay by what it will forget from now on.

        With several processes all have to call it, and the first one's measurement holds.

        Args:
            model: As it is now.

        Returns:
            `[N]` float64, the completed row, nats per token.

        Raises:
            ValueError: The base has not been measured.
        """
        if self.base is None:
            raise ValueError("base: expected to be measured, got none; call begin(model) before the training")
        values = self.measure(model) - self.base
        values[~np.isfinite(values)] = np.nan
        self.values = values
        row = self.predictor.predict(self.columns, values)
        self.mixer.set_forecast(row)
        return row

    @torch.no_grad()
    def measure(self, model: nn.Module) -> np.ndarray:
        """The model's log-perplexity of the S examples.

        Args:
            model: A causal language model.

        Returns:
            `[S]` float64, nats per token; with several processes those of the first.

        Raises:
            ValueError: An item has no `input_ids`.
        """
        device = next(model.parameters()).device
        found = []
        for columns in np.array_split(self.columns, max(1, -(-len(self.columns) // self.batch_size))):
            batch = _padded([self.mixer.upstream[int(column)] for column in columns])
            found.append(log_perplexity(model, *(tensor.to(device) for tensor in batch)).double())
        values = torch.cat(found)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.broadcast(values, 0)
        return values.cpu().numpy()

    def state_dict(self) -> dict[str, Any]:
        """What another one of the same arguments needs to continue; plain values that JSON can hold.

        Returns:
            The columns, the base's log-perplexities, and the measured forgetting.
        """
        columns, base, values = (None if v is None else v.tolist() for v in (self.columns, self.base, self.values))
        return {"columns": columns, "base": base, "values": values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where another one was; the mixer has a state of its own.

        Args:
            state: Its `state_dict()`.

        Raises:
            ValueError: It measured other examples.
        """
        if state["columns"] != self.columns.tolist():
            raise ValueError(
                f"state: expected the examples {self.columns.tolist()}, got {state['columns']}; use the same predictor, "
                "count and seed"
            )
        self.base, self.values = (None if v is None else np.array(v) for v in (state["base"], state["values"]))


def _base(base: Any, total: int) -> np.ndarray:
    values = np.asarray(base, np.float64)
    if values.shape != (total,):
        raise ValueError(f"base: expected shape [N] = ({total},) like upstream, got {values.shape}")
    return values


def _padded(items: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Items as ids, mask and labels, each `[B, T]`."""
    for item in items:
        if not hasattr(item, "keys") or "input_ids" not in item:
            raise ValueError(f"upstream: expected items with input_ids, got {type(item).__name__}; tokenize them")
    rows = [torch.as_tensor(item["input_ids"]) for item in items]
    targets = [
        torch.as_tensor(item["labels"]) if "labels" in item else row for item, row in zip(items, rows, strict=True)
    ]
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    labels = pad(targets, batch_first=True, padding_value=IGNORE)
    return pad(rows, batch_first=True), mask, labels
