"""What the optimizers share: the steered step around the update rule of each, and everything of `torch.optim` that it meets."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from fastforget._parameters import local, named
from fastforget.fisher.names import Fisher, canonical_name
from fastforget.ops._dispatch import resolve
from fastforget.ops._examples import accumulator
from fastforget.ops._steering import Steering, Update
from fastforget.ops._tensor_lists import FLOATS, is_dense
from fastforget.optim._given import INITIAL, Given, Sources, fit, sharded_like
from fastforget.optim._lists import Bucket, Checked, makes_states_only, mean_fisher, on_device
from fastforget.optim._state import Loading, mark

if TYPE_CHECKING:
    from fastforget_kernels.tensor_lists import Table

__all__ = ["Steered"]

ADDITIONS = (
    "fisher", "fisher_decay", "anchor", "ewc_lambda", "mask", "min_fisher", "max_fisher", "soft_weight", "state_dtype",
    "stochastic_rounding", "seed", "impl",
)  # fmt: skip
DIFFERENTIABLE = "differentiable: expected False beside the options of fastforget, got True; leave it out"


class Steered(torch.optim.Optimizer):
    """The base of the optimizers; see `AdamW`."""

    STATES: ClassVar[dict[str, str]] = {}  # keys of states that have the parameter's shape, and the operation's names
    BASE: ClassVar[type[torch.optim.Optimizer]] = torch.optim.Optimizer
    SPARSE: ClassVar[bool] = False  # whether torch's own step takes sparse gradients
    _step_supports_amp_scaling = False  # GradScaler unscales before the step: what a Fisher does needs plain gradients

    def __init__(
        self, params: Any, *args: Any, fisher: Any = None, fisher_decay: float | None = None, anchor: Any = None,
        ewc_lambda: float | None = None, mask: Any = None, min_fisher: float | None = None, max_fisher: float | None = None,
        soft_weight: float | None = None, state_dtype: torch.dtype | None = None, stochastic_rounding: bool = False,
        seed: int = 0, impl: str = "auto", **options: Any,
    ):  # fmt: skip
        numbers = {"fisher_decay": fisher_decay, "ewc_lambda": ewc_lambda, "soft_weight": soft_weight}
        numbers |= {"min_fisher": min_fisher, "max_fisher": max_fisher}
        uses = {name: value for name, value in numbers.items() if value is not None}
        self._steering = dataclasses.replace(Steering(), **uses)
        self._sources = Sources.read(fisher, anchor, mask)
        self._state_dtype, self._seed, self._impl = state_dtype, seed if stochastic_rounding else None, impl
        self._check_options(uses, seed)
        self._given: list[list[Given]] = []
        self._mean: tuple[list[int], float] | None = None  # of a Fisher that stays, and the versions of its tensors
        self._known: dict[Any, Checked] = {}
        self._captured: list[Checked] = []
        if isinstance(params, nn.Module):
            params = [(name, parameter) for name, parameter in params.named_parameters() if parameter.requires_grad]
        super().__init__(params, *args, **options)
        self._step_supports_amp_scaling = False

    # Checks -----------------------------------------------------------------------------------------------------------

    @property
    def _plain(self) -> bool:
        """Whether torch's own step does the same."""
        steering, mask = self._steering, self._sources.mask
        return not steering.needs_fisher and mask is None and self._state_dtype is None and self._seed is None

    def _check_options(self, uses: Mapping[str, float], seed: int) -> None:
        steering, sources = self._steering, self._sources
        steering.check_numbers()
        if sources.fisher is not None and not uses:
            raise ValueError(
                "fisher: expected fisher_decay, ewc_lambda, min_fisher, max_fisher or soft_weight beside it, got none: it "
                "would do nothing"
            )
        if sources.anchor is not None and "ewc_lambda" not in uses:
            raise ValueError("ewc_lambda: expected the strength of the pull to the anchor, got an anchor and None")
        if steering.needs_fisher and sources.fisher is None and steering.fisher_decay is None:
            defaults = {"ewc_lambda": 0.0, "soft_weight": 0.0, "min_fisher": None, "max_fisher": None}
            needs = next(name for name, default in defaults.items() if getattr(steering, name) != default)
            raise ValueError(
                f"fisher: expected a Fisher, which {needs} needs, got None; pass fisher= (an estimator, a mapping or a "
                "file), or fisher_decay= to accumulate one"
            )
        if steering.ewc_lambda and sources.anchor is None:
            raise ValueError('anchor: expected what ewc_lambda pulls to, got None; pass anchor="initial", or a model')
        if self._state_dtype not in (None, torch.float32):
            raise ValueError(f"state_dtype: expected torch.float32 or None, got {self._state_dtype}")
        if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed: expected an integer of 64 bits, got {seed!r}")
        resolve(
            "auto" if self._impl == "triton" else self._impl, torch.device("cpu")
        )  # where Triton runs is not known yet

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters; those that the Fisher, the anchor and the mask were given for have to be named.

        Args:
            param_group: As `torch.optim` takes it.

        Raises:
            TypeError: A tensor has the wrong dtype.
            ValueError: A name is missing, or what was given does not fit; the group is not added then.
        """
        super().add_param_group(param_group)
        try:
            self._given.append(self._fit(self.param_groups[-1]))
        except BaseException:
            self.param_groups.pop()
            raise
        self._mean = None

    def _fit(self, group: dict[str, Any]) -> list[Given]:
        odd = [name for name in ADDITIONS if name in group]
        if odd:
            raise ValueError(f"params: expected {odd[0]} for the whole optimizer, got one in a group; pass {odd[0]}=")
        for name, parameter in zip(self._names(group), group["params"], strict=True):
            self._check_covered(name, parameter, group)
        parameters: dict[str, Tensor] = {str(i): parameter for i, parameter in enumerate(group["params"])}
        if self._sources.by_name:
            if group["params"] and "param_names" not in group:
                raise ValueError(
                    f"params: expected named parameters beside {self._sources.by_name[0]}, got tensors without names; pass "
                    "the model, or model.named_parameters(); in a Trainer see for_trainer"
                )
            groups = [(g["param_names"], g["params"]) for g in self.param_groups if g["params"]]
            named(itertools.chain.from_iterable(zip(*pairs, strict=True) for pairs in groups), "params")  # names differ
            parameters = named(zip(group.get("param_names", []), group["params"], strict=True), "params")
        result = fit(parameters, self._sources)
        self._sources = self._sources.without(parameters)
        if not self._steering.ewc_lambda:
            for given in result:
                given.anchor = None
        return result

    def _check_covered(self, name: str, parameter: Tensor, group: dict[str, Any]) -> None:
        if self._plain:
            return
        if group["differentiable"]:
            raise ValueError(DIFFERENTIABLE)
        if parameter.dtype not in FLOATS:
            allowed = ", ".join(str(dtype)[6:] for dtype in FLOATS)
            raise TypeError(f"{name}: expected {allowed}, got {parameter.dtype}; use torch.optim for this parameter")
        if not is_dense(local(parameter)):
            raise ValueError(
                f"{name}: expected a dense parameter, got strides {parameter.stride()} for shape "
                f"{tuple(parameter.shape)}; make it of a contiguous tensor"
            )

    @staticmethod
    def _names(group: dict[str, Any]) -> Sequence[str]:
        return group.get("param_names") or [f"params[{i}]" for i in range(len(group["params"]))]

    # The step ---------------------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Perform one step.

        Args:
            closure: Computes the loss and its gradients anew.

        Returns:
            The closure's loss, None without one.

        Raises:
            TypeError: A dtype is wrong.
            ValueError: A gradient is sparse, or tensors do not belong together. Nothing was written then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._plain and not self._covered():
            original = self.BASE.step
            if getattr(original, "hooked", False):  # hooks are called around this step
                original = original.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
            original(self)
        else:
            with torch.no_grad():
                self._steered_step()
        return loss

    def _covered(self) -> bool:
        """Whether the operations take every gradient and parameter; if not, torch's step does."""
        for group in self.param_groups:
            for parameter in group["params"]:
                grad = parameter.grad
                if grad is not None and (
                    group["differentiable"] or (self.SPARSE and grad.layout != torch.strided) or parameter.dtype not in FLOATS
                    or not is_dense(local(parameter))
                ):  # fmt: skip
                    return False
        return True

    @torch._disable_dynamo  # pyright: ignore[reportPrivateImportUsage]
    def _steered_step(self) -> None:
        buckets, begun = self._gather()
        steering, ready = self._steering, []
        if len(begun) == sum(len(bucket.params) for bucket in buckets.values()) and makes_states_only(buckets.values()):
            steering = dataclasses.replace(steering, ewc_lambda=0.0, fisher_decay=steering.fisher_decay and 1.0)
        if buckets and steering.soft_weight:
            steering = dataclasses.replace(steering, mean_fisher=self._mean_fisher())
        for key, bucket in buckets.items():
            update = bucket.update(on_device(bucket.params[0].device, steering), self.STATES)
            self._known[key] = checked = Checked.of(bucket, update, self._impl, self._known.get(key))
            ready.append((bucket, update, checked))
        for parameter, state, given in begun:  # nothing is refused any more
            self.state[parameter].update(state)
            given.drop(state.keys() & self._own)
        for bucket, update, checked in ready:
            if "step" in bucket.states:
                torch._foreach_add_(bucket.states["step"], 1)  # pyright: ignore[reportPrivateImportUsage]
            if self._seed is not None:
                update = dataclasses.replace(update, rounding_keys=bucket.rounding_keys(self._seed, checked.numbers))
            if checked.tables and update.params[0].is_cuda and torch.cuda.is_current_stream_capturing():
                self._captured.append(checked)  # every replay reads the tables again
            self._apply(bucket, update, checked.implementation, checked.tables)

    def _apply(self, bucket: Bucket, update: Update, implementation: str, tables: Sequence[Table] | None) -> None:
        """The optimizer's operation on a bucket, without checks."""
        raise NotImplementedError

    def _keys(self, group: dict[str, Any]) -> list[str]:
        """The states of a group's parameters."""
        raise NotImplementedError

    @property
    def _own(self) -> list[str]:
        """The states that torch's optimizer has not: a Fisher that changes, and an anchor that nobody else has."""
        initial = self._sources.anchor == INITIAL and bool(self._steering.ewc_lambda)
        return ["fisher"] * (self._steering.fisher_decay is not None) + ["anchor"] * initial

    def _gather(self) -> tuple[dict[Any, Bucket], list[tuple[Tensor, dict[str, Tensor], Given]]]:
        """The lists of this step, and the states that it begins."""
        buckets: dict[Any, Bucket] = {}
        begun, number = [], 0
        for g, group in enumerate(self.param_groups):
            if group["differentiable"]:
                raise ValueError(DIFFERENTIABLE)
            names, keys = self._names(group), self._keys(group)
            for i, parameter in enumerate(group["params"]):
                number += 1
                if parameter.grad is None:
                    continue
                given, state = self._given_of(g, i), self.state.get(parameter, {})
                new = {key: self._new_state(key, group, parameter, given) for key in keys if state.get(key) is None}
                if new:
                    begun.append((parameter, new, given))
                bucket = buckets.setdefault((g, parameter.device, parameter.dtype == torch.float64), Bucket(group))
                states = {key: new[key] if key in new else state[key] for key in keys}
                bucket.add(names[i], number, parameter, states, set(new), given)
        return buckets, begun

    def _given_of(self, g: int, i: int) -> Given:
        given = self._given[g][i]
        if given.fisher is not None or given.anchor is not None or given.mask is not None:
            given = self._given[g][i] = given.refitted(self.param_groups[g]["params"][i])
        return given

    def _new_state(self, key: str, group: dict[str, Any], parameter: Tensor, given: Given) -> Tensor:
        if key == "step":
            on_device = group.get("capturable", True) or group["fused"]  # SGD of torch counts no steps
            return torch.zeros((), dtype=torch.float32, device=parameter.device if on_device else "cpu")
        if key == "anchor" and given.anchor is not None:
            return sharded_like(parameter, given.anchor)
        state = torch.zeros_like(parameter, dtype=self._dtype(key, parameter), memory_format=torch.preserve_format)
        if key == "fisher" and given.fisher is not None:
            local(state).copy_(given.fisher)
        return state

    def _dtype(self, key: str, parameter: Tensor) -> torch.dtype:
        wide = key == "fisher" or self._state_dtype is not None
        return accumulator(parameter.dtype) if wide else parameter.dtype

    # The Fisher -------------------------------------------------------------------------------------------------------

    @property
    def fisher(self) -> Fisher | None:
        """The Fisher that the next step sees, by canonical name; what accumulates is not copied. None without one.

        Raises:
            ValueError: The parameters have no names.
        """
        if self._steering.fisher_decay is None and self._sources.fisher is None:
            return None
        result = Fisher()
        for group, i, parameter, value in self._fishers():
            if "param_names" not in group:
                raise ValueError("fisher: expected an optimizer of named parameters; pass it model.named_parameters()")
            if value is None:
                value = torch.zeros_like(local(parameter), dtype=accumulator(parameter.dtype), requires_grad=False)
            result[canonical_name(group["param_names"][i])] = sharded_like(parameter, value)
        return result

    def _fishers(self) -> Iterator[tuple[dict[str, Any], int, Tensor, Tensor | None]]:
        """Every parameter with its group, its place there and its local F, None where that is zero."""
        for g, group in enumerate(self.param_groups):
            for i, parameter in enumerate(group["params"]):
                value = self._given_of(g, i).fisher
                if self._steering.fisher_decay is not None:
                    state = self.state.get(parameter, {}).get("fisher")
                    value = value if state is None else local(state)
                yield group, i, parameter, value

    def _mean_fisher(self) -> Tensor | float:
        """F's mean: a number, known until somebody changes it, if F stays."""
        fishers = [(parameter, value) for _, _, parameter, value in self._fishers()]
        if self._steering.fisher_decay is not None:
            return mean_fisher(fishers)
        versions = [0 if value is None or value.is_inference() else value._version for _, value in fishers]
        if self._mean is None or self._mean[0] != versions:
            self._mean = versions, float(mean_fisher(fishers))
        return self._mean[1]

    # State ------------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The state as torch's optimizer has it; a Fisher or an anchor of its own adds an entry that torch's does not read.

        Returns:
            The state.
        """
        return super().state_dict() | mark(self._own, *self._all_parameters())

    def load_state_dict(self, state_dict: Any) -> None:
        """Load the state of this optimizer, or of torch's.

        What this optimizer keeps in float32 beside parameters of a lower dtype is loaded as it is; torch would round it. Of a
        Fisher or an anchor that is not in torch's state dict there stays what there was; a Fisher that had not begun to
        accumulate when this optimizer's state was saved begins anew.

        Args:
            state_dict: Of `state_dict()`.

        Raises:
            ValueError: A Fisher has to begin anew from `fisher=`, which has been added to since.
        """
        loading = Loading(
            self, *self._all_parameters(), self._own, [*self.STATES, *self._own], self._dtype,
            self._sources.fisher is not None,
        )  # fmt: skip
        # After all hooks that change what is loaded, and before those that see what was.
        hooks = [self.register_load_state_dict_pre_hook(loading.read)]
        hooks.append(self.register_load_state_dict_post_hook(loading.restore, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for hook in hooks:
                hook.remove()

    def _all_parameters(self) -> tuple[list[Tensor], list[Given]]:
        chain = itertools.chain.from_iterable
        return list(chain(group["params"] for group in self.param_groups)), list(chain(self._given))

    def __getstate__(self) -> dict[str, Any]:
        own = ("_steering", "_state_dtype", "_seed", "_impl", "_given", "_mean")
        kept = {name: getattr(self, name) for name in own}
        return super().__getstate__() | kept | {"_sources": self._sources.emptied()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = {}
        self.__dict__.setdefault("_captured", [])  # not there in a copy

    # transformers -----------------------------------------------------------------------------------------------------

    @classmethod
    def for_trainer(cls) -> Callable[..., Any]:
        """What transformers' `Trainer`, and TRL's, make this optimizer with, and show the model, which has the names.

        It goes in `optimizer_cls_and_kwargs=(ff.optim.AdamW.for_trainer, {"lr": 1e-5, "weight_decay": 0.1, "mask": mask})`.
        Trainer passes nothing else on: give `lr` and `weight_decay` here. As in Trainer, biases and norms do not decay.

        Returns:
            A function of the model and the optimizer's keyword arguments.
        """
        return cls._of_model

    @classmethod
    def _of_model(cls, model: nn.Module, **options: Any) -> Any:
        from transformers import Trainer

        if "lr" not in options:
            raise ValueError(
                "lr: expected a learning rate in optimizer_cls_and_kwargs, since Trainer does not pass its own on, got none"
            )
        decaying = set(Trainer.get_decay_parameter_names(None, model))  # pyright: ignore[reportArgumentType]
        pairs = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [pair for pair in pairs if pair[0] in decaying]},
            {"params": [pair for pair in pairs if pair[0] not in decaying], "weight_decay": 0.0},
        ]
        return cls([group for group in groups if group["params"]], **options)
