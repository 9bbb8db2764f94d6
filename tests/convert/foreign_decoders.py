"""Tiny random decoders of Hugging Face's families, as transformers makes and saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN16 = {**YARN, "original_max_position_embeddings": 16}
SLIDING = "sliding_attention"
PLAIN = {SLIDING: {"rope_type": "default", "rope_theta": 50.0}}
SMOL = {**SHAPE, "num_key_value_heads": 2, "pad_token_id": None}
GEMMA = {
    **SHAPE,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 5,
    "pad_token_id": None,
    "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0}, **PLAIN},
}
GPT2_SHAPE = {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64}
THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**SHAPE, "num_key_value_heads": 2, "rope_parameters": LLAMA3}),
    "llama biased, tied, linear": (
        "Llama",
        {
            **SHAPE,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 500.0},
        },
    ),
    "llama, dynamic": (
        "Llama",
        {**SHAPE, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 2.7}},
    ),
    "qwen2": ("Qwen2", {**SHAPE, "num_key_value_heads": 2}),
    "qwen2 windowed": (
        "Qwen2",
        {**SHAPE, "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
    ),
    "qwen2 windowed in part": (
        "Qwen2",
        {**SHAPE, "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**SHAPE, "num_key_value_heads": 2, "head_dim": 6, "tie_word_embeddings": True}),
    "qwen3, yarn": ("Qwen3", {**SHAPE, "num_key_value_heads": 2, "head_dim": 16, "rope_parameters": YARN}),
    "mistral": ("Mistral", {**SHAPE, "num_key_value_heads": 2, "sliding_window": 5}),
    "smollm3": ("SmolLM3", {**SMOL, "num_hidden_layers": 5}),
    "smollm3, every second": ("SmolLM3", {**SMOL, "no_rope_layer_interval": 2, "tie_word_embeddings": False}),
    "phi3": (
        "Phi3",
        {
            **SHAPE,
            "num_key_value_heads": 2,
            "sliding_window": 5,
            "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        },
    ),
    "olmo2": ("Olmo2", {**SHAPE, "num_key_value_heads": 2, "pad_token_id": None}),
    "olmo3": (
        "Olmo3",
        {**SMOL, "num_hidden_layers": 5, "sliding_window": 5, "rope_parameters": {"full_attention": YARN16, **PLAIN}},
    ),
    "olmo3, listed": ("Olmo3", {**SMOL, "sliding_window": 5, "layer_types": [SLIDING, "full_attention", SLIDING]}),
    "gemma3": ("Gemma3Text", {**GEMMA, "query_pre_attn_scalar": 8, "num_hidden_layers": 7}),
    "nemotron": ("Nemotron", {**SHAPE, "num_key_value_heads": 2}),
    "nemotron biased": ("Nemotron", {**SHAPE, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "stablelm": ("StableLm", {**SHAPE, "hidden_size": 32, "num_key_value_heads": 4}),
    "stablelm biased": ("StableLm", {**SHAPE, "hidden_size": 32, "num_key_value_heads": 2, "use_qkv_bias": True}),
    "gpt2": ("GPT2", GPT2_SHAPE),
    "gpt2 erf": ("GPT2", {**GPT2_SHAPE, "activation_function": "gelu", "n_inner": 40}),
}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 2.5}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
GEMMA_27B = ("Gemma3Text", {**GEMMA, "query_pre_attn_scalar": 5, "layer_types": [SLIDING, "full_attention", SLIDING]})
FOLDED: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("Granite", {**SHAPE, **GRANITE, "num_key_value_heads": 2}),
    "granite biased, tied": ("Granite", {**SHAPE, **GRANITE, **BIASED}),
}


def made(transformers: Any, kind: str, folder: Path) -> Any:
    """A random model of theirs, with random norms and biases too, saved in many shards."""
    name, arguments = (THEIRS | FOLDED | {"gemma3, 27b": GEMMA_27B})[kind]
    config = getattr(transformers, f"{name}Config")(**arguments, bos_token_id=None, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size="10KB")
    return model
