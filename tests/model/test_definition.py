"""The model equals the paper's definition, written with loops in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_retro.testing.layouts import LIKE_GEMMA3, LIKE_OLMO2
from megatron_retro.testing.slow_retro import SlowRetro
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

TOLERANCE = 1e-6  # angles are float32 in a float64 model too
GROUPED = {"group_query_attention": True, "num_query_groups": 2}
DECODERS: dict[str, dict[str, Any]] = {
    "gpt2": {"position_embedding_type": "learned_absolute", "gelu_tanh": True},
    "llama": {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, **GROUPED},
    "nemotron": {"apply_layernorm_1p": True, "squared_relu": True, "rotary_percent": 0.5},
    "qwen": {"normalization": "RMSNorm", "swiglu": True, "qk_layernorm": True, "kv_channels": 6},
    "mistral": {"sliding_window": 5, "untie_embeddings_and_output_weights": True, "rotary_interleaved": True},
    "smollm3": {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True, "no_rope_freq": 2},
    "olmo2": LIKE_OLMO2,
    "gemma3": LIKE_GEMMA3,
    "windows by layer": {"sliding_window": 3, "full_attention_layers": (3, 5), "rotary_base_local": 50.0},
    "norms before and after": {"norm_placement": "both"},
    "retro": {"position_embedding_type": "relative", "normalization": "RMSNorm"},
}
RETRIEVERS: dict[str, dict[str, Any]] = {
    "published": {"retro_neighbor_positions": "none"},
    "rotary": {},
    "relative": {"retro_neighbor_positions": "relative"},
    "own encoder": {
        "retro_encoder_hidden_size": 12,
        "retro_encoder_num_attention_heads": 3,
        "retro_encoder_own_embedding": True,
        "retro_layers": (1, 3, 6),
    },
    "like the decoder": {
        "retro_neighbor_positions": "continued",
        "retro_encoder_causal": True,
        "retro_encoder_final_norm": True,
    },
    "as deep as itself": {
        "retro_encoder_final_norm": True,
        "retro_encoder_reads": "same-depth",
        "retro_encoder_layers": 3,
        "retro_layers": (1, 3, 6),
    },
    "scalar": {"retro_gate_type": "scalar"},
    "heads": {"retro_gate_type": "heads"},
    "adaptive": {"retro_gate_type": "adaptive"},
    "half open": {"retro_attention_gate": 0.5, "retro_encoder_layers": 1},
}


PAIRS = [
    (decoder, retriever)
    for decoder in DECODERS
    for retriever in RETRIEVERS
    if decoder in ("llama", "retro") or retriever in ("rotary", "relative")
]


@pytest.mark.parametrize(("decoder", "retriever"), PAIRS)
def test_equals_the_definition(decoder: str, retriever: str) -> None:
    model, retro = tiny_model(**DECODERS[decoder]), tiny_retro(**RETRIEVERS[retriever])
    built = random_model(model, retro, dtype=torch.float64)
    tokens, neighbors = random_tokens(2, 14), random_neighbors(2, 3, length=5)
    neighbors.mask_BCKR[1, 1] = False
    logits = built(tokens, neighbors).detach().numpy()
    slow = SlowRetro(built.state_dict(), model, retro)
    for row in range(2):
        expected = slow.logits(tokens[row].tolist(), neighbors.tokens_BCKR[row].tolist(), neighbors.mask_BCKR[row])
        assert abs(expected - logits[row]).max() < TOLERANCE * abs(expected).max()


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_decoder_alone_equals_the_definition(decoder: str) -> None:
    model = tiny_model(**DECODERS[decoder])
    built = random_model(model, tiny_retro(), dtype=torch.float64)
    tokens = random_tokens(1, 11)
    expected = SlowRetro(built.state_dict(), model, tiny_retro()).logits(tokens[0].tolist())
    assert abs(expected - built(tokens)[0].detach().numpy()).max() < TOLERANCE * abs(expected).max()


@pytest.mark.parametrize(("number", "length", "chunk"), [(1, 3, 2), (3, 7, 3), (2, 8, 1), (4, 1, 5)])
def test_any_number_and_length_of_neighbors(number: int, length: int, chunk: int) -> None:
    model, retro = tiny_model(num_layers=3), tiny_retro(retro_chunk_length=chunk, retro_layers=(1, 2))
    built = random_model(model, retro, dtype=torch.float64)
    tokens, neighbors = random_tokens(1, 11), random_neighbors(1, 11 // chunk, number, length)
    expected = SlowRetro(built.state_dict(), model, retro).logits(
        tokens[0].tolist(), neighbors.tokens_BCKR[0].tolist(), neighbors.mask_BCKR[0]
    )
    assert abs(expected - built(tokens, neighbors)[0].detach().numpy()).max() < TOLERANCE * abs(expected).max()
