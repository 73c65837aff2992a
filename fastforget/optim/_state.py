"""What a state dict holds besides torch's, and how it comes back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastforget._parameters import local
from fastforget.optim._given import Given, sharded_like

__all__ = ["MARK", "Loading", "mark"]

MARK = "fastforget"  # entry of a state dict, which torch's optimizers do not read
OWN = ("fisher", "anchor")  # states that torch's optimizers have not


def mark(own: Sequence[str], parameters: Sequence[Tensor], given: Sequence[Given]) -> dict[str, Any]:
    """The entry by which an optimizer knows its own state.

    Args:
        own: The states that the optimizer keeps, of `OWN`.
        parameters: In order.
        given: As many.

    Returns:
        `{MARK: ...}`, with the anchors of parameters that have no state yet; nothing where `own` is empty.
    """
    if not own:
        return {}
    pairs = enumerate(zip(parameters, given, strict=True)) if "anchor" in own else ()
    anchors = {i: sharded_like(p, g.anchor) for i, (p, g) in pairs if g.anchor is not None}
    return {MARK: {"states": list(own), "anchors": anchors}}


@dataclass
class Loading:
    """One `load_state_dict`, in two hooks: before torch reads the dict, and when the states are there.

    torch gives states their parameter's dtype, and drops those that the dict lacks.

    Attributes:
        optimizer: Whose state is loaded.
        parameters: In order.
        given: As many.
        own: The states that the optimizer keeps, of `OWN`.
        kept: All states that may be wider than their parameter.
        dtype: Of a state of a parameter.
        takes_fisher: Whether a Fisher was given.
    """

    optimizer: torch.optim.Optimizer
    parameters: Sequence[Tensor]
    given: Sequence[Given]
    own: Sequence[str]
    kept: Sequence[str]
    dtype: Callable[[str, Tensor], torch.dtype]
    takes_fisher: bool
    before: list[dict[str, Any]] = field(init=False)
    loaded: list[dict[str, Any]] = field(init=False)  # of every parameter, as the dict has them
    marked: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters]
        self.before = [{key: state[key] for key in self.own if key in state} for state in states]

    def read(self, _: Any, final: dict[str, Any]) -> None:
        """Before anything is loaded.

        Args:
            final: What is going to be.

        Raises:
            ValueError: A Fisher would have to begin from one that was given, and that has been added to since.
        """
        numbers = [number for group in final["param_groups"] for number in group["params"]]
        self.loaded = [final["state"].get(number, {}) for number in numbers]
        self.marked = final.get(MARK) or {"states": [], "anchors": {}}
        if "fisher" not in self.marked["states"] or not self.takes_fisher:
            return
        for state, before, given in zip(self.loaded, self.before, self.given, strict=False):
            if "fisher" in before and "fisher" not in state and given.fisher is None:
                raise ValueError(
                    "state_dict: expected one with the Fisher of every parameter, got one from before it began to accumulate; "
                    "make the optimizer anew with fisher=, then load"
                )

    def restore(self, _: Any) -> None:
        """After torch."""
        for i, (parameter, state) in enumerate(zip(self.parameters, self.loaded, strict=True)):
            self._restore(parameter, state, self.before[i], self.given[i])
            anchor = self.marked["anchors"].get(i)
            if anchor is not None and "anchor" in self.own:
                self.given[i].anchor = torch.empty_like(local(parameter), requires_grad=False).copy_(local(anchor))
                self.optimizer.state.get(parameter, {}).pop("anchor", None)

    def _restore(self, parameter: Tensor, state: dict[str, Any], before: dict[str, Any], given: Given) -> None:
        given.drop(state.keys() & set(self.own))
        result = self.optimizer.state.get(parameter, {})
        for key in state.keys() & set(self.kept):  # in the dtype that they have, not their parameter's
            dtype = state[key].dtype if key == "anchor" else self.dtype(key, parameter)
            if dtype != parameter.dtype and state[key] is not None:  # or a buffer without a step
                result[key] = state[key].to(parameter.device, dtype)
        for key in OWN:
            begins = key == "fisher" and key in self.marked["states"]  # had not begun when the state was saved
            if key not in self.own:
                result.pop(key, None)
            elif key not in state and key in before and not begins:
                result[key] = before[key]
        if result:
            self.optimizer.state[parameter] = result
