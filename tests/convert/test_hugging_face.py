"""Hugging Face's models come in, and ours go out, with the same logits and the same greedy tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import open_checkpoint, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, read_parameter, write_checkpoint
from megatron_retro.convert.hugging_face import export_hugging_face, import_hugging_face
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_tokens, tiny_model, tiny_retro
from tests.convert.foreign_decoders import FOLDED, THEIRS, made

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "43b in small": (
        "stablelm",
        {"apply_layernorm_1p": True, "swiglu": True, "rotary_percent": 0.5, "disable_bias_linear": True},
    ),
    "nemotron": ("nemotron", {"apply_layernorm_1p": True, "squared_relu": True, "rotary_percent": 0.5}),
    "llama": ("llama", {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "kv_channels": 6}),
    "mistral": (
        "mistral",
        {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "sliding_window": 4},
    ),
    "phi3": (
        "phi3",
        {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "rotary_percent": 0.5},
    ),
    "qwen3": (
        "qwen3",
        {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "qk_layernorm": True},
    ),
    "smollm3": (
        "smollm3",
        {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "no_rope_freq": 2},
    ),
    "gpt2": ("gpt2", {"position_embedding_type": "learned_absolute", "gelu_tanh": True, "apply_layernorm_1p": True}),
}


def loaded(run: Path) -> Retro:
    checkpoint = open_checkpoint(run)
    settings = stored_settings(checkpoint)
    model = Retro(settings[ModelConfig], settings[RetroConfig]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = read_parameter(checkpoint, name)
            parameter.zero_()
            parameter[: len(value)].copy_(value)
    return model


def saved(model: Retro, run: Path) -> Path:
    """A checkpoint of one of our models."""
    shapes = parameter_shapes(model.model, model.retro)
    state = model.state_dict()
    settings = Settings([model.model, model.retro, TokenizerConfig()])
    return write_checkpoint(run, settings, shapes, lambda name: state[name][: shapes[name][0]], {})


@torch.no_grad()
def greedy(model: Retro, prompt: Tensor, count: int) -> Tensor:
    tokens, cache = prompt, model.new_cache(len(prompt), prompt.shape[1] + count)
    logits = model(prompt, cache=cache)
    for _ in range(count):
        tokens = torch.cat((tokens, logits[:, -1:].argmax(-1)), 1)
        logits = model(tokens[:, -1:], cache=cache)
    return tokens


def generated(model: Any, prompt: Tensor, count: int) -> Tensor:
    tokens: Tensor = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return tokens


@pytest.mark.parametrize("kind", FOLDED)
def test_what_is_multiplied_comes_in_and_goes_out_as_llama(transformers: Any, kind: str, tmp_path: Path) -> None:
    original = made(transformers, kind, tmp_path / "theirs")
    import_hugging_face(tmp_path / "theirs", tmp_path / "run", TokenizerConfig())
    ours, tokens = loaded(tmp_path / "run"), random_tokens(2, 21)
    with torch.no_grad():
        expected = original(tokens).logits
        assert torch.allclose(ours(tokens), expected, atol=5e-5, rtol=5e-5)
    export_hugging_face(tmp_path / "run", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert type(again).__name__ == "LlamaForCausalLM"
    with torch.no_grad():
        assert torch.allclose(again(tokens).logits, expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("kind", ["granite", "gemma3, 27b", "stablelm"])
def test_weights_of_few_bits_are_not_rounded_again(transformers: Any, kind: str, tmp_path: Path) -> None:
    """Stored in bfloat16 and imported as float32, what is folded or stored less one keeps float32's precision."""
    model = made(transformers, kind, tmp_path / "first")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(0.2 if "norm" in name else 1.0)  # less one, they have more bits than bfloat16
    model.bfloat16().save_pretrained(tmp_path / "theirs")
    original = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, attn_implementation="eager"
    )
    import_hugging_face(tmp_path / "theirs", tmp_path / "run", TokenizerConfig())
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        expected = original(tokens).logits
        assert (loaded(tmp_path / "run")(tokens) - expected).abs().max() < 2e-5 * expected.abs().max()


def test_another_scale_of_scores_goes_into_the_norm_of_queries(transformers: Any, tmp_path: Path) -> None:
    original = made(transformers, "gemma3, 27b", tmp_path / "theirs")
    import_hugging_face(tmp_path / "theirs", tmp_path / "run", TokenizerConfig())
    export_hugging_face(tmp_path / "run", tmp_path / "back")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        expected = original(tokens).logits
        for model in (loaded(tmp_path / "run"), lambda tokens: again(tokens).logits):
            assert torch.allclose(model(tokens), expected, atol=5e-5, rtol=5e-5)


