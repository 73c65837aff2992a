"""Differences of models and adapters, and adding them: against the models that transformers and PEFT make of the same files."""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
import warnings

import pytest
import torch
from architectures.families import build
from tiny_models import save_adapter, save_base, save_tuned, tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.update import checkpoints


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A base, a tuned checkpoint and adapters; read only."""
    folder = tmp_path_factory.mktemp("world")
    base = save_base(folder / "base")
    save_tuned(base, folder / "tuned", max_shard_size="50KB")
    save_adapter(base, folder / "lora", lora_alpha=3, use_rslora=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT says that it saves the embedding, too
        save_adapter(
            base, folder / "head", target_modules=["embed_tokens", "down_proj"], modules_to_save=["lm_head", "norm"]
        )
    save_adapter(base, folder / "dora", use_dora=True)
    return folder


def load(folder, **settings):
    return AutoModelForCausalLM.from_pretrained(folder, **settings)


def merged(base, adapter):
    from peft import PeftModel

    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def assert_close(model, expected, *, rtol=1e-6, atol=1e-6):
    for name, parameter in expected.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name).detach(), parameter.detach(), rtol=rtol, atol=atol, msg=name
        )


def test_checkpoints_modules_and_mappings_give_the_same_delta(world):
    base, tuned = load(world / "base"), load(world / "tuned")
    expected = {name: p.detach() - base.get_parameter(name).detach() for name, p in tuned.named_parameters()}
    for first in (world / "tuned", tuned, tuned.state_dict()):
        for second in (world / "base", base, dict(base.named_parameters()), world / "base" / "model.safetensors"):
            delta = ff.parameter_delta(first, second)
            assert delta.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in delta.items())
            assert not any(value.requires_grad for value in delta.values())


@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_adds_as_float64_does(world, scale, tmp_path):
    delta = ff.parameter_delta(world / "tuned", world / "base")
    base = load(world / "base")
    expected = {name: p.detach().double() + scale * delta[name].double() for name, p in base.named_parameters()}
    ff.save_delta(delta, tmp_path / "delta.safetensors", {"from": "tuned"})
    for given in (delta, tmp_path / "delta.safetensors"):
        model = load(world / "base")
        ff.add_delta_(model, given, scale)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=1e-6, atol=1e-7)
    loaded = ff.load_delta(tmp_path / "delta.safetensors")
    assert list(loaded) == list(delta)
    assert loaded.metadata == {"from": "tuned"}


def test_16_bit_parameters_are_added_to_in_float32_and_rounded_once():
    model = nn.Linear(200, 50).bfloat16()
    before = model.weight.detach().clone()
    delta = {"weight": torch.randn(50, 200) * 1e-2}
    ff.add_delta_(model, delta, 0.3)
    exact = (before.double() + 0.3 * delta["weight"].double()).bfloat16()
    assert (model.weight != exact).sum() <= 2  # where float32 lies on the other side of a tie
    twice = before + (0.3 * delta["weight"]).bfloat16()
    assert (twice != exact).sum() > 100
    wide = ff.parameter_delta(model, {"weight": before, "bias": model.bias})
    assert wide["weight"].dtype == torch.float32
    assert torch.equal(wide["weight"], model.weight.float() - before.float())
    assert ff.parameter_delta({"w": torch.ones(2).double()}, {"w": torch.ones(2)})["w"].dtype == torch.float64


@pytest.mark.parametrize(("adapter", "changed"), [("lora", 4), ("head", 9)])
def test_adapters_become_what_peft_merges(world, adapter, changed):
    from peft import PeftModel

    expected = merged(load(world / "base"), world / adapter)
    inside = PeftModel.from_pretrained(load(world / "base"), str(world / adapter))
    pairs = [(tuned, base) for tuned in (world / adapter, inside) for base in (world / "base", load(world / "base"))]
    for tuned, base in pairs:
        delta = ff.parameter_delta(tuned, base)
        assert len(delta) == changed
        model = load(world / "base")
        ff.add_delta_(model, delta)
        assert_close(model, expected)


def test_the_base_inside_a_peft_model_will_do(world):
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(world / "base"), str(world / "lora"))
    expected = ff.parameter_delta(world / "lora", world / "base")
    delta = ff.parameter_delta(model, model.get_base_model())
    assert delta.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in delta.items())


@pytest.mark.parametrize(
    ("options", "merged", "changed"),
    [
        ({}, True, "model.layers.0.self_attn.q_proj"),
        ({"bias": "all"}, False, "model.layers.0.self_attn.q_proj.bias"),
        ({"modules_to_save": ["lm_head"]}, False, None),
        ({"modules_to_save": ["lm_head"]}, True, "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_base_that_peft_wrapped_counts_as_it_was(options, merged, changed):
    """What was trained beside it is found; what was changed in place is refused, as are tensors taken from it before."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model(attention_bias=True)
    untouched, tensors = copy.deepcopy(base), base.state_dict()
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1
    expected = ff.parameter_delta(model, untouched)
    if merged:
        model.merge_adapter()
    for given in (base, tensors):
        if changed is None:
            delta = ff.parameter_delta(model, given)
            assert "lm_head.weight" in delta
            assert delta.keys() == expected.keys()
            assert all(torch.equal(value, expected[name]) for name, value in delta.items())
        else:
            with pytest.raises(
                ValueError, match=f"base: expected it as it was before the adapters, got '{changed}.*; pass its"
            ):
                ff.parameter_delta(model, given)


