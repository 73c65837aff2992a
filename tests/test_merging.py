"""Fisher merging, against a plain float64 loop; checkpoints through `from_pretrained`; what is in memory meanwhile."""

from __future__ import annotations

import json
import os
import tracemalloc
import weakref

import pytest
import torch
from architectures.families import build
from safetensors.torch import load_file, save_file
from tiny_models import save_adapter, save_base, save_tuned, tiny_model, tiny_tokenizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, AutoTokenizer

import fastforget as ff
from fastforget.fisher.files import save_fisher
from fastforget.fisher.names import Fisher
from fastforget.update import checkpoints, writing

FLOOR = 1e-6


def random_fisher(model, seed, skip=()):
    generator = torch.Generator().manual_seed(seed)
    return {
        # Some entries are below the floor in all models.
        name: torch.rand(p.shape, generator=generator) ** 4 * (torch.rand(p.shape, generator=generator) > 0.3)
        for name, p in model.named_parameters()
        if name not in skip
    }


def looped(tensors, fishers, weights, floor=FLOOR):
    """One entry after the other, in float64."""
    result = []
    flat = [tensor.detach().double().flatten().tolist() for tensor in tensors]
    known = [[1.0] * len(flat[0]) if f is None else f.double().flatten().tolist() for f in fishers]
    for i in range(len(flat[0])):
        factors = [c * max(f[i], floor) for c, f in zip(weights, known, strict=True)]
        result.append(sum(f * t[i] for f, t in zip(factors, flat, strict=True)) / sum(factors))
    return torch.tensor(result, dtype=torch.float64).view(tensors[0].shape)


def small(seed):
    model = tiny_model(seed, hidden_size=16, intermediate_size=24, vocab_size=40, num_hidden_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * seed  # the norms too
    return model


def expected_of(models, fishers, weights, **settings):
    named = [dict(model.named_parameters()) for model in models]
    return {
        name: looped([n[name] for n in named], [f.get(name) for f in fishers], weights, **settings) for name in named[0]
    }


@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0], [0.0, 1.0, 3.0]])
def test_merges_as_the_loop_does(weights, tmp_path):
    models = [small(seed) for seed in range(3)]
    skip = ("model.norm.weight",)
    fishers = [random_fisher(models[0], 10 + j, skip) for j in range(3)]
    expected = expected_of(models, fishers, weights or [1.0] * 3)
    models[1].save_pretrained(tmp_path / "model")
    save_fisher(tmp_path / "f.safetensors", fishers[2], {})
    given = [models[0], tmp_path / "model", dict(models[2].named_parameters())]
    result = ff.fisher_merge(given, [*fishers[:2], tmp_path / "f.safetensors"], weights)
    assert result.keys() == expected.keys()
    for name, value in result.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
        assert not value.requires_grad
        assert value.dtype == torch.float32


def test_a_large_floor_gives_the_mean():
    models = [small(seed) for seed in range(2)]
    fishers = [random_fisher(models[0], j) for j in range(2)]
    for floor in (0.3, 100.0):
        result = ff.fisher_merge(models, fishers, floor=floor)
        for name, value in expected_of(models, fishers, [1.0, 1.0], floor=floor).items():
            torch.testing.assert_close(result[name].double(), value, rtol=1e-5, atol=1e-6)
    mean = (models[0].lm_head.weight + models[1].lm_head.weight) / 2
    torch.testing.assert_close(result["lm_head.weight"], mean)


