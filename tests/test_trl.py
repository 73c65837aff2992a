"""The Fisher and the optimizers inside TRL's trainer, whose loss comes from a head of its own that keeps no logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures.families import build
from architectures.layouts import some_examples
from fisher_oracle import assert_exact, batch_1_fisher
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

import fastforget as ff

datasets = pytest.importorskip("datasets", reason="TRL's trainer takes its data sets")
trl = pytest.importorskip("trl", reason="TRL's trainer is tested where it is installed")

ROWS = some_examples(seed=8, lengths=(5, 12, 2, 9, 14, 3, 7, 8, 6, 4, 11))  # the last step has fewer
LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture
def llama() -> Any:
    return build("Llama", torch.float32)


def trainer_of(model: Any, folder: Path, *, optimizer: Any = None, adapter: Any = None, **settings: Any) -> Any:
    from tokenizers import Tokenizer, models

    words = {f"w{i}": i for i in range(model.config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    arguments = {"learning_rate": 0.0, "num_train_epochs": 1, "per_device_train_batch_size": 2, "save_strategy": "no"}
    arguments |= {"gradient_accumulation_steps": 3, "disable_tqdm": True, "report_to": "none", "use_cpu": True}
    arguments |= {"logging_strategy": "no", "bf16": False, "activation_checkpointing": False} | settings
    return trl.SFTTrainer(
        model,
        args=trl.SFTConfig(str(folder), **arguments),
        train_dataset=datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in ROWS]}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, unk_token="w0", pad_token="w1", eos_token="w2"
        ),
        peft_config=adapter,
        **({} if optimizer is None else {"optimizer_cls_and_kwargs": optimizer}),
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_adapter(checkpointing: bool, llama: Any, tmp_path: Path):
    """Over micro-batches of different numbers of targets, each example counts as it would alone."""
    trainer = trainer_of(llama, tmp_path, adapter=LORA, activation_checkpointing=checkpointing)
    fisher = ff.DiagonalFisher(trainer.model)
    trainer.add_callback(ff.FisherCallback(fisher))
    trainer.train()
    assert fisher.metadata["examples"] == len(ROWS)
    assert len(fisher.diagonal()) == 8
    assert_exact(fisher.diagonal(), batch_1_fisher(trainer.model, ROWS), torch.float32)


def test_all_weights_but_those_of_its_head(llama: Any, tmp_path: Path):
    trainer = trainer_of(llama, tmp_path)
    trainer.add_callback(ff.FisherCallback(ff.DiagonalFisher(llama)))
    with pytest.raises(ValueError, match=r"model: lm_head.weight was used where no rule sees it .*ChunkedLogProb"):
        trainer.train()
    trainer = trainer_of(llama, tmp_path)
    fisher = ff.DiagonalFisher(llama, parameters=lambda name: "lm_head" not in name)
    trainer.add_callback(ff.FisherCallback(fisher))
    trainer.train()
    expected = batch_1_fisher(llama, ROWS)
    del expected["lm_head.weight"]
    assert_exact(fisher.diagonal(), expected, torch.float32)


def test_a_loss_that_weights_its_targets_is_refused(llama: Any, tmp_path: Path):
    trainer = trainer_of(llama, tmp_path, adapter=LORA, loss_type="dft")
    trainer.add_callback(ff.FisherCallback(ff.DiagonalFisher(trainer.model)))
    with pytest.raises(ValueError, match="loss: expected the same factor for the log-likelihood of every target"):
        trainer.train()


def test_a_mask_holds(llama: Any, tmp_path: Path):
    before = {name: parameter.detach().clone() for name, parameter in llama.named_parameters()}
    mask = {name: torch.rand(value.shape) < 0.5 for name, value in before.items()}
    factory = ff.optim.AdamW.for_trainer, {"lr": 1e-2, "weight_decay": 0.1, "mask": mask}
    trainer = trainer_of(llama, tmp_path, optimizer=factory)
    trainer.train()
    for name, parameter in llama.named_parameters():
        assert torch.equal(parameter[~mask[name]], before[name][~mask[name]])
        assert (parameter != before[name])[mask[name]].double().mean() > 0.5
