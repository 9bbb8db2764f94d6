"""The decoder families of Hugging Face that can be imported and exported: names of tensors and settings.

A setting that is neither understood nor known to leave the function alone is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron_retro.config.model import ModelConfig
from megatron_retro.convert.family_rules import gemma_rules, gpt2_rules, granite_rules, llama_rules, phi3_rules
from megatron_retro.convert.tensor_rules import Rule

SILU = {"silu": {"swiglu": True}}
RELU2 = {"relu2": {"squared_relu": True}}
GELU: dict[str, dict[str, Any]] = {
    "gelu_new": {"gelu_tanh": True},
    "gelu_pytorch_tanh": {"gelu_tanh": True},
    "gelu": {"gelu_tanh": False},
}


@dataclass(frozen=True)
class Family:
    """One `model_type`. `names` maps our settings to theirs, `defaults` holds theirs where a file leaves them out."""

    model_type: str
    architecture: str
    names: Mapping[str, str]
    defaults: Mapping[str, Any]
    activations: Mapping[str, Mapping[str, Any]]
    fixed: Mapping[str, Any]
    must_be: Mapping[str, Any]
    rules: Callable[[ModelConfig], list[Rule]]
    multipliers: Mapping[str, float] = field(default_factory=dict)  # of activations; ours go into the weights
    full_every: int | None = None  # windows and rotary bases by layer: every N-th is full where a file does not say

    def tensor_rules(self, model: ModelConfig) -> list[Rule]:
        """One rule for each tensor of the model."""
        rules = []
        for rule in self.rules(model):
            repeated = "{i}" in rule.ours
            rules += [rule.of_layer(index) for index in range(model.num_layers)] if repeated else [rule]
        return rules


_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "ffn_hidden_size": "intermediate_size",
    "num_layers": "num_hidden_layers",
    "num_attention_heads": "num_attention_heads",
    "max_position_embeddings": "max_position_embeddings",
}
_RMS_NAMES = {**_NAMES, "norm_epsilon": "rms_norm_eps"}
_RMS = {"normalization": "RMSNorm"}
_WINDOW_OFF = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_LAYER_NORM = {"normalization": "LayerNorm"}
_ROPE = {"position_embedding_type": "rope"}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    SILU,
    {**_RMS, **_ROPE},
    {"pretraining_tp": 1},
    llama_rules,
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _RMS_NAMES,
    {**_WINDOW_OFF, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    SILU,
    {**_RMS, **_ROPE, "add_qkv_bias": True},
    {},
    llama_rules,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _RMS_NAMES,
    {**_WINDOW_OFF, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
    SILU,
    {**_RMS, **_ROPE, "qk_layernorm": True},
    {"attention_bias": False},
    llama_rules,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    SILU,
    {**_RMS, **_ROPE},
    {},
    llama_rules,
)
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    _RMS_NAMES,
    {
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
        "rope_theta": 2000000.0,
    },
    SILU,
    {**_RMS, **_ROPE},
    {"attention_bias": False, "mlp_bias": False, "use_sliding_window": False},
    llama_rules,
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    SILU,
    {**_RMS, **_ROPE},
    {"attention_bias": False},
    phi3_rules,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    SILU,
    {**_RMS, **_ROPE, "norm_placement": "after", "qk_layernorm": True, "qk_norm_scope": "projection"},
    {"attention_bias": False},
    llama_rules,
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "sliding_window": 4096, "rope_theta": None},
    SILU,
    OLMO2.fixed,
    {"attention_bias": False},
    llama_rules,
    full_every=4,
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    _RMS_NAMES,
    {
        "vocab_size": 262208,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window_pattern": 6,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "rope_theta": 1000000.0,
        "rope_local_base_freq": 10000.0,
        "tie_word_embeddings": True,
    },
    {"gelu_pytorch_tanh": {"geglu": True, "gelu_tanh": True}},
    {
        **_RMS,
        **_ROPE,
        "apply_layernorm_1p": True,
        "norm_placement": "both",
        "qk_layernorm": True,
        "scale_embedding": True,
    },
    {
        "attention_bias": False,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "use_bidirectional_attention": False,
    },
    llama_rules,
    full_every=6,
)
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    SILU,
    {**_RMS, **_ROPE},
    {},
    llama_rules,
    dict.fromkeys(("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"), 1.0),
)
NEMOTRON = Family(
    "nemotron",
    "NemotronForCausalLM",
    {**_NAMES, "norm_epsilon": "norm_eps"},
    {"norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.5},
    RELU2,
    {**_LAYER_NORM, **_ROPE, "apply_layernorm_1p": True},
    {},
    llama_rules,
)
STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    {**_NAMES, "norm_epsilon": "layer_norm_eps"},
    {"layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25, "num_key_value_heads": 32},
    SILU,
    {**_LAYER_NORM, **_ROPE},
    {"qk_layernorm": False, "use_parallel_residual": False},
    llama_rules,
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    {
        "vocab_size": "vocab_size",
        "hidden_size": "n_embd",
        "ffn_hidden_size": "n_inner",
        "num_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "norm_epsilon": "layer_norm_epsilon",
    },
    {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "hidden_act": "gelu_new", "n_inner": None},
    GELU,
    {**_LAYER_NORM, "position_embedding_type": "learned_absolute", "disable_bias_linear": False},
    {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "reorder_and_upcast_attn": False,
    },
    gpt2_rules,
)
FAMILIES = {
    family.model_type: family
    for family in (LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, PHI3, OLMO2, OLMO3, GEMMA3, GRANITE, NEMOTRON, STABLELM, GPT2)
}
WINDOW_FAMILIES = ("mistral", "phi3", "qwen2", "qwen3", "olmo3", "gemma3_text")
PARTLY_ROTATED_FAMILIES = ("phi3", "nemotron", "stablelm", "gpt2")


def with_multipliers(family: Family, config: Mapping[str, Any]) -> Family:
    """The family whose rules multiply weights by what this `config.json` multiplies activations by."""
    if family is GEMMA3:
        scalar = config.get("query_pre_attn_scalar", GEMMA3.defaults["query_pre_attn_scalar"])
        known = isinstance(scalar, int | float) and scalar > 0
        return replace(family, rules=partial(gemma_rules, float(scalar))) if known else family
    if not family.multipliers:
        return family
    given = {name: config.get(name) for name in family.multipliers}
    numbers = {name: float(value) for name, value in given.items() if isinstance(value, int | float) and value}
    found = {**family.multipliers, **numbers}
    return replace(family, rules=partial(granite_rules, found, bool(config.get("tie_word_embeddings", False))))


def rotated_layers(layers: int, freq: int | None) -> list[int]:
    """As SmolLM3 writes it: 1 for a layer with rotary positions, 0 for every N-th."""
    return [1 if freq is None else int((layer + 1) % freq != 0) for layer in range(layers)]


def activation_field(family: Family) -> str:
    """What a `config.json` calls the activation."""
    return {"gpt2": "activation_function", "gemma3_text": "hidden_activation"}.get(family.model_type, "hidden_act")