def test_buffers_are_averaged_and_integers_have_to_agree():
    def model(seed):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        made(torch.randn(5, 3))
        return made

    models = [model(0), model(1)]
    fishers = [random_fisher(models[0], j) for j in range(2)]
    result = ff.fisher_merge(models, fishers, [1.0, 3.0])
    mean = (models[0][1].running_mean + 3 * models[1][1].running_mean) / 4
    torch.testing.assert_close(result["1.running_mean"], mean)
    assert result["1.num_batches_tracked"] == 1
    models[1](torch.randn(5, 3))
    with pytest.raises(
        ValueError, match=r"models\[1\]\['1.num_batches_tracked'\]: expected the integers of models\[0\]"
    ):
        ff.fisher_merge(models, fishers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shards", ["5GB", "3KB"])
def test_a_checkpoint_comes_back_through_from_pretrained(dtype, shards, tmp_path):
    models = [small(seed).to(dtype) for seed in range(2)]
    fishers = [random_fisher(models[0], 10 + j, ("model.norm.weight",)) for j in range(2)]
    for j, model in enumerate(models):
        model.save_pretrained(tmp_path / str(j), max_shard_size=shards)
    tiny_tokenizer().save_pretrained(tmp_path / "0")
    out = tmp_path / "new" / "merged"
    folders = [tmp_path / "0", tmp_path / "1"]
    dry = ff.fisher_merge(folders, fishers, [1.0, 2.0], out=out, dry_run=True)
    assert not out.parent.exists()
    report = ff.fisher_merge(folders, fishers, [1.0, 2.0], out=out, max_shard_size=shards)
    assert dry == report
    files = sorted(path.name for path in out.glob("*.safetensors"))
    if shards == "5GB":
        assert files == ["model.safetensors"]
    else:
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert len(files) > 2
    loaded, about = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(about[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    rtol = {torch.bfloat16: 2**-8, torch.float64: 1e-6}[dtype]  # the Fishers are float32
    for name, value in expected_of(models, fishers, [1.0, 2.0]).items():
        parameter = loaded.get_parameter(name)
        assert parameter.dtype == dtype
        torch.testing.assert_close(parameter.detach().double(), value, rtol=rtol, atol=1e-5)
        assert report.changed[name] == int((parameter != models[0].get_parameter(name)).sum())
        assert report.changed[name] > 0.5 * parameter.numel()
    assert report.averaged == ["model.norm.weight"]
    assert AutoTokenizer.from_pretrained(out)("a b").input_ids == tiny_tokenizer()("a b").input_ids
    for path in out.iterdir():
        assert path.stat().st_mode == (tmp_path / "0" / "config.json").stat().st_mode, path.name
    assert sorted(os.listdir(out.parent)) == ["merged"]


def test_modules_are_written_with_their_configuration(tmp_path):
    models = [tiny_model(seed, tie_word_embeddings=True) for seed in range(2)]
    fishers = [random_fisher(models[0], j) for j in range(2)]
    ff.fisher_merge(models, fishers, out=tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    result = ff.fisher_merge(models, fishers)
    assert result.keys() == {name for name, _ in models[0].named_parameters()}  # tied: once
    for name, value in result.items():
        assert torch.equal(value, loaded.get_parameter(name))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_experts_whose_files_have_other_names(tmp_path):
    models = [build("Mixtral"), build("Mixtral")]
    for parameter in models[1].parameters():
        parameter.data = parameter.data * 0.5
    fishers = [random_fisher(models[0], j) for j in range(2)]
    for j, model in enumerate(models):
        model.save_pretrained(tmp_path / str(j))
    assert "model.layers.0.mlp.experts.down_proj" in fishers[0]
    assert "model.layers.0.mlp.experts.down_proj" not in load_file(tmp_path / "0" / "model.safetensors")
    report = ff.fisher_merge([tmp_path / "0", tmp_path / "1"], fishers, out=tmp_path / "out")
    assert report.averaged == []  # type: ignore[union-attr]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for name, value in expected_of(models, fishers, [1.0, 1.0]).items():
        torch.testing.assert_close(loaded.get_parameter(name).detach().double(), value, rtol=1e-5, atol=1e-6)


def test_tied_tensors_that_a_file_has_twice_stay_tied(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    name, alias = "model.embed_tokens.weight", "lm_head.weight"
    first = {n: p.detach() for n, p in model.named_parameters()}
    second = {n: t * 2 for n, t in first.items()}
    fishers = [Fisher(random_fisher(model, j), {"aliases": {alias: name}}) for j in range(2)]
    expected = ff.fisher_merge([first, second], fishers)
    assert alias not in expected
    save_file(first | {alias: first[name].clone()}, tmp_path / "first.safetensors")
    other = {n: t for n, t in second.items() if n != name} | {alias: second[name]}  # under its other name only
    result = ff.fisher_merge([tmp_path / "first.safetensors", other], fishers)
    assert result.keys() == expected.keys()
    assert all(torch.equal(value, expected[n]) for n, value in result.items())
    state = ff.fisher_merge([model.state_dict(), second], [dict(fisher) for fisher in fishers])
    assert all(torch.equal(value, expected[n]) for n, value in state.items())
    with pytest.raises(
        ValueError, match=r"models\[1\]: expected lm_head.weight to be tied to model.embed_tokens.weight"
    ):
        ff.fisher_merge([first, second | {alias: first[name]}], fishers)


class Living(TorchDispatchMode):
    """The most tensors of at least a size that were alive at a time."""

    def __init__(self, size):
        super().__init__()
        self.size, self.alive, self.peak = size, weakref.WeakSet(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.size and not leaf.is_meta:
                self.alive.add(leaf)
        self.peak = max(self.peak, len(self.alive))
        return result


def test_a_few_tensors_are_alive_at_a_time(tmp_path):
    count, size = 60, 1 << 16
    tensors = {f"layers.{i}.weight": torch.full((size,), float(i)) for i in range(count)}
    paths = [tmp_path / f"{j}.safetensors" for j in range(3)]
    for path in paths:
        save_file(tensors, path)
    fishers = [Fisher(tensors) for _ in paths]
    with Living(size) as living:
        ff.fisher_merge(paths, fishers, out=tmp_path / "out")
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == count
    assert 3 <= living.peak <= 15


def test_python_holds_less_than_a_file_while_it_is_written(tmp_path):
    sizes = {f"{i}": torch.empty(1 << 18, device="meta") for i in range(40)}
    source = checkpoints.Source("x", sizes, {name: name for name in sizes}, {}, torch.zeros, lambda folder: None)
    tracemalloc.start()
    writing.write_checkpoint(tmp_path / "out", source, lambda name: torch.ones(1 << 18), "writing")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20  # of 40 MB
    assert torch.equal(load_file(tmp_path / "out" / "model.safetensors")["7"], torch.ones(1 << 18))


def test_files_are_those_of_safetensors(tmp_path):
    """Every dtype, tensors without entries or dimensions, and names that JSON escapes."""
    tensors = {f"ü{dtype}": torch.arange(5).to(dtype) for dtype in checkpoints.DTYPES.values()}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.0), "strided": torch.arange(6.0).view(2, 3).t()}
    source = checkpoints.tensor_source(tensors.items(), "x")
    writing.write_checkpoint(tmp_path / "out", source, source.read, "writing")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name].double(), tensor.double())
    header, size = header_of(tmp_path / "out")
    assert size % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0, name
    for length in range(1, 9):
        source = checkpoints.tensor_source([("x" * length, torch.ones(1))], "x")
        writing.write_checkpoint(tmp_path / str(length), source, source.read, "writing")
        assert header_of(tmp_path / str(length))[1] % 8 == 0


def header_of(folder):
    data = (folder / "model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), size


def test_a_failure_leaves_no_folder(tmp_path):
    models = [dict(small(seed).named_parameters()) for seed in range(2)]
    fishers = [random_fisher(small(0), j) for j in range(2)]
    fishers[1]["model.norm.weight"][3] = torch.inf  # among the last that are read
    with pytest.raises(
        ValueError, match=r"fishers\[1\]\['model.norm.weight'\]: expected finite values >= 0, got .* inf"
    ):
        ff.fisher_merge(models, fishers, out=tmp_path / "new" / "out")
    assert not (tmp_path / "new" / "out").exists()
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "out").mkdir()  # an empty one will do
    ff.fisher_merge(models, [fishers[0], fishers[0]], out=tmp_path / "out")
    with pytest.raises(ValueError, match=r"out: expected a new or empty folder, got .*out; choose another"):
        ff.fisher_merge(models, [fishers[0], fishers[0]], out=tmp_path / "out")


def test_wrong_input_is_refused_by_name(tmp_path, monkeypatch):
    model = small(0)
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    fisher = random_fisher(model, 1)
    norm = "model.norm.weight"
    fewer = {n: f for n, f in fisher.items() if n != norm}
    meta = model.__class__(model.config).to("meta")
    ok = [tensors, tensors], [fisher, fisher]
    cases = [
        (tensors, ok[1], "models: expected a list, got one dict"),
        (model, ok[1], "models: expected a list, got one LlamaForCausalLM"),
        (ok[0], "f.safetensors", "fishers: expected a list, got one str"),
        ([tensors], [fisher], "models: expected at least two, got 1"),
        (ok[0], [fisher], "fishers: expected 2, one for each of models, got 1"),
        ([tensors, 3], ok[1], r"models\[1\]: expected a model, .* got int"),
        ([tensors, {"a": 1}], ok[1], r"models\[1\]: expected a model or its named_parameters"),
        ([tensors, meta], ok[1], r"models\[1\]\[.*\]: expected a whole tensor with values, got one on the meta device"),
        (
            [tensors, tensors | {norm: torch.ones(3)}],
            ok[1],
            r"models\[1\]\['model.norm.weight'\]: expected shape \(16,\)",
        ),
        (
            [tensors, tensors | {norm: torch.ones(16).half()}],
            ok[1],
            r"models\[1\]\['model.norm.weight'\]: expected torch.float32",
        ),
        (
            [tensors, tensors | {"x": torch.ones(1)}],
            ok[1],
            r"models\[1\]: expected the tensors of .*'x' in models\[1\] only",
        ),
        (
            [tensors | {"x": torch.ones(1)}, tensors],
            ok[1],
            r"models\[1\]: expected the tensors of .*'x' in models\[0\] only",
        ),
        ([{norm: torch.ones(2).to(torch.float8_e5m2)}] * 2, [{}, {}], r"expected float32, .* got torch.float8_e5m2"),
        (ok[0], [fisher, 3], r"fishers\[1\]: fisher: expected a DiagonalFisher"),
        (ok[0], [fisher, tmp_path / "gone.safetensors"], r"fishers\[1\]: path: expected an existing file"),
        (ok[0], [fisher, fewer], r"fishers\[1\]: expected the names of fishers\[0\], got none for 'model.norm.weight'"),
        (ok[0], [fewer, fisher], r"fishers\[1\]: expected the names of fishers\[0\], got 'model.norm.weight' besides"),
        (ok[0], [{"x": torch.ones(2)}] * 2, r"fishers\[0\]: expected names of the models' tensors, got 'x'"),
        (
            ok[0],
            [fisher, fisher | {norm: torch.ones(3)}],
            r"fishers\[1\]\['model.norm.weight'\]: expected shape \(16,\)",
        ),
        (
            ok[0],
            [fisher, fisher | {norm: torch.ones(16).half()}],
            r"fishers\[1\]\['model.norm.weight'\]: expected float32",
        ),
        (
            ok[0],
            [fisher, fisher | {norm: torch.ones(16, device="meta")}],
            r"fishers\[1\]\['model.norm.weight'\]: expected a tensor with values, got one on the meta device",
        ),
        (
            ok[0],
            [fisher, fisher | {norm: -torch.ones(16)}],
            r"fishers\[1\]\['model.norm.weight'\]: expected finite values >= 0",
        ),
        (["/nowhere/a", "/nowhere/b"], ok[1], r"models\[0\]: expected a checkpoint's folder .* does not exist"),
    ]
    with monkeypatch.context() as context:
        context.setattr(writing, "_write_file", None)  # nothing gets that far
        for models, fishers, message in cases[:-2]:
            with pytest.raises((ValueError, TypeError), match=message):
                ff.fisher_merge(models, fishers, out=tmp_path / "out")
    for models, fishers, message in cases:
        with pytest.raises((ValueError, TypeError), match=message):
            ff.fisher_merge(models, fishers)
        assert not list(tmp_path.iterdir())
    for settings, message in (
        ({"weights": [1.0]}, "weights: expected 2, one for each of models, got 1"),
        ({"weights": [1.0, -1.0]}, r"weights\[1\]: expected a finite number of at least 0, got -1"),
        ({"weights": [0.0, 0.0]}, "weights: expected one above 0"),
        ({"floor": 0.0}, "floor: expected a finite number above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.fisher_merge(*ok, **settings)


def test_names_that_mean_one_parameter_are_refused(tmp_path):
    save_file({"w": torch.ones(2), "module.w": torch.zeros(2)}, tmp_path / "both.safetensors")
    with pytest.raises(
        ValueError, match=r"models\[1\]: expected one tensor a name, got 'module.w' and 'w', both 'w'; rename"
    ):
        ff.fisher_merge([{"w": torch.ones(2)}, tmp_path / "both.safetensors"], [{}, {}])


def test_weights_are_read_from_folders_and_files(tmp_path):
    models = [small(0), small(1)]
    models[0].save_pretrained(tmp_path, max_shard_size="3KB")  # with an index
    for folder, model in ((tmp_path, models[0]), (tmp_path, models[1])):
        weights = checkpoints.read_weights(folder, "x")
        assert weights.keys() == model.state_dict().keys()
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
        save_file(models[1].state_dict(), tmp_path / "model.safetensors")  # the single file counts, as in transformers
    assert checkpoints.read_weights(str(tmp_path / "model.safetensors"), "x").keys() == weights.keys()
    (tmp_path / "model.safetensors").write_bytes(b"x")
    for path, message in (
        (tmp_path / "gone", "expected a safetensors file or a folder"),
        (tmp_path, "cannot read .*model"),
    ):
        with pytest.raises(ValueError, match=f"anchor: {message}"):
            checkpoints.read_weights(path, "anchor")


def test_wrong_folders_are_refused(tmp_path):
    from peft import PeftModel

    base = save_base(tmp_path / "base")
    adapter = save_adapter(base, tmp_path / "lora")
    fisher = random_fisher(tiny_model(), 1)
    sharded = save_tuned(base, tmp_path / "sharded", max_shard_size="50KB")
    next(iter(sharded.glob("model-00002*"))).unlink()
    damaged = save_tuned(base, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"x" * 50)
    index = save_tuned(base, tmp_path / "index", max_shard_size="50KB")
    (index / "model.safetensors.index.json").write_text(json.dumps({"weight_map": 3}))
    (tmp_path / "empty").mkdir()
    peft = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))
    for wrong, message in (
        (adapter, r"models\[1\]: expected a full checkpoint, got the adapter"),
        (peft, r"models\[1\]: expected a model without adapters"),
        (sharded, r"models\[1\]: cannot read .*model-00002"),
        (damaged, r"models\[1\]: cannot read .*model.safetensors"),
        (index, r"models\[1\]: cannot read .*index.json"),
        (tmp_path / "empty", r"models\[1\]: cannot read .*model.safetensors"),
    ):
        with pytest.raises(ValueError, match=message):
            ff.fisher_merge([base, wrong], [fisher, fisher], out=tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_full_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    models = [dict(small(seed).named_parameters()) for seed in range(2)]
    fishers = [random_fisher(small(0), j) for j in range(2)]
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 100})())
    with pytest.raises(ValueError, match=r"out: expected .* MB of free space"):
        ff.fisher_merge(models, fishers, out=tmp_path / "out")
