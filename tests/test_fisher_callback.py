"""The Fisher inside other people's loops: transformers' Trainer and accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from architectures.families import build
from architectures.layouts import padded, some_examples
from fisher_oracle import assert_exact, batch_1_fisher, float64_throughout
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import Trainer, TrainingArguments

import fastforget as ff

IGNORE = -100


@pytest.fixture(autouse=True)
def only_float64() -> Iterator[None]:
    with float64_throughout():
        yield


def with_labels(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch | {"labels": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORE)}


def collate(rows: list[Tensor]) -> dict[str, Tensor]:
    return with_labels(padded(rows, "right"))


def trainer_of(model: Any, rows: list[Tensor], folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    arguments = {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    arguments |= {"gradient_accumulation_steps": 2, "remove_unused_columns": False, "disable_tqdm": True}
    arguments |= {"report_to": "none", "use_cpu": True, "logging_strategy": "no"} | settings
    options = TrainingArguments(str(folder), **arguments)
    return Trainer(model, options, data_collator=collate, train_dataset=rows, callbacks=list(callbacks))


ROWS = some_examples(seed=8, lengths=(5, 12, 2, 9, 14, 3, 7, 8, 6, 4, 11))  # the last step has fewer


@pytest.mark.parametrize("loss", ["mean", "sum"])
@pytest.mark.parametrize("counted", [True, False], ids=["over all micro-batches", "a micro-batch"])
def test_trainer(counted: bool, loss: str, model: Any, tmp_path: Path):
    """Without training it is the Fisher of the examples that were seen, whatever the loss is divided by."""
    fisher = ff.DiagonalFisher(model, loss=loss)
    model.accepts_loss_kwargs = counted
    trainer = trainer_of(model, ROWS, tmp_path, ff.FisherCallback(fisher))
    trainer.train()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, ROWS, loss=loss), torch.float64)
    assert fisher.metadata["examples"] == len(ROWS)


def test_trainer_every_second_step_and_its_square(model: Any, tmp_path: Path):
    fisher = ff.DiagonalFisher(model)
    trainer_of(model, ROWS[:8], tmp_path, ff.FisherCallback(fisher, every=2)).train()
    assert fisher.metadata["examples"] == 4
    square = ff.DiagonalFisher(model, per="batch_mean")
    trainer_of(model, ROWS[:4], tmp_path, ff.FisherCallback(square), max_grad_norm=0.0).train()
    model.zero_grad()
    tokens = sum(len(row) - 1 for row in ROWS[:4])
    for row in ROWS[:4]:
        (model(row[None], labels=row[None]).loss * ((len(row) - 1) / tokens)).backward()
    expected = {name: p.grad.square() for name, p in model.named_parameters()}
    assert_exact(square.diagonal(), expected, torch.float64)
    with pytest.raises(ValueError, match="every: expected an integer >= 1, got 0"):
        ff.FisherCallback(fisher, every=0)


def test_training_is_bitwise_what_it_is_without(tmp_path: Path):
    """With dropout, clipping and weights that move."""
    weights = []
    for observed in (False, True):
        model = build("GPT-2", torch.float32)
        fisher = ff.DiagonalFisher(model)
        callbacks = [ff.FisherCallback(fisher)] if observed else []
        trainer_of(model, ROWS, tmp_path, *callbacks, learning_rate=1e-2, num_train_epochs=2).train()
        weights.append(model.state_dict())
    assert fisher.metadata["examples"] == 2 * len(ROWS)
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    moved = build("GPT-2", torch.float32).state_dict()
    assert not torch.equal(moved["lm_head.weight"], weights[0]["lm_head.weight"])


def test_what_is_no_fisher_of_the_trained_model_is_refused(model: Any, tmp_path: Path):
    with pytest.raises(
        TypeError, match="fisher: expected a DiagonalFisher, got LlamaForCausalLM; write FisherCallback"
    ):
        ff.FisherCallback(model)
    callback = ff.FisherCallback(ff.DiagonalFisher(build("Llama, tied", torch.float64)))
    with pytest.raises(
        ValueError, match="fisher: expected a DiagonalFisher of the model that the Trainer trains, got "
    ):
        trainer_of(model, ROWS, tmp_path, callback).train()


def test_an_adapter_is_trained(model: Any, tmp_path: Path):
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    fisher = ff.DiagonalFisher(tuned)
    trainer_of(tuned, ROWS[:4], tmp_path, ff.FisherCallback(fisher)).train()
    assert fisher.metadata["examples"] == 4


def test_label_smoothing_is_refused(model: Any, tmp_path: Path):
    callback = ff.FisherCallback(ff.DiagonalFisher(model))
    with pytest.raises(ValueError, match=r"FisherCallback: expected label_smoothing_factor=0, whose loss is no log-l"):
        trainer_of(model, ROWS, tmp_path, callback, label_smoothing_factor=0.1).train()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_mixed_precision(smoothing: float, tmp_path: Path):
    """Accelerate gives other logits out than those that the model's loss is computed from: the loss is checked all the same."""
    model = build("Llama", torch.float32)

    def loss(logits: Tensor, labels: Tensor, vocab_size: int, num_items_in_batch: Any = None, **_: Any) -> Tensor:
        count = (labels[:, 1:] != IGNORE).sum() if num_items_in_batch is None else num_items_in_batch
        flat = logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(*flat, reduction="sum", label_smoothing=smoothing) / count

    model.loss_function = loss
    fisher = ff.DiagonalFisher(model)
    trainer = trainer_of(model, ROWS[:4], tmp_path, ff.FisherCallback(fisher), bf16=True)
    if smoothing:
        with pytest.raises(ValueError, match="model: its loss is another than"):
            trainer.train()
        return
    trainer.train()
    assert fisher._watched.loss_checked
    update = ff.DiagonalFisher(model)
    update.update(**padded(ROWS[:4], "right"))
    expected = update.diagonal()
    for name, value in fisher.diagonal().items():
        assert (value - expected[name]).norm() < 0.1 * expected[name].norm(), name


def test_training_that_is_interrupted_can_begin_again(model: Any, tmp_path: Path):
    """Trainer does not tell its callbacks, and the model must not stay as it was inside."""
    fisher, calls = ff.DiagonalFisher(model), []

    def interrupt(module: Any, *_: Any) -> None:
        calls.append(module.training)
        if sum(calls) == 3:  # in the second step
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    callback = ff.FisherCallback(fisher)
    trainer = trainer_of(model, ROWS, tmp_path, callback)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    handle.remove()
    callback.on_train_begin(trainer.args, None, None)  # as its next training does
    fisher = ff.DiagonalFisher(model)
    callback = ff.FisherCallback(fisher)
    assert not any("forward" in vars(module) for module in model.modules())
    trainer_of(model, ROWS, tmp_path, callback).train()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, ROWS), torch.float64)


def test_accelerate(model: Any):
    """Its backward divides by the number of micro-batches, which the caller says."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    fisher = ff.DiagonalFisher(model)
    loader = torch.utils.data.DataLoader(ROWS, batch_size=4, collate_fn=collate)
    prepared, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), loader)
    for batch in loader:
        targets = int((batch["labels"][:, 1:] != IGNORE).sum())
        with accelerator.accumulate(prepared), fisher.observe(loss_denominator=2 * targets):
            accelerator.backward(prepared(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    assert_exact(fisher.diagonal(), batch_1_fisher(model, ROWS), torch.float64)
    assert not any("forward" in vars(module) for module in model.modules())
