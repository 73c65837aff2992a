"""`ff.optim` inside transformers' Trainer and accelerate, and in two processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from architectures.families import build
from architectures.layouts import padded, some_examples
from end_to_end.two_processes import run_in_two_processes
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import fastforget as ff

ROWS = some_examples(seed=8, lengths=(5, 12, 2, 9, 14, 3, 7, 8))


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    batch = padded(rows, "right")
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)}


def trainer_of(model: Any, folder: Path, optimizer: Any = None, **settings: Any) -> Trainer:
    """Over two epochs of two steps, with accumulation, clipping and a schedule."""
    arguments: dict[str, Any] = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "save_strategy": "no"}
    arguments |= {"gradient_accumulation_steps": 2, "remove_unused_columns": False, "disable_tqdm": True, "seed": 3}
    arguments |= {"report_to": "none", "use_cpu": True, "logging_strategy": "no", "max_grad_norm": 0.5}
    arguments |= {"learning_rate": 1e-2, "weight_decay": 0.3, "optim": "adamw_torch", "lr_scheduler_type": "cosine"}
    options = TrainingArguments(str(folder), **(arguments | settings))
    return Trainer(model, options, data_collator=collate, train_dataset=ROWS, optimizer_cls_and_kwargs=optimizer)


def additions(model: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    return {
        "fisher": {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()},
        "mask": {name: torch.rand(shape, generator=generator) > 0.3 for name, shape in shapes.items()},
        "fisher_decay": 0.9,
        "anchor": "initial",
        "ewc_lambda": 0.5,
        "soft_weight": 1.0,
    }


@pytest.mark.parametrize("family", ["GPT-2", "Llama, tied"])
def test_trainer_without_options_is_as_with_its_own(family: str, tmp_path: Path):
    """The same groups, biases and norms without decay, and the same bits."""
    numbers = {"lr": 1e-2, "weight_decay": 0.3}
    trainers = []
    for optimizer in (None, (ff.optim.AdamW.for_trainer, numbers)):
        trainer = trainer_of(build(family), tmp_path, optimizer)
        trainer.train()
        trainers.append(trainer)
    own, ours = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(value, ours[name]) for name, value in own.items())
    assert any(not torch.equal(value, ours[name]) for name, value in build(family).state_dict().items())
    groups = trainers[1].optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert not any("bias" in name or "norm" in name for name in groups[0]["param_names"])


def test_trainer_sees_the_names_of_a_peft_model(tmp_path: Path):
    """LoRA's matrices alone, which all decay: one group."""
    model = get_peft_model(build("Llama"), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    mask = {name: torch.zeros_like(parameter, dtype=torch.bool) for name, parameter in trainable.items()}
    first, *_ = mask
    mask[first] |= True
    before = {name: parameter.detach().clone() for name, parameter in trainable.items()}
    trainer = trainer_of(model, tmp_path, (ff.optim.SGD.for_trainer, {"lr": 0.1, "mask": mask}))
    trainer.train()
    assert len(trainer.optimizer.param_groups) == 1
    assert {name for name, parameter in trainable.items() if not torch.equal(parameter, before[name])} == {first}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_resumes_bit_for_bit(dtype: torch.dtype, tmp_path: Path):
    weights = []
    for part in ("whole", "first half", "second half"):
        model = build("Llama, tied", dtype)
        options = {"lr": 1e-2, "state_dtype": torch.float32, "stochastic_rounding": True} | additions(model)
        folder = tmp_path / ("whole" if part == "whole" else "halves")
        settings = {"save_strategy": "steps", "save_steps": 2}
        trainer = trainer_of(model, folder, (ff.optim.AdamW.for_trainer, options), **settings)
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if part == "second half" else None)
        weights.append(
            model.state_dict() | {f"fisher {name}": f for name, f in trainer.optimizer.optimizer.fisher.items()}
        )
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[0].items())


def test_accelerate(tmp_path: Path):
    """Prepared, with accumulation and clipping: as in a loop by hand."""
    models = [build("GPT-2").eval() for _ in range(2)]
    plain = ff.optim.AdamW(models[0], lr=1e-2, **additions(models[0]))
    for start in (0, 4):
        for rows in (ROWS[start : start + 2], ROWS[start + 2 : start + 4]):
            (models[0](**collate(rows)).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(models[0].parameters(), 0.5)
        plain.step()
        plain.zero_grad()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2, collate_fn=collate)
    optimizer = ff.optim.AdamW(models[1], lr=1e-2, **additions(models[1]))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    model, prepared, loader, schedule = accelerator.prepare(models[1], optimizer, loader, schedule)
    for batch in loader:
        with accelerator.accumulate(model):
            accelerator.backward(model(**batch).loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            prepared.step()
            schedule.step()
            prepared.zero_grad()
    expected = models[0].state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in models[1].state_dict().items())
    assert all(torch.equal(value, plain.fisher[name]) for name, value in optimizer.fisher.items())


# In two processes -----------------------------------------------------------------------------------------------------

