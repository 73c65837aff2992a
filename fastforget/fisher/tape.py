"""Watching a model's own forward: every use of a trainable parameter is seen, and its gradients are told apart by example.

While a tape runs, the forward of every module that owns trainable parameters is replaced by one that calls the original
and taps its outputs, so that the backward hands over their gradients together with the inputs. The forward itself is the
model's own, bit for bit. How gradients are told apart is the module's tier:

- "uses": each torch function that takes the parameter has a rule (`uses.FUNCTIONS`);
- "module": the module's class has a rule (`rules.MODULES`), such as 3-D experts or a user's;
- "broadcast": the module is computed again with one copy of the parameter an example, all at once;
- "slice": it is computed again example by example, on the example's row; "whole": on all rows, with the output gradient of
  one example at a time. Both are slow, and named in a warning.

`verify.py` chooses the first tier whose result is right. A parameter that is used outside its module goes to a parent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastforget._head import current_forward, swapped_forward
from fastforget.fisher.examples import Examples, LayoutError
from fastforget.fisher.gradients import How, Piece, PositionError, reduce_
from fastforget.fisher.graph import Seen, in_backward
from fastforget.ops._dispatch import no_autocast

if TYPE_CHECKING:
    from fastforget.fisher.reductions import Reductions

__all__ = ["TIERS", "NoRule", "Owner", "Tape", "tap"]

TIERS = ("module", "uses", "broadcast", "slice", "whole")
Pieces = Callable[[Examples, tuple[Tensor, ...], tuple[Tensor | None, ...]], Mapping[str, Piece]]
"""Examples, saved tensors and output gradients to a piece for every parameter's name."""


class NoRule(Exception):
    """A parameter meets a function that no rule covers: the module's next tier has to do."""


@dataclass
class Owner:
    """A module and the parameters that are told apart at its outputs."""

    path: str
    module: nn.Module
    parameters: dict[tuple[str, str], str]
    """(path of the module that holds it, attribute) -> name; the module's own, or also its children's."""
    holders: dict[str, nn.Module]  # by path
    tier: str = "uses"

    @property
    def slow(self) -> bool:
        """Whether it is computed again example by example."""
        return self.tier in ("slice", "whole")

    def tensors(self) -> dict[str, Tensor]:
        """The parameters as they are now, by name: under FSDP2 they are whole only inside the forward.

        Returns:
            Them.

        Raises:
            NoRule: One has gone: it is parametrised while the forward runs.
        """
        found = {
            name: self.holders[path]._parameters.get(attribute) for (path, attribute), name in self.parameters.items()
        }
        if any(parameter is None for parameter in found.values()):
            raise NoRule(self.path)
        return found  # type: ignore[return-value]

    @contextlib.contextmanager
    def replaced(self, tensors: dict[str, Tensor]) -> Iterator[None]:
        """Other tensors in place of the parameters."""
        saved = []
        for (path, attribute), name in self.parameters.items():
            holder = self.holders[path]._parameters
            saved.append((holder, attribute, holder[attribute]))
            holder[attribute] = tensors[name]  # type: ignore[assignment]
        try:
            yield
        finally:
            for holder, attribute, parameter in saved:
                holder[attribute] = parameter


