"""The next token's logits from tokens, neighbours and a cache: the one place where generation calls the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from megatron_retro.inference.neighbor_sources import Found
from megatron_retro.model.cache import Cache
from megatron_retro.model.neighbors import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.peft.prompts import virtual_tokens_of


class Forward(Protocol):
    """A model that can be fed in pieces, however it is cut. `virtual_tokens` (of P-tuning) lead every text."""

    chunk_length: int
    vocab_size: int
    reads_neighbors: bool
    neighbor_shape: tuple[int, int]
    virtual_tokens: tuple[int, ...]
    learned_positions: int | None

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Room for sequences."""

    def fill(self, tokens_BS: Sequence[Sequence[int]], found: Sequence[Sequence[Found]], cache: Cache) -> None:
        """Put tokens into the cache. `found` holds, by row, neighbours of the chunks that these tokens complete."""

    def all_logits(self, tokens_BS: Sequence[Sequence[int]], found: Sequence[Sequence[Found]], cache: Cache) -> Tensor:
        """As `fill`, with [B, S, V]: what the model says after each of these tokens."""

    def next_logits(self, tokens_B: Sequence[int], found: Sequence[Found | None], cache: Cache) -> Tensor:
        """[B, V] after one more token of each row; `found` for rows whose token completes a chunk."""


class LocalForward:
    """A whole model in this process."""

    def __init__(self, model: Retro) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.chunk_length = model.retro.retro_chunk_length
        self.vocab_size = model.model.vocab_size or 0
        self.reads_neighbors = model.retro.reads_neighbors()
        self.neighbor_shape = (max(1, model.retro.retro_num_neighbors), model.retro.retrieved_length())
        self.virtual_tokens = virtual_tokens_of(model.embedding)
        self.learned_positions = model.model.learned_positions()

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Room for sequences."""
        return self.model.new_cache(batch_size, max_length)

    @torch.inference_mode()
    def fill(self, tokens_BS: Sequence[Sequence[int]], found: Sequence[Sequence[Found]], cache: Cache) -> None:
        """Put tokens into the cache; no logits are computed."""
        self._hidden(torch.tensor(tokens_BS, device=self.device), stack(found, self.neighbor_shape, self.device), cache)

    @torch.inference_mode()
    def all_logits(self, tokens_BS: Sequence[Sequence[int]], found: Sequence[Sequence[Found]], cache: Cache) -> Tensor:
        """[B, S, V] after each of these tokens."""
        tokens, neighbors = torch.tensor(tokens_BS, device=self.device), stack(found, self.neighbor_shape, self.device)
        return self.model.head(self._hidden(tokens, neighbors, cache))

    @torch.inference_mode()
    def next_logits(self, tokens_B: Sequence[int], found: Sequence[Found | None], cache: Cache) -> Tensor:
        """[B, V] after one more token of each row."""
        rows = [[] if one is None else [one] for one in found]
        tokens_B1 = torch.tensor(tokens_B, device=self.device)[:, None]
        hidden_B1H = self._hidden(tokens_B1, stack(rows, self.neighbor_shape, self.device), cache)
        return self.model.head(hidden_B1H)[:, -1]

    def _hidden(self, tokens_BS: Tensor, neighbors: Neighbors | None, cache: Cache) -> Tensor:
        model = self.model
        batch_size, length = tokens_BS.shape
        context = model.prepare(batch_size, length, tokens_BS.device, neighbors=neighbors, cache=cache)
        hidden_BSH, _ = model.run_layers(model.embed(tokens_BS, context), None, context, cache)
        if context.cache_slice is not None:
            cache.commit(context.cache_slice)
        return hidden_BSH


def stack(
    rows: Sequence[Sequence[Found]], shape: tuple[int, int], device: torch.device, at_least: int = 0
) -> Neighbors | None:
    """[B, C, K, R] of what rows found, filled up with absent neighbours; None when nothing was found."""
    most = max(map(len, rows), default=0)
    if most == 0:
        return None
    most = max(most, at_least)
    tokens = np.zeros((len(rows), most, *shape), np.int64)
    mask = np.zeros(tokens.shape, np.bool_)
    for row, chunks in enumerate(rows):
        for place, found in enumerate(chunks):
            tokens[row, place], mask[row, place] = found.tokens_KR, found.mask_KR
    return Neighbors(torch.from_numpy(tokens).to(device), torch.from_numpy(mask).to(device))