@pytest.mark.parametrize("kind", THEIRS)
def test_theirs_comes_in_and_goes_back(transformers: Any, kind: str, tmp_path: Path) -> None:
    original = made(transformers, kind, tmp_path / "theirs")
    import_hugging_face(tmp_path / "theirs", tmp_path / "run", TokenizerConfig())
    ours = loaded(tmp_path / "run")
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        expected = original(tokens).logits
        assert torch.allclose(ours(tokens), expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(greedy(ours, tokens[:, :5], 12), generated(original, tokens[:, :5], 12))
    export_hugging_face(tmp_path / "run", tmp_path / "back", shard_bytes=10_000)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", attn_implementation="eager").eval()
    assert type(again) is type(original)
    with torch.no_grad():
        assert torch.equal(again(tokens).logits, expected)


def test_dynamic_rope_ends_where_its_base_would_change(transformers: Any, tmp_path: Path) -> None:
    """To its last position it is transformers' function; what transformers computes beyond is another, so refused."""
    original = made(transformers, "llama, dynamic", tmp_path / "theirs")
    import_hugging_face(tmp_path / "theirs", tmp_path / "run", TokenizerConfig())
    ours, tokens = loaded(tmp_path / "run"), random_tokens(1, 65)
    with torch.no_grad():
        whole = ours(tokens[:, :64])
        assert torch.allclose(whole, original(tokens[:, :64]).logits, atol=2e-5, rtol=2e-5)
        assert not torch.allclose(whole, original(tokens).logits[:, :64], atol=1e-3)
        with pytest.raises(DataError, match="at most 64 tokens"):
            ours(tokens)
    export_hugging_face(tmp_path / "run", tmp_path / "back")
    written = json.loads((tmp_path / "back/config.json").read_text())
    assert written["rope_scaling"] == {"rope_type": "dynamic", "factor": 2.7}


@pytest.mark.parametrize("kind", OURS)
def test_ours_goes_out_and_comes_back(transformers: Any, kind: str, tmp_path: Path) -> None:
    family, changes = OURS[kind]
    ours = random_model(tiny_model(untie_embeddings_and_output_weights=kind != "gpt2", **changes), RetroConfig())
    saved(ours, tmp_path / "run")
    export_hugging_face(tmp_path / "run", tmp_path / "theirs")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").eval()
    assert theirs.config.model_type == family
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        expected = ours(tokens)
        assert torch.allclose(theirs(tokens).logits, expected, atol=2e-5, rtol=2e-5)
    assert torch.equal(greedy(ours, tokens[:, :5], 12), generated(theirs, tokens[:, :5], 12))
    import_hugging_face(tmp_path / "theirs", tmp_path / "again", TokenizerConfig())
    with torch.no_grad():
        assert torch.allclose(loaded(tmp_path / "again")(tokens), expected, atol=1e-5, rtol=1e-5)


def test_the_decoder_of_a_retro_goes_out_when_its_gate_is_shut(transformers: Any, tmp_path: Path) -> None:
    llama = {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True}
    shut = random_model(tiny_model(**llama), tiny_retro(retro_attention_gate=0.0))
    saved(shut, tmp_path / "run")
    export_hugging_face(tmp_path / "run", tmp_path / "theirs", dtype=torch.bfloat16)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto").eval()
    assert theirs.dtype == torch.bfloat16
    tokens = random_tokens(1, 9)
    with torch.no_grad():
        assert torch.allclose(theirs.float()(tokens).logits, shut(tokens), atol=0.2, rtol=0.2)
    opened = random_model(tiny_model(**llama), tiny_retro())
    saved(opened, tmp_path / "open")
    with pytest.raises(ConfigError, match="reads neighbours"):
        export_hugging_face(tmp_path / "open", tmp_path / "no")
    assert not (tmp_path / "no").exists()
    export_hugging_face(tmp_path / "open", tmp_path / "yes", decoder_only=True)


def test_a_decoder_of_no_family_is_refused_with_every_reason(tmp_path: Path) -> None:
    saved(random_model(tiny_model(normalization="RMSNorm", squared_relu=True), RetroConfig()), tmp_path / "run")
    with pytest.raises(ConfigError) as raised:
        export_hugging_face(tmp_path / "run", tmp_path / "out")
    message = str(raised.value)
    assert all(f"\n  {family}: " in message for family in ("llama", "qwen2", "qwen3", "mistral", "nemotron", "gpt2"))
    assert "normalization is 'RMSNorm', not 'LayerNorm'" in message
