"""The rules of the model's shape: which settings of decoder and retriever go together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import Violation


def model_violations(model: ModelConfig, retro: RetroConfig) -> list[Violation]:
    """Every broken rule of decoder and retriever."""
    return [
        *_decoder(model),
        *_layers(model),
        *_heads(model),
        *(_retriever(model, retro) if retro.retro_add_retriever else ()),
    ]


def _decoder(model: ModelConfig) -> Iterator[Violation]:
    if not model.vocab_size:
        yield Violation("vocab_size", model.vocab_size, "a whole number of at least 1", "give it, or a tokenizer")
    if model.swiglu and model.squared_relu:
        yield Violation("squared_relu", True, "one activation", "drop --swiglu or --squared-relu")
    if model.geglu and (model.swiglu or model.squared_relu):
        yield Violation("geglu", True, "one activation", "drop --geglu, --swiglu or --squared-relu")
    if model.qk_norm_scope == "projection" and not (model.qk_layernorm and model.normalization == "RMSNorm"):
        yield Violation("qk_norm_scope", "projection", "--qk-layernorm with RMSNorm", "set both, or leave it at head")
    if model.no_rope_freq and model.position_embedding_type != "rope":
        yield Violation("no_rope_freq", model.no_rope_freq, "rotary positions", "use --position-embedding-type rope")
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


def _layers(model: ModelConfig) -> Iterator[Violation]:
    """What differs by layer."""
    full, fix = model.full_attention_layers, "set --sliding-window, or leave it out"
    if full is not None and model.sliding_window is None:
        yield Violation("full_attention_layers", full, "a sliding window in the other layers", fix)
    if full is not None and (list(full) != sorted(set(full)) or not full or full[-1] > model.num_layers):
        expected = f"rising numbers from 1 to {model.num_layers}"
        yield Violation("full_attention_layers", full, expected, "name each such layer once")
    local = model.rotary_base_local
    if local is not None and (model.sliding_window is None or model.position_embedding_type != "rope"):
        yield Violation("rotary_base_local", local, "a sliding window and rotary positions", fix)


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
    if retro.retro_init == "decoder":
        yield from _warm_start(model, retro)
    if retro.retro_core_checkpoint:
        yield from _core(model, retro)
    if not 0 < retro.retro_gate_target_rate < 1:
        yield Violation(
            "retro_gate_target_rate", retro.retro_gate_target_rate, "a rate between 0 and 1", "0.5 is a start"
        )


def _core(model: ModelConfig, retro: RetroConfig) -> Iterator[Violation]:
    """One function at a time, and a learned position for every token of a neighbour."""
    if retro.retro_legacy_checkpoint:
        yield Violation("retro_core_checkpoint", True, "false beside retro_legacy_checkpoint", "drop one of them")
    longest = model.max_position_embeddings
    if retro.learned_neighbor_positions(model) and retro.retrieved_length() > longest:
        fix = "raise it, or shorten neighbours"
        yield Violation("max_position_embeddings", longest, f"at least {retro.retrieved_length()}", fix)


def _warm_start(model: ModelConfig, retro: RetroConfig) -> Iterator[Violation]:
    """What is added can start from the decoder where it has the decoder's shape."""
    encoder = retro.encoder_model(model)
    fix = "leave the encoder's shape to the decoder, or use --retro-init noise"
    for name in ("hidden_size", "num_attention_heads", "kv_channels", "ffn_hidden_size"):
        if getattr(encoder, name) != getattr(model, name):
            yield Violation(
                f"retro_encoder_{name}", getattr(encoder, name), f"{getattr(model, name)}, as in the decoder", fix
            )
    if retro.retro_encoder_layers > model.num_layers:
        yield Violation("retro_encoder_layers", retro.retro_encoder_layers, f"at most {model.num_layers}", fix)
    yield from _open_heads(model, retro)
    if model.norms_after():
        expected = "noise, since cross-attention has a norm before it and none after it"
        yield Violation("retro_init", "decoder", expected, "use --retro-init noise")
    if model.qk_layernorm:
        yield Violation("retro_init", "decoder", "noise, since cross-attention has no norms of queries and keys", fix)


def _open_heads(model: ModelConfig, retro: RetroConfig) -> Iterator[Violation]:
    names, layers = retro.retro_open_heads or (), retro.retrieval_layers(model.num_layers)
    if names and retro.retro_gate_type != "heads":
        yield Violation("retro_gate_type", retro.retro_gate_type, "heads, since --retro-open-heads is set", "set it")
    known = {f"{layer}.{head}" for layer in layers for head in range(1, model.num_attention_heads + 1)}
    if unknown := [name for name in names if name not in known]:
        expected = f"LAYER.HEAD, a retrieval layer of {layers} and a head from 1 to {model.num_attention_heads}"
        yield Violation("retro_open_heads", ", ".join(unknown), expected, "name other heads, or add the layers")


def model_is_possible(settings: Settings, world_size: int) -> Iterator[Violation]:
    """Decoder and retriever; the vocabulary may still be the tokenizer's."""
    if settings.has(ModelConfig, RetroConfig):
        model = settings[ModelConfig]
        yield from model_violations(replace(model, vocab_size=model.vocab_size or 1), settings[RetroConfig])
