"""The decoder families of Hugging Face that can be imported and exported: names of tensors and settings.

A setting that is neither understood nor known to leave the function alone is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from megatron_retro.config.model import ModelConfig
from megatron_retro.convert.tensor_rules import (
    Rule,
    by_head,
    fused_query_key_value,
    gated,
    norm_weight,
    query_key_value,
    same,
    scaled,
    stacked_gated,
    stacked_query_key_value,
    transposed,
)

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


_LAYER_NORMS = {
    "before": {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}


def _llama_rules(model: ModelConfig) -> list[Rule]:
    """Llama's names, shared by all families but GPT-2."""
    layer, attention, mlp = "model.layers.{i}", "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
    projections = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    rules = [same("embedding.word.weight", "model.embed_tokens.weight")]
    kinds = ["weight"] if model.normalization == "RMSNorm" else ["weight", "bias"]
    # Nemotron stores 1 + w as ours does; the others store the weight as applied
    weight_rule = same if model.squared_relu else norm_weight
    norms = {f"layers.{{i}}.{ours}": f"{layer}.{theirs}" for ours, theirs in _LAYER_NORMS[model.norm_placement].items()}
    for ours, theirs in {**norms, "final_norm": "model.norm"}.items():
        rules += [(weight_rule if kind == "weight" else same)(f"{ours}.{kind}", f"{theirs}.{kind}") for kind in kinds]
    biased = not model.disable_bias_linear
    for kind in ("weight", "bias"):
        if kind == "weight" or biased or model.add_qkv_bias:
            names = (f"{projections[0]}.{kind}", f"{projections[1]}.{kind}", f"{projections[2]}.{kind}")
            rules.append(query_key_value(f"layers.{{i}}.attention.query_key_value.{kind}", names))
        if kind == "weight" or biased:
            rules.append(same(f"layers.{{i}}.attention.output.{kind}", f"{attention}.o_proj.{kind}"))
            up = f"layers.{{i}}.mlp.up.{kind}"
            both = (f"{mlp}.gate_proj.{kind}", f"{mlp}.up_proj.{kind}")
            rules.append(gated(up, both) if model.swiglu else same(up, both[1]))
            rules.append(same(f"layers.{{i}}.mlp.down.{kind}", f"{mlp}.down_proj.{kind}"))
    if model.qk_layernorm:
        rule, leaf = (same, "weight") if model.qk_norm_scope == "head" else (by_head, "heads")
        rules.append(rule(f"layers.{{i}}.attention.query_norm.{leaf}", f"{attention}.q_norm.weight"))
        rules.append(rule(f"layers.{{i}}.attention.key_norm.{leaf}", f"{attention}.k_norm.weight"))
    if model.untie_embeddings_and_output_weights:
        rules.append(same("output.weight", "lm_head.weight"))
    return rules


def _phi3_rules(model: ModelConfig) -> list[Rule]:
    """Llama's function from two stacked matrices."""
    attention, mlp = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
    stacked = [
        stacked_query_key_value("layers.{i}.attention.query_key_value.weight", f"{attention}.qkv_proj.weight"),
        stacked_gated("layers.{i}.mlp.up.weight", f"{mlp}.gate_up_proj.weight"),
    ]
    ours = {rule.ours for rule in stacked}
    return [rule for rule in _llama_rules(model) if rule.ours not in ours] + stacked


def _granite_rules(multipliers: Mapping[str, float], tied: bool, model: ModelConfig) -> list[Rule]:
    """Llama's function with multiplied activations, which are multiplied weights. A tied embedding is multiplied as the
    output otherwise than as the input, so it becomes two."""
    residual = multipliers["residual_multiplier"]
    query = multipliers["attention_multiplier"] * model.head_size() ** 0.5
    rules = []
    for rule in _llama_rules(model):
        if rule.ours == "embedding.word.weight":
            rule = scaled(rule, multipliers["embedding_multiplier"])
        elif rule.ours == "output.weight":
            theirs = same("output.weight", "model.embed_tokens.weight") if tied else rule
            rule = scaled(theirs, 1.0 / multipliers["logits_scaling"])
        elif ".query_key_value." in rule.ours:
            rule = scaled(rule, query, part=0)
        elif ".attention.output." in rule.ours or ".mlp.down." in rule.ours:
            rule = scaled(rule, residual)
        rules.append(rule)
    return rules


