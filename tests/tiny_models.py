"""Tiny models, adapters and a tokenizer, made on the spot and saved as transformers and PEFT save them."""

import warnings
from functools import cache
from pathlib import Path
from pydoc_data import topics

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

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
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers has deprecated
            model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += scale * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder
