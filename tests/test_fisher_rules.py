"""Parameters that are used in unusual ways: exact, or refused by name."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.layouts import layouts, packed, padded, some_examples
from fisher_oracle import assert_exact, batch_1_fisher, float64_throughout
from torch import Tensor, nn
from torch.nn import functional as F

import fastforget as ff

IGNORE = -100
H = 32


@pytest.fixture(autouse=True)
def only_float64() -> Iterator[None]:
    with float64_throughout():
        yield


@pytest.fixture(scope="module")
def examples() -> list[Tensor]:
    return some_examples(lengths=(15, 12, 2, 9))


def randn(*shape: int) -> nn.Parameter:
    generator = torch.Generator().manual_seed(sum(shape))
    return nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64) * 0.3)


def llama_with(module: nn.Module, **changes: Any) -> Any:
    """A tiny Llama whose last hidden states go through the module."""
    model = build("Llama", torch.float64, **changes)
    model.model.norm = nn.Sequential(model.model.norm, module.double())
    return model.eval()


@contextlib.contextmanager
def slow_rules(named: str | None) -> Iterator[None]:
    """A warning that names this module, and none where it is None."""
    if named is None:
        yield
        return
    with pytest.warns(UserWarning, match=rf"exact, but slow, example by example: .*{named}.*ff.fisher_rule"):
        yield


def check_exact(model: Any, examples: list[Tensor], slow: str | None = None, **options: Any) -> None:
    """Both ways in, and the layouts."""
    expected = batch_1_fisher(model, examples)
    for batch in layouts(examples).values():
        fisher = ff.DiagonalFisher(model, **options)
        with slow_rules(slow):
            fisher.update(**batch)
        found = fisher.diagonal()
        assert_exact(found, {name: expected[name] for name in found} if options else expected, torch.float64)
    batch = padded(examples, "right")
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)
    model.zero_grad()
    model(**batch).loss.backward()
    alone = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    fisher = ff.DiagonalFisher(model, **options)
    with slow_rules(slow), fisher.observe():
        model(**batch).loss.backward()
    assert_exact(fisher.diagonal(), found, torch.float64)
    assert all(torch.equal(p.grad, alone[name]) for name, p in model.named_parameters() if name in alone)
    assert alone.keys() == {name for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()


# Modules --------------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """A module that is called twice in one forward."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.inner(x).tanh())


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = randn(H)

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + self.weight)


class Convolution(nn.Module):
    """A causal convolution over tokens."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(H, H, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(F.pad(x, (0, 0, 2, 0)).transpose(1, 2)).transpose(1, 2)


class WeightOfAnother(nn.Module):
    """A weight that is used outside its module, once more than in it."""

    def __init__(self) -> None:
        super().__init__()
        self.child, self.other = nn.Linear(H, H), nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.child(x) + F.linear(self.other(x).tanh(), self.child.weight.T)


class InPlace(nn.Module):
    """Changes a linear map's output in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y += x
        y[:, 1:].mul_(0.5)
        return y.relu_()


class Functions(nn.Module):
    """Parameters in functions that have rules, in every order of arguments and with casts and transposes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.scale, self.shift = randn(H, 8), randn(H, 8), randn(H), randn(H)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(torch.matmul(x, self.a), self.b.T) + x @ self.a @ self.b.mT
        return self.shift + self.scale.to(x.dtype) * y + x * (self.scale + 1) + self.shift


class Gathered(nn.Module):
    """Parameters in functions without a rule: lists, einsum, a scalar, an index, a product of two."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.table, self.scalar = randn(H, 16), randn(H, 16), randn(5, H), randn()

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.left, self.right], 1)
        mixed = torch.einsum("bth,ho->bto", x, both @ both.T)
        return x + self.scalar * mixed + self.table[torch.arange(x.shape[1]) % 5]


