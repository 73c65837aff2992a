"""Fishers on the disk: names, round trips, what does not fit a model, and means of several."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import save_adapter, save_base, tiny_model
from torch import nn

import fastforget as ff
from fastforget.fisher import files
from fastforget.fisher.files import check_fisher, combine_fishers, load_fisher, save_fisher
from fastforget.fisher.names import Fisher, as_fisher, canonical_name

METADATA = {
    "model": "a",
    "model_type": "llama",
    "per": "example",
    "labels": "data",
    "loss": "mean",
    "examples": 3,
    "tokens": 40,
    "weight_sum": 3.0,
    "skipped": 1,
    "aliases": {},
}


def diagonal_of(model, seed=0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()}


class Estimator:
    """What `as_fisher` sees of a DiagonalFisher."""

    def __init__(self, diagonal, metadata):
        self._diagonal, self.metadata = diagonal, metadata

    def diagonal(self):
        return self._diagonal


# Names


@pytest.mark.parametrize(
    ("name", "canonical"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("module._orig_mod.lm_head.weight", "lm_head.weight"),
        ("_orig_mod.module.lm_head.weight", "lm_head.weight"),
        ("model.layers.0._fsdp_wrapped_module._checkpoint_wrapped_module.mlp.up.bias", "model.layers.0.mlp.up.bias"),
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.lm_head.modules_to_save.default.weight", "lm_head.weight"),
        ("base_model.model.lm_head.original_module.weight", "lm_head.weight"),
        ("base_model.model.score.modules_to_save.a.base_layer.weight", "score.weight"),
        ("module.base_model.model.q_proj.lora_A.default.weight", "q_proj.lora_A.default.weight"),
        ("transformer.module.weight", "transformer.module.weight"),  # a module of the model's own
        ("base_model.weight", "base_model.weight"),
        ("module", "module"),
    ],
)
def test_canonical_names_are_those_of_the_bare_model(name, canonical):
    assert canonical_name(name) == canonical


PARTS = ["module", "_orig_mod", "base_model", "model", "base_layer", "modules_to_save", "default", "0", "weight"]


@given(st.lists(st.sampled_from(PARTS), min_size=1, max_size=9))
@settings(max_examples=300, deadline=None)
def test_canonical_names_stay_as_they_are(parts):
    once = canonical_name(".".join(parts))
    assert canonical_name(once) == once


def test_canonical_names_of_wrapped_models_are_the_bare_models(tmp_path):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    base = save_base(tmp_path / "base")
    bare = {name for name, _ in LlamaForCausalLM.from_pretrained(base).named_parameters()}
    save_adapter(base, tmp_path / "lora", modules_to_save=["lm_head"])
    wrapped = peft.PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), str(tmp_path / "lora"))
    names = {canonical_name(name) for name, _ in wrapped.named_parameters()}
    assert {name for name in names if ".lora_" not in name} == bare
    assert {canonical_name(n) for n, _ in torch.compile(wrapped, backend="eager").named_parameters()} == names


def test_a_fisher_answers_to_every_name_of_a_parameter():
    weight = torch.ones(2, 3)
    fisher = Fisher({"model.embed_tokens.weight": weight}, {"aliases": {"lm_head.weight": "model.embed_tokens.weight"}})
    for name in ("model.embed_tokens.weight", "lm_head.weight", "module._orig_mod.lm_head.weight"):
        assert fisher[name] is weight
        assert fisher.get(name) is weight
        assert name in fisher
    assert list(fisher) == ["model.embed_tokens.weight"]
    assert "other.weight" not in fisher
    assert 3 not in fisher
    assert fisher.get("other.weight", 5) == 5
    with pytest.raises(KeyError, match=r"other\.weight"):
        fisher["other.weight"]
    assert repr(Fisher({"a": weight}, METADATA)) == (
        "Fisher(1 tensors, 6 parameters, per example, labels data, loss mean, 3 examples)"
    )


def test_whatever_stands_for_a_fisher_will_do(tmp_path):
    diagonal = {"a.weight": torch.ones(2)}
    save_fisher(tmp_path / "f.safetensors", diagonal, METADATA)
    fisher = Fisher(diagonal, METADATA)
    assert as_fisher(fisher) is fisher
    for given_as in (Estimator(diagonal, METADATA), str(tmp_path / "f.safetensors"), tmp_path / "f.safetensors"):
        assert as_fisher(given_as)["a.weight"].tolist() == [1, 1]
        assert as_fisher(given_as).metadata == METADATA
    assert list(as_fisher({"module.a.base_layer.weight": torch.ones(1)})) == ["a.weight"]
    with pytest.raises(ValueError, match=r"expected one tensor a parameter, got a second for 'a' in 'module\.a'"):
        as_fisher({"a": torch.ones(1), "module.a": torch.ones(1)})
    for wrong in (3, torch.ones(2), {"a": 3}, {1: torch.ones(1)}):
        with pytest.raises(TypeError, match="fisher: expected a DiagonalFisher, a mapping from parameter names"):
            as_fisher(wrong)


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("up_proj", "'*up_proj*'"),
        ("layers.0", "'*layers.0*'"),
        ("*.model.embed_tokens.weight", "'model.embed_tokens.weight' or "),
        ("model.layers.*.upproj.weight", "'model.layers.*.mlp.up_proj.weight' or "),
    ],
)
def test_a_pattern_that_matches_nothing_is_named_with_one_that_matches(pattern, meant):
    with pytest.raises(ValueError, match="parameters: expected patterns that match trainable parameters") as refused:
        ff.DiagonalFisher(tiny_model(), parameters=["*.mlp.*", pattern])
    assert f"got none: {pattern!r} matches none of 21 names such as 'model.embed" in str(refused.value)
    assert f"; did you mean {meant}" in str(refused.value)
    named = re.findall("'([^']*)'", str(refused.value).partition("did you mean")[2])
    assert all(ff.DiagonalFisher(tiny_model(), parameters=suggested).state_dict() for suggested in named)


@pytest.mark.parametrize("chosen", ["*.mlp.*", ["*.mlp.*"], lambda name: ".mlp." in name])
def test_the_fisher_of_chosen_parameters_fits_the_whole_model(tmp_path, chosen):
    model = tiny_model()
    for parameters, name in ((chosen, "some"), (None, "all")):
        estimator = ff.DiagonalFisher(model, parameters=parameters)
        estimator.update(torch.randint(3, 50, (2, 6)))
        estimator.save(tmp_path / f"{name}.safetensors")
    assert all(".mlp." in name for name in ff.load_fisher(tmp_path / "some.safetensors", model))
    tensors, metadata = files.read_tensors(tmp_path / "all.safetensors", kind=files.KIND)
    save_fisher(tmp_path / "less.safetensors", {n: t for n, t in tensors.items() if ".mlp." in n}, metadata)
    with pytest.raises(ValueError, match="missing"):
        ff.load_fisher(tmp_path / "less.safetensors", model)


def test_a_tied_parameter_is_chosen_by_either_name():
    tied = tiny_model(tie_word_embeddings=True)
    estimator = ff.DiagonalFisher(tied, parameters=["lm_head.*", "model.norm.*"])
    names = {name for name in estimator.state_dict() if name.startswith("sum.")}
    assert names == {"sum.model.embed_tokens.weight", "sum.model.norm.weight"}


# Files


def test_a_saved_fisher_comes_back_with_its_metadata(tmp_path):
    wide = torch.arange(12.0).view(3, 4)
    diagonal = {
        "a": wide,
        "transposed": wide.t(),
        "row": wide[1],
        "again": wide,
        "empty": torch.zeros(0, 3),
        "double": torch.rand(2, dtype=torch.float64).requires_grad_(),
        "scalar": torch.tensor(2.0),
    }
    path = tmp_path / "new" / "folder" / "f.safetensors"
    save_fisher(path, diagonal, METADATA | {"model": "Bär\n"})
    fisher = load_fisher(path)
    assert fisher.keys() == diagonal.keys()
    for name, tensor in diagonal.items():
        assert torch.equal(fisher[name], tensor)
        assert fisher[name].dtype == tensor.dtype
    assert fisher.metadata == METADATA | {"model": "Bär\n"}
    assert os.listdir(path.parent) == ["f.safetensors"]


def test_the_same_fisher_gives_the_same_bytes(tmp_path):
    diagonal = diagonal_of(tiny_model())
    metadata = METADATA | {f"key {i}": i for i in range(20)}
    backwards = dict(reversed(metadata.items()))
    save_fisher(tmp_path / "a.safetensors", diagonal, metadata)
    save_fisher(tmp_path / "b.safetensors", diagonal, backwards)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_the_order_of_the_tensors_comes_back(tmp_path):
    from safetensors.torch import load_file, save_file

    path = tmp_path / "f.safetensors"
    wide = {"last": torch.ones(2), "first": torch.ones(1).double(), "more": torch.ones(3)}
    save_fisher(path, wide, METADATA)
    assert list(load_fisher(path)) == list(as_fisher(path)) == list(wide)
    record = json.dumps({"kind": files.KIND, "format": files.FORMAT_VERSION, "metadata": METADATA})
    save_file(load_file(path), path, metadata={"fastforget": record})  # as older versions wrote it
    assert load_fisher(path).keys() == wide.keys()


def test_files_have_the_mode_that_open_gives(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o027, 0o640)):
        before = os.umask(mask)
        try:
            save_fisher(tmp_path / "f.safetensors", {"a": torch.ones(2)}, METADATA)
        finally:
            os.umask(before)
        assert (tmp_path / "f.safetensors").stat().st_mode & 0o777 == mode


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f.safetensors"
    save_fisher(path, {"a": torch.ones(2)}, METADATA)
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match=r"cannot write .*f\.safetensors: No space left on device; free some space"):
        save_fisher(path, {"a": torch.zeros(2)}, METADATA)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["f.safetensors"]


def test_what_cannot_be_saved_is_refused(tmp_path):
    good = {"a": torch.ones(2)}
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.safetensors").mkdir()
    for name, message in (
        ("f.pt", r"path: expected a file ending in \.safetensors, got .*f\.pt; rename it"),
        ("folder.safetensors", "path: expected a file, got the folder"),
        ("file/f.safetensors", "path: expected a folder that can be written to, got .*file"),
    ):
        with pytest.raises(ValueError, match=message):
            save_fisher(tmp_path / name, good, METADATA)
    path = tmp_path / "f.safetensors"
    for value in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ValueError, match="diagonal: expected finite values, got NaN or infinity in b"):
            save_fisher(path, good | {"b": torch.tensor([1.0, value])}, METADATA)
    with pytest.raises(TypeError, match="diagonal: expected tensors, got int for 'b'"):
        save_fisher(path, good | {"b": 3}, METADATA)
    with pytest.raises(TypeError, match=r"metadata: expected what JSON can hold: .*set"):
        save_fisher(path, good, {"a": {1}})
    assert not path.exists()


def test_what_is_no_fisher_is_refused(tmp_path, monkeypatch):
    from safetensors.torch import save_file

    path = tmp_path / "f.safetensors"
    with pytest.raises(ValueError, match=r"path: expected an existing file, got .*; check the path"):
        load_fisher(path)
    path.write_bytes(b"not safetensors, but long enough for a header")
    with pytest.raises(ValueError, match=r"path: expected a safetensors file, got .*; it is damaged or something else"):
        load_fisher(path)
    for header in (None, {"fastforget": "{"}, {"fastforget": "3"}, {"fastforget": json.dumps({"kind": "other"})}):
        save_file({"a": torch.ones(1)}, path, metadata=header)
        with pytest.raises(ValueError, match="path: expected a file that fastforget wrote for a diagonal Fisher"):
            load_fisher(path)
    save_fisher(path, {"a": torch.ones(1000)}, METADATA)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="damaged"):
        load_fisher(path)
    path.write_bytes(whole)
    monkeypatch.setattr(files, "FORMAT_VERSION", 2)
    with pytest.raises(
        ValueError, match=r"expected a diagonal Fisher of format 2, got format 1 in .*; use the version"
    ):
        load_fisher(path)


def test_space_is_checked(tmp_path):
    files.check_space(tmp_path / "a" / "f.safetensors", 1000)
    with pytest.raises(ValueError, match=r"path: expected 1000000000000.0 MB of free space in .*; free some space"):
        files.check_space(tmp_path / "a" / "f.safetensors", 10**18)


# Fishers and models


def test_a_fisher_of_the_model_is_accepted(tmp_path):
    model = tiny_model()
    save_fisher(tmp_path / "f.safetensors", diagonal_of(model), METADATA)
    assert load_fisher(tmp_path / "f.safetensors", model).keys() == dict(model.named_parameters()).keys()
    check_fisher(tmp_path / "f.safetensors", nn.Sequential(model)[0])
    tied = tiny_model(tie_word_embeddings=True)
    fisher = diagonal_of(tied)
    assert "lm_head.weight" not in fisher
    check_fisher(fisher, tied)
    # Stored under the other of its two names.
    fisher["lm_head.weight"] = fisher.pop("model.embed_tokens.weight")
    check_fisher(fisher, tied)


def test_a_fisher_of_a_part_fits_where_the_rest_is_frozen():
    model = tiny_model()
    part = {name: f for name, f in diagonal_of(model).items() if ".mlp." in name}
    with pytest.raises(ValueError, match="missing"):
        check_fisher(part, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp." in name)
    check_fisher(part, model)
    check_fisher(diagonal_of(model), model)


def test_a_fisher_of_chosen_parameters_fits_the_whole_model(tmp_path):
    model = tiny_model()
    part = {name: f for name, f in diagonal_of(model).items() if ".mlp." in name}
    save_fisher(tmp_path / "f.safetensors", part, METADATA | {"parameters": ["*.mlp.*"]})
    assert load_fisher(tmp_path / "f.safetensors", model).keys() == part.keys()
    save_fisher(tmp_path / "f.safetensors", part | {"extra": torch.ones(1)}, METADATA | {"parameters": ["*.mlp.*"]})
    with pytest.raises(ValueError, match=r"got a Fisher, of a with 1 unexpected: extra; load the model that .* on$"):
        load_fisher(tmp_path / "f.safetensors", model)
    save_fisher(tmp_path / "f.safetensors", part, METADATA | {"parameters": None})
    with pytest.raises(ValueError, match=r"15 missing: model\.embed_tokens\.weight, .* freeze \(requires_grad_"):
        load_fisher(tmp_path / "f.safetensors", model)


def test_a_fisher_of_another_model_is_refused_by_name(tmp_path):
    model = tiny_model()
    fisher = diagonal_of(model)
    del fisher["model.norm.weight"]
    fisher["model.layers.0.mlp.up_proj.weight"] = torch.ones(3, 4)
    fisher |= {f"extra.{i}": torch.ones(1) for i in range(7)}
    save_fisher(tmp_path / "f.safetensors", fisher, METADATA)
    with pytest.raises(ValueError, match="expected the trainable parameters of LlamaForCausalLM") as refused:
        load_fisher(tmp_path / "f.safetensors", model)
    message = str(refused.value)
    assert "got a Fisher, of a with 1 missing: model.norm.weight; 7 unexpected: extra.0, extra.1, " in message
    assert "extra.4 and 2 more; 1 of another shape: model.layers.0.mlp.up_proj.weight (3, 4) for (64, 32); " in message
    assert "load the model that the Fisher was computed on" in message


# Means


def test_the_combined_fisher_is_the_weighted_mean(tmp_path):
    model = tiny_model()
    first, second = diagonal_of(model, 0), diagonal_of(model, 1)
    save_fisher(tmp_path / "f.safetensors", first, METADATA | {"data": "one"})
    other = Fisher(second, METADATA | {"data": "two", "weight_sum": 1.0, "examples": 1, "skipped": 4})
    combined = combine_fishers([tmp_path / "f.safetensors", other])
    for name in first:
        expected = (3 * first[name].double() + second[name].double()) / 4
        assert torch.equal(combined[name], expected.float())
    expected = {"weight_sum": 4.0, "examples": 4, "tokens": 80, "skipped": 5, "combined": 2}
    assert combined.metadata == METADATA | expected
    by_hand = combine_fishers([first, second], weights=[0, 2.5])
    assert all(torch.equal(by_hand[name], second[name]) for name in second)
    assert "weight_sum" not in combine_fishers([other, other], weights=[1, 1]).metadata
    assert torch.equal(combine_fishers([other])["lm_head.weight"], second["lm_head.weight"])


def test_fishers_that_do_not_belong_together_are_refused():
    fisher = Fisher({"a": torch.ones(2), "b": torch.ones(2)}, METADATA)

    def refused(message, other, **settings):
        with pytest.raises(ValueError, match=message):
            combine_fishers([fisher, other], **settings)

    for name in ("per", "labels", "loss", "model_type", "batch_size"):
        other = Fisher(fisher, METADATA | {name: "else"})
        refused(rf"expected {name} = ('\w+'|None) as in the first, got 'else' in number 2; combine", other)
    refused("expected model_type = 'llama' as in the first, got None in number 2", dict(fisher))
    refused(r"got a difference in b in number 2", Fisher({"a": torch.ones(2)}, METADATA))
    refused(r"got a difference in b, c in number 2", Fisher({"a": torch.ones(2), "c": torch.ones(1)}, METADATA))
    reshaped = Fisher({"a": torch.ones(2), "b": torch.ones(1)}, METADATA)
    refused(r"got a difference in b \(1,\) for \(2,\) in number 2; combine Fishers of one model", reshaped)
    refused("weights: expected 2, one a Fisher, got 1", fisher, weights=[1.0])
    for weights in ([0.0, 0.0], [1.0, -1.0], [1.0, float("nan")]):
        refused("weights: expected finite numbers >= 0 that are not all 0", fisher, weights=weights)
    with pytest.raises(ValueError, match=r"weights: expected weight_sum in the metadata .*got none in number 1; pass"):
        combine_fishers([dict(fisher)])
    with pytest.raises(ValueError, match="fishers: expected at least one, got none"):
        combine_fishers([])
    for one in (fisher, "f.safetensors", Path("f.safetensors")):
        with pytest.raises(ValueError, match="fishers: expected a list, got one"):
            combine_fishers(one)
