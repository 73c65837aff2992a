"""`DiagonalFisher`: the diagonal Fisher of a causal language model, exact per example, in ordinary training steps."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from fastforget._head import eval_mode
from fastforget.fisher.batch_mean import add_squares_, losses_and_gradient, one_step, refuse_given
from fastforget.fisher.counts import Counts
from fastforget.fisher.examples import Examples
from fastforget.fisher.gradients import How
from fastforget.fisher.observe import Observer, refuse_batch_norms
from fastforget.fisher.passes import (
    Convention,
    Losses,
    NonFiniteError,
    backward_under,
    choose_rules_on,
    example_weights,
    refuse_nonfinite_gradients,
    transform_of,
)
from fastforget.fisher.sums import Sums
from fastforget.fisher.tape import Tape
from fastforget.fisher.watched import Filter, Watched, local, uncompiled
from fastforget.perplexity import IGNORE, check_batch, pack_rows

__all__ = ["DiagonalFisher"]

_CONVENTION: dict[str, tuple[str, ...]] = {
    "per": ("example", "position", "batch_mean"),
    "labels": ("data", "sampled"),
    "loss": ("mean", "sum"),
    "samples": (),
}
"""Arguments that say which quantity is summed, with their values, whose order saved states depend on."""


class DiagonalFisher:
    r"""Diagonal Fisher information of every trainable parameter of a causal language model.

        F = sum_b w_b G_b^2 / sum_b w_b,    G_b = dL_b / dtheta

    with L_b the loss of example b alone: what a loop of batch-size-1 backwards over the unpadded examples computes, at the
    price of one ordinary step a batch. The rule of every module is checked against autograd on a few tokens at
    first use; a parameter whose gradients cannot be told apart by example is refused by name.

    Args:
        model: A transformers causal language model; PEFT, DDP, FSDP2 and `torch.compile` wrappers are fine.
        per: "example" is the Fisher above. "position" squares every position's contribution, `(d^2)^T a^2`: cheaper, and
            another quantity. "batch_mean" squares the gradient of the mean loss of a batch, once an update, as most
            EWC code does: that averaged over the processes under FSDP2 and in `observe` under DDP, whose `.grad` it is,
            but each process's own in `update` under DDP, which does not wait for the others.
        labels: "data" for the empirical Fisher, "sampled" for labels drawn from the model's own distribution.
        loss: "mean" or "sum" over an example's targets.
        samples: Draws an example, for sampled labels.
        seed: Of the draws.
        parameters: Patterns such as "*.mlp.*", or a function of the canonical name; default: every parameter that
            requires a gradient.
        offload: Keep the sums in pinned CPU memory; one parameter at a time is on the device.
        impl: Implementation of the fused operations: "auto", "triton" or "torch".

    Raises:
        ValueError: An argument is unknown, no parameter is left, or the model is no causal language model.

    References:
        Kirkpatrick et al., arXiv 1612.00796 (EWC); Kunstner et al., arXiv 1905.12558 (empirical and true Fisher).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        per: str = "example",
        labels: str = "data",
        loss: str = "mean",
        samples: int = 1,
        seed: int = 0,
        parameters: Filter = None,
        offload: bool = False,
        impl: str = "auto",
    ) -> None:
        for name, value, allowed in (
            ("per", per, _CONVENTION["per"]),
            ("labels", labels, _CONVENTION["labels"]),
            ("loss", loss, _CONVENTION["loss"]),
            ("impl", impl, ("auto", "triton", "torch")),
        ):
            if value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(map(repr, allowed))}, got {value!r}")
        if per == "batch_mean" and labels == "sampled":
            raise ValueError('labels: expected "data" with per="batch_mean", got "sampled"; use per="example"')
        if not isinstance(samples, int) or samples < 1 or (samples > 1 and labels == "data"):
            raise ValueError(f'samples: expected an integer >= 1, and 1 with labels="data", got {samples!r}')
        if not isinstance(seed, int) or not 0 <= seed < 2**31:
            raise ValueError(f"seed: expected an integer in [0, 2^31), got {seed!r}")
        self.per, self.labels, self.loss, self.samples, self.seed = per, labels, loss, samples, seed
        self._impl = impl
        self._watched = Watched(model, parameters)
        self._sums = Sums(self._watched.wanted, offload)
        self._uses: dict[str, int] | None = None  # of every parameter in one forward, once the rules are chosen
        self._counts = Counts()
        self._invalid: str | None = None

    # Ways in ----------------------------------------------------------------------------------------------------------

    def update(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        weights: Tensor | Sequence[float] | None = None,
        example_ids: Sequence[Any] | None = None,
    ) -> Losses:
        """Add a batch: one forward and one backward of its own, in eval mode. No `.grad` is written.

        Args:
            input_ids: `[B, T]` int64, like the next three as in `log_perplexity`.
            attention_mask: `[B, T]`, nonzero where a token is attended; None for everywhere.
            labels: `[B, T]` int64, unshifted, -100 for no target; default: every attended token.
            position_ids: `[B, T]`; positions that start again at 0 within a row tell packed examples apart.
            weights: `[B]` >= 0, how much each example counts; default 1.
            example_ids: B names of the examples, for error messages, and for the draws of sampled labels, which are those
                of an example's name whatever its batch; default: numbers in order.

        Returns:
            `.loss` and `.tokens`, each `[B]`.

        Raises:
            NonFiniteError: The loss of some examples is not finite: nothing was added. Or a gradient is not: then the
                estimate is invalid.
            ValueError: An argument has a wrong shape or value, or the model does something that cannot be honoured.
        """
        watched = self._watched
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "position_ids": position_ids,
        }
        check_batch(watched.model, **batch)
        rows = pack_rows(**batch)
        with self._active(), torch.enable_grad(), eval_mode(watched.inner), uncompiled(watched.model):
            transform = transform_of(watched, rows.input_ids, self._impl)
            self._choose_rules()
            given = example_weights(weights, len(rows.input_ids), self._dtype, input_ids.device)
            examples = Examples.of_rows(rows, given / self.samples, self._ids(example_ids, len(rows.input_ids)))
            if self.per == "batch_mean":
                tokens = (rows.target != IGNORE).sum(1)
                losses, gradients = losses_and_gradient(watched, batch, examples, tokens, self.loss, self._impl)
                with self._all_or_invalid(lambda: self._sums.adding):
                    add_squares_(self._sums, gradients, self._impl)
            else:
                tape = self._tape(detach=True)
                with self._all_or_invalid(lambda: bool(tape.batches)):
                    convention = Convention(self.loss, self._seeds(), self._impl)
                    losses = backward_under(watched, tape, rows, examples, transform, convention)
        self._counts.add(examples.ids, given, losses.tokens, step=self.per == "batch_mean")
        self._refuse_nonfinite([examples])
        return losses

    @contextlib.contextmanager
    def observe(
        self,
        labels: Tensor | None = None,
        *,
        loss_denominator: float | Tensor | None = None,
        weights: Tensor | Sequence[float] | None = None,
        loss_factor: float | None = None,
        fuse_grad: bool = False,
    ) -> Iterator[None]:
        """Ride on the caller's own step: `with fisher.observe(): loss = model(**batch).loss; loss.backward()`.

        The model's forward and the caller's `.grad` stay bitwise what they are. Several micro-batches may run inside. The
        loss has to be `sum over targets of the negative log-likelihood / loss_denominator`, as transformers' models
        compute it; the factor that it gives each example is undone, so the result is that of `update` in the model's own
        mode. With per="batch_mean" the block is one optimizer step: the square of its `.grad` is added.

        Args:
            labels: `[B, T]` unshifted, -100 for no target; default: the `labels` that the model is called with.
            loss_denominator: What the summed loss was divided by; default: `num_items_in_batch` if the model is called with
                it, else the number of targets of the call. Needed for a loss that is not the model's own.
            weights: `[B]` >= 0 of each call's examples; default 1.
            loss_factor: What the loss is multiplied by before the backward, besides; 1 with a denominator. What the model's
                own loss (or the sum of TRL's `log_probs`) is multiplied by is found where neither of the two is given.
            fuse_grad: Compute the weights' `.grad` in the same pass as the Fisher: cheaper, and equal up to rounding.

        Yields:
            Nothing.

        Raises:
            TypeError: labels is no tensor.
            ValueError: There are no targets an example, the loss couples examples or is not the model's own and its
                denominator is not given, no backward ran, or the labels are to be sampled.
        """
        if self.labels == "sampled":
            raise ValueError(
                'observe: expected labels="data", got "sampled", whose loss is not the caller\'s: use update()'
            )
        if self.per == "batch_mean":
            refuse_given(labels=labels, loss_denominator=loss_denominator, weights=weights, loss_factor=loss_factor)
        else:
            refuse_batch_norms(self._watched.inner)
        with self._active(), uncompiled(self._watched.model):
            if self.per == "batch_mean":
                with self._all_or_invalid(lambda: self._sums.adding):
                    yield from one_step(self._watched, self._sums, self._impl)
                self._counts.add_step()
                return
            with eval_mode(self._watched.inner), torch.enable_grad():
                self._choose_rules()
            tape = self._tape(detach=False, fuse_grad=fuse_grad)
            given = labels, loss_denominator, loss_factor, weights
            observer = Observer(self._watched, tape, *given, self.loss, self._counts.seen)
            with self._all_or_invalid(lambda: bool(tape.batches)):
                with tape.running(), observer.running():
                    yield
                batches = observer.finished()
                tape.flush()
        for batch in batches:
            self._counts.add(batch.examples.ids, batch.weights, batch.tokens, step=False)
        self._refuse_nonfinite([batch.examples for batch in batches])

    # Results ----------------------------------------------------------------------------------------------------------

    def diagonal(self) -> dict[str, Tensor]:
        """The estimate, `sum_b w_b G_b^2 / sum_b w_b`, by canonical parameter name.

        Under DDP and FSDP2 it is that of all processes' examples, and every process has to call this.

        Returns:
            float32 tensors (float64 for a float64 model), new ones; DTensors sharded like their parameters under FSDP2.

        Raises:
            ValueError: Nothing was added yet, or the estimate is invalid.
        """
        self._refuse_invalid()
        total = self._over_processes(self._counts.weight)
        if not total > 0:
            raise ValueError(
                "fisher: expected at least one example with a target and a weight > 0; call update() first"
            )
        group, result = self._watched.group(), {}
        for name, value in self._sums.tensors.items():
            parameter = self._watched.parameters[name]
            if value.device.type == "cpu" and local(parameter).is_cuda:
                torch.cuda.synchronize(local(parameter).device)  # an offloaded sum may still be on its way
            mean = value / total
            if not bool(mean.isfinite().all()):
                self._invalid = f"the sum of {name} is not finite"
                self._refuse_invalid()
            if isinstance(parameter, DTensor):
                shape, stride = parameter.shape, parameter.stride()
                placed = parameter.device_mesh, parameter.placements
                mean = DTensor.from_local(mean, *placed, run_check=False, shape=shape, stride=stride)
            elif group is not None:
                dist.all_reduce(mean, group=group)
            result[name] = mean
        return result

    @property
    def metadata(self) -> dict[str, Any]:
        """What a saved file records beside the tensors: model, convention, and what was counted."""
        from fastforget import __version__

        config = self._watched.base.config
        dtypes = sorted({str(parameter.dtype)[6:] for parameter in self._watched.wanted.values()})
        return {
            "model": str(getattr(config, "_name_or_path", "") or type(self._watched.base).__name__),
            "model_type": getattr(config, "model_type", ""),
            "per": self.per,
            "labels": self.labels,
            "loss": self.loss,
            "samples": self.samples,
            "seed": self.seed,
            "examples": int(self._over_processes(self._counts.examples)),
            "tokens": int(self._over_processes(self._counts.tokens)),
            "weight_sum": self._over_processes(self._counts.weight),
            "skipped": int(self._over_processes(len(self._counts.skipped))),
            "dtype": ", ".join(dtypes),
            "aliases": self._watched.aliases,
            "parameters": self._watched.filter,
            "fastforget": __version__,
        }

    @property
    def slow_modules(self) -> dict[str, str]:
        """Modules without a fast rule: their class by path. Known once the estimator has been used."""
        owners = self._watched.owners if self._uses else []
        return {owner.path: type(owner.module).__name__ for owner in owners if owner.slow}

    @property
    def invalid(self) -> str | None:
        """Why the estimate is invalid; None where it is not."""
        return self._invalid

    @property
    def skipped(self) -> list[Any]:
        """Ids of the examples without a target, which do not count."""
        return list(self._counts.skipped)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the estimate as safetensors with its metadata; whole or not at all.

        Under DDP and FSDP2 every process has to call this, and the first one writes.

        Args:
            path: The file, `.safetensors`.

        Raises:
            ValueError: The estimate is invalid or empty.
        """
        from fastforget.fisher.files import save_fisher

        whole = {n: v.full_tensor() if isinstance(v, DTensor) else v for n, v in self.diagonal().items()}
        metadata = self.metadata
        if self._watched.group() is None or dist.get_rank() == 0:
            save_fisher(path, whole, metadata)

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and counters of this process, to continue from bit for bit.

        Returns:
            Tensors, which later updates change.
        """
        self._refuse_invalid()
        sums = {f"sum.{name}": value for name, value in self._sums.tensors.items()}
        return sums | {"counters": self._counts.tensor(), "convention": self._convention()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from what `state_dict` gave.

        Args:
            state: Its tensors.

        Raises:
            ValueError: Names, shapes, or `per`, `labels`, `loss` or `samples` are others.
        """
        mine = self.state_dict()
        own = mine.pop("convention")
        theirs = state.get("convention", own)  # older ones have none
        state = {name: value for name, value in state.items() if name != "convention"}
        wrong = sorted(mine.keys() ^ state.keys()) or [n for n in mine if mine[n].shape != state[n].shape]
        if wrong:
            raise ValueError(
                f"state: expected the names and shapes of this model, got others for {', '.join(wrong[:3])}"
            )
        different = [n for n, a, b in zip(_CONVENTION, own.tolist(), theirs.tolist(), strict=True) if a != b]
        if different:
            raise ValueError(
                f"state: expected sums of the estimator's own convention, {self!r}, got others by {', '.join(different)}; make "
                "the estimator with the same arguments"
            )
        for name, value in self._sums.tensors.items():
            value.copy_(state[f"sum.{name}"])
        self._counts, self._invalid = Counts.of(state["counters"]), None

    def __repr__(self) -> str:
        """One line."""
        convention = f"per={self.per!r}, labels={self.labels!r}, loss={self.loss!r}"
        return f"DiagonalFisher({convention}, {len(self._sums.tensors)} tensors, {self._counts.examples:,} examples)"

    # Inside -----------------------------------------------------------------------------------------------------------

    @property
    def _dtype(self) -> torch.dtype:
        return self._sums.dtype

    def _convention(self) -> Tensor:
        """`[4]` int64: which of its values each argument has, and the number of further samples."""
        chosen = [_CONVENTION[name].index(getattr(self, name)) for name in ("per", "labels", "loss")]
        return torch.tensor([*chosen, self.samples - 1])

    def _tape(self, *, detach: bool, fuse_grad: bool = False) -> Tape:
        how = How(self.per == "position", self._impl)
        return Tape(self._watched.owners, self._sums, self._watched.selected, self._uses or {}, detach, how, fuse_grad)

    def _choose_rules(self) -> None:
        """Choose the rules, once, in eval mode."""
        if self._uses is None:
            choose = self.per != "batch_mean"
            self._uses = choose_rules_on(self._watched, self._sums, self._impl) if choose else {}

    @contextlib.contextmanager
    def _active(self) -> Iterator[None]:
        """One estimator at a time on a model."""
        self._refuse_invalid()
        with self._watched.active():
            yield

    @contextlib.contextmanager
    def _all_or_invalid(self, begun: Callable[[], bool]) -> Iterator[None]:
        """An error after something was added makes the estimate invalid."""
        try:
            yield
        except BaseException as error:
            if begun():
                self._invalid = f"a batch failed after part of it had been added ({type(error).__name__})"
            raise

    def _refuse_invalid(self) -> None:
        if self._invalid:
            raise ValueError(f"fisher: the estimate is invalid: {self._invalid}; start again with a new DiagonalFisher")

    def _refuse_nonfinite(self, batches: Sequence[Examples]) -> None:
        try:
            refuse_nonfinite_gradients(batches)
        except NonFiniteError:
            self._invalid = "gradients of some examples were not finite"
            raise

    def _seeds(self) -> tuple[int, ...] | None:
        """Of the draws of a batch's labels."""
        return tuple((self.seed << 16) + i for i in range(self.samples)) if self.labels == "sampled" else None

    def _ids(self, given: Sequence[Any] | None, count: int) -> list[Any]:
        if given is None:
            first = self._counts.seen
            rank = dist.get_rank() << 34 if self._watched.group() is not None else 0
            return [rank + first + i for i in range(count)]
        if len(given) != count:
            raise ValueError(f"example_ids: expected {count}, one an example, got {len(given)}")
        return list(given)

    def _over_processes(self, value: float) -> float:
        group = self._watched.group()
        if group is None or (self.per == "batch_mean" and self._watched.sharded):  # the steps are the same ones
            return value
        total = torch.tensor(
            [value], dtype=torch.float64, device=local(next(iter(self._watched.parameters.values()))).device
        )
        dist.all_reduce(total, group=group)
        return float(total)