@dataclass
class Tape:
    """One activation of an estimator: owners' forwards are swapped, and pieces are accumulated as they arrive."""

    owners: list[Owner]
    reductions: Reductions
    selected: frozenset[str]
    """Names whose Fisher is wanted."""
    expected: dict[str, int]
    """Pieces of every name in one backward; names with one are accumulated at once. Empty: not known yet."""
    detach: bool
    """The parameters get no gradient: `update`."""
    how: How = field(default_factory=How)
    fuse_grad: bool = False
    examples: Examples | None = None
    """Of the forward that is running; None outside an observed call."""
    seen: Seen | None = None
    """What rules see of an observed call."""
    pending: list[Examples] = field(default_factory=list)
    """Of observed calls whose backward may still come."""
    unscaled: list[Examples] = field(default_factory=list)
    """Of observed calls, as long as it is not known what the caller multiplied their loss by."""
    paused: bool = False
    """A rule is computing a module again: the swapped forwards step aside."""
    open: bool = True
    failures: dict[str, Exception] | None = None
    """While rules are chosen: owners, by path, whose rule raised."""
    received: dict[str, int] = field(default_factory=dict)
    """Pieces of every name so far."""
    bypassed: set[str] = field(default_factory=set)
    """Names that got an ordinary gradient in `update`: their rule did not see a use."""
    batches: list[Examples] = field(default_factory=list)
    """Whose backward has begun."""

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Swapped forwards inside, the original ones after."""
        with contextlib.ExitStack() as stack:
            for owner in self.owners:
                stack.enter_context(swapped_forward(owner.module, self._forward_of(owner)))
            try:
                yield
            finally:
                self.open = False

    def _forward_of(self, owner: Owner) -> Callable[..., Any]:
        from fastforget.fisher.rules import forward_by_tier

        original = current_forward(owner.module)
        wanted = not self.selected.isdisjoint(owner.parameters.values())

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.paused or not (self.detach or torch.is_grad_enabled()):
                return original(*args, **kwargs)
            if not wanted:
                with self.without_gradients(owner):
                    return original(*args, **kwargs)
            if self.examples is None:
                with self.calling(self._computed_again(owner)):
                    return forward(*args, **kwargs)
            while True:
                try:
                    with self.seeing(owner):
                        return forward_by_tier(self, owner, original, args, kwargs)
                except (NoRule, LayoutError) as error:
                    if self.failures is None:
                        raise ValueError(
                            f"model: {owner.path} cannot be told apart by example as when its rule was chosen ({error}); a "
                            "model whose code path or layout changes from batch to batch is not supported; call model.eval() "
                            "if training is what changes it"
                        ) from error
                    if owner.tier == TIERS[-1]:
                        self.failures[owner.path] = error
                        return original(*args, **kwargs)
                    owner.tier = TIERS[TIERS.index(owner.tier) + 1]
                except Exception as error:
                    if self.failures is None or owner.tier in ("module", "uses"):
                        raise
                    raise ValueError(
                        f"model: {owner.path} ({type(owner.module).__name__}) does not run with other tensors in place of "
                        f"{next(iter(owner.parameters.values()))}: {error}; exclude it by parameters="
                    ) from error

        return forward

    @contextlib.contextmanager
    def calling(self, examples: Examples) -> Iterator[Seen]:
        """A forward of these examples inside, or a part of one that is computed again."""
        before = self.examples, self.seen
        held = {n: o.holders[path]._parameters.get(a) for o in self.owners for (path, a), n in o.parameters.items()}
        seen = Seen({name: tensor for name, tensor in held.items() if tensor is not None and name in self.selected})
        self.examples, self.seen = examples, seen
        try:
            yield seen
        finally:
            self.examples, self.seen = before

    def checkpointing(self, checkpoint: Callable[..., Any]) -> Callable[..., Any]:
        """A function that checkpoints, such that what it computes again belongs to the call that it was computed in.

        Args:
            checkpoint: Takes a function and its arguments.

        Returns:
            The same.
        """

        def bound(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            examples = self.examples

            def run(*args: Any, **kwargs: Any) -> Any:
                if examples is None or not in_backward():
                    return function(*args, **kwargs)
                with self.calling(examples) as seen:
                    output = function(*args, **kwargs)
                    seen.refuse_others(output)
                    return output

            return checkpoint(run, *args, **kwargs)

        return bound

    def _computed_again(self, owner: Owner) -> Examples:
        """Of the call whose part a checkpoint of the model's own code computes again."""
        if not in_backward():
            raise ValueError(
                f"observe: {owner.path} was called with gradients, but not in a call of the model; call the model itself, or "
                "leave the `with` block, or use torch.no_grad()"
            )
        if len(self.pending) != 1:
            raise ValueError(
                f"model: a checkpoint of its own computes {owner.path} again, for one of {len(self.pending)} calls; run every "
                "call's backward before the next call, or checkpoint as transformers does"
            )
        return self.pending[0]

    @contextlib.contextmanager
    def seeing(self, owner: Owner) -> Iterator[None]:
        """A module's forward, in which its parameters may be used in any way, unless its functions are what is tapped."""
        if self.seen is None or owner.tier == "uses":
            yield
            return
        self.seen.know(owner.tensors())
        with self.seen.span(owner.parameters.values()):
            yield

    def without_gradients(self, owner: Owner) -> contextlib.AbstractContextManager[None]:
        """In `update` an owner's parameters get no gradient; in `observe` they get the caller's."""
        if not self.detach:
            return contextlib.nullcontext()
        return owner.replaced({name: parameter.detach() for name, parameter in owner.tensors().items()})

    def guarded(self, owner: Owner, rule: Callable[[], Mapping[str, Piece]]) -> Mapping[str, Piece]:
        """What a rule gives. While rules are chosen, one that fails is noted, and the module's next tier is tried."""
        if self.failures is None:
            return rule()
        try:
            return rule()
        except Exception as error:  # a module that is computed on other shapes may raise anything
            self.failures[owner.path] = error
            return {}

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Original forwards inside, for computing a module again."""
        before, self.paused = self.paused, True
        try:
            yield
        finally:
            self.paused = before

    def add(self, examples: Examples, name: str, piece: Piece) -> None:
        """Take a piece: accumulate it, or keep it until the others of its parameter are there.

        Args:
            examples: Of the forward that it comes from.
            name: The parameter.
            piece: Its gradients through one use.

        Raises:
            ValueError: The parameter is used more often than it was when the rules were chosen.
        """
        if name not in self.selected:
            return
        self.begin(examples)
        if name in examples.done:
            raise ValueError(
                f"model: {name} was used more than {self.expected[name]} times in one forward, as often as when its rule "
                "was chosen; a parameter whose uses change from batch to batch is not supported: exclude it by parameters="
            )
        pieces = examples.waiting.setdefault(name, [])
        pieces.append(piece)
        self.received[name] = self.received.get(name, 0) + 1
        if len(pieces) == self.expected.get(name):
            examples.done.add(name)
            self._accumulate(examples, name, examples.waiting.pop(name))

    def begin(self, examples: Examples) -> None:
        """Something of a batch is about to be added.

        Args:
            examples: Of the batch.

        Raises:
            ValueError: It is not known what their loss was multiplied by.
        """
        if any(examples is other for other in self.unscaled):
            raise ValueError(
                "loss_denominator: expected a number with a loss that is not the model's own, got None and a backward that "
                "does not pass through the loss of the model's output; pass observe(loss_denominator=...), what the summed "
                "loss is divided by, or loss_factor=1 for its mean over the targets of a call"
            )
        if examples not in self.batches:
            self.batches.append(examples)

    def flush(self) -> None:
        """Accumulate what waits for uses that did not come."""
        for examples in self.batches:
            while examples.waiting:
                self._accumulate(examples, *examples.waiting.popitem())
            examples.done.clear()

    def _accumulate(self, examples: Examples, name: str, pieces: Sequence[Piece]) -> None:
        with (
            torch.no_grad(),
            no_autocast(examples.owner.device),
            self.reductions.reduction(name) as into,
        ):
            try:
                reduce_(into, pieces, examples, self.how)
                examples.edges.extend(into.edges())
            except PositionError as error:
                raise ValueError(
                    f'per: "position" is not defined for {name}, whose rule sees whole examples; exclude it by parameters=, '
                    'or use per="example"'
                ) from error
            except Exception:
                if self.failures is None:
                    raise
                self.bypassed.add(name)  # a rule's result that does not fit the parameter


def tap(
    tape: Tape,
    outputs: Sequence[Tensor],
    saved: Sequence[Tensor],
    pieces: Pieces,
    owner: Owner,
    fused: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The same outputs; in the backward their gradients and the saved tensors become pieces.

    Args:
        tape: Receives the pieces.
        outputs: Floating-point tensors.
        saved: What the rule needs, by `save_for_backward`, so that checkpointing works.
        pieces: The rule.
        owner: Whose parameters must not change before the backward.
        fused: A parameter whose ordinary gradient the only piece computes on the way.

    Returns:
        The outputs; no views, so that the model may change them in place.
    """
    assert tape.examples is not None
    versions = {name: (parameter, parameter._version) for name, parameter in owner.tensors().items()}
    record = _Record(tape, tape.examples, pieces, owner, versions)
    anchor = torch.zeros((), requires_grad=True)  # the outputs get a gradient even where the parameters are detached
    return _Tap.apply(record, len(outputs), anchor, fused, *outputs, *saved)  # type: ignore[return-value]