def test_a_model_is_not_its_own_base(world):
    from peft import PeftModel

    base = load(world / "base")
    whole = PeftModel.from_pretrained(base, str(world / "lora")).merge_and_unload()
    with pytest.raises(ValueError, match="base: expected another model than tuned, got the same, changed in place"):
        ff.parameter_delta(whole, base)
    assert any(value.any() for value in ff.parameter_delta(whole, world / "base").values())


def test_several_active_and_merged_adapters(world):
    from peft import PeftModel

    model = PeftModel.from_pretrained(load(world / "base"), str(world / "lora"), adapter_name="one")
    model.load_adapter(str(world / "lora"), adapter_name="two")
    model.base_model.set_adapter(["one", "two"])
    one = ff.parameter_delta(world / "lora", world / "base")
    both = ff.parameter_delta(model, world / "base")
    assert both.keys() == one.keys()
    for name, value in both.items():
        torch.testing.assert_close(value, 2 * one[name])
    model.merge_adapter(["one"])
    for name, value in ff.parameter_delta(model, world / "base").items():
        torch.testing.assert_close(value, 2 * one[name], rtol=1e-5, atol=1e-6)
    model = PeftModel.from_pretrained(load(world / "base"), str(world / "lora"))
    with model.disable_adapter():
        assert ff.parameter_delta(model, world / "base") == {}


