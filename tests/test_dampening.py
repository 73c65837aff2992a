"""Selective dampening of models and checkpoints, against a loop over the entries in float64."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from architectures.families import build
from end_to_end.two_processes import run_in_two_processes
from tiny_models import tiny_model
from torch import nn
from transformers import AutoModelForCausalLM

import fastforget as ff
from fastforget.fisher.files import save_fisher
from fastforget.fisher.names import Fisher
from fastforget.update import dampening
from fastforget.update.dampening import dampen_checkpoint


def random_fisher(model, seed, names=None):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(p.shape, generator=generator) ** 4
        for name, p in model.named_parameters()
        if names is None or name in names
    }


def dampened(model, forget, retain, alpha=10.0, lam=1.0):
    """Entry by entry."""
    result, counts = {}, {}
    for name, parameter in model.named_parameters():
        values = parameter.detach().double().clone().flatten()
        counts[name] = 0
        if name in forget:
            for i, (f, r) in enumerate(
                zip(forget[name].double().flatten().tolist(), retain[name].double().flatten().tolist(), strict=True)
            ):
                if f > alpha * r:
                    values[i] *= min(lam * r / f, 1.0)
                    counts[name] += 1
        result[name] = values.view(parameter.shape)
    return result, counts


@pytest.fixture
def small():
    return tiny_model(hidden_size=16, intermediate_size=24, vocab_size=40)


@pytest.mark.parametrize(("alpha", "lam"), [(10.0, 1.0), (2.0, 5.0), (0.5, 0.5)])
def test_dampens_as_the_loop_does(small, alpha, lam, tmp_path):
    forget, retain = random_fisher(small, 1), random_fisher(small, 2)
    expected, counts = dampened(small, forget, retain, alpha, lam)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    save_fisher(tmp_path / "retain.safetensors", retain, {})
    arguments = {"forget": forget, "retain": tmp_path / "retain.safetensors", "alpha": alpha, "lam": lam}
    assert ff.selective_dampening_(small, **arguments, dry_run=True) == counts
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert ff.selective_dampening_(small, **arguments) == counts
    assert 0 < sum(counts.values()) < sum(p.numel() for p in small.parameters())
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=2e-7, atol=0)
        untouched = ~(forget[name] > alpha * retain[name])
        assert torch.equal(parameter[untouched], before[name][untouched])


def test_parameters_without_a_fisher_stay_and_groups_do_not_matter(small, monkeypatch):
    names = ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"]
    forget, retain = random_fisher(small, 1, names), random_fisher(small, 2, names)
    expected, counts = dampened(small, forget, retain, 1.0)
    monkeypatch.setattr(dampening, "BYTES", 1)  # each tensor is a group
    assert ff.selective_dampening_(small, forget=forget, retain=retain, alpha=1.0) == {
        n: counts[n] for n in counts if n in names
    }
    for name, parameter in small.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), expected[name], rtol=2e-7, atol=0)


def test_bfloat16_models_and_estimators():
    model = build("Llama, tied")
    estimators = []
    for seed in range(2):
        estimator = ff.DiagonalFisher(model)
        estimator.update(torch.randint(3, 131, (2, 9), generator=torch.Generator().manual_seed(seed)))
        estimators.append(estimator)
    forget, retain = (estimator.diagonal() for estimator in estimators)
    model.bfloat16()
    expected, counts = dampened(model, forget, retain)
    assert ff.selective_dampening_(model, forget=estimators[0], retain=estimators[1]) == counts
    assert sum(counts.values())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name].bfloat16(), rtol=2**-8, atol=0)


def test_tied_parameters_answer_to_their_other_name():
    model = tiny_model(tie_word_embeddings=True)
    embedding = torch.ones_like(model.lm_head.weight)
    counts = ff.selective_dampening_(
        model, forget={"lm_head.weight": embedding}, retain={"lm_head.weight": torch.zeros_like(embedding)}
    )
    assert counts == {"model.embed_tokens.weight": embedding.numel()}
    assert not model.lm_head.weight.any()


def test_modules_that_an_adapter_replaces_are_those_that_change():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
    name = "lm_head.weight"
    shape = model.base_model.model.lm_head.original_module.weight.shape
    ff.selective_dampening_(model, forget={name: torch.ones(shape)}, retain={name: torch.zeros(shape)})
    assert model.base_model.model.lm_head.original_module.weight.any()
    assert not model.base_model.model.lm_head.modules_to_save["default"].weight.any()


def changed(fisher, name, value):
    return fisher | {name: value}


WRONG = [
    (lambda f: {"x.weight": torch.ones(2)}, "forget: expected names of the model's parameters, got 'x.weight'"),
    (lambda f: changed(f, "model.norm.weight", torch.ones(3)), r"'model.norm.weight'\]: expected shape \(16,\)"),
    (
        lambda f: changed(f, "model.norm.weight", -torch.ones(16)),
        r"'model.norm.weight'\]: expected finite values >= 0, got -1",
    ),
    (lambda f: changed(f, "model.norm.weight", torch.full((16,), torch.nan)), "expected finite values >= 0, got nan"),
    (lambda f: changed(f, "model.norm.weight", torch.ones(16, dtype=torch.int64)), "expected float32 or float64, got"),
]


@pytest.mark.parametrize(("change", "message"), WRONG, ids=range(len(WRONG)))
@pytest.mark.parametrize("to_file", [False, True])
def test_wrong_fishers_are_refused_before_anything_is_written(small, change, message, to_file, tmp_path, monkeypatch):
    monkeypatch.setattr(dampening, "BYTES", 1)  # the wrong tensor is in one of the last groups
    good = random_fisher(small, 1)
    bad = change(good)
    before = {name: p.detach().clone() for name, p in small.named_parameters()}
    if to_file:
        small.save_pretrained(tmp_path / "model")
        message = message.replace("parameters", "tensors")
    dampen = (
        partial(dampen_checkpoint, tmp_path / "model", tmp_path / "out")
        if to_file
        else partial(ff.selective_dampening_, small)
    )
    with pytest.raises((ValueError, TypeError), match=message):
        dampen(forget=bad, retain={name: 0 * value for name, value in bad.items()})
    assert all(torch.equal(p, before[name]) for name, p in small.named_parameters())
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]


def test_other_wrong_input_is_refused(small):
    fisher = random_fisher(small, 1)
    fewer = {name: value for name, value in fisher.items() if name != "model.norm.weight"}
    for forget, retain, message in (
        (fisher, fewer, "retain: expected the names of forget, got none for 'model.norm.weight'"),
        (fewer, fisher, "retain: expected the names of forget, got 'model.norm.weight' besides"),
        (3, fisher, "forget: fisher: expected a DiagonalFisher"),
        (fisher, "gone.safetensors", "retain: path: expected an existing file"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            ff.selective_dampening_(small, forget=forget, retain=retain)
    elsewhere = fisher | {"model.norm.weight": torch.ones(16, device="meta")}
    with pytest.raises(ValueError, match="expected device cpu like the parameter, got meta"):
        ff.selective_dampening_(small, forget=elsewhere, retain=fisher)
    with pytest.raises(ValueError, match="alpha: expected a finite number"):
        ff.selective_dampening_(small, forget=fisher, retain=fisher, alpha=-1.0)
    with pytest.raises(ValueError, match="lam: expected a finite number"):
        ff.selective_dampening_(small, forget=fisher, retain=fisher, lam=float("nan"))
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got dict"):
        ff.selective_dampening_(dict(fisher), forget=fisher, retain=fisher)  # type: ignore[arg-type]
    tied = tiny_model(tie_word_embeddings=True)
    both = {name: torch.ones_like(tied.lm_head.weight) for name in ("lm_head.weight", "model.embed_tokens.weight")}
    with pytest.raises(ValueError, match=r"expected one tensor a parameter, got .* tied to 'lm_head.weight'"):
        ff.selective_dampening_(tied, forget=both, retain=both)
    with pytest.raises(ValueError, match="out: expected a new folder, got none"):
        dampen_checkpoint("x", None, forget=fisher, retain=fisher)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (
            torch.ones(4, 10)[:, :5],
            r"model: expected dense parameters, got strides \(10, 1\) for shape \(4, 5\) of '1'",
        ),
        (torch.ones(2).to(torch.float8_e5m2), "model: expected floating-point .*, got torch.float8_e5m2 for '1'"),
        (None, "model: expected every parameter's own memory, got that of '0' for '1'"),
    ],
)
def test_parameters_that_cannot_be_written_are_refused_before_the_others_are(last, message, monkeypatch):
    monkeypatch.setattr(dampening, "BYTES", 1)
    first = torch.ones(3)
    model = nn.ParameterList([nn.Parameter(first), nn.Parameter(first if last is None else last, requires_grad=False)])
    forget = {name: torch.ones(p.shape) for name, p in model.named_parameters()}
    with pytest.raises((ValueError, TypeError), match=message):
        ff.selective_dampening_(model, forget=forget, retain={name: 0 * value for name, value in forget.items()})
    assert first.tolist() == [1, 1, 1]


def test_a_checkpoint_is_dampened_like_the_model(tmp_path):
    model = tiny_model(tie_word_embeddings=True)
    names = [name for name, _ in model.named_parameters() if "mlp" in name or "embed" in name]
    aliases = {"aliases": {"lm_head.weight": "model.embed_tokens.weight"}}
    forget, retain = (Fisher(random_fisher(model, seed, names), aliases) for seed in (1, 2))
    model.save_pretrained(tmp_path / "model")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    dampen_checkpoint(model, tmp_path / "of_module", forget=forget, retain=retain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    report = dampen_checkpoint(
        tmp_path / "model", tmp_path / "out", forget=forget, retain=retain, max_shard_size="50KB"
    )
    counts = ff.selective_dampening_(model, forget=forget, retain=retain)
    assert {name: n for name, n in report.changed.items() if name in names} == counts
    assert sum(report.changed.values()) == sum(counts.values()) > 0
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    for out in ("out", "of_module"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / out)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, loaded.get_parameter(name)), name


WORKER = """
from pathlib import Path

