"""Our settings -> the Hugging Face family that computes the same, and its `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from megatron_retro.config.model import ModelConfig
from megatron_retro.convert.families import (
    FAMILIES,
    GEMMA3,
    GPT2,
    PARTLY_ROTATED_FAMILIES,
    QWEN2,
    QWEN3,
    SMOLLM3,
    WINDOW_FAMILIES,
    Family,
    activation_field,
    rotated_layers,
)
from megatron_retro.convert.rope_settings import written_rope, written_ropes_by_layer
from megatron_retro.errors import ConfigError


def hugging_face_from_model(model: ModelConfig) -> tuple[Family, dict[str, Any]]:
    """The family that computes the same function, and its `config.json`; none is a refusal with every reason."""
    reasons: dict[str, list[str]] = {}
    for family in FAMILIES.values():
        reasons[family.model_type] = found = not_supported_reasons(family, model)
        if not found:
            return family, _written_config(family, model)
    listed = "\n".join(f"  {name}: {'; '.join(found)}" for name, found in reasons.items())
    raise ConfigError(f"no Hugging Face family computes what this decoder computes:\n{listed}")


def first_family(model: ModelConfig) -> Family | None:
    """The family that a decoder goes out as."""
    return next((family for family in FAMILIES.values() if not not_supported_reasons(family, model)), None)


def not_supported_reasons(family: Family, model: ModelConfig) -> list[str]:
    """Why a decoder is no member of a family; empty when it is."""
    plain = {"add_qkv_bias": False, "qk_layernorm": False, "norm_placement": "before", "qk_norm_scope": "head"}
    plain |= {"apply_layernorm_1p": False, "scale_embedding": False}
    wanted: dict[str, Any] = {**plain, **family.fixed}
    if family.model_type in ("stablelm", "gpt2"):
        wanted.pop("add_qkv_bias")  # use_qkv_bias; GPT-2 has every bias anyway
        wanted.pop("apply_layernorm_1p")  # folded into the weight
    reasons = [
        f"{name} is {getattr(model, name)!r}, not {value!r}"
        for name, value in wanted.items()
        if getattr(model, name) != value
    ]
    chosen = {"swiglu": model.swiglu, "squared_relu": model.squared_relu, "geglu": model.geglu}
    known = [
        dict.fromkeys(chosen, False) | {k: v for k, v in act.items() if k in chosen}
        for act in family.activations.values()
    ]
    if chosen not in known or (model.geglu and not model.gelu_tanh):
        reasons.append("another activation")
    reasons += _attention_reasons(family, model)
    return reasons


def _attention_reasons(family: Family, model: ModelConfig) -> list[str]:
    reasons = []
    if model.position_embedding_type == "rope" and model.rotary_interleaved:
        reasons.append("rotary_interleaved has no counterpart")
    if model.no_rope_freq is not None and family is not SMOLLM3:
        reasons.append("all of its layers have rotary positions")
    if model.rotary_percent != 1.0 and family.model_type not in PARTLY_ROTATED_FAMILIES:
        reasons.append(f"rotary_percent is {model.rotary_percent}, not 1.0")
    has_window = model.sliding_window is not None
    if has_window and family.model_type not in WINDOW_FAMILIES:
        reasons.append("it has no sliding window")
    reasons += _reasons_by_layer(family, model)
    has_biases = not model.disable_bias_linear
    if has_biases and family.model_type not in ("llama", "nemotron", "gpt2"):
        reasons.append("it has no biases in all linear layers")
    sized = model.kv_channels not in (None, model.hidden_size // model.num_attention_heads)
    if sized and family.model_type in ("qwen2", "stablelm", "gpt2"):
        reasons.append("its head size is hidden size / heads")
    if family is GPT2 and model.num_key_value_heads() != model.num_attention_heads:
        reasons.append("it has no grouped queries")
    return reasons


def _reasons_by_layer(family: Family, model: ModelConfig) -> Iterator[str]:
    """Why layers that differ in windows and rotary bases cannot be those of a family."""
    if family.full_every is not None:
        if model.sliding_window is None:
            yield "it has a sliding window"
        return
    if model.rotary_base_local is not None:
        yield "all of its layers have one rotary base"
    full = model.full_attention_layers or ()
    if full and family not in (QWEN2, QWEN3):
        yield "it has a sliding window in all layers, or in none"
    elif full != tuple(range(1, len(full) + 1)):
        yield "its layers with a sliding window are its last ones"


def _written_config(family: Family, model: ModelConfig) -> dict[str, Any]:
    plain = dataclasses.replace(model, ffn_hidden_size=model.ffn_width())
    config: dict[str, Any] = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= {theirs: getattr(plain, ours) for ours, theirs in family.names.items()}
    config |= {"tie_word_embeddings": not model.untie_embeddings_and_output_weights, "dtype": "float32"}
    config |= {"attention_dropout": 0.0, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if family is GPT2:
        names = {False: "gelu", True: "gelu_new"}
        config |= {"activation_function": names[model.gelu_tanh], "attn_pdrop": 0.0, "embd_pdrop": 0.0}
        return config | {"resid_pdrop": 0.0}
    config |= {
        activation_field(family): next(iter(family.activations)),
        "num_key_value_heads": model.num_key_value_heads(),
        **_written_positions(family, model),
    }
    if family.model_type not in ("qwen2", "stablelm"):
        config["head_dim"] = model.head_size()
    if family.model_type in ("llama", "nemotron"):
        config |= {"attention_bias": not model.disable_bias_linear, "mlp_bias": not model.disable_bias_linear}
    if family is SMOLLM3:
        config |= {"no_rope_layers": rotated_layers(model.num_layers, model.no_rope_freq), "use_sliding_window": False}
        config["no_rope_layer_interval"] = model.no_rope_freq or model.num_layers + 1
    if family is GEMMA3:
        config["query_pre_attn_scalar"] = model.head_size()
    if family.model_type == "stablelm":
        config["use_qkv_bias"] = model.add_qkv_bias
    if family.model_type in WINDOW_FAMILIES:
        config["sliding_window"] = model.sliding_window
    if family.model_type in ("qwen2", "qwen3"):
        num_full = len(model.full_attention_layers or ())
        config |= {"use_sliding_window": model.sliding_window is not None, "max_window_layers": num_full}
    if family.full_every is not None or model.full_attention_layers:
        layers = range(1, model.num_layers + 1)
        config["layer_types"] = [
            "full_attention" if model.window(layer) is None else "sliding_attention" for layer in layers
        ]
    return config


def _written_positions(family: Family, model: ModelConfig) -> dict[str, Any]:
    if family.full_every is not None:
        return written_ropes_by_layer(model, local_base=family is GEMMA3)
    return written_rope(model, partial=family.model_type in PARTLY_ROTATED_FAMILIES)
