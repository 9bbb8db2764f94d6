"""Models small enough for any test, with values large enough that every part shows in the logits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro


def tiny_model(**changes: Any) -> ModelConfig:
    """A decoder of 6 layers."""
    config = ModelConfig(
        num_layers=6,
        hidden_size=16,
        ffn_hidden_size=24,
        num_attention_heads=4,
        vocab_size=61,
        make_vocab_size_divisible_by=8,
        max_position_embeddings=64,
    )
    return replace(config, **changes)


def tiny_retro(**changes: Any) -> RetroConfig:
    """Chunks of 4 tokens, neighbours of 8, read in layers 2 and 5."""
    config = RetroConfig(retro_add_retriever=True, retro_chunk_length=4, retro_layers=(2, 5))
    return replace(config, **changes)


def random_model(model: ModelConfig, retro: RetroConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> Retro:
    """An evaluating model whose every parameter, norms, biases and gates too, differs from its first value."""
    built = Retro(model, retro).to(dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            is_norm_weight = "norm" in name and name.endswith(("weight", "heads")) and not model.apply_layernorm_1p
            parameter.copy_(noise * 0.3 + (1.0 if is_norm_weight else 0.0))
    return built


def random_tokens(batch: int, length: int, vocabulary: int = 61, seed: int = 1) -> Tensor:
    """[B, S]."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def random_neighbors(
    batch: int,
    chunks: int,
    number: int = 2,
    length: int = 8,
    *,
    vocabulary: int = 61,
    present: float = 0.8,
    seed: int = 2,
) -> Neighbors[Tensor]:
    """Neighbours of which a share of `present` tokens exist; mask patterns are arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, chunks, number, length)
    tokens = torch.randint(0, vocabulary, shape, generator=generator)
    return Neighbors(tokens, torch.rand(shape, generator=generator) < present)
