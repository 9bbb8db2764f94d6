"""What cannot be in a model's configuration, each rule by itself; a model is built only when none is broken."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_retro.config.model import ModelConfig
from megatron_retro.config.retro import RetroConfig
from megatron_retro.errors import Violation


def model_violations(model: ModelConfig, retro: RetroConfig) -> list[Violation]:
    """Every broken rule of decoder and retriever."""
    return [*_decoder(model), *_heads(model), *(_retriever(model, retro) if retro.retro_add_retriever else ())]


def _decoder(model: ModelConfig) -> Iterator[Violation]:
    if not model.vocab_size:
        yield Violation("vocab_size", model.vocab_size, "a whole number of at least 1", "give it, or a tokenizer")
    if model.swiglu and model.squared_relu:
        yield Violation("squared_relu", True, "one activation", "drop --swiglu or --squared-relu")
    if model.normalization == "RMSNorm" and model.apply_layernorm_1p:
        yield Violation("apply_layernorm_1p", True, "LayerNorm", "use --normalization LayerNorm")
    if (
        model.rope_scaling_type == "llama3"
        and model.rope_scaling_high_freq_factor <= model.rope_scaling_low_freq_factor
    ):
        yield Violation(
            "rope_scaling_high_freq_factor",
            model.rope_scaling_high_freq_factor,
            f"more than the low factor {model.rope_scaling_low_freq_factor}",
            "raise it",
        )


def _heads(model: ModelConfig) -> Iterator[Violation]:
    heads, groups = model.num_attention_heads, model.num_key_value_heads()
    if model.kv_channels is None and model.hidden_size % heads:
        yield Violation(
            "num_attention_heads", heads, f"a divisor of the hidden size {model.hidden_size}", "or give --kv-channels"
        )
    if heads % groups:
        yield Violation("num_query_groups", groups, f"a divisor of the {heads} heads", "change one of them")


def _retriever(model: ModelConfig, retro: RetroConfig) -> Iterator[Violation]:
    layers = retro.retrieval_layers(model.num_layers)
    wrong = [layer for layer in layers if not 1 <= layer <= model.num_layers]
    if wrong or not layers or list(layers) != sorted(set(layers)):
        yield Violation(
            "retro_layers", layers, f"rising numbers from 1 to {model.num_layers}", "name each retrieval layer once"
        )
    encoder = retro.encoder_model(model)
    if encoder.hidden_size != model.hidden_size and not retro.retro_encoder_own_embedding:
        yield Violation(
            "retro_encoder_own_embedding",
            False,
            f"true, since the encoder's width {encoder.hidden_size} is not the decoder's {model.hidden_size}",
            "set it, or leave the encoder's width alone",
        )
    if encoder.kv_channels is None and encoder.hidden_size % encoder.num_attention_heads:
        yield Violation(
            "retro_encoder_num_attention_heads",
            encoder.num_attention_heads,
            f"a divisor of the encoder's width {encoder.hidden_size}",
            "or give --retro-encoder-kv-channels",
        )
    if not 0 < retro.retro_gate_target_rate < 1:
        yield Violation(
            "retro_gate_target_rate", retro.retro_gate_target_rate, "a rate between 0 and 1", "0.5 is a start"
        )
