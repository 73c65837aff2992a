"""`log_perplexity` around a model: wrappers, adapters, modes, gradients, and what it refuses."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from kernel_registry import interpreter_problem
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, T5Config, T5ForConditionalGeneration

import fastforget as ff
from fastforget.perplexity import score_examples

sys.path.insert(0, str(Path(__file__).parent / "architectures"))
from families import VOCABULARY, build

IDS = torch.randint(3, VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 10, [1] * 6 + [0] * 4, [0] * 3 + [1] * 7])


def oracle(model: nn.Module, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK) -> torch.Tensor:
    """Log-perplexity of every unpadded example from full logits."""
    values = []
    for row, attended in zip(ids, mask.bool(), strict=True):
        example = row[attended]
        logits = model(input_ids=example[None], use_cache=False).logits[0, :-1].double()
        values.append(nn.functional.cross_entropy(logits, example[1:]))
    return torch.stack(values)


def assert_equals_oracle(model: nn.Module, tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        got = ff.log_perplexity(model, IDS, MASK)
        expected = oracle(model.eval())
    assert (got - expected).abs().max() <= tolerance


def randomise_lora(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    return model


# labels, reductions and layouts --------------------------------------------------------------------------------------


def test_labels_are_shifted_as_in_transformers():
    model = build("Llama").eval()
    labels = IDS.clone()
    labels[:, :4] = -100
    labels[0, 6] = -100
    with torch.no_grad():
        got = ff.log_perplexity(model, IDS, labels=labels)
        expected = [float(model(input_ids=IDS[b : b + 1], labels=labels[b : b + 1]).loss) for b in range(3)]
    assert got.tolist() == pytest.approx(expected, abs=1e-5)


def test_reductions_agree():
    model = build("Llama")
    with torch.no_grad():
        mean = ff.log_perplexity(model, IDS, MASK)
        total = ff.log_perplexity(model, IDS, MASK, reduction="sum")
        token = ff.log_perplexity(model, IDS, MASK, reduction="token")
        scores = score_examples(model, IDS, MASK)
    assert token.shape == IDS.shape
    assert token[2, :4].tolist() == [0, 0, 0, 0]  # padding, and the first token, which nothing predicts
    assert bool((token[2, 4:] > 0).all())
    assert torch.allclose(token.sum(1), total)
    assert torch.allclose(total / torch.tensor([9, 5, 6]), mean)
    assert scores.tokens.tolist() == [9, 5, 6]
    assert scores.nll_sum.dtype == torch.float64
    assert torch.allclose(scores.nll_sum.float(), total)


def test_token_losses_of_packed_input_stay_in_place():
    model = build("GPT-2")
    positions = torch.cat([torch.arange(4), torch.arange(6)])[None]
    with torch.no_grad():
        token = ff.log_perplexity(model, IDS[:1], position_ids=positions, reduction="token")
        halves = [ff.log_perplexity(model, half, reduction="token") for half in (IDS[:1, :4], IDS[:1, 4:])]
        per_example = ff.log_perplexity(model, IDS[:1], position_ids=positions)
    assert torch.allclose(token, torch.cat(halves, dim=1), atol=1e-5)
    assert per_example.shape == (2,)


def test_an_example_without_targets_is_nan_and_not_zero():
    model = build("Llama")
    ids = IDS.clone()
    mask = torch.ones_like(ids)
    mask[0, 1:] = 0  # one token: nothing to predict
    mask[1] = 0  # no token at all
    with torch.no_grad():
        mean = ff.log_perplexity(model, ids, mask)
        total = ff.log_perplexity(model, ids, mask, reduction="sum")
        scores = score_examples(model, ids, mask)
        one = ff.log_perplexity(model, ids[:1, :1])
    assert mean.isnan().tolist() == [True, True, False]
    assert total[:2].tolist() == [0, 0]
    assert scores.exact[:2].tolist() == [False, False]
    assert one.isnan().all()


def test_explicit_positions_of_unpacked_rows_are_used():
    model = build("GPT-2").eval()
    positions = torch.arange(10) + 7
    with torch.no_grad():
        got = ff.log_perplexity(model, IDS[:1], position_ids=positions[None])
        logits = model(input_ids=IDS[:1], position_ids=positions[None]).logits[0, :-1].double()
        default = ff.log_perplexity(model, IDS[:1])
    assert float(got) == pytest.approx(float(nn.functional.cross_entropy(logits, IDS[0, 1:])), abs=1e-5)
    assert abs(float(got - default)) > 1e-3


# modes and gradients -------------------------------------------------------------------------------------------------


def test_runs_in_eval_mode_and_restores_every_module():
    model = build("GPT-2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5).train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    with torch.no_grad():
        first, second = ff.log_perplexity(model, IDS, MASK), ff.log_perplexity(model, IDS, MASK)
    assert torch.equal(first, second)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ValueError, match="input_ids"):
        ff.log_perplexity(model, IDS + VOCABULARY)
    assert [module.training for module in model.modules()] == before
    assert "forward" not in vars(model.lm_head)


def test_gradients_equal_those_of_full_logits():
    model = build("Gemma 2").double()
    expected = torch.autograd.grad(oracle(model.eval()).sum(), list(model.parameters()))
    got = torch.autograd.grad(ff.log_perplexity(model, IDS, MASK).sum().double(), list(model.parameters()))
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-6 * b.norm() + 1e-9  # the result is float32


def test_frozen_head_gets_no_gradient():
    model = build("Llama")
    model.lm_head.weight.requires_grad_(False)
    ff.log_perplexity(model, IDS, MASK).sum().backward()
    assert model.lm_head.weight.grad is None
    assert model.model.embed_tokens.weight.grad is not None


@pytest.mark.parametrize(
    "impl",
    [
        "torch",
        pytest.param("triton", marks=pytest.mark.skipif(bool(interpreter_problem()), reason=interpreter_problem())),
    ],
)
def test_both_implementations(impl: str):
    model = build("Gemma 2")
    with torch.no_grad():
        got = ff.log_perplexity(model, IDS, MASK, impl=impl)
        assert (got - oracle(model.eval())).abs().max() <= 1e-5


def test_autocast():
    model = build("Llama")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = ff.log_perplexity(model, IDS, MASK)
        eager = oracle(model.eval())
    with torch.no_grad():
        exact = oracle(model)
    assert (got - exact).abs().max() <= (eager - exact).abs().max() + 2e-2


def test_compiled_model():
    model = build("Llama")
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager")
    with torch.no_grad():
        got = ff.log_perplexity(compiled, IDS, MASK)
    assert (got - oracle(model.eval())).abs().max() <= 1e-5


# adapters ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["Llama", "Gemma 2"])
def test_lora_on_the_head_on_a_gpu(family: str):
    model = randomise_lora(get_peft_model(build(family), LoraConfig(r=4, target_modules=["q_proj", "lm_head"])))
    with torch.no_grad():
        expected = oracle(model.eval())
        got = ff.log_perplexity(model.cuda(), IDS.cuda(), MASK.cuda())
    assert (got.cpu() - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "lm_head"], "all-linear"])
def test_lora(targets: list[str] | str):
    model = randomise_lora(get_peft_model(build("Llama"), LoraConfig(r=4, target_modules=targets)))
    assert_equals_oracle(model)
    with model.disable_adapter():
        assert_equals_oracle(model)
    assert_equals_oracle(model)
    model.merge_adapter()
    assert_equals_oracle(model)


def test_lora_on_the_head_gets_gradients():
    model = randomise_lora(get_peft_model(build("Llama"), LoraConfig(r=4, target_modules=["lm_head"])))
    adapter = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
    expected = torch.autograd.grad(oracle(model.eval()).sum(), adapter)
    got = torch.autograd.grad(ff.log_perplexity(model, IDS, MASK).sum(), adapter)
    for a, b in zip(got, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm()


def test_switching_adapters_on_the_head_is_seen():
    model = get_peft_model(build("Llama"), LoraConfig(r=4, target_modules=["lm_head"]), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lm_head"]))
    randomise_lora(model)
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        assert_equals_oracle(model)


def test_trained_copy_of_the_head():
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = randomise_lora(get_peft_model(build("Llama"), config))
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(1.5)
    assert_equals_oracle(model)
    with model.disable_adapter():
        assert_equals_oracle(model)


def test_adapters_that_are_no_plain_lora_on_the_head_are_refused():
    model = get_peft_model(build("Llama"), LoraConfig(r=4, target_modules=["lm_head"], use_dora=True))
    with pytest.raises(ValueError, match="no plain LoRA"):
        ff.log_perplexity(model, IDS)


# what cannot be done right is refused by name ------------------------------------------------------------------------


def test_prompt_tuning_is_refused():
    model = get_peft_model(build("Llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(ValueError, match="virtual tokens"):
        ff.log_perplexity(model, IDS)


def test_encoder_decoder_is_refused():
    config = T5Config(vocab_size=VOCABULARY, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder T5ForConditionalGeneration"):
        ff.log_perplexity(T5ForConditionalGeneration(config), IDS)


def test_a_model_without_a_head_is_refused():
    with pytest.raises(ValueError, match="LlamaModel"):
        ff.log_perplexity(build("Llama").model, IDS)
    with pytest.raises(ValueError, match="Linear"):
        ff.log_perplexity(nn.Linear(3, 3), IDS)


def test_attention_in_both_directions_is_refused():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)  # as initialised: so weak a leak of later tokens hides within the loss's rounding
    config = AutoConfig.for_model("bert", vocab_size=VOCABULARY, **sizes)
    with pytest.raises(ValueError, match="BertForMaskedLM, which sees later tokens"):
        ff.log_perplexity(AutoModelForMaskedLM.from_config(config), IDS)
    with pytest.raises(ValueError, match="BertLMHeadModel is not causal"):
        ff.log_perplexity(AutoModelForCausalLM.from_config(config), IDS)


def test_more_tokens_than_positions_are_refused():
    with pytest.raises(ValueError, match=r"input_ids: expected at most the model's 64 tokens an example, got 70"):
        ff.log_perplexity(build("GPT-2"), IDS[:1].repeat(1, 7))


def test_logits_changed_in_an_unknown_way_are_refused():
    model = build("Llama")
    model.lm_head.register_forward_hook(lambda module, args, output: output.abs())
    with pytest.raises(ValueError, match="only a scale and a softcap"):
        ff.log_perplexity(model, IDS)


def test_a_head_that_is_not_linear_is_refused():
    class Odd(nn.Linear):
        def forward(self, input):
            return super().forward(input.roll(1, -1))

    model = build("Llama")
    odd = Odd(32, VOCABULARY, bias=False)
    odd.weight = model.lm_head.weight
    model.lm_head = odd
    with pytest.raises(ValueError, match="own logits give another loss"):
        ff.log_perplexity(model, IDS)


def test_a_quantised_head_is_refused():
    model = build("Llama")
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False)
    model.lm_head.weight = nn.Parameter(torch.zeros(VOCABULARY, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="floating point"):
        ff.log_perplexity(model, IDS)


def test_logits_that_are_read_by_index_are_refused():
    for column in (50, slice(50, 51)):
        model = build("Llama")
        model.lm_head.register_forward_hook(
            lambda module, args, output, c=column: output.sub(output[..., c].view(1, -1, 1))
        )
        with pytest.raises(ValueError, match="reads particular logits"):
            ff.log_perplexity(model, IDS)


def test_a_scale_changed_later_is_seen():
    model = build("Granite")
    assert_equals_oracle(model)
    model.config.logits_scaling = 2
    assert_equals_oracle(model)


def test_a_diverged_model_gives_nan_and_is_checked_when_it_is_finite_again():
    model = build("Llama")
    norm = model.model.norm.weight.detach().clone()
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
        assert ff.log_perplexity(model, IDS, MASK).isnan().all()
        model.model.norm.weight.copy_(norm)
    assert_equals_oracle(model)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"input_ids": IDS[0]}, ValueError, r"input_ids: expected shape \[B, T\] .* got \(10,\); add \[None\]"),
        ({"input_ids": IDS[:0]}, ValueError, r"input_ids: expected shape .* got \(0, 10\)"),
        ({"input_ids": IDS[:, :0]}, ValueError, r"input_ids: expected shape .* got \(3, 0\)"),
        ({"input_ids": IDS.tolist()}, TypeError, "input_ids: expected a tensor, got list; call torch.tensor"),
        ({"input_ids": IDS.float()}, TypeError, r"input_ids: expected int64, got float32; call .long\(\)"),
        ({"input_ids": IDS.int()}, TypeError, "input_ids: expected int64, got int32"),
        ({"input_ids": IDS + 200}, ValueError, r"input_ids: expected values in \[0, 131\), got"),
        (
            {"input_ids": IDS, "attention_mask": MASK[:, 1:]},
            ValueError,
            r"attention_mask: expected shape .* got \(3, 9\)",
        ),
        (
            {"input_ids": IDS, "attention_mask": IDS.masked_fill(MASK == 0, -100)},
            ValueError,
            r"attention_mask: expected values >= 0, got -100 at row \d, token \d; were labels passed in its place\? pass l",
        ),
        ({"input_ids": IDS, "labels": IDS[:, 1:]}, ValueError, "pass unshifted labels"),
        ({"input_ids": IDS, "labels": IDS.int()}, TypeError, "labels: expected int64, got int32"),
        ({"input_ids": IDS, "labels": IDS - 50}, ValueError, r"labels: expected values in \[0, 131\) or -100, got -"),
        ({"input_ids": IDS, "labels": IDS + 100}, ValueError, r"labels: expected values .* at row \d, token \d"),
        ({"input_ids": IDS, "position_ids": IDS[:2]}, ValueError, "position_ids: expected shape"),
        ({"input_ids": IDS, "position_ids": -IDS}, ValueError, "position_ids: expected values"),
        (
            {"input_ids": IDS, "reduction": "max"},
            ValueError,
            'reduction: expected "mean", "sum" or "token", got \'max\'',
        ),
        ({"input_ids": IDS, "impl": "cuda"}, ValueError, "impl: expected"),
        ({"input_ids": IDS, "labels": IDS.to("meta")}, ValueError, "labels: expected device cpu"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str):
    with pytest.raises(error, match=message):
        ff.log_perplexity(build("Llama"), **arguments)


def test_positions_that_a_model_does_not_take_are_refused():
    with pytest.raises(ValueError, match="position_ids: BloomForCausalLM takes none"):
        ff.log_perplexity(build("BLOOM"), IDS, position_ids=(torch.arange(10) + 3).expand(3, -1))


def test_loads_back_from_disk(tmp_path: Path):
    model = build("Granite")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(ff.log_perplexity(model, IDS, MASK), ff.log_perplexity(loaded, IDS, MASK))
