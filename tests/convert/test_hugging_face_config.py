"""Settings of published models, as their files spell them, become ours."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.hugging_face_config import model_from_hugging_face
from megatron_retro.convert.hugging_face_settings import hugging_face_from_model
from megatron_retro.errors import ConfigError
from megatron_retro.model.retro import count_parameters
from megatron_retro.testing.tiny_models import tiny_model

PUBLISHED = json.loads((Path(__file__).parent / "data/published_configs.json").read_text())
LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}


def test_the_older_spelling_of_rotary_rescaling() -> None:
    model = model_from_hugging_face(LLAMA_31_8B)
    newer = {name: value for name, value in LLAMA_31_8B.items() if not name.startswith("rope")}
    newer["rope_parameters"] = {**LLAMA_31_8B["rope_scaling"], "rope_theta": 500000.0}
    assert model_from_hugging_face(newer) == model
    assert (model.rotary_base, model.rope_scaling_type, model.rope_scaling_factor) == (500000.0, "llama3", 8.0)
    assert (model.num_key_value_heads(), model.head_size(), model.ffn_width()) == (8, 128, 14336)


def test_what_a_file_leaves_out_is_what_the_family_has() -> None:
    shape = {"vocab_size": 10, "hidden_size": 64, "intermediate_size": 8, "num_hidden_layers": 1}
    mistral = model_from_hugging_face({"model_type": "mistral", **shape, "num_attention_heads": 16})
    assert (mistral.sliding_window, mistral.num_key_value_heads()) == (4096, 8)
    full = model_from_hugging_face(
        {"model_type": "mistral", **shape, "num_attention_heads": 16, "sliding_window": None}
    )
    assert full.sliding_window is None
    stablelm = model_from_hugging_face(
        {"model_type": "stablelm", **shape, "num_attention_heads": 4, "num_key_value_heads": 4}
    )
    assert stablelm.rotary_percent == 0.25
    qwen2 = model_from_hugging_face(
        {"model_type": "qwen2", **shape, "num_attention_heads": 4, "sliding_window": 9, "max_window_layers": 0}
    )
    assert qwen2.sliding_window is None  # a window is used where use_sliding_window says so
    qwen3 = model_from_hugging_face({"model_type": "qwen3", **shape, "num_attention_heads": 4})
    assert qwen3.kv_channels == 128


@pytest.mark.parametrize(
    "changes",
    [
        {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True},
        {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "sliding_window": 9},
        {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "add_qkv_bias": True},
        {"apply_layernorm_1p": True, "squared_relu": True, "rotary_percent": 0.5},
        {"swiglu": True, "disable_bias_linear": True, "rotary_percent": 0.5},
        {"position_embedding_type": "learned_absolute", "untie_embeddings_and_output_weights": False},
    ],
)
def test_out_and_in_is_the_same_function(changes: dict[str, Any]) -> None:
    model = tiny_model(**changes)
    _, config = hugging_face_from_model(model)
    again = model_from_hugging_face(config)
    told = {name for name in vars(ModelConfig()) if getattr(again, name) != getattr(model, name)}
    assert told <= {"make_vocab_size_divisible_by"}


def test_windows_and_bases_are_those_of_each_layer() -> None:
    olmo = model_from_hugging_face(PUBLISHED["Olmo-3-7B"])
    assert olmo.full_attention_layers == (4, 8, 12, 16, 20, 24, 28, 32)
    assert (olmo.window(3), olmo.window(4), olmo.rotation(3), olmo.rotation(4)) == (4096, None, "local", "global")
    assert (olmo.rotary_base, olmo.rotary_base_local, olmo.rope_scaling_type) == (5e5, 5e5, "yarn")
    qwen = PUBLISHED["Qwen2-7B"] | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 26}
    assert model_from_hugging_face(qwen).full_attention_layers == tuple(range(1, 27))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"sliding_window": None}, "sliding_window is missing"),
        ({"layer_types": ["full_attention"]}, "for each of 32 layers"),
        ({"layer_types": ["chunked_attention"] * 32}, "for each of 32 layers"),
        ({"rope_theta": 1e4}, "which base windowed layers get depends on transformers' version"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters: rope_type: expected objects full_attention"),
        ({"rope_parameters": {"full_attention": "none"}}, "rope_parameters: full_attention: expected objects"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, "rope type 'longrope'"),
        ({"rope_local_base_freq": 1e4}, "rope_local_base_freq = 10000.0 is not understood"),
    ],
)
def test_layers_that_are_not_understood_are_named(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError) as raised:
        model_from_hugging_face({**PUBLISHED["Olmo-3-7B"], **changes})
    assert named in str(raised.value)


# keys of published files and of what people make of them
HARMLESS: dict[str, Any] = {
    "_name_or_path": "HuggingFaceTB/SmolLM2-135M",
    "_attn_implementation_autoset": True,
    "is_llama_config": True,
    "rope_interleaved": False,
    "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}},
    "use_mrope": False,
    "n_special": 0,
    "auto_map": {"AutoModelForCausalLM": "modeling_llama.LlamaForCausalLM"},
    "unsloth_version": "2024.9",
    "id2label": {"0": "LABEL_0"},
    "temperature": 0.7,
    "quantization_config": None,
    "num_experts": 0,
    "pruned_heads": {},
    "is_encoder_decoder": False,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_leaves_the_function_alone_never_stops_an_import(name: str) -> None:
    assert model_from_hugging_face({**LLAMA_31_8B, name: HARMLESS[name]}) == model_from_hugging_face(LLAMA_31_8B)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rope_interleaved", True),
        ("use_mrope", True),
        ("n_special", 4),
        ("use_rope", False),
        ("num_experts", 8),
        ("residual_multiplier", 0.22),
        ("no_rope_layers", [1, 1, 1, 0]),
        ("quantization_config", {"bits": 4}),
    ],
)
def test_what_changes_the_function_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{name} = .* is not understood"):
        model_from_hugging_face({**LLAMA_31_8B, name: value})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_come_in_as_they_are(name: str) -> None:
    """Two layers of each have as many parameters as transformers gives them."""
    transformers = pytest.importorskip("transformers")
    layers = "n_layer" if PUBLISHED[name]["model_type"] == "gpt2" else "num_hidden_layers"
    config = {**PUBLISHED[name], layers: 2}
    config.pop("max_window_layers", None)
    if config.get("layer_types"):
        config["layer_types"] = config["layer_types"][:2]
    with torch.device("meta"):
        theirs = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config))
    expected = sum(parameter.numel() for parameter in theirs.parameters())
    model = model_from_hugging_face(config)
    untied = model.untie_embeddings_and_output_weights and config.get("tie_word_embeddings")  # multipliers of Granite
    twice = (model.vocab_size or 0) * model.hidden_size if untied else 0
    assert count_parameters(model, RetroConfig()) == expected + twice
    whole = model_from_hugging_face(PUBLISHED[name])
    assert dataclasses.replace(whole, num_layers=2, full_attention_layers=model.full_attention_layers) == model


@pytest.mark.parametrize(
    ("rope", "outside", "named"),
    [
        ({"truncate": False}, None, "rope: truncate = False is not understood"),
        ({"attention_factor": 1.5}, None, "rope: attention_factor = 1.5: only 1.13862"),
        ({"beta_fast": 16}, None, "rope: beta_fast = 16: only 32"),
        ({}, 32, "beside another in rope's fields"),
    ],
)
def test_yarn_otherwise_than_published_is_named(rope: dict[str, Any], outside: int | None, named: str) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192, **rope}
    config = {**LLAMA_31_8B, "rope_scaling": yarn, "original_max_position_embeddings": outside}
    with pytest.raises(ConfigError) as raised:
        model_from_hugging_face(config)
    assert named in str(raised.value)
