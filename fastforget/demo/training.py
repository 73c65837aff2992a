"""A tokenizer, a small Llama and its fine-tuned versions, in plain PyTorch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastforget.demo.text import Document
from fastforget.perplexity import log_perplexity

END_OF_TEXT = "<|endoftext|>"
# One set for every fine-tuning of a kind: differences between the rows of the matrix come from the text alone.
LEARNING_RATES = {"base": 2e-3, "full": 5e-4, "adapter": 2e-3}
ADAPTER = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
HELD_OUT_ROWS = 8


def train_tokenizer(texts: Iterable[str], vocabulary: int, max_length: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer trained on the texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, model_max_length=max_length
    )


def pack(documents: Iterable[Document], tokenizer: Any, length: int) -> Tensor:
    """Joins documents into rows for training.

    Args:
        documents: the texts.
        tokenizer: a transformers tokenizer with an end-of-sequence token, which is put behind each document.
        length: T, tokens a row.

    Returns:
        int64 `[rows, T]`; what is left at the end is dropped.
    """
    encoded = tokenizer([document.text for document in documents], add_special_tokens=False, verbose=False)
    tokens = [token for ids in encoded["input_ids"] for token in (*ids, tokenizer.eos_token_id)]
    rows = len(tokens) // length
    return torch.tensor(tokens[: rows * length], dtype=torch.long).view(rows, length)


def new_model(tokenizer: Any, *, hidden: int, layers: int, max_length: int, seed: int) -> LlamaForCausalLM:
    """Returns a Llama with random weights and a tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        initializer_range=0.05,  # a narrow model learns faster from it than from the 0.02 of wide ones
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def train(
    model: torch.nn.Module,
    rows: Tensor,
    *,
    tokens: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    on_step: Callable[[int, float], None],
) -> list[float]:
    """Trains the parameters that require a gradient, with AdamW and one cycle of the learning rate.

    Args:
        model: a transformers causal LM on its device; changed in place.
        rows: int64 `[rows, T]`, read in random order, again and again where there are too few.
        tokens: how many tokens to train on.
        batch_size: rows a step.
        learning_rate: the highest.
        seed: of the order.
        on_step: called with the tokens of a step and its loss, nats per token.

    Returns:
        The loss of every step, nats per token.
    """
    device = next(model.parameters()).device
    steps = max(1, tokens // (batch_size * rows.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * batch_size // len(rows))
    order = torch.cat([torch.randperm(len(rows), generator=generator) for _ in range(epochs)])
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, learning_rate, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False
    )
    losses = []
    model.train()
    for batch in order[: steps * batch_size].view(steps, batch_size):
        input_ids = rows[batch].to(device)  # [B, T]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(input_ids=input_ids, labels=input_ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
        on_step(input_ids.numel(), losses[-1])
    model.eval()
    return losses


@torch.inference_mode()
def held_out_loss(model: torch.nn.Module, rows: Tensor) -> float:
    """Returns the mean log-perplexity of rows `[rows, T]`, nats per token."""
    return log_perplexity(model, rows.to(next(model.parameters()).device)).mean().item()


def train_base(
    folder: Path, tokenizer: Any, rows: Tensor, size: dict[str, int], *, device: str, **settings: Any
) -> dict[str, Any]:
    """Trains the base model from random weights and saves it with its tokenizer and `training.json`.

    Args:
        folder: where it is saved.
        tokenizer: a transformers tokenizer.
        rows: int64 `[rows, T]`; the first are held out.
        size: arguments of `new_model`.
        device: torch device.
        **settings: arguments of `train`.

    Returns:
        What `training.json` holds: the losses (nats per token), tokens and parameters.
    """
    held_out, rows = rows[:HELD_OUT_ROWS], rows[HELD_OUT_ROWS:]
    model: Any = new_model(tokenizer, seed=settings["seed"], **size)
    model.to(device)
    losses = train(model, rows, learning_rate=LEARNING_RATES["base"], **settings)
    record = {
        "loss_after": held_out_loss(model, held_out),
        "tokens": len(losses) * settings["batch_size"] * rows.shape[1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "losses": losses,
    }
    _save(model, folder, record, tokenizer)
    return record


def fine_tune(
    folder: Path, base: Path, tokenizer: Any, rows: Tensor, kind: str, *, device: str, **settings: Any
) -> dict[str, Any]:
    """Fine-tunes the base, and saves the checkpoint or the adapter with `training.json`.

    Args:
        folder: where it is saved.
        base: the base's folder.
        tokenizer: the base's.
        rows: int64 `[rows, T]`; the first are held out.
        kind: "full" trains every parameter, "adapter" a LoRA on every linear layer but the head.
        device: torch device.
        **settings: arguments of `train`.

    Returns:
        What `training.json` holds: the losses (nats per token) and the number of trained parameters.
    """
    held_out, rows = rows[:HELD_OUT_ROWS], rows[HELD_OUT_ROWS:]
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.to(device)
    before = held_out_loss(model, held_out)
    if kind == "adapter":
        model = _with_adapter(model, settings["seed"])
    losses = train(model, rows, learning_rate=LEARNING_RATES[kind], **settings)
    record = {
        "loss_before": before,
        "loss_after": held_out_loss(model, held_out),
        "trained": sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        "losses": losses,
    }
    _save(model, folder, record, tokenizer if kind == "full" else None)
    return record


def _with_adapter(model: Any, seed: int) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():  # PEFT still asks for attributes that transformers has renamed
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, LoraConfig(**ADAPTER))


def _save(model: Any, folder: Path, record: dict[str, Any], tokenizer: Any = None) -> None:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record), encoding="utf-8")