def test_adapters_of_experts_and_of_conv1d(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    for family, config in (
        ("Mixtral", LoraConfig(r=2, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])),
        ("GPT-2", LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)),
    ):
        build(family).save_pretrained(tmp_path / family)
        model = get_peft_model(load(tmp_path / family), config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1
        model.save_pretrained(tmp_path / f"{family}-lora")
        expected = merged(load(tmp_path / family), tmp_path / f"{family}-lora")
        inside = PeftModel.from_pretrained(load(tmp_path / family), str(tmp_path / f"{family}-lora"))
        for tuned in (tmp_path / f"{family}-lora", inside):
            target = load(tmp_path / family)
            delta = ff.parameter_delta(tuned, target)
            assert delta
            ff.add_delta_(target, delta)
            assert_close(target, expected)


def test_an_adapters_folder_reads_nothing_of_the_base(world, monkeypatch):
    monkeypatch.setattr(checkpoints, "_open_checkpoint", None)
    assert len(ff.parameter_delta(world / "lora", world / "base")) == 4


def test_a_base_that_an_initialisation_changed_counts(world):
    """PiSSA subtracts from the base what it puts into the adapter: the delta is that to the original base."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(load(world / "base"), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"))
    for value in ff.parameter_delta(model, world / "base").values():
        assert value.abs().max() < 1e-5
    with pytest.raises(
        ValueError, match=r"base: expected it as it was before the adapters, got 'model.layers.0.*weight'"
    ):
        ff.parameter_delta(model, model.get_base_model())
    model.save_pretrained(world.parent / "pissa")
    with pytest.raises(ValueError, match="tuned: expected plain LoRA, got init_lora_weights='pissa'"):
        ff.parameter_delta(world.parent / "pissa", world / "base")


def edited(adapter, folder, **changes):
    shutil.copytree(adapter, folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def test_adapters_that_are_no_plain_lora_are_refused(world, tmp_path):
    from peft import IA3Config, LoraConfig, PeftModel, get_peft_model

    base = world / "base"
    ia3 = get_peft_model(load(base), IA3Config(target_modules=["q_proj"], feedforward_modules=[]))
    ia3.save_pretrained(tmp_path / "ia3")
    with pytest.warns(UserWarning, match="tie_word_embeddings=True"):
        tied = get_peft_model(tiny_model(tie_word_embeddings=True), LoraConfig(target_modules=["embed_tokens"]))
    wide = save_base(tmp_path / "wide", hidden_size=64)
    dora = PeftModel.from_pretrained(load(base), str(world / "dora"))
    for tuned, of, message in (
        (world / "dora", base, "tuned: expected a plain LoRA adapter, got use_dora=True"),
        (
            dora,
            base,
            "tuned: expected plain LoRA of dense weights, got DoraLinearVariant at model.layers.0.self_attn.q_proj",
        ),
        (tmp_path / "ia3", base, "tuned: expected a LoRA adapter, got IA3"),
        (ia3, base, r"tuned: expected plain LoRA of dense weights, got ia3.layer.Linear at model.layers.0"),
        (tied, tiny_model(tie_word_embeddings=True), "model.embed_tokens.weight, which is tied to lm_head.weight"),
        (world / "lora", wide, "tuned: cannot load the adapter"),
        (
            edited(world / "lora", tmp_path / "more", target_modules=["q_proj", "v_proj", "o_proj"]),
            base,
            "got a difference in",
        ),
        (edited(world / "lora", tmp_path / "fewer", target_modules=["q_proj"]), base, "got a difference in"),
    ):
        with (
            pytest.warns() if tuned == tmp_path / "more" else contextlib.nullcontext(),
            pytest.raises(ValueError, match=message),
        ):
            ff.parameter_delta(tuned, of)
    with pytest.raises(TypeError, match="base: expected a model or a checkpoint's folder for an adapter, got dict"):
        ff.parameter_delta(world / "lora", {})


def test_names_shapes_and_integers_have_to_fit(world):
    base = {"a": torch.ones(2), "n": torch.tensor([3])}
    for tuned, error, message in (
        ({"a": torch.ones(2)}, ValueError, "tuned: expected the base's tensors, got 'n' in base only"),
        (base | {"b": torch.ones(2)}, ValueError, "tuned: expected the base's tensors, got 'b' in tuned only"),
        (base | {"a": torch.ones(3)}, ValueError, r"tuned\['a'\]: expected shape \(2,\) as in the base, got \(3,\)"),
        (
            base | {"n": torch.tensor([4])},
            ValueError,
            r"tuned\['n'\]: expected the base's values of torch.int64, got others",
        ),
        (3, TypeError, "tuned: expected a model, a mapping from names to tensors or a checkpoint's path, got int"),
    ):
        with pytest.raises(error, match=message):
            ff.parameter_delta(tuned, base)
    assert ff.parameter_delta(base, base).keys() == {"a"}


def test_wrong_deltas_are_refused_before_anything_is_written(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    first, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
    good = {first: torch.ones_like(before[first])}
    embedding = torch.ones_like(before["model.embed_tokens.weight"])
    (tmp_path / "x.safetensors").write_bytes(b"x")
    for delta, scale, message in (
        (good | {"x": torch.ones(1)}, 1.0, "delta: expected names of the model's tensors, got 'x'"),
        (good | {norm: torch.ones(3)}, 1.0, r"delta\['model.norm.weight'\]: expected shape \(32,\) like the parameter"),
        (
            good | {norm: torch.ones(32).long()},
            1.0,
            r"delta\['model.norm.weight'\]: expected float32 or .*, got torch.int64",
        ),
        (good | {norm: torch.ones(32, device="meta")}, 1.0, r"delta\['model.norm.weight'\]: expected device cpu"),
        (
            good | {"lm_head.weight": embedding, "model.embed_tokens.weight": embedding},
            1.0,
            "expected one tensor a parameter",
        ),
        (good, float("inf"), "scale: expected a finite number, got inf"),
        (tmp_path / "gone.safetensors", 1.0, "path: expected an existing file"),
        (tmp_path / "x.safetensors", 1.0, "path: expected a safetensors file"),
        (3, 1.0, "delta: expected a mapping from names to tensors or a path, got int"),
        ({first: 3}, 1.0, "delta: expected a model or its named_parameters"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ff.add_delta_(model, delta, scale)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        ff.add_delta_(before, good)  # type: ignore[arg-type]
    first = torch.ones(3)
    expanded = nn.ParameterList([nn.Parameter(first), nn.Parameter(torch.ones(1).expand(3))])
    with pytest.raises(
        ValueError, match=r"delta\['1'\]: expected a tensor of the model whose entries have memory of their own"
    ):
        ff.add_delta_(expanded, {"0": torch.ones(3), "1": torch.ones(3)})
    assert first.tolist() == [1, 1, 1]
    counted = nn.BatchNorm1d(2)
    with pytest.raises(
        TypeError, match=r"expected a floating-point tensor of the model, of 16 bits or more, got torch.int64"
    ):
        ff.add_delta_(counted, {"num_batches_tracked": torch.tensor(1.0)})
    with pytest.raises(ValueError, match=r"path: expected a file ending in .safetensors"):
        ff.save_delta(good, tmp_path / "delta.bin")
