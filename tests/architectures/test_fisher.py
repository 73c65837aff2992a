"""The exact Fisher of every family, in every layout: the batch-size-1 loop over the unpadded examples."""

from __future__ import annotations

import pytest
import torch
from architectures.families import FAMILIES, build
from architectures.fisher_steps import (
    COVERED,
    DTYPES,
    IGNORE,
    SLOW,
    SLOW_RULE,
    same_bits,
    slow_rules_of,
    throughout,
    truth_of,
    updated,
)
from architectures.layouts import layouts, packed, padded
from fisher_oracle import assert_as_accurate, assert_exact, batch_1_fisher
from torch import Tensor, nn

import fastforget as ff

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@DTYPES
@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_equal_the_loop(family: str, dtype: torch.dtype, device: str, examples: list[Tensor]):
    if device == "cuda" and dtype == torch.float64:
        pytest.skip("the kernels have no float64")
    model = build(family, dtype).to(device)
    examples = [example.to(device) for example in examples]
    with throughout(dtype), slow_rules_of(family):
        expected, truth = batch_1_fisher(model, examples), truth_of(model, examples)
        for batch in layouts(examples).values():
            fisher = ff.DiagonalFisher(model)
            fisher.update(**batch)
            assert_exact(fisher.diagonal(), expected, dtype, truth)
            assert sorted(set(fisher.slow_modules.values())) == sorted(SLOW.get(family, ()))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any("forward" in vars(module) for module in model.modules())


@DTYPES
@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("family", COVERED)
def test_weights_prompts_and_an_example_without_targets(
    family: str, loss: str, dtype: torch.dtype, examples: list[Tensor]
):
    model = build(family, dtype)
    labels = [example.clone() for example in examples]
    labels[0][:4] = IGNORE  # a prompt
    labels[1][::3] = IGNORE  # in between
    labels[2][1:] = IGNORE  # nothing but the first token, which nothing predicts
    labels[3][-4:] = 7  # another token than the input's
    weights = [0.25, 3.0, 5.0, 0.5]
    expected = batch_1_fisher(model, examples, labels, weights, loss)
    truth = truth_of(model, examples, labels, weights, loss)
    for layout, batch in layouts(examples).items():
        placed = layouts(labels)[layout]["input_ids"]
        mask = batch.get("attention_mask")
        placed = placed if mask is None else placed.masked_fill(mask == 0, 9)  # a label at padding is no target
        fisher = ff.DiagonalFisher(model, loss=loss)
        result = fisher.update(**batch, labels=placed, weights=torch.tensor(weights))
        assert_exact(fisher.diagonal(), expected, dtype, truth)
        losses = ff.log_perplexity(model, **batch, labels=placed, reduction=loss).detach()
        losses[2] = torch.nan
        torch.testing.assert_close(result.loss, losses, equal_nan=True)
        assert fisher.metadata["examples"] == 3
        assert fisher.skipped == [2]


@pytest.mark.parametrize("family", COVERED)
def test_rows_with_several_padded_examples(family: str, examples: list[Tensor]):
    model = build(family, torch.float64)
    first, second = packed(examples[:3]), packed(examples[1:])
    width = max(batch["input_ids"].shape[1] for batch in (first, second))
    rows = {
        name: torch.cat([nn.functional.pad(b[name], (width - b[name].shape[1], 0)) for b in (first, second)])
        for name in first
    }
    mask = torch.tensor([[width - batch["input_ids"].shape[1]] for batch in (first, second)]) <= torch.arange(width)
    expected = batch_1_fisher(model, [*examples[:3], *examples[1:]])
    assert_exact(updated(model, rows | {"attention_mask": mask}), expected, torch.float64)


@pytest.mark.parametrize("family", COVERED)
def test_batches_add_up_and_the_order_of_bits_is_fixed(family: str, examples: list[Tensor]):
    model = build(family).train()
    batches = padded(examples[:2], "left"), padded(examples[2:], "right")
    got = updated(model, *batches)
    assert model.training
    assert_exact(got, batch_1_fisher(model, examples), torch.float32, truth_of(model, examples))
    assert not same_bits(updated(model, *batches), got)


