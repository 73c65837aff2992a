"""The forgetting matrix against independent evaluations, and what it refuses."""

import io
import json
import shutil
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import (
    build,
    matrix_of,
    save_adapter,
    save_base,
    save_tuned,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget import perplexity
from fastforget.matrix import local, models, readahead, runner
from fastforget.matrix.checkpoints import find_checkpoint
from fastforget.matrix.store import Store
from fastforget.matrix.upstream import load_upstream

pytestmark = pytest.mark.usefixtures("small_shards")


def examples_of(world, **settings):
    return load_upstream(world / "upstream.jsonl", tiny_tokenizer(), **({"max_length": 256} | settings))


def independent(model, examples):
    """Log-perplexity and exact match of each unpadded example from the model's own logits, `[N]` each."""
    perplexities, exact = [], []
    for tokens, first in zip(examples.tokens, examples.first_target, strict=True):
        ids = torch.from_numpy(tokens.astype(np.int64))[None]
        with torch.no_grad():
            log_probabilities = model(ids).logits[0].double().log_softmax(-1)[first - 1 : -1]
        target = ids[0, first:]
        perplexities.append(-log_probabilities.gather(1, target[:, None]).mean().item())
        exact.append(bool((log_probabilities.argmax(-1) == target).all()))
    return np.array(perplexities), np.array(exact)


def with_adapter(base, adapter):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()


# Values


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers has deprecated
def test_checkpoints_and_adapters_give_what_each_model_gives_alone(world, tmp_path):
    matrix = build(world, tmp_path / "out", ["full", "lora", "other"], tokens_per_batch=700)
    examples = examples_of(world)
    base, _ = independent(AutoModelForCausalLM.from_pretrained(world / "base"), examples)
    rows = [
        independent(model, examples)[0] - base
        for model in (
            AutoModelForCausalLM.from_pretrained(world / "full"),
            with_adapter(world / "base", world / "lora"),
            AutoModelForCausalLM.from_pretrained(world / "other"),
        )
    ]
    assert matrix.tasks == ["full", "lora", "other"]
    assert matrix.examples == examples.ids
    assert matrix.complete
    np.testing.assert_allclose(matrix.base, base, atol=1e-5)
    np.testing.assert_allclose(matrix.values, rows, atol=1e-5)
    assert np.abs(matrix.values).mean(1).min() > 0.01  # the tasks do differ
    np.testing.assert_array_equal(matrix.targets, examples.targets)
    assert len(Store(tmp_path / "out").finished()) == 4 * 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model has `tie_word_embeddings=True`")
def test_what_an_adapter_writes_over_does_not_reach_the_next_one(world, tmp_path):
    # A tuned head is a whole module, which PEFT's unload leaves in; biases are loaded over the base's.
    base = save_base(tmp_path / "base", attention_bias=True, tie_word_embeddings=True)
    save_adapter(base, tmp_path / "head", modules_to_save=["lm_head"], ensure_weight_tying=False)
    save_adapter(base, tmp_path / "bias", bias="all")
    save_adapter(base, tmp_path / "pissa", init_lora_weights="pissa")
    save_adapter(base, tmp_path / "plain")
    save_tuned(base, tmp_path / "full")
    names = ["head", "bias", "pissa", "plain", "full"]
    with pytest.warns(UserWarning, match="task 'head': Model has `tie_word_embeddings=True`"):
        matrix = build(world, tmp_path / "out", [tmp_path / name for name in names], base=base)
    examples = examples_of(world)
    before, _ = independent(AutoModelForCausalLM.from_pretrained(base), examples)
    for i, name in enumerate(names[:-1]):
        alone, _ = independent(with_adapter(base, tmp_path / name), examples)
        np.testing.assert_allclose(matrix.values[i], alone - before, atol=1e-5, err_msg=name)
    alone, _ = independent(AutoModelForCausalLM.from_pretrained(tmp_path / "full"), examples)
    np.testing.assert_allclose(matrix.values[-1], alone - before, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])  # of the files; PEFT computes in float32