class Normalised(nn.Module):
    """A weight that is computed from others by `torch.nn.utils.parametrizations`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.parametrizations.weight_norm(nn.Linear(H, H))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


MODULES: dict[str, tuple[Callable[[], nn.Module], str | None]] = {
    "linear, twice": (lambda: Twice(nn.Linear(H, H)), None),
    "norm, twice": (lambda: Twice(nn.LayerNorm(H)), None),
    "own scale, twice": (lambda: Twice(Scale()), None),
    "convolution": (Convolution, r"Conv1d"),
    "depthwise convolution, twice": (lambda: Twice(Convolution(H)), r"Conv1d"),
    "weight of another": (WeightOfAnother, r"WeightOfAnother"),
    "in place": (InPlace, None),
    "functions": (Functions, None),
    "functions without a rule": (Gathered, r"Gathered"),
    "parametrization": (Normalised, r"ParametrizedLinear|Normalised"),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules(name: str, examples: list[Tensor]):
    module, slow = MODULES[name]
    torch.manual_seed(1)
    check_exact(llama_with(module()), examples, slow)


@pytest.mark.parametrize("name", ["linear, twice", "norm, twice", "own scale, twice", "functions"])
def test_modules_observed_on_packed_rows(name: str, examples: list[Tensor]):
    """Several examples share a row, so that rows do not tell them apart."""
    torch.manual_seed(1)
    model, batch = llama_with(MODULES[name][0]()), packed(examples)
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        labels = batch["input_ids"].masked_fill(batch["position_ids"] == 0, IGNORE)
        model(**batch, labels=labels, use_cache=False).loss.backward()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, examples), torch.float64)


def test_a_layer_that_the_model_shares(examples: list[Tensor]):
    model = build("Llama", torch.float64).eval()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].input_layernorm.weight = model.model.layers[0].input_layernorm.weight
    expected = batch_1_fisher(model, examples)
    fisher = ff.DiagonalFisher(model)
    fisher.update(**padded(examples, "left"))
    assert_exact(fisher.diagonal(), expected, torch.float64)
    alias = "model.layers.1.input_layernorm.weight"
    assert fisher.metadata["aliases"][alias] == "model.layers.0.input_layernorm.weight"


def test_a_scaled_embedding_with_a_padding_token(examples: list[Tensor]):
    """Tied, scaled, and with the padding token inside the examples."""
    model = build("Gemma 3", torch.float64).eval()
    padding = int(model.config.pad_token_id)
    examples = [torch.cat([e[:1], torch.tensor([padding]), e[1:], e[:1], torch.tensor([padding])]) for e in examples]
    assert model.model.embed_tokens.padding_idx == padding
    check_exact(model, examples)


FROZEN = [
    "lm_head.weight",
    "model.embed_tokens.weight",
    "model.norm.weight",
    "model.layers.0.input_layernorm.weight",
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.0.self_attn.k_proj.weight",
    "model.layers.1.self_attn.q_norm.weight",
]


@pytest.mark.parametrize("chosen", ["frozen", "pattern"])
@pytest.mark.parametrize("name", FROZEN)
def test_one_tensor_alone(name: str, chosen: str, examples: list[Tensor]):
    model = build("Qwen3", torch.float64).eval()
    if chosen == "frozen":
        for other, parameter in model.named_parameters():
            parameter.requires_grad_(other == name)
        assert list(ff.DiagonalFisher(model)._sums.tensors) == [name]
    check_exact(model, examples, parameters=name)


def test_rules_are_chosen_whatever_the_first_tokens(examples: list[Tensor]):
    """Behind a short example there is padding, which is one token again and again: no query or key has a gradient."""
    model = build("Qwen3", torch.float64).eval()
    check_exact(model, [examples[2], *examples], parameters=["*.q_proj.*", "*.k_norm.*"])


def test_parameters_by_patterns_and_by_function(examples: list[Tensor]):
    model = build("Llama, tied", torch.float64).eval()
    found = []
    for wanted in (None, ["*.mlp.*", "model.embed*"], lambda name: ".mlp." in name or "embed" in name):
        fisher = ff.DiagonalFisher(model, parameters=wanted)
        fisher.update(**padded(examples, "right"))
        found.append(fisher.diagonal())
    expected = {name: value for name, value in found[0].items() if ".mlp." in name or "embed" in name}
    assert len(expected) == 7
    for one in found[1:]:
        assert one.keys() == expected.keys()
        assert all(torch.equal(value, expected[name]) for name, value in one.items())


class Quantised(nn.Module):
    """A frozen int8 weight under a trained scale."""

    def __init__(self) -> None:
        super().__init__()
        integers = torch.randint(-9, 9, (H, H), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
        self.weight = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("zero", torch.ones(H, dtype=torch.int8))
        self.scale = randn(H)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(x, (self.weight - self.zero).to(x.dtype) / 20) * self.scale


def test_a_quantised_weight_is_left_out(examples: list[Tensor]):
    model = llama_with(nn.Identity())
    model.model.norm[1] = Quantised()
    check_exact(model, examples)
    assert "model.norm.1.weight" not in ff.DiagonalFisher(model)._sums.tensors


# Refused --------------------------------------------------------------------------------------------------------------


class Mixing(nn.Module):
    """What it does to an example depends on the others of the batch."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight = kind, randn(H)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "mean":
            return (x - 0.5 * x.mean(0, keepdim=True)) * self.weight
        return x * self.weight + 0.3 * x.roll(1, 0)


@pytest.mark.parametrize("kind", ["mean", "roll"])
def test_a_module_that_mixes_examples_is_refused(kind: str, examples: list[Tensor]):
    model = llama_with(Mixing(kind))
    fisher = ff.DiagonalFisher(model)
    for _ in range(2):  # nor the second time
        with pytest.raises(ValueError, match=r"model: .*mix"), ignore_slow_rules():
            fisher.update(**padded(examples, "right"))
    assert not any(bool(value.any()) for value in fisher.state_dict().values())


