"""Which tensors of a Hugging Face family make each of ours."""

from __future__ import annotations

from collections.abc import Mapping

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
    scaled_plus_one,
    stacked_gated,
    stacked_query_key_value,
    transposed,
)

_LAYER_NORMS = {
    "before": {"input_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"},
    "after": {
        "post_attention_norm": "post_attention_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
    "both": {
        "input_norm": "input_layernorm",
        "post_attention_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "post_mlp_norm": "post_feedforward_layernorm",
    },
}


def llama_rules(model: ModelConfig) -> list[Rule]:
    """Llama's names, shared by all families but GPT-2."""
    layer, attention, mlp = "model.layers.{i}", "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
    projections = (f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj")
    rules = [same("embedding.word.weight", "model.embed_tokens.weight")]
    kinds = ["weight"] if model.normalization == "RMSNorm" else ["weight", "bias"]
    # Nemotron and Gemma store 1 + w as ours does; the others store the weight as applied
    weight_rule = same if model.squared_relu or model.norm_placement == "both" else norm_weight
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
            rules.append(gated(up, both) if model.gated() else same(up, both[1]))
            rules.append(same(f"layers.{{i}}.mlp.down.{kind}", f"{mlp}.down_proj.{kind}"))
    if model.qk_layernorm:
        rule, leaf = (same, "weight") if model.qk_norm_scope == "head" else (by_head, "heads")
        rules.append(rule(f"layers.{{i}}.attention.query_norm.{leaf}", f"{attention}.q_norm.weight"))
        rules.append(rule(f"layers.{{i}}.attention.key_norm.{leaf}", f"{attention}.k_norm.weight"))
    if model.untie_embeddings_and_output_weights:
        rules.append(same("output.weight", "lm_head.weight"))
    return rules


def phi3_rules(model: ModelConfig) -> list[Rule]:
    """Llama's function from two stacked matrices."""
    attention, mlp = "model.layers.{i}.self_attn", "model.layers.{i}.mlp"
    stacked = [
        stacked_query_key_value("layers.{i}.attention.query_key_value.weight", f"{attention}.qkv_proj.weight"),
        stacked_gated("layers.{i}.mlp.up.weight", f"{mlp}.gate_up_proj.weight"),
    ]
    ours = {rule.ours for rule in stacked}
    return [rule for rule in llama_rules(model) if rule.ours not in ours] + stacked


def granite_rules(multipliers: Mapping[str, float], tied: bool, model: ModelConfig) -> list[Rule]:
    """Llama's function with multiplied activations, which are multiplied weights. A tied embedding is multiplied as the
    output otherwise than as the input, so it becomes two."""
    residual = multipliers["residual_multiplier"]
    query = multipliers["attention_multiplier"] * model.head_size() ** 0.5
    rules = []
    for rule in llama_rules(model):
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


def gemma_rules(scalar: float, model: ModelConfig) -> list[Rule]:
    """Llama's function, whose attention divides by the root of a number that need not be the head size: by another
    norm of queries, which is stored less one."""
    factor = (model.head_size() / scalar) ** 0.5
    rules = []
    for rule in llama_rules(model):
        if rule.ours.endswith("query_norm.weight") and factor != 1.0:
            rule = scaled_plus_one(rule, factor)
        rules.append(rule)
    return rules


def gpt2_rules(model: ModelConfig) -> list[Rule]:
    """GPT-2's own names."""
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
