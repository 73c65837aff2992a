"""Tiny models, adapters, a tokenizer and matrices, made on the spot and saved as transformers and PEFT save them."""

import json
import warnings
from functools import cache
from pathlib import Path
from pydoc_data import topics

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastforget.matrix import ForgettingMatrix, forgetting_matrix

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


@cache
def texts() -> list[str]:
    """Paragraphs of the standard library's documentation, in a fixed order."""
    paragraphs = [part.strip() for name in sorted(topics.topics) for part in topics.topics[name].split("\n\n")]
    return [part for part in paragraphs if len(part) > 40]


@cache
def _backend(vocabulary: int) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts()[:300], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer.to_str()


def tiny_tokenizer(vocabulary: int = 384) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that begins a text with <s>, with a chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_backend(vocabulary)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(**changes) -> LlamaConfig:
    """A Llama of two layers and 20,000 parameters."""
    settings = {
        "vocab_size": 384,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,  # far from uniform predictions, so that differences show
    }
    return LlamaConfig(**(settings | changes))


def tiny_model(seed: int = 0, **changes) -> LlamaForCausalLM:
    """A model with the seed's weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(tiny_config(**changes)).eval()


def save_base(folder: Path, seed: int = 0, **changes) -> Path:
    """A base with its tokenizer."""
    tiny_model(seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tuned(base: Path, folder: Path, seed: int = 1, scale: float = 0.05, **save) -> Path:
    """A full checkpoint: the base with noise on every weight."""
    model = LlamaForCausalLM.from_pretrained(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(folder, **save)
    return folder


def save_adapter(base: Path, folder: Path, seed: int = 2, scale: float = 0.1, **changes) -> Path:
    """A LoRA adapter whose two factors are both random, so that it changes the model."""
    from peft import LoraConfig, get_peft_model

    settings = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | changes
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT calls what transformers has deprecated, and advises on tied weights
            model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += scale * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def matrix_of(values, **changes) -> ForgettingMatrix:
    """A finished matrix with these values."""
    m, n = np.shape(values)
    fields = {
        "values": np.asarray(values, dtype=float),
        "base": np.zeros(n),
        "exact": np.full((m, n), np.nan, np.float32),
        "base_exact": np.zeros(n, bool),
        "tasks": [f"task {i}" for i in range(m)],
        "examples": [f"example {j}" for j in range(n)],
        "texts": [""] * n,
        "tokens": np.ones(n, int),
        "targets": np.ones(n, int),
        "noise": {},
        "complete": True,
        "unfinished": np.zeros((m, n), bool),
        "about": {"about": {"truncated": 0, "skipped": []}},
    }
    return ForgettingMatrix(**(fields | changes))


def save_world(folder: Path) -> Path:
    """A base, two checkpoints, an adapter and 40 upstream examples, for tests that only read them."""
    base = save_base(folder / "base")
    save_tuned(base, folder / "full")
    save_tuned(base, folder / "other", seed=3)
    save_adapter(base, folder / "lora")
    rows = [{"text": text} for text in texts()[:30]]
    rows += [{"prompt": text[:20], "response": text[20:60]} for text in texts()[30:40]]
    (folder / "upstream.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def build(world: Path, out: Path, tasks=("full", "lora"), **settings) -> ForgettingMatrix:
    """The matrix of some tasks of a world, or of other paths."""
    return forgetting_matrix(
        **({"base": world / "base", "upstream": world / "upstream.jsonl", "noise_examples": 1} | settings),
        tasks=[world / task if task in ("full", "other", "lora", "forgot", "gone") else task for task in tasks],
        out=out,
        progress=False,
    )


def units_of(out: Path) -> dict[str, bytes]:
    """The files of the finished units, bit for bit."""
    return {path.name: path.read_bytes() for path in sorted((out / "units").iterdir())}