@dataclass
class _Record:
    tape: Tape
    examples: Examples
    pieces: Pieces
    owner: Owner
    versions: dict[str, tuple[Tensor, int]]

    def receive(self, saved: tuple[Tensor, ...], grads: tuple[Tensor | None, ...]) -> Tensor | None:
        """Pass the pieces on; the ordinary gradient of a fused weight comes back."""
        if not self.tape.open:
            raise ValueError("observe: a backward ran after its `with` block had ended; call loss.backward() inside it")
        for name, (parameter, version) in self.versions.items():
            if parameter._version != version:
                raise ValueError(
                    f"model: {name} was changed between the forward and the backward; step the optimizer after the backward"
                )
        fused = None
        with torch.no_grad():
            for name, piece in self.tape.guarded(self.owner, lambda: self.pieces(self.examples, saved, grads)).items():
                self.tape.add(self.examples, name, piece)
                fused = getattr(piece, "grad_weight", fused)
        return fused


class _Tap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, record: _Record, outputs: int, anchor: Tensor, fused: Tensor | None, *tensors: Tensor) -> Any:
        ctx.record, ctx.outputs, ctx.inputs = record, outputs, len(tensors)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors[outputs:])
        # The same storage, but no view: a view from a custom function could not be changed in place by the model.
        return tuple(t.new_empty(0).set_(t) for t in tensors[:outputs])  # type: ignore[call-overload]

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Any, ...]:
        fused = ctx.record.receive(ctx.saved_tensors, grads) if any(grad is not None for grad in grads) else None
        return (None, None, None, fused, *grads, *[None] * (ctx.inputs - ctx.outputs))