@contextlib.contextmanager
def ignore_slow_rules() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*exact, but slow", category=UserWarning)
        yield


class ChangingList(nn.Module):
    """The same, inside its own forward and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = randn(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight
        return y if x.shape[1] <= 10 else y + x @ torch.stack([self.weight.to(x.dtype)]).sum(0)


class Changing(nn.Module):
    """Its path through the code is another for wide batches."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.linear = way, nn.Linear(H, H)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if x.shape[1] <= 10:  # rules are chosen on fewer
            return y
        if self.way == "more":
            return self.linear(y)
        if self.way == "less":
            return x
        return y + F.linear(x, self.linear.weight)  # outside its module


@pytest.mark.parametrize(
    ("change", "way"),
    list(itertools.product(["more", "less", "outside", "list"], ["update", "observe"])),
)
def test_a_path_that_changes_from_batch_to_batch(change: str, way: str, examples: list[Tensor]):
    """Refused where it cannot be exact: rules were chosen on few tokens."""
    model = llama_with(ChangingList() if change == "list" else Changing(change))
    fisher = ff.DiagonalFisher(model)
    batch = padded(examples[1:2], "right")

    def run() -> None:
        if way == "update":
            fisher.update(**batch)
            return
        with fisher.observe():
            model(**batch, labels=batch["input_ids"]).loss.backward()

    if change == "less":
        run()
        assert_exact(fisher.diagonal(), batch_1_fisher(model, examples[1:2]), torch.float64)
        return
    with pytest.raises(ValueError, match=r"model: model.norm.1[.\w]* .*batch to batch is not supported"):
        run()
    if change == "list" or (way == "observe" and change == "outside"):  # found before the backward
        assert not any(bool(value.any()) for value in fisher.state_dict().values())
        return
    with pytest.raises(ValueError, match="fisher: the estimate is invalid: "):
        fisher.diagonal()


class Borrowing(nn.Module):
    """Uses parameters of the model's other modules, in wide batches or in all, with their gradient or without."""

    def __init__(self, parameter: nn.Parameter, wide: int = 10, detached: bool = False) -> None:
        super().__init__()
        self.borrowed, self.wide, self.detached = [parameter], wide, detached  # a list: not registered

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] <= self.wide:
            return x
        weight = self.borrowed[0].detach() if self.detached else self.borrowed[0]
        return x * weight if weight.ndim == 1 else x @ weight.T @ weight


def observed(model: Any, examples: list[Tensor]) -> ff.DiagonalFisher:
    """After two calls, of which the second is wide."""
    fisher = ff.DiagonalFisher(model)
    with fisher.observe():
        for example in (examples[2], examples[0]):
            model(input_ids=example[None], labels=example[None]).loss.backward()
    return fisher


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("how", ["plain", "autocast", "checkpoint", "reentrant checkpoint"])
@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.input_layernorm.weight", "lm_head.weight"]
)
def test_a_parameter_that_is_borrowed_in_some_batches(name: str, how: str, examples: list[Tensor]):
    """Beside its module's use, which a rule sees; autocast casts it once for both."""
    model = build("Llama").train()
    module = Borrowing(model.get_parameter(name))
    model.model.layers[1].mlp = nn.Sequential(model.model.layers[1].mlp, module)
    if "checkpoint" in how:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in how})
    message = rf"model: {name} was used where no rule sees it \(autograd's \w+\), .*batch to batch is not supported"
    with (
        pytest.raises(ValueError, match=message),
        torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"),
    ):
        observed(model, examples)
    module.detached = True
    observed(model, examples)


def test_a_cast_that_autocast_keeps(examples: list[Tensor]):
    """The second use of the cast shows no parameter."""
    model = build("Llama").eval()
    model.model.norm = nn.Sequential(model.model.norm, Changing("outside"))
    with (
        pytest.raises(ValueError, match=r"model: model.norm.1.linear.weight was used where no rule sees it"),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        observed(model, examples)


def test_several_devices_are_refused():
    model = build("Llama")
    model.model.layers[1].to("meta")
    with pytest.raises(
        ValueError, match=r"model: expected all parameters on one device, got cpu, meta; load it on one"
    ):
        ff.DiagonalFisher(model)
    with pytest.raises(ValueError, match=r"model: expected all parameters on one device, got meta; "):
        ff.DiagonalFisher(model.to("meta"))


def test_tensor_parallelism_is_refused():
    model = build("Llama")
    model._tp_size = 2
    with pytest.raises(ValueError, match=r"model: expected no tensor parallelism, got tp_size=2; shard it with FSDP2"):
        ff.DiagonalFisher(model)