from fastforget.fisher.files import save_fisher

rank, folder = dist.get_rank(), Path(__file__).parent
whole = build("Llama, tied")
with torch.no_grad():
    values = torch.Generator().manual_seed(0)
    fishers = [{n: torch.rand(p.shape, generator=values) ** 4 for n, p in whole.named_parameters()} for _ in range(2)]
expected = ff.selective_dampening_(whole, forget=fishers[0], retain=fishers[1])
assert sum(expected.values())
path = folder / f"retain{rank}.safetensors"
save_fisher(path, fishers[1], {})
model = sharded(build("Llama, tied"))
before = {n: p.full_tensor().clone() for n, p in model.named_parameters()}
bad = {n: f.clone() for n, f in fishers[0].items()}
bad["model.layers.1.mlp.up_proj.weight"][-1, -1] = -1.0  # in the second process's shard
try:
    ff.selective_dampening_(model, forget=bad, retain=path)
except ValueError as error:
    where = "got others for" if rank == 0 else "forget['model.layers.1.mlp.up_proj.weight']: expected finite values >= 0"
    assert where in str(error), error
else:
    raise AssertionError("not refused")
assert all(torch.equal(p.full_tensor(), before[n]) for n, p in model.named_parameters())
assert ff.selective_dampening_(model, forget=fishers[0], retain=path) == expected
for name, parameter in model.named_parameters():
    assert torch.equal(parameter.full_tensor(), whole.get_parameter(name)), name

try:
    ff.fisher_merge([model, model], fishers)
except ValueError as error:
    assert "expected a whole tensor with values, got a sharded one; save the model" in str(error), error
else:
    raise AssertionError("not refused")
delta = {n: torch.randn(p.shape, generator=values) for n, p in whole.named_parameters()}
ff.add_delta_(whole, delta, -0.3)
ff.add_delta_(model, delta, -0.3)
for name, parameter in model.named_parameters():
    assert torch.equal(parameter.full_tensor(), whole.get_parameter(name)), name
"""


def test_sharded_models_in_two_processes(tmp_path: Path):
    run_in_two_processes(WORKER, tmp_path)
