"""Neighbours that are encoded once: the same numbers, bounded memory, and only where the text does not count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.config.inference import EngineConfig
from megatron_retro.errors import ConfigError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.kept_encodings import KeptEncodings
from megatron_retro.model.retro import Retro
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

LENGTH = 18
KINDS: dict[str, dict[str, Any]] = {
    "last": {},
    "same depth": {"retro_encoder_reads": "same-depth", "retro_encoder_causal": True, "retro_encoder_final_norm": True},
    "relative": {"retro_neighbor_positions": "relative"},
}


def closed(**retro: Any) -> Retro:
    """A model whose encoder does not read the chunk, as a frozen one that started from the decoder."""
    model = random_model(tiny_model(), tiny_retro(**retro))
    torch.nn.init.zeros_(model.encoder.layers["0"].cross_attention.output.weight)
    return model


@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_the_same_numbers_with_and_without(kind: str) -> None:
    model, neighbors = closed(**KINDS[kind]), random_neighbors(2, 4)
    neighbors.mask_BCKR[1, 2] = False
    neighbors.tokens_BCKR[1, 3] = neighbors.tokens_BCKR[0, 0]  # one that two chunks read
    texts = [random_tokens(2, LENGTH, seed) for seed in (1, 2)]
    expected = [model(tokens, neighbors) for tokens in texts]
    model.keep_encodings(None)
    kept = model.kept_encodings
    for tokens, logits in zip(texts, expected, strict=True):
        torch.testing.assert_close(model(tokens, neighbors), logits, atol=1e-5, rtol=1e-5)
    assert kept.num_read == 2 * 2 * 4 * 2 and kept.num_encoded < 2 * 4 * 2  # the second text found all of them
    cache = model.new_cache(2, LENGTH)
    pieces = [model(texts[0][:, :9], chunks(neighbors, 0, 2), cache=cache)]
    pieces.append(model(texts[0][:, 9:], chunks(neighbors, 2, 4), cache=cache))
    encoded = kept.num_encoded
    torch.testing.assert_close(torch.cat(pieces, 1), expected[0], atol=2e-5, rtol=2e-5)
    assert kept.num_encoded == encoded


def chunks(neighbors: Neighbors[Tensor], first: int, last: int) -> Neighbors[Tensor]:
    return Neighbors(neighbors.tokens_BCKR[:, first:last], neighbors.mask_BCKR[:, first:last])


def test_an_encoder_that_reads_the_chunk_keeps_nothing() -> None:
    model = random_model(tiny_model(), tiny_retro())
    model.keep_encodings(None)
    assert model.kept_encodings is None
    with pytest.raises(ConfigError, match="reads the chunk"):
        model.keep_encodings(64)
    off = closed()
    off.keep_encodings(0)
    assert off.kept_encodings is None
    with pytest.raises(ConfigError, match="whole models only"):
        EngineConfig(keep_encoded_mb=64).refuse_to_keep_encoded()


def test_training_encodes_anew() -> None:
    model, neighbors = closed(), random_neighbors(1, 4)
    model.keep_encodings(None)
    model(random_tokens(1, LENGTH), neighbors).sum().backward()
    assert model.kept_encodings.num_encoded == 0 and model.layers["4"].cross_attention.query.weight.grad is not None


def test_memory_is_bounded_and_the_last_read_stay() -> None:
    kept = KeptEncodings(max_bytes=3 * 5 * 2 * 4)  # three neighbours of five tokens, two numbers each
    encoded: list[int] = []

    def encode(some: Neighbors[Tensor]) -> Tensor:
        encoded.extend(some.tokens_BCKR[:, 0, 0, 0].tolist())
        return some.tokens_BCKR[..., None].expand(-1, -1, -1, -1, 2).float()

    def read(*names: int) -> None:
        tokens = torch.tensor(names)[None, :, None, None].expand(1, -1, 1, 5)
        states = kept.read(Neighbors(tokens, torch.ones_like(tokens, dtype=torch.bool)), encode)
        assert torch.equal(states[0, :, 0, 0, 0], torch.tensor(names).float()) and kept.num_bytes <= kept.max_bytes

    read(1, 2, 3)
    read(1, 4)  # 2 was not read for longest
    read(3, 1, 4, 2)
    assert encoded == [1, 2, 3, 4, 2]
    read(*range(10, 20))  # more than there is room for
    assert kept.num_bytes == kept.max_bytes
