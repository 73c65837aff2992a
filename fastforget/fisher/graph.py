"""Whether a rule sees every way on which a gradient reaches a parameter in one call's autograd graph.

Autograd numbers its nodes as they are created, so those of one function, or of one module's forward, are a span of numbers.
Rules see spans; a node outside them whose gradient goes to a parameter is a use that no rule sees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.utils import _pytree as pytree

__all__ = ["Seen", "in_backward"]

_CAST = "ToCopyBackward0"  # autocast keeps a cast weight for its next uses


def in_backward() -> bool:
    """Whether autograd runs a backward now, in which a checkpoint computes a part of the forward again."""
    return torch._C._current_graph_task_id() != -1


class Seen:
    """What rules see of the graph of one call, from now on.

    Args:
        parameters: Tensors of the parameters, by name.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._first = _get_sequence_nr()
        self._spans: dict[str, list[tuple[int, int]]] = {}
        self._names: dict[int, tuple[str, Tensor]] = {}  # held, so that an id stays its own
        self.know(parameters)

    def know(self, parameters: Mapping[str, Tensor]) -> None:
        """Tensors that are parameters too: under FSDP2 another one takes the parameter's place while a module runs.

        Args:
            parameters: By name.
        """
        self._names |= {id(tensor): (name, tensor) for name, tensor in parameters.items()}

    @contextlib.contextmanager
    def span(self, names: Iterable[str]) -> Iterator[None]:
        """What is created inside is seen by rules of these parameters."""
        first = _get_sequence_nr()
        yield
        for name in names:
            self._spans.setdefault(name, []).append((first, _get_sequence_nr()))

    def refuse_others(self, outputs: Any) -> None:
        """Walk the graph of a call's outputs.

        Args:
            outputs: Of the call; any structure of tensors.

        Raises:
            ValueError: A gradient reaches a parameter where no rule sees it.
        """
        tensors = (leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor))
        met = {tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None}
        waiting: list[Any] = list(met)
        while waiting:
            node = waiting.pop()
            number = node._sequence_nr()
            for following, _ in node.next_functions:
                if following is None:
                    continue
                name = self._name(following)
                if name is not None and not any(first <= number < end for first, end in self._spans.get(name, ())):
                    raise ValueError(
                        f"model: {name} was used where no rule sees it (autograd's {node.name()}), unlike when its rule was "
                        "chosen; a model whose uses of a parameter change from batch to batch is not supported: call "
                        "model.eval() if training is what changes them, compute the loss from the logits if that is where, or "
                        "exclude it by parameters="
                    )
                if following not in met and following._sequence_nr() >= self._first:  # older ones are another call's
                    met.add(following)
                    waiting.append(following)

    def _name(self, node: Any) -> str | None:
        """Of the parameter that a node stands for: its leaf, or a cast of it."""
        while type(node).__name__ == _CAST:
            node = node.next_functions[0][0]
        leaf = getattr(node, "variable", None) if type(node).__name__ == "AccumulateGrad" else None
        return self._names[id(leaf)][0] if id(leaf) in self._names else None
