"""What a run refuses: each by name, and before anything is written or lost."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import (
    build,
    save_adapter,
    save_base,
    save_tuned,
    tiny_model,
    tiny_tokenizer,
    units_of,
)
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.matrix.checkpoints import find_checkpoint

pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture
def refused(world, tmp_path):
    """Checks that a run is refused with a message, before anything is written."""

    def check(message, tasks=("full",), **settings):
        with pytest.raises(ValueError, match=message):
            build(world, tmp_path / "out", tasks, **settings)
        assert not (tmp_path / "out").exists()

    return check


def test_bad_arguments_are_refused(world, refused):
    refused("tasks: expected at least one checkpoint or adapter, got none", [])
    refused(r"tasks: expected unique names, got 'full' for .*; name them with NAME=PATH", ["full", "full"])
    refused(r"tasks: expected a name, got none", [f"={world / 'full'}"])
    refused(r"task 'gone': expected a folder or a hub id, got .*/gone, which does not exist", ["gone"])
    refused(r"base: expected a folder or a hub id, got \./gone", base="./gone")
    refused("base: expected a full checkpoint, got the adapter", base=world / "lora")
    refused("max_length: expected 2 tokens or more, got 1", max_length=1)
    refused("max_length: expected at most 256, the model's limit, got 257", max_length=257)
    refused("tokens_per_batch: expected 1 tokens or more, got 0", tokens_per_batch=0)
    refused("noise_examples: expected 0 or more, got -1", noise_examples=-1)
    refused("dtype: expected one of float32, bfloat16, float16, float64, got int8", dtype="int8")
    refused("device: expected a device of this machine, got gpu", device="gpu")
    refused(r"upstream: expected an existing file, got .*absent\.jsonl", upstream="absent.jsonl")
    with pytest.raises(TypeError, match=r"tasks: expected a list or a mapping, got 'a'; write \['a'\]"):
        ff.forgetting_matrix(base=world / "base", tasks="a", upstream=world / "upstream.jsonl", out=world / "out")


def test_names_may_hold_what_paths_hold(world, tmp_path):
    odd = tmp_path / "lr=0.1"
    shutil.copytree(world / "full", odd)
    matrix = build(world, tmp_path / "out", [odd, f"my[run]={odd}"])
    assert matrix.tasks == ["lr=0.1", "my[run]"]
    mapped = ff.forgetting_matrix(
        base=world / "base", tasks={"x": odd}, upstream=world / "upstream.jsonl", out=tmp_path / "b", progress=False
    )
    assert mapped.tasks == ["x"]


def test_hub_ids_are_downloaded_and_failures_said(world, refused, tmp_path, monkeypatch):
    import huggingface_hub

    calls = []

    def download(repo, allow_patterns):
        calls.append(repo)
        if repo == "org/gone":
            raise OSError("no connection")
        if "*.bin" in allow_patterns:
            torch.save(AutoModelForCausalLM.from_pretrained(world / "full").state_dict(), old / "pytorch_model.bin")
        return str(old if repo == "org/old" else world / "full")

    old = tmp_path / "old"  # a repository from before safetensors
    old.mkdir()
    shutil.copy(world / "full" / "config.json", old)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    refused(r"task 'gone': .*got org/gone: no such folder, and the hub says: no connection", ["gone=org/gone"])
    matrix = build(world, tmp_path / "out", ["tuned=org/tuned", "org/old"])
    assert matrix.tasks == ["tuned", "old"]
    np.testing.assert_array_equal(matrix.values[0], matrix.values[1])
    assert calls == ["org/gone", "org/tuned", "org/old", "org/old"]


def copy_of(world, tmp_path, name="full"):
    shutil.copytree(world / name, tmp_path / "task")
    return tmp_path / "task"


def test_a_checkpoint_without_weights_or_configuration_is_refused(world, refused, tmp_path):
    task = copy_of(world, tmp_path)
    (task / "model.safetensors").unlink()
    refused(r"task 'task': expected weights .*, got none in .*save_pretrained", [task])
    (task / "config.json").unlink()
    refused(r"task 'task': expected a checkpoint \(config\.json\) or an adapter", [task])


@pytest.mark.parametrize("keep", [40, 3000])
def test_a_damaged_checkpoint_is_refused(world, refused, tmp_path, keep):
    weights = copy_of(world, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(r"task 'task': cannot read .*model\.safetensors: .*; the file is damaged", [tmp_path / "task"])
    shutil.copytree(world / "base", tmp_path / "base")
    shutil.copy(weights, tmp_path / "base")
    refused(r"base: cannot read .*model\.safetensors: .*; the file is damaged", base=tmp_path / "base")


def test_a_checkpoint_with_a_missing_part_is_refused(world, refused, tmp_path):
    save_tuned(world / "base", tmp_path / "task", max_shard_size="40KB")
    sorted((tmp_path / "task").glob("*.safetensors"))[1].unlink()
    refused(r"task 'task': expected every file of .*index\.json, got none named model-00002-of", [tmp_path / "task"])


def test_a_damaged_bin_is_refused(world, refused, tmp_path):
    task = copy_of(world, tmp_path)
    (task / "model.safetensors").rename(task / "pytorch_model.bin")
    refused(r"task 'task': cannot read .*pytorch_model\.bin: .*; the file is damaged", [task])


def test_a_checkpoint_of_another_shape_is_refused_by_tensor(refused, tmp_path):
    tiny_model(intermediate_size=80).save_pretrained(tmp_path / "task")
    refused(
        r"task 'task': expected .*mlp\.\w+\.weight of shape \(.*64.*\) as in the base, got \(.*80", [tmp_path / "task"]
    )


def test_a_checkpoint_that_unties_what_the_base_ties_is_refused(world, tmp_path):
    from safetensors.torch import load_file, save_file

    base = save_base(tmp_path / "base", tie_word_embeddings=True)
    weights = save_tuned(base, tmp_path / "task") / "model.safetensors"
    tensors = load_file(weights)
    head = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors | {"lm_head.weight": head}, weights, metadata={"format": "pt"})
    build(world, tmp_path / "same", [tmp_path / "task"], base=base)  # stored twice, but equal
    save_file(tensors | {"lm_head.weight": head + 1}, weights, metadata={"format": "pt"})
    message = r"task 'task': expected model\.embed_tokens\.weight tied to lm_head\.weight as in the base, got another"
    with pytest.raises(ValueError, match=message):
        build(world, tmp_path / "out", [tmp_path / "task"], base=base)
    assert len(units_of(tmp_path / "out")) == 2  # the base's units are kept


def test_a_checkpoint_with_other_settings_is_refused_by_entry(refused, tmp_path):
    tiny_model(rms_norm_eps=1e-3).save_pretrained(tmp_path / "task")
    refused(
        r"task 'task': expected rms_norm_eps = 1e-06 as in the base's config\.json, got 0\.001", [tmp_path / "task"]
    )


def test_a_base_that_lacks_tensors_is_refused(world, refused, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(world / "base", tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    refused(r"base: expected every tensor of the model .* model\.norm\.weight", base=tmp_path / "base")


def test_an_adapter_for_another_base_is_refused(world, refused, tmp_path):
    other = save_base(tmp_path / "other-base", seed=7)
    adapter = save_adapter(other, tmp_path / "task")
    message = r"task 'task': expected an adapter for .*base, got one for .*other-base; .*--no-check-adapter-base"
    refused(message, [adapter])
    config = json.loads((adapter / "adapter_config.json").read_text())
    for named in ("org/another", "org/base", str(world / "base")):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": named}))
        if named == "org/another":
            refused("got one for org/another", [adapter])
            build(world, tmp_path / "unchecked", [adapter], check_adapter_base=False)
        else:
            build(world, tmp_path / Path(named).name, [adapter])
            shutil.rmtree(tmp_path / Path(named).name)


def test_an_adapter_that_does_not_fit_is_refused(world, refused, tmp_path):
    wide = save_base(tmp_path / "wide", hidden_size=48, num_hidden_layers=3)
    adapter = save_adapter(wide, tmp_path / "task")
    message = (
        r"task 'task': expected a base with a module for .*q_proj\.lora_A.* of shape \(4, 48\), got a weight of shape"
    )
    refused(message, [adapter], check_adapter_base=False)
    shutil.rmtree(adapter)
    save_adapter(save_base(tmp_path / "large", vocab_size=390), adapter, modules_to_save=["lm_head"])
    message = r"expected lm_head\.weight of shape \(384, 32\) as in the base, got \(390, 32\)"
    refused(message, [adapter], check_adapter_base=False)
    deep = save_base(tmp_path / "deep", num_hidden_layers=3)
    shutil.rmtree(adapter)
    save_adapter(deep, adapter, layers_to_transform=[2])
    refused(r"layers\.2\.self_attn.*, got no such module", [adapter], check_adapter_base=False)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_with_missing_or_unexpected_tensors_is_refused(world, tmp_path):
    adapter = copy_of(world, tmp_path, "lora")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for modules, message in (
        (["q_proj", "v_proj", "o_proj"], "missing adapter keys"),
        (["q_proj"], "no place for .*v_proj"),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": modules}))
        with pytest.raises(ValueError, match=rf"task 'task': expected the adapter's tensors to be .*{message}"):
            build(world, tmp_path / f"out{len(modules)}", [adapter])


def test_an_adapter_of_virtual_tokens_is_refused(world, refused, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(world / "base")
    prompt = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(model, prompt).save_pretrained(tmp_path / "task")
    refused("task 'task': expected an adapter of the weights such as LoRA, got .*PROMPT_TUNING", [tmp_path / "task"])


def test_a_task_with_another_tokenizer_is_refused(world, refused, tmp_path):
    task = copy_of(world, tmp_path)
    padded = tiny_tokenizer()
    padded.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    padded.padding_side = "left"
    padded.save_pretrained(task)
    build(world, tmp_path / "same", [task])  # another padding and an added token cut no text otherwise
    tiny_tokenizer(vocabulary=350).save_pretrained(task)
    refused("task 'task': expected the base's tokenizer, got another model; the run tokenises with the base's", [task])
    padded.add_tokens(["the"])
    padded.save_pretrained(task)
    refused(r"task 'task': expected the base's tokens \[.*\] for .*, got \[", [task])
    (task / "tokenizer.json").write_text("{")
    refused(r"task 'task': cannot load the tokenizer of", [task])


def test_a_tokenizer_larger_than_the_model_is_refused(refused, tmp_path):
    base = save_base(tmp_path / "base", vocab_size=300)
    refused("base: expected a tokenizer of at most vocab_size = 300 tokens, got token", base=base)


def test_a_disk_that_is_too_small_is_refused(refused, monkeypatch):
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    refused(r"out: expected .* MB of free space in .*, got 0\.0 MB; free some space")


def test_a_disk_that_fills_up_keeps_the_finished_units(world, tmp_path, monkeypatch):
    from fastforget.matrix import folders

    real, written = folders.pq.write_table, []

    def full(table, path, **kwargs):
        written.append(path)  # the token cache, two tables of names, then the units
        if Path(path).parent.name == "units" and len(written) == 6:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        real(table, path, **kwargs)

    message = r"out: cannot write to .*No space left on device; 2 of 4 units are finished and kept; free some space"
    with monkeypatch.context() as patch:
        patch.setattr(folders.pq, "write_table", full)
        with pytest.raises(ValueError, match=message):
            build(world, tmp_path / "out", ["full"])
    assert len(list((tmp_path / "out" / "units").iterdir())) == 2
    wanted = build(world, tmp_path / "wanted", ["full"])
    np.testing.assert_array_equal(build(world, tmp_path / "out", ["full"]).values, wanted.values)


def test_out_may_not_be_a_file_or_another_folder(world, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("years")
    with pytest.raises(ValueError, match=r"out: expected an empty folder or one of this run, got .*thesis\.tex"):
        build(world, tmp_path / "out")
    with pytest.raises(ValueError, match="out: expected a folder that can be written to"):
        build(world, tmp_path / "out" / "thesis.tex")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_a_base_without_a_tokenizer_is_refused(world, refused, tmp_path):
    refused("base: cannot load the tokenizer", base=world / "full")


def test_a_base_that_does_not_fit_is_refused(world, refused, monkeypatch):
    def too_large(self, device):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", too_large)
    refused(r"base: expected a model that fits on cpu, got .*: tried to allocate 80 GiB; choose a narrower dtype")


def test_a_resume_with_other_inputs_is_refused_with_what_differs(world, tmp_path):
    build(world, tmp_path / "out", ["full", "other"])
    before = units_of(tmp_path / "out")
    changed = tmp_path / "changed"
    shutil.copytree(world, changed)
    save_tuned(world / "base", changed / "full", seed=8)
    with open(changed / "upstream.jsonl", "a") as file:
        file.write('{"text": "one more"}\n')
    for arguments, message in (
        ({"world": world, "tasks": ["full"]}, r"tasks other: .* there, null here; task order: "),
        (
            {"world": world, "tasks": ["full", "lora"]},
            r"task order: \[\"full\", \"other\"\] there, \[\"full\", \"lora\"\]",
        ),
        ({"world": world, "max_length": 30}, "settings max_length: 256 there, 30 here"),
        ({"world": world, "dtype": "float64"}, 'settings dtype: "float32" there, "float64" here'),
        ({"world": world, "tokens_per_batch": 999}, "settings tokens_per_batch: 4096 there, 999 here"),
        ({"world": changed}, r"tasks full weights: .*upstream content: .*upstream examples: 40 there, 41 here"),
        ({"world": world, "base": world / "lora-base"}, "base weights: "),
    ):
        if "base" in arguments:
            save_base(world / "lora-base", seed=4)
        with pytest.raises(ValueError, match=r"out: .* belongs to a run with other inputs.*" + message):
            build(**({"tasks": ["full", "other"]} | arguments), out=tmp_path / "out")
    assert units_of(tmp_path / "out") == before


def test_a_fingerprint_sees_one_small_tensor_in_a_large_file(world, tmp_path):
    from safetensors.torch import save_file

    shutil.copytree(world / "full", tmp_path / "task")
    tensors = {"a": torch.zeros(2_000_000), "norm": torch.ones(8), "z": torch.zeros(2_000_000)}
    found = []
    for value in (1.0, 1.0, 1.5):
        tensors["norm"][3] = value
        save_file(tensors, tmp_path / "task" / "model.safetensors")
        found.append(find_checkpoint("task", str(tmp_path / "task")).fingerprint)
    assert found[0] == found[1] != found[2]