def test_adapters_of_one_form_take_turns_in_one_slot(world, tmp_path, monkeypatch, dtype):
    base = world / "base"
    plain = {"a": {"seed": 2}, "b": {"seed": 5}, "wider": {"r": 8}, "c": {"seed": 6}, "scaled": {"lora_alpha": 32}}
    tasks = {name: save_adapter(base, tmp_path / name, **settings) for name, settings in plain.items()}
    for folder in tasks.values():
        weights = load_file(folder / "adapter_model.safetensors")
        save_file({n: t.to(dtype) for n, t in weights.items()}, folder / "adapter_model.safetensors")
    tasks["head"] = save_adapter(base, tmp_path / "head", modules_to_save=["lm_head"])
    checkpoints = {name: find_checkpoint(name, str(folder)) for name, folder in tasks.items()}
    checkpoints["base"] = find_checkpoint("base", str(base), is_base=True)
    built, real = [], models.ResidentModel._with_adapter
    monkeypatch.setattr(models.ResidentModel, "_with_adapter", lambda self, t: built.append(t.name) or real(self, t))
    resident = models.ResidentModel(checkpoints["base"], "cpu", torch.float32)
    before = {name: tensor.clone() for name, tensor in resident.model.state_dict().items()}
    for name in ("a", "b", "wider", "a", "c", "head", "b", "a", "scaled", "base"):
        with resident.holding(checkpoints[name]) as model:
            held = {n: t.clone() for n, t in model.state_dict().items()}
            ids = torch.arange(20)[None]
            logits = model(ids).logits
        alone = models.ResidentModel(checkpoints["base"], "cpu", torch.float32)
        monkeypatch.setattr(models.ResidentModel, "_with_adapter", real)
        with alone.holding(checkpoints[name]) as model:
            wanted = model.state_dict()
            assert held.keys() == wanted.keys()
            assert all(held[n].dtype == t.dtype and torch.equal(held[n], t) for n, t in wanted.items())
            assert torch.equal(logits, model(ids).logits)
        monkeypatch.setattr(
            models.ResidentModel, "_with_adapter", lambda self, t: built.append(t.name) or real(self, t)
        )
    assert built == ["a", "wider", "a", "head", "b", "scaled"]
    after = resident.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_checkpoints_are_read_however_they_were_saved(world, tmp_path):
    base = save_base(tmp_path / "base", tie_word_embeddings=True)  # the tied head is not in the file
    save_tuned(base, tmp_path / "whole")
    save_tuned(base, tmp_path / "sharded", max_shard_size="40KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    shutil.copy(tmp_path / "whole" / "config.json", tmp_path / "bin")
    tuned = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    torch.save(tuned.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    matrix = build(world, tmp_path / "out", [tmp_path / name for name in ("whole", "sharded", "bin")], base=base)
    examples = examples_of(world)
    row = independent(tuned, examples)[0] - independent(AutoModelForCausalLM.from_pretrained(base), examples)[0]
    np.testing.assert_allclose(matrix.values[0], row, atol=1e-5)
    np.testing.assert_array_equal(matrix.values, matrix.values[:1].repeat(3, 0))


def test_checkpoints_whose_tensors_are_stored_under_other_names_are_converted(world, tmp_path):
    from transformers import MixtralConfig, MixtralForCausalLM

    small = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MixtralConfig(
        **small, max_position_embeddings=256, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3
    )
    for name, seed in (("base", 0), ("tuned", 1)):
        torch.manual_seed(seed)
        MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    matrix = build(world, tmp_path / "out", [tmp_path / "tuned"], base=tmp_path / "base")
    examples = examples_of(world)
    base, tuned = (
        independent(AutoModelForCausalLM.from_pretrained(tmp_path / n), examples)[0] for n in ("base", "tuned")
    )
    np.testing.assert_allclose(matrix.values[0], tuned - base, atol=1e-5)


def constant_model(folder, follows, tokenizer):
    """A model whose argmax after token t is follows[t], whatever came before: one-hot embeddings and no layers."""
    size = len(tokenizer)
    model = tiny_model(vocab_size=size, hidden_size=size, num_hidden_layers=1, intermediate_size=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        for token, following in follows.items():
            model.lm_head.weight[following, token] = 1.0
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_exact_match_forgetting_is_known_for_constructed_models(tmp_path):
    tokenizer = tiny_tokenizer()
    a, b, c, d = (tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in "abcd")
    constant_model(tmp_path / "base", {a: b, b: c, c: d}, tokenizer)
    constant_model(tmp_path / "forgot", {a: b, b: d}, tokenizer)
    rows = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]
    (tmp_path / "upstream.jsonl").write_text(
        "".join(json.dumps({"prompt": prompt, "response": response}) + "\n" for prompt, response in rows)
    )
    matrix = build(tmp_path, tmp_path / "out", ["forgot", "same=" + str(tmp_path / "base")])
    assert matrix.base_exact.tolist() == [True, True, True, False]
    assert matrix.exact.dtype == np.float32
    np.testing.assert_array_equal(matrix.exact, [[0, 1, 1, np.nan], [0, 0, 0, np.nan]])
    assert matrix.tasks == ["forgot", "same"]
    assert matrix.values[1].tolist() == [0.0] * 4
    assert matrix.summary()["per_task"]["forgot"]["exact_forgotten"] == pytest.approx(2 / 3)


def test_lower_precision_reports_its_noise_and_leaves_the_base_as_it_was(world, tmp_path, monkeypatch):
    states = []
    real = local.measure_noise

    def watched(model, *args, **kwargs):
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        noise = real(model, *args, **kwargs)
        after = model.state_dict()
        assert all(t.dtype == torch.bfloat16 and torch.equal(t, after[n]) for n, t in states[0].items())
        return noise

    monkeypatch.setattr(local, "measure_noise", watched)
    matrix = build(world, tmp_path / "out", ["full"], dtype="bfloat16", noise_examples=5)
    assert len(states) == 1
    assert matrix.noise["examples"] == 5
    assert matrix.noise["dtype"] == "bfloat16"
    assert matrix.noise["wider_dtype"]["dtype"] == "float32"
    examples = examples_of(world)
    model = AutoModelForCausalLM.from_pretrained(world / "base", dtype=torch.bfloat16).float()
    exact, _ = independent(model, examples)
    longest_first = np.argsort(examples.lengths, kind="stable")[[0, 10, 20, 29, 39]]
    difference = np.abs(exact - matrix.base)[longest_first]
    assert matrix.noise["wider_dtype"]["max"] == pytest.approx(difference.max(), rel=1e-3)
    assert matrix.noise["wider_dtype"]["rms"] == pytest.approx(np.sqrt((difference**2).mean()), rel=1e-3)
    assert 0 < matrix.noise["wider_dtype"]["max"] < 0.2
    assert matrix.summary()["noise"] == matrix.noise


def test_noise_that_cannot_be_measured_says_why(world, tmp_path, monkeypatch):
    real = perplexity.score_examples

    def scorer(model, *args, **kwargs):
        if next(model.parameters()).dtype == torch.float64:
            raise torch.OutOfMemoryError("tried to allocate too much")
        return real(model, *args, **kwargs)

    monkeypatch.setattr(perplexity, "score_examples", scorer)
    matrix = build(world, tmp_path / "out", ["full"], noise_examples=32)
    assert matrix.noise["wider_dtype"] == {"dtype": "float64", "unmeasured": "tried to allocate too much"}
    assert matrix.noise["batch_composition"]["max"] < 1e-5
    assert matrix.values.dtype == np.float64
    none = build(world, tmp_path / "none", ["full"], noise_examples=0)
    assert none.noise["batch_composition"] == {"unmeasured": "no example was asked for"}


def test_nan_rows_are_kept_counted_and_listed(world, tmp_path):
    tuned = AutoModelForCausalLM.from_pretrained(world / "full")
    examples = examples_of(world)
    rare = next(t for t in range(383, 0, -1) if 0 < sum(t in tokens[:-1] for tokens in examples.tokens) < 6)
    tuned.model.embed_tokens.weight.data[rare] = torch.nan
    tuned.save_pretrained(tmp_path / "broken")
    matrix = build(world, tmp_path / "out", [tmp_path / "broken", "full"])
    bad = [j for j, tokens in enumerate(examples.tokens) if rare in tokens[:-1]]
    assert np.flatnonzero(np.isnan(matrix.values[0])).tolist() == bad
    assert np.isfinite(matrix.values[1]).all()
    summary = matrix.summary()
    assert summary["nan"] == {"count": len(bad), "entries": [["broken", examples.ids[j]] for j in bad]}
    finite = matrix.values[np.isfinite(matrix.values)]
    assert summary["mean"] == pytest.approx(finite.mean())
    json.dumps(summary)
    with pytest.warns(RuntimeWarning, match=f"{len(bad)} of 40 columns hold NaN and are left out"):
        assert matrix.low_rank_r2(2) == pytest.approx(1.0)


def test_a_diverged_adapter_is_kept_as_nan(world, tmp_path):
    adapter = tmp_path / "diverged"
    shutil.copytree(world / "lora", adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: torch.full_like(t, torch.nan) for name, t in weights.items()}, adapter / "adapter_model.safetensors"
    )
    matrix = build(world, tmp_path / "out", [adapter, "lora"])
    assert np.isnan(matrix.values[0]).all()
    assert np.isfinite(matrix.values[1]).all()
    assert matrix.summary()["nan"]["count"] == 40


def test_its_repr_is_one_line(world, tmp_path):
    text = repr(build(world, tmp_path / "out", ["lora"]))
    assert text.startswith("ForgettingMatrix(1 tasks x 40 examples, mean ")
    assert len(text) < 100


def test_a_lost_table_is_written_again_by_the_same_command(world, tmp_path):
    first = build(world, tmp_path / "out", ["lora"])
    (tmp_path / "out" / "examples.parquet").unlink()
    again = build(world, tmp_path / "out", ["lora"])
    assert np.array_equal(first.values, again.values)


@pytest.mark.gpu
def test_on_a_gpu(world, tmp_path):
    settings = {"device": "cuda", "dtype": "bfloat16", "noise_examples": 8}
    first, again = (build(world, tmp_path / name, **settings) for name in ("first", "again"))
    assert np.array_equal(first.values, again.values)
    assert np.abs(first.values - build(world, tmp_path / "cpu", device="cpu").values).max() < 0.1
    assert first.noise["wider_dtype"]["max"] < 0.1


# Reading a matrix


def test_r2_of_matrices_whose_rank_is_known():
    rng = np.random.default_rng(0)
    rows, columns = rng.normal(size=(7, 3)), rng.normal(size=(3, 50))
    additive = matrix_of(0.3 + rows[:, :1] + columns[:1])
    assert additive.additive_r2() == pytest.approx(1.0)
    assert additive.low_rank_r2(1) < 0.999
    assert additive.low_rank_r2(2) == pytest.approx(1.0)
    low = matrix_of(rows @ columns)
    singular = np.linalg.svd(low.values, compute_uv=False)
    variance = ((low.values - low.values.mean()) ** 2).sum()
    assert low.low_rank_r2(1) == pytest.approx(1 - (singular[1:] ** 2).sum() / variance)
    assert low.low_rank_r2(3) == pytest.approx(1.0)
    with pytest.raises(ValueError, match="rank: expected 1 or more, got 0"):
        low.low_rank_r2(0)
    with pytest.raises(ValueError, match="expected a column without NaN, got none"):
        matrix_of(np.full((2, 3), np.nan)).additive_r2()


def test_summary_and_table(world, tmp_path):
    pandas = pytest.importorskip("pandas")
    matrix = build(world, tmp_path / "out", ["full", "other"], max_length=20)
    summary = matrix.summary()
    values = matrix.values
    assert (summary["tasks"], summary["examples"], summary["unfinished"]) == (2, 40, 0)
    assert summary["truncated"] == examples_of(world, max_length=20).truncated > 30
    assert summary["median"] == pytest.approx(np.median(values))
    assert summary["share_increased"] == pytest.approx((values > 0).mean())
    assert summary["per_task"]["other"]["mean"] == pytest.approx(values[1].mean())
    table = matrix.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert table.loc["other", matrix.examples[3]] == values[1, 3]


# Running


def test_the_progress_bar_counts_examples_and_tokens(world, tmp_path, capsys):
    settings = {"base": world / "base", "upstream": world / "upstream.jsonl", "noise_examples": 0}
    ff.forgetting_matrix(**settings, tasks=[world / "full"], out=tmp_path / "out", progress=True)
    shown = capsys.readouterr()
    assert not shown.out
    for part in ("full", "100%", "examples/s", "tokens/s", "0:00:00"):
        assert part in shown.err
    ff.forgetting_matrix(**settings, tasks=[world / "full"], out=tmp_path / "silent", progress=False)
    assert not capsys.readouterr().err


def test_the_base_is_loaded_once_and_every_checkpoint_once(world, tmp_path, monkeypatch):
    loaded = []
    from_pretrained, load = models.from_pretrained, models.ResidentModel._load
    monkeypatch.setattr(models, "from_pretrained", lambda c, dtype: loaded.append(c.label) or from_pretrained(c, dtype))
    monkeypatch.setattr(models.ResidentModel, "_load", lambda self, c: loaded.append(c.label) or load(self, c))
    build(world, tmp_path / "out", ["full", "lora", "other"])
    # The adapter comes before the checkpoints, which overwrite the base that it needs.
    assert loaded == ["base", "task 'full'", "task 'other'"]


def test_the_next_models_files_are_read_ahead(world, tmp_path, monkeypatch):
    read, start = [], readahead.ReadAhead.start
    monkeypatch.setattr(readahead.ReadAhead, "start", lambda self, task: read.append(task.name) or start(self, task))
    build(world, tmp_path / "out", ["full", "lora", "other"])
    assert read == ["lora", "full", "other"]
    assert not [thread for thread in threading.enumerate() if "read-ahead" in thread.name]


def test_reading_ahead_reads_every_byte_and_leaves_errors_to_the_loading(world, tmp_path, monkeypatch):
    read = []

    class File(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    def files(path, *args, **kwargs):
        return File(path) if str(path).endswith(".safetensors") else open(path, *args, **kwargs)

    monkeypatch.setattr(readahead, "CHUNK", 5000)
    monkeypatch.setattr(readahead, "open", files, raising=False)
    save_tuned(world / "base", tmp_path / "task", max_shard_size="40KB")
    task = find_checkpoint("task", str(tmp_path / "task"))
    with readahead.ReadAhead() as ahead:

        def bytes_read():
            read.clear()
            ahead.start(task)
            ahead._thread.join(60)
            assert not ahead._thread.is_alive()
            return sum(read)

        size = sum(path.stat().st_size for path in task.folder.glob("*.safetensors"))
        assert bytes_read() == size > 3 * 5000
        with monkeypatch.context() as patch:
            patch.setattr(readahead, "available_memory", lambda: 1.9 * size)
            assert bytes_read() == 0  # it would push out what the run itself needs
        shutil.rmtree(task.folder)
        assert bytes_read() == 0


def test_a_finished_run_is_not_run_again(world, tmp_path, monkeypatch):
    first = build(world, tmp_path / "out")
    monkeypatch.setattr(runner, "LocalRun", None)  # nothing is loaded
    again = build(world, tmp_path / "out")
    np.testing.assert_array_equal(first.values, again.values)


def test_an_unfinished_matrix_can_be_read(world, tmp_path, monkeypatch):
    real = Store.write_unit

    def stops(self, unit, *args):
        if unit.index == 3:
            raise KeyboardInterrupt
        real(self, unit, *args)

    monkeypatch.setattr(Store, "write_unit", stops)
    with pytest.raises(KeyboardInterrupt):
        build(world, tmp_path / "out", ["full", "other"])
    matrix = ff.ForgettingMatrix.load(tmp_path / "out")
    assert not matrix.complete
    assert np.isfinite(matrix.base).all()
    done = ~matrix.unfinished
    assert done[0].any()
    assert not done[0].all()
    assert not done[1].any()
    np.testing.assert_array_equal(np.isfinite(matrix.values), done)
    assert matrix.summary()["nan"]["count"] == 0
    assert matrix.summary()["unfinished"] == (~done).sum()


def test_another_environment_is_said(world, tmp_path):
    build(world, tmp_path / "out", ["full"])
    store = Store(tmp_path / "out")
    manifest = store.manifest()
    manifest["environment"]["torch"] = "1.0"
    store.write_manifest(manifest)
    (tmp_path / "out" / "units" / "task-0000_shard-0001.parquet").unlink()
    with pytest.warns(RuntimeWarning, match=r"begun in another environment \(torch 1\.0 -> "):
        build(world, tmp_path / "out", ["full"])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # torch's own
def test_compiled_models_give_the_same_values_from_few_graphs(world, tmp_path, monkeypatch):
    from torch._dynamo.utils import counters

    monkeypatch.setattr(
        models, "COMPILER", "eager"
    )  # traces as the real one does, and takes seconds in place of minutes
    shapes, real = set(), perplexity.score_examples

    def scorer(model, input_ids, attention_mask=None, labels=None):
        if attention_mask is None and labels is not None:
            shapes.add(tuple(input_ids.shape))
        return real(model, input_ids, attention_mask, labels)

    settings = {"tasks": ["full", "lora"], "tokens_per_batch": 500, "max_length": 90}
    wanted = build(world, tmp_path / "out", **settings)
    monkeypatch.setattr(perplexity, "score_examples", scorer)
    counters.clear()
    found = build(world, tmp_path / "compiled", **settings, compile=True)
    assert {length for _, length in shapes} == {64, 96}
    assert len(shapes) > 2
    assert counters["stats"]["unique_graphs"] == 2 * 2  # for the checkpoints, and for the adapter
    np.testing.assert_allclose(found.values, wanted.values, atol=2e-6)
    np.testing.assert_allclose(found.base, wanted.base, atol=2e-6)
    np.testing.assert_array_equal(found.base_exact, wanted.base_exact)
    assert found.noise["batch_composition"]["max"] < 2e-6
    with pytest.raises(ValueError, match="settings compile: null there, true here"):
        build(world, tmp_path / "out", **settings, compile=True)


# Out of memory


def small_memory(monkeypatch, cells, error=torch.OutOfMemoryError):
    """A scorer that has memory for batches of so many padded tokens."""
    real = perplexity.score_examples

    def scorer(model, input_ids, *args, **kwargs):
        if input_ids.numel() > cells:
            raise error("DefaultCPUAllocator: can't allocate memory")
        return real(model, input_ids, *args, **kwargs)

    monkeypatch.setattr(perplexity, "score_examples", scorer)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, RuntimeError, MemoryError])