PROLOGUE = """
import copy
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from architectures.layouts import padded, some_examples
from test_optim_integrations import additions, collate

batches = [collate(some_examples(seed=s, lengths=(7, 12))) for s in range(6)]  # the same for both
wrap = {"DDP": DistributedDataParallel, "FSDP2": sharded}
for shape in ((2, 1), (1, 2)):  # hybrid: copies over the first dimension, shards over the second
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    wrap[f"FSDP2 over {shape}"] = lambda model, mesh=mesh: sharded(model, mesh=mesh)
numbers = {"AdamW": {"lr": 0.01, "amsgrad": True}, "SGD": {"lr": 0.01, "momentum": 0.9}}


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(model, optimizer, batches):
    for batch in batches:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def agree(model, optimizer, alone, expected, kind):
    for (name, value), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        assert torch.allclose(whole(value), other, rtol=1e-9, atol=1e-12), (kind, name)
    for name, value in expected.fisher.items():
        assert torch.allclose(whole(optimizer.fisher[name]), value, rtol=1e-9, atol=1e-15), (kind, name)
"""

EQUAL = """
for name, settings in numbers.items():
    cls = getattr(ff.optim, name)
    for fixed in (False, True):
        alone = build("Llama, tied", torch.float64)
        options = settings | additions(alone) | ({"fisher_decay": None} if fixed else {})
        expected = cls(alone, **options)
        train(alone, expected, batches)
        for kind, wrapper in wrap.items():
            model = wrapper(build("Llama, tied", torch.float64))
            optimizer = cls(model, **options)
            train(model, optimizer, batches)
            agree(model, optimizer, alone, expected, kind)
            if "FSDP2" in kind:
                assert all(isinstance(value, DTensor) for value in optimizer.fisher.values())
"""

CHECKPOINT = """
for kind in ("FSDP2", "FSDP2 over (1, 2)"):
    options = {"lr": 0.01, "state_dtype": torch.float32, "stochastic_rounding": True} | additions(build("Llama"))
    model = wrap[kind](build("Llama", torch.bfloat16))
    optimizer = ff.optim.AdamW(model, **options)
    train(model, optimizer, batches[:3])
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    fresh = ff.optim.AdamW(model, **options | {"anchor": build("Llama", torch.bfloat16)})
    set_optimizer_state_dict(model, fresh, state)
    for own, loaded in zip(optimizer.state.values(), fresh.state.values(), strict=True):
        assert own.keys() - loaded.keys() == {"anchor"}  # which the fresh one was given
        for key, value in loaded.items():
            assert key == "step" or isinstance(value, DTensor), key
            assert own[key].dtype == value.dtype and torch.equal(whole(own[key]), whole(value)), key
    before = [parameter.to_local().detach().clone() for parameter in model.parameters()]
    train(model, optimizer, batches[3:])
    after = {name: whole(value).clone() for name, value in model.named_parameters()}
    for parameter, value in zip(model.parameters(), before, strict=True):
        parameter.data.to_local().copy_(value)
    train(model, fresh, batches[3:])
    for name, value in model.named_parameters():
        assert torch.equal(whole(value), after[name]), name
"""

ROUNDING = """
class One(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(4, 500, dtype=torch.bfloat16))


for shape, copies in (((1, 2), False), ((2, 1), True)):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards"))
    model = fully_shard(One(), mesh=mesh)
    optimizer = ff.optim.SGD(model, lr=2**-10, stochastic_rounding=True)
    model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    moved = (model.weight.to_local() != 1).to(torch.uint8)
    parts = [torch.empty_like(moved) for _ in range(2)]
    dist.all_gather(parts, moved)
    assert 0 < moved.sum() < moved.numel()
    assert torch.equal(*parts) == copies, shape
"""

LATE = """
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters

for initial in (False, True):
    options = {"lr": 0.01} | additions(build("Llama"))
    if not initial:
        options |= {"anchor": build("Llama", torch.float64), "fisher_decay": None}
    alone = build("Llama", torch.float64)
    expected = ff.optim.AdamW(alone, **options)
    train(alone, expected, batches)
    model = build("Llama", torch.float64)
    optimizer = ff.optim.AdamW(model, **options)
    addresses = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:  # as accelerate's prepare does
        for i, parameter in enumerate(group["params"]):
            group["params"][i] = torch.empty(1, dtype=parameter.dtype)
            group["params"][i].data_ptr = parameter.data_ptr()
    sharded(model)
    new = dict(model.named_parameters())
    fsdp2_switch_optimizer_parameters(optimizer, {addresses[name]: new[name] for name in addresses})
    train(model, optimizer, batches)
    agree(model, optimizer, alone, expected, "late")
"""


@pytest.mark.parametrize(
    "script", [EQUAL, CHECKPOINT, ROUNDING, LATE], ids=["equal", "checkpoint", "rounding", "sharded after"]
)
def test_two_processes_are_as_one(script: str, tmp_path: Path):
    """Distributed over copies and shards, uneven ones too, a run is that of one process."""
    run_in_two_processes(PROLOGUE + script, tmp_path)