def _gpt2_rules(model: ModelConfig) -> list[Rule]:
    layer = "transformer.h.{i}"
    rules = [
        same("embedding.word.weight", "transformer.wte.weight"),
        same("embedding.position.weight", "transformer.wpe.weight"),
    ]
    for ours, theirs in (
        ("layers.{i}.input_norm", f"{layer}.ln_1"),
        ("layers.{i}.mlp_norm", f"{layer}.ln_2"),
        ("final_norm", "transformer.ln_f"),
    ):
        rules += [norm_weight(f"{ours}.weight", f"{theirs}.weight"), same(f"{ours}.bias", f"{theirs}.bias")]
    for kind, rule in (("weight", transposed), ("bias", same)):
        rules.append(
            fused_query_key_value(f"layers.{{i}}.attention.query_key_value.{kind}", f"{layer}.attn.c_attn.{kind}")
        )
        rules.append(rule(f"layers.{{i}}.attention.output.{kind}", f"{layer}.attn.c_proj.{kind}"))
        rules.append(rule(f"layers.{{i}}.mlp.up.{kind}", f"{layer}.mlp.c_fc.{kind}"))
        rules.append(rule(f"layers.{{i}}.mlp.down.{kind}", f"{layer}.mlp.c_proj.{kind}"))
    if model.untie_embeddings_and_output_weights:
        rules.append(same("output.weight", "lm_head.weight"))
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
    _llama_rules,
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _RMS_NAMES,
    {**_WINDOW_OFF, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768},
    SILU,
    {**_RMS, **_ROPE, "add_qkv_bias": True},
    {},
    _llama_rules,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _RMS_NAMES,
    {**_WINDOW_OFF, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768, "head_dim": 128},
    SILU,
    {**_RMS, **_ROPE, "qk_layernorm": True},
    {"attention_bias": False},
    _llama_rules,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    SILU,
    {**_RMS, **_ROPE},
    {},
    _llama_rules,
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
    _llama_rules,
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
    SILU,
    {**_RMS, **_ROPE},
    {"attention_bias": False},
    _phi3_rules,
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048},
    SILU,
    {**_RMS, **_ROPE, "norm_placement": "after", "qk_layernorm": True, "qk_norm_scope": "projection"},
    {"attention_bias": False},
    _llama_rules,
)
OLMO3 = Family(
    "olmo3",
    "Olmo3ForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "sliding_window": 4096, "rope_theta": None},
    SILU,
    OLMO2.fixed,
    {"attention_bias": False},
    _llama_rules,
    full_every=4,
)
GRANITE = Family(
    "granite",
    "GraniteForCausalLM",
    _RMS_NAMES,
    {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048},
    SILU,
    {**_RMS, **_ROPE},
    {},
    _llama_rules,
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
    _llama_rules,
)
STABLELM = Family(
    "stablelm",
    "StableLmForCausalLM",
    {**_NAMES, "norm_epsilon": "layer_norm_eps"},
    {"layer_norm_eps": 1e-5, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25, "num_key_value_heads": 32},
    SILU,
    {**_LAYER_NORM, **_ROPE},
    {"qk_layernorm": False, "use_parallel_residual": False},
    _llama_rules,
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
    _gpt2_rules,
)
FAMILIES = {
    family.model_type: family
    for family in (LLAMA, QWEN2, QWEN3, MISTRAL, SMOLLM3, PHI3, OLMO2, OLMO3, GRANITE, NEMOTRON, STABLELM, GPT2)
}
WINDOW_FAMILIES = ("mistral", "phi3", "qwen2", "qwen3", "olmo3")
PARTLY_ROTATED_FAMILIES = ("phi3", "nemotron", "stablelm", "gpt2")


def with_multipliers(family: Family, config: Mapping[str, Any]) -> Family:
    """The family whose rules multiply weights by what this `config.json` multiplies activations by."""
    if not family.multipliers:
        return family
    given = {name: config.get(name) for name in family.multipliers}
    numbers = {name: float(value) for name, value in given.items() if isinstance(value, int | float) and value}
    found = {**family.multipliers, **numbers}
    return replace(family, rules=partial(_granite_rules, found, bool(config.get("tie_word_embeddings", False))))


def rotated_layers(layers: int, freq: int | None) -> list[int]:
    """As SmolLM3 writes it: 1 for a layer with rotary positions, 0 for every N-th."""
    return [1 if freq is None else int((layer + 1) % freq != 0) for layer in range(layers)]