def test_out_of_memory_halves_the_budget_writes_it_down_and_goes_on(world, tmp_path, monkeypatch, error):
    wanted = build(world, tmp_path / "small", ["full"], tokens_per_batch=512)
    small_memory(monkeypatch, 600, error)
    with pytest.warns(RuntimeWarning) as caught:
        found = build(world, tmp_path / "out", ["full"], tokens_per_batch=2048)
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        f"out of memory on cpu with {before} tokens per batch; the run goes on with {before // 2}"
        for before in (2048, 1024)
    ]
    events = Store(tmp_path / "out").events("budget")
    assert [(event["from_unit"], event["tokens_per_batch"]) for event in events] == [(0, 1024), (0, 512)]
    np.testing.assert_array_equal(found.values, wanted.values)  # the plan of 512 tokens from the first unit on


def test_an_example_that_does_not_fit_alone_is_named(world, tmp_path, monkeypatch):
    small_memory(monkeypatch, 60)
    examples = examples_of(world)
    longest = examples.ids[int(np.argmax(examples.lengths))]
    message = rf"got '{longest}' of 256 tokens, which does not fit alone on cpu; choose a smaller max_length"
    with pytest.warns(RuntimeWarning, match="out of memory"), pytest.raises(ValueError, match=message):
        build(world, tmp_path / "out", ["full"])


def test_other_errors_of_the_scorer_are_not_taken_for_memory(world, tmp_path, monkeypatch):
    small_memory(monkeypatch, 10**9)
    monkeypatch.setattr(
        perplexity, "score_examples", lambda *args, **kwargs: (_ for _ in ()).throw(RuntimeError("odd"))
    )
    with pytest.raises(RuntimeError, match="odd"):
        build(world, tmp_path / "out", ["full"])