@pytest.mark.parametrize("way", ["autocast", "parameters"])
@pytest.mark.parametrize("family", [*COVERED, "Llama", "Mixtral", "OPT"])
def test_bfloat16_is_as_accurate_as_the_loop(family: str, way: str, examples: list[Tensor]):
    model = build(family, torch.float32 if way == "autocast" else torch.bfloat16)
    truth = truth_of(model, examples)()
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
        loop = batch_1_fisher(model, examples)
        for batch in layouts(examples).values():
            assert_as_accurate(updated(model, batch), loop, truth, torch.bfloat16, slack=2e-2)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_models(family: str, examples: list[Tensor]):
    """Of every family, all parameters together: routers that rounding tips over make more of single tensors uncertain."""
    model = build(family, torch.bfloat16)
    truth, loop = truth_of(model, examples)(), batch_1_fisher(model, examples)
    with slow_rules_of(family):
        got = updated(model, padded(examples, "left"))
    assert got.keys() == truth.keys()
    mine, theirs = (
        torch.stack([(fisher[name].double() - value).norm() for name, value in truth.items()]).norm()
        for fisher in (got, loop)
    )
    size = torch.stack([value.norm() for value in truth.values()]).norm()
    assert mine <= 2 * theirs + 0.05 * size, f"{float(mine / size):.2g}, the loop {float(theirs / size):.2g}"


@DTYPES
def test_biases_of_queries_keys_and_values(dtype: torch.dtype, examples: list[Tensor]):
    model = build("Llama", dtype, attention_bias=True, mlp_bias=True)
    expected, truth = batch_1_fisher(model, examples), truth_of(model, examples)
    for batch in layouts(examples).values():
        assert_exact(updated(model, batch), expected, dtype, truth)


@DTYPES
@pytest.mark.parametrize("family", ["Llama, tied", "Gemma 3", "OPT", "Llama"])
def test_padding_token_inside(family: str, dtype: torch.dtype, examples: list[Tensor]):
    """`padding_idx` takes a token's gradient from the embedding, but not from a head that is tied to it."""
    model = build(family, dtype)
    examples = [example.clone() for example in examples]
    for example in examples:
        example[1::3] = model.config.pad_token_id
        example[-1] = example[0]  # and a token that comes twice
    with throughout(dtype):
        expected, truth = batch_1_fisher(model, examples), truth_of(model, examples)
        for batch in layouts(examples).values():
            assert_exact(updated(model, batch), expected, dtype, truth)


@DTYPES
def test_frozen_parameters_are_left_out(dtype: torch.dtype, examples: list[Tensor]):
    model = build("Llama, tied", dtype)
    model.model.embed_tokens.requires_grad_(False)
    model.model.layers[0].requires_grad_(False)
    expected = batch_1_fisher(model, examples)
    assert not [name for name in expected if "layers.0" in name or "embed" in name]
    assert_exact(updated(model, padded(examples, "left")), expected, dtype, truth_of(model, examples))


class Odd(nn.Module):
    """A module that no rule knows, with a parameter of no particular shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.randn(3, width, generator=torch.Generator().manual_seed(0)) * 0.3)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, hidden: Tensor) -> Tensor:
        shifted = nn.functional.pad(hidden, (0, 0, 2, 0)).unfold(1, 3, 1)  # [B, T, H, 3]: a token and the two before
        return hidden + self.scale * torch.einsum("bthk,kh->bth", shifted, self.mixing).tanh()


class Recurrence(Odd):
    """Another one, in which every token's state depends on the parameters through all before."""

    def forward(self, hidden: Tensor) -> Tensor:
        state, states = hidden.new_zeros(hidden.shape[0], hidden.shape[2]), []
        for token in hidden.unbind(1):
            state = self.scale * state.tanh() + (token * self.mixing[0]).cos() * self.mixing[1]
            states.append(state)
        return hidden + torch.stack(states, 1) * self.mixing[2].exp()


@pytest.mark.filterwarnings(f"ignore:{SLOW_RULE}:UserWarning")
@DTYPES
def test_a_module_without_a_rule(dtype: torch.dtype, examples: list[Tensor]):
    model = build("Llama")
    model.model.norm = nn.Sequential(model.model.norm, Odd(32))
    model = model.to(dtype)
    expected, truth = batch_1_fisher(model, examples), truth_of(model, examples)
    for batch in layouts(examples).values():
        assert_exact(updated(model, batch), expected, dtype, truth)


@DTYPES
def test_a_slow_rule(dtype: torch.dtype, examples: list[Tensor]):
    """A recurrence that no fast rule can tell apart; the warning names it, once."""
    model = build("Llama")
    model.model.norm = nn.Sequential(model.model.norm, Recurrence(32))
    model = model.to(dtype)
    expected, truth = batch_1_fisher(model, examples), truth_of(model, examples)
    fisher = ff.DiagonalFisher(model)
    first, *others = layouts(examples).values()
    with pytest.warns(UserWarning, match=r"slow.*model\.norm\.1 \(Recurrence\)"):
        fisher.update(**first)
    for batch in others:
        fisher.update(**batch)
    assert_exact(fisher.diagonal(), expected, dtype, truth)
