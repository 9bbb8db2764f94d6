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
from megatron_retro.convert.hugging_face import export_hugging_face, import_hugging_face, imported_tokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_tokens, tiny_model, tiny_retro

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
SMOL = {**SHAPE, "num_key_value_heads": 2, "pad_token_id": None}
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
    "qwen2": ("Qwen2", {**SHAPE, "num_key_value_heads": 2}),
    "qwen2 windowed": (
        "Qwen2",
        {**SHAPE, "num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0},
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
    "nemotron": ("Nemotron", {**SHAPE, "num_key_value_heads": 2}),
    "nemotron biased": ("Nemotron", {**SHAPE, "num_key_value_heads": 4, "attention_bias": True, "mlp_bias": True}),
    "stablelm": ("StableLm", {**SHAPE, "hidden_size": 32, "num_key_value_heads": 4}),
    "stablelm biased": ("StableLm", {**SHAPE, "hidden_size": 32, "num_key_value_heads": 2, "use_qkv_bias": True}),
    "gpt2": ("GPT2", GPT2_SHAPE),
    "gpt2 erf": ("GPT2", {**GPT2_SHAPE, "activation_function": "gelu", "n_inner": 40}),
}
GRANITE = {"embedding_multiplier": 3.0, "attention_multiplier": 0.4, "residual_multiplier": 0.7, "logits_scaling": 2.5}
BIASED = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
FOLDED: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("Granite", {**SHAPE, **GRANITE, "num_key_value_heads": 2}),
    "granite biased, tied": ("Granite", {**SHAPE, **GRANITE, **BIASED}),
}
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


@pytest.fixture(scope="module")
def transformers() -> Any:
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return transformers


def made(transformers: Any, kind: str, folder: Path) -> Any:
    """A random model of theirs, with random norms and biases too, saved in many shards."""
    name, arguments = (THEIRS | FOLDED)[kind]
    config = getattr(transformers, f"{name}Config")(**arguments, bos_token_id=None, eos_token_id=None)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size="10KB")
    return model


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


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"unheard_of": 3}, "unheard_of = 3 is not understood"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "default", "short_factor": [1.0]}}, "short_factor"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu': expected silu"),
        ({"model_type": "lama"}, "did you mean llama"),
        ({"attention_bias": True}, "only both or none"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"pretraining_tp": 2}, "pretraining_tp"),
        ({"sliding_window": 4}, "sliding_window: transformers passes it over in this family"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "beside rope_parameters"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope: factor is missing"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "rope: low_freq_factor is missing"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": "big"}}, "rope: rope_theta = 'big'"),
        ({"rope_parameters": "none"}, "rope_parameters = 'none': expected an object"),
        ({"num_attention_heads": 0}, "num_attention_heads = 0: expected a whole number above 0"),
        ({"hidden_size": "16"}, "hidden_size = '16'"),
        ({"num_key_value_heads": 1.5}, "num_key_value_heads = 1.5"),
    ],
)
def test_what_is_not_understood_is_named(
    transformers: Any, changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    made(transformers, "llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError) as raised:
        import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    assert named in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_windows_of_some_layers_are_refused(transformers: Any, tmp_path: Path) -> None:
    made(transformers, "qwen2 windowed", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention", "sliding_attention"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="some layers have a sliding window"):
        import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())


def test_a_tied_model_whose_output_matrix_is_another_is_refused(transformers: Any, tmp_path: Path) -> None:
    """Which of the two transformers uses depends on its version."""
    made(transformers, "llama", tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    (tmp_path / "theirs/config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ArtifactError, match="ties its embeddings, and yet its output matrix is another"):
        import_hugging_face(tmp_path / "theirs", tmp_path / "run", TokenizerConfig())


@pytest.mark.parametrize(
    ("files", "kind"),
    [
        (("tokenizer.model",), "SentencePieceTokenizer"),
        (("vocab.json", "merges.txt"), "GPT2BPETokenizer"),
        (("tokenizer.json", "tokenizer.model"), "HuggingFaceTokenizer"),
    ],
)
def test_the_tokenizer_of_a_folder_is_found(files: tuple[str, ...], kind: str, tmp_path: Path) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    assert imported_tokenizer(tmp_path).tokenizer_type == kind


def test_damaged_and_foreign_folders_are_refused(transformers: Any, tmp_path: Path) -> None:
    made(transformers, "llama", tmp_path)
    shard = min(tmp_path.glob("model-*.safetensors"))
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match="no intact safetensors"):
        import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    shard.unlink()
    with pytest.raises(ArtifactError, match="lacks shards"):
        import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    shard.write_bytes(content)
    config = json.loads((tmp_path / "config.json").read_text())
    for changes, named in (
        ({"num_hidden_layers": 2}, "not understood"),
        ({"num_hidden_layers": 4}, "lacks tensors"),
        ({"intermediate_size": 20}, "another shape"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(ArtifactError, match=named):
            import_hugging_face(tmp_path, tmp_path / "run", TokenizerConfig())
    assert not (tmp_path / "run").exists()


def test_a_decoder_of_no_family_is_refused_with_every_reason(tmp_path: Path) -> None:
    saved(random_model(tiny_model(normalization="RMSNorm", squared_relu=True), RetroConfig()), tmp_path / "run")
    with pytest.raises(ConfigError) as raised:
        export_hugging_face(tmp_path / "run", tmp_path / "out")
    message = str(raised.value)
    assert all(f"\n  {family}: " in message for family in ("llama", "qwen2", "qwen3", "mistral", "nemotron", "gpt2"))
    assert "normalization is 'RMSNorm', not 'LayerNorm'" in message


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "..", "sub/one.safetensors", "", 3, None])
def test_a_weight_index_that_leads_out_of_its_folder_is_refused(tmp_path: Path, file: Any) -> None:
    from megatron_retro.convert.safetensors_folder import INDEX, SafetensorsFolder

    (tmp_path / "secret.safetensors").write_bytes(b"")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(ArtifactError, match="does not name files beside it"):
        SafetensorsFolder(folder)
