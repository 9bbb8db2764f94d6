"""One layer of the decoder and one of the neighbour encoder. A layer's call is a point of recomputation."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.model.cache import Cache
from megatron_retro.model.context import EncoderContext, SequenceContext
from megatron_retro.model.cross_attention import ChunkCrossAttention, ChunkedCrossAttention
from megatron_retro.model.leaves import Norm
from megatron_retro.model.mlp import MLP
from megatron_retro.model.self_attention import SelfAttention

ReadNeighbors = Callable[[Tensor], Tensor | None]


class DecoderLayer(nn.Module):
    """FFW(CCA(ATTN(H), E)), without CCA in a plain layer; every part is pre-norm and residual."""

    def __init__(self, config: ModelConfig, retro: RetroConfig, index: int, encoder_size: int | None) -> None:
        super().__init__()
        self.index = index
        self.dropout = config.hidden_dropout
        self.input_norm = Norm(config, config.hidden_size)
        self.attention = SelfAttention(config)
        retrieves = encoder_size is not None
        self.cross_norm = Norm(config, config.hidden_size) if retrieves else None
        self.cross_attention = ChunkedCrossAttention(config, retro, encoder_size) if encoder_size is not None else None
        self.mlp_norm = Norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_BSH: Tensor,
        encoded_neighbors: Tensor | None,
        context: SequenceContext,
        read: ReadNeighbors | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The new hidden state and the encoded neighbours; `read` encodes them, in the first retrieval layer."""
        layer_cache = None if cache is None else cache.layer(self.index)
        normed_BSH = self.input_norm(hidden_BSH)
        with self.input_norm.recomputed(normed_BSH, hidden_BSH):
            attended = self.attention(normed_BSH, context.pattern, context.rotary, context.cache_slice, layer_cache)
        added = self._dropped(attended)
        retrieval = context.retrieval
        if self.cross_attention is not None and self.cross_norm is not None and retrieval is not None:
            normed_BSH, summed_BSH = self.cross_norm(hidden_BSH, added)
            if read is not None:
                encoded_neighbors = read(normed_BSH)
            if encoded_neighbors is not None or retrieval.mask_BCE is not None:
                found = self.cross_attention(normed_BSH, encoded_neighbors, retrieval, context.cache_slice, layer_cache)
                hidden_BSH, added = summed_BSH, self._dropped(found)
        normed_BSH, hidden_BSH = self.mlp_norm(hidden_BSH, added)
        with self.mlp_norm.recomputed_from_sum(normed_BSH, hidden_BSH):
            hidden_BSH = hidden_BSH + self._dropped(self.mlp(normed_BSH))
        return hidden_BSH, encoded_neighbors

    def _dropped(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


class EncoderLayer(nn.Module):
    """Bidirectional over one neighbour; the first layer also reads the chunk that retrieved it."""

    def __init__(self, config: ModelConfig, retro: RetroConfig, decoder_size: int | None) -> None:
        super().__init__()
        self.dropout = config.hidden_dropout
        self.input_norm = Norm(config, config.hidden_size)
        self.attention = SelfAttention(config)
        conditioned = decoder_size is not None
        self.cross_norm = Norm(config, config.hidden_size) if conditioned else None
        self.cross_attention = ChunkCrossAttention(config, retro, decoder_size) if decoder_size is not None else None
        self.mlp_norm = Norm(config, config.hidden_size)
        self.mlp = MLP(config)

    def forward(self, hidden_XKRH: Tensor, chunk_XMH: Tensor, context: EncoderContext) -> Tensor:
        """[X, K, R, H] for X chunks."""
        shape = hidden_XKRH.shape[:2]
        normed = self.input_norm(hidden_XKRH)
        with self.input_norm.recomputed(normed, hidden_XKRH):
            attended = self.attention(normed.flatten(0, 1), context.pattern, context.rotary)
        added = self._dropped(torch.unflatten(attended, 0, shape))
        if self.cross_attention is not None and self.cross_norm is not None:
            normed, hidden_XKRH = self.cross_norm(hidden_XKRH, added)
            with self.cross_norm.recomputed_from_sum(normed, hidden_XKRH):
                found = self.cross_attention(
                    normed, chunk_XMH, context.chunk_mask_XM, context.query_rotary, context.chunk_rotary
                )
            added = self._dropped(found)
        normed, hidden_XKRH = self.mlp_norm(hidden_XKRH, added)
        with self.mlp_norm.recomputed_from_sum(normed, hidden_XKRH):
            return hidden_XKRH + self._dropped(self.mlp(normed))

    def _dropped(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden
