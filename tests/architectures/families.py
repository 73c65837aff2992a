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
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
_ROUTED = _MOE | {
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
_STATE = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_chunk_size": 16}
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
    "AFMoE": ("afmoe", _COMMON | _MOE | {"sliding_window": 6, "num_dense_layers": 1}),
    "Apertus": ("apertus", _COMMON),
    "Arcee": ("arcee", _COMMON),
    "BitNet": ("bitnet", _COMMON),
    "BioGPT": ("biogpt", _COMMON),
    "CodeGen": ("codegen", _GPT | _TOKENS | {"rotary_dim": 4, "n_ctx": 64}),
    "CTRL": ("ctrl", _GPT | {"dff": 48}),
    "CWM": ("cwm", _COMMON | {"sliding_window": 6}),
    "DBRX": (
        "dbrx",
        {"vocab_size": VOCABULARY, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}
        | {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4}}
        | {"ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}}
        | _TOKENS,
    ),
    "DeepSeek-V2": ("deepseek_v2", _COMMON | _ROUTED | _LATENT | {"num_key_value_heads": 4}),
    "DeepSeek-V3": ("deepseek_v3", _COMMON | _ROUTED | _LATENT | {"num_key_value_heads": 4}),
    "DiffLlama": ("diffllama", _COMMON),
    "Doge": ("doge", _COMMON),
    "dots.llm1": ("dots1", _COMMON | _ROUTED),
    "ERNIE 4.5": ("ernie4_5", _COMMON),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", _COMMON | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16}),
    "EXAONE 4": ("exaone4", _COMMON | {"sliding_window": 6}),
    "Falcon-Mamba": ("falcon_mamba", _COMMON | {"state_size": 4}),
    "FlexOlmo": ("flex_olmo", _COMMON | _MOE),
    "Gemma 3n": (
        "gemma3n_text",
        _COMMON
        | {"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0}
        | {"laurel_rank": 4, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
        | {"activation_sparsity_pattern": [0.95, 0.0]},
    ),
    "GLM": ("glm", _COMMON),
    "GLM-4": ("glm4", _COMMON),
    "GLM-4-MoE": ("glm4_moe", _COMMON | _ROUTED),
    "gpt-oss": ("gpt_oss", _COMMON | _EXPERTS | {"sliding_window": 6}),
    "GPTBigCode": ("gpt_bigcode", _GPT | _TOKENS),
    "Granite MoE": ("granitemoe", _COMMON | _EXPERTS | {"logits_scaling": 3.0}),
    "Granite MoE Hybrid": (
        "granitemoehybrid",
        _COMMON | _EXPERTS | _STATE | {"shared_intermediate_size": 16, "layer_types": ["mamba", "attention"]},
    ),
    "Granite MoE Shared": ("granitemoeshared", _COMMON | _EXPERTS | {"shared_intermediate_size": 16}),
    "Helium": ("helium", _COMMON),
    "HunYuan": ("hunyuan_v1_dense", _COMMON),
    "HunYuan MoE": ("hunyuan_v1_moe", _COMMON | {"num_experts": 4, "moe_topk": 2}),
    "Jamba": ("jamba", _COMMON | _EXPERTS | {"mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "JetMoE": ("jetmoe", _COMMON | _EXPERTS | {"kv_channels": 8}),
    "LFM2": ("lfm2", _COMMON | {"layer_types": ["conv", "full_attention"]}),
    "LFM2-MoE": ("lfm2_moe", _COMMON | _MOE | {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1}),
    "Llama 4": ("llama4_text", _COMMON | _EXPERTS | {"intermediate_size_mlp": 48, "attention_chunk_size": 8}),
    "LongCat-Flash": (
        "longcat_flash",
        _COMMON
        | _LATENT
        | {"num_layers": 2, "n_routed_experts": 4, "moe_topk": 2, "expert_ffn_hidden_size": 16}
        | {"num_key_value_heads": 4, "ffn_hidden_size": 48, "zero_expert_num": 2},
    ),
    "MiniMax": ("minimax", _COMMON | _EXPERTS | {"layer_types": ["linear_attention", "full_attention"]}),
    "Ministral": ("ministral", _COMMON | {"sliding_window": 6}),
    "ModernBERT decoder": ("modernbert-decoder", _COMMON | {"local_attention": 12}),
    "nanochat": ("nanochat", _COMMON),
    "Nemotron": ("nemotron", _COMMON),
    "OLMo 3": ("olmo3", _COMMON | {"sliding_window": 6}),
    "OpenAI GPT": ("openai-gpt", _GPT),
    "OPT, post-norm": ("opt", _COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),
    "Persimmon": ("persimmon", _COMMON),
    "Phi-MoE": ("phimoe", _COMMON | _EXPERTS),
    "Qwen2-MoE": ("qwen2_moe", _COMMON | _MOE),
    "Qwen3-Next": ("qwen3_next", _COMMON | _MOE | _DELTA | {"layer_types": ["linear_attention", "full_attention"]}),
    "Qwen3.5": ("qwen3_5_text", _COMMON | _DELTA | {"layer_types": ["linear_attention", "full_attention"]}),
    "RecurrentGemma": ("recurrent_gemma", _COMMON | {"lru_width": 32, "attention_window_size": 6}),
    "RWKV": ("rwkv", _COMMON | {"attention_hidden_size": 32, "context_length": 64}),
    "Seed-OSS": ("seed_oss", _COMMON),
    "VaultGemma": ("vaultgemma", _COMMON | {"sliding_window": 6}),
    "xLSTM": ("xlstm", _COMMON | {"num_heads": 4, "chunk_size": 16}),
    "Zamba": (
        "zamba",
        _COMMON
        | {"mamba_d_state": 8, "n_mamba_heads": 2, "attention_hidden_size": 64, "attention_head_dim": 16}
        | {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]},
    ),
    "Zamba2": ("zamba2", _COMMON | _STATE | {"layers_block_type": ["mamba", "hybrid"], "n_mamba_heads": 4}),
    "Bamba": ("bamba", _COMMON | _STATE | {"attn_layer_indices": [1]}),
    "Mamba-2": ("mamba2", _COMMON | {"state_size": 8, "num_heads": 8, "n_groups": 1, "chunk_size": 16}),
    "BART, its decoder": (
        "bart",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "encoder_layers": 2,
        }
        | {"decoder_ffn_dim": 48, "max_position_embeddings": 64, "scale_embedding": True, "is_decoder": True}
        | _TOKENS,
    ),
    "ELECTRA, as a decoder": ("electra", _COMMON | {"embedding_size": 16, "is_decoder": True}),
    "RemBERT, as a decoder": (
        "rembert",
        _COMMON | {"input_embedding_size": 16, "output_embedding_size": 24, "is_decoder": True},
    ),
    "RoFormer, as a decoder": ("roformer", _COMMON | {"embedding_size": 16, "is_decoder": True}),
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
