"""Tiny, randomly initialised models of the causal language model families that the tests cover."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCABULARY = 131

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
_FALCON = {k: v for k, v in _COMMON.items() if k not in ("head_dim", "intermediate_size", "num_key_value_heads")}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

# name -> (transformers' model type, configuration)
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama", _COMMON),
    "Llama, tied": ("llama", _COMMON | {"tie_word_embeddings": True}),
    "Qwen2": ("qwen2", _COMMON),
    "Qwen3": ("qwen3", _COMMON),
    "Qwen3-MoE": ("qwen3_moe", _COMMON | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}),
    "Gemma": ("gemma", _COMMON),
    "Gemma 2": ("gemma2", _COMMON | {"sliding_window": 6, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}),
    "Gemma 3": ("gemma3_text", _COMMON | {"sliding_window": 6, "final_logit_softcapping": 2.0}),
    "Mistral": ("mistral", _COMMON | {"sliding_window": 5}),
    "Mixtral": ("mixtral", _COMMON | _EXPERTS),
    "Phi-3": ("phi3", _COMMON),
    "Phi": ("phi", _COMMON | {"num_key_value_heads": 4}),
    "GPT-2": ("gpt2", _GPT | _TOKENS),
    "GPT-J": ("gptj", _GPT | _TOKENS | {"rotary_dim": 4}),
    "GPT-Neo": (
        "gpt_neo",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 6}
        | {"attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64}
        | _TOKENS,
    ),
    "GPT-NeoX": ("gpt_neox", _COMMON | {"num_key_value_heads": 4}),
    "OPT": ("opt", _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Falcon": ("falcon", _FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "Falcon, ALiBi": ("falcon", _FALCON | {"alibi": True, "new_decoder_architecture": False, "multi_query": True}),
    "Falcon-H1": (
        "falcon_h1",
        _COMMON
        | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
        | {"mamba_chunk_size": 16, "lm_head_multiplier": 0.7},
    ),
    "OLMo": ("olmo", _COMMON),
    "OLMo 2": ("olmo2", _COMMON),
    "OLMoE": ("olmoe", _COMMON | {"num_experts": 4, "num_experts_per_tok": 2}),
    "Cohere": ("cohere", _COMMON | {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", _COMMON | {"sliding_window": 6}),
    "Granite": ("granite", _COMMON | {"logits_scaling": 13.0, "embedding_multiplier": 3.0}),
    "StableLM": ("stablelm", _COMMON),
    "StarCoder2": ("starcoder2", _COMMON),
    "SmolLM3": ("smollm3", _COMMON),
    "BLOOM": ("bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4} | _TOKENS),
    "MPT": ("mpt", {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64} | _TOKENS),
    "Mamba": (
        "mamba",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4} | _TOKENS,
    ),
    "BERT, as a decoder": ("bert", _COMMON | {"is_decoder": True}),
    "RoBERTa, as a decoder": ("roberta", _COMMON | {"is_decoder": True}),
    "XLM-RoBERTa, as a decoder": ("xlm-roberta", _COMMON | {"is_decoder": True}),
}


def build(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A tiny model of the family whose logits are spread out, so that a wrong position or mask shows."""
    model_type, settings = FAMILIES[family]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **settings | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped product has no float64, which the oracle needs
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * (0.6 / parameter.shape[-1] ** 0.5) * (3 if "embed" in model_type else 1))
            else:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)
