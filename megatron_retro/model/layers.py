"""The MLP, and one layer of the decoder and of the neighbour encoder. A layer's call is a point of recomputation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.model.attention import ChunkedCrossAttention, EncoderCrossAttention, SelfAttention
from megatron_retro.model.cache import Cache
from megatron_retro.model.context import EncoderContext, SequenceContext
from megatron_retro.model.leaves import Linear, NoNorm, Norm
from megatron_retro.ops.activation import GEGLU, GEGLU_TANH, GELU, GELU_TANH, SQUARED_RELU, SWIGLU, activate
from megatron_retro.ops.recomputation import recomputed

EncodeNeighbors = Callable[[Tensor], Tensor | None]


class DecoderLayer(nn.Module):
    """FFW(CCA(ATTN(H), E)), without CCA in a plain layer; every part is residual.

    Norms stand before attention and MLP, after them, or both. CCA's stands before it always: one after it would undo
    its gate.
    """

    def __init__(self, config: ModelConfig, retro: RetroConfig, index: int, encoder_size: int | None) -> None:
        super().__init__()
        self.index, self.window, self.rotation = index, config.window(index + 1), config.rotation(index + 1)
        self.dropout = config.hidden_dropout
        self.input_norm = _norm_if(config.norms_before(), config)
        self.attention = SelfAttention(config)
        self.post_attention_norm = _norm_if(config.norms_after(), config)
        retrieves = encoder_size is not None
        self.cross_norm = Norm(config, config.hidden_size) if retrieves else None
        self.cross_attention = ChunkedCrossAttention(config, retro, encoder_size) if encoder_size is not None else None
        self.state_read = _state_read(config, retro, index) if retrieves else None
        self.mlp_norm = _norm_if(config.norms_before(), config)
        self.mlp = MLP(config)
        self.post_mlp_norm = _norm_if(config.norms_after(), config)

    def forward(
        self,
        hidden_BSH: Tensor,
        encoded_neighbors: Tensor | None,
        context: SequenceContext,
        encode: EncodeNeighbors | None = None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The new hidden state and the encoded neighbours; `encode` makes these, in the first retrieval layer.

        What stands on either side of `encode` is a method, as the whole is without it: each may be compiled.
        """
        if encode is None:
            return self.whole(hidden_BSH, encoded_neighbors, context, cache), encoded_neighbors
        normed_BSH, summed_BSH, added = self.before_encoding(hidden_BSH, context, cache)
        encoded_neighbors = encode(normed_BSH)
        states = (hidden_BSH, normed_BSH, summed_BSH, added)
        return self.behind_encoding(*states, encoded_neighbors, context, cache), encoded_neighbors

    def whole(
        self, hidden_BSH: Tensor, encoded_neighbors: Tensor | None, context: SequenceContext, cache: Cache | None
    ) -> Tensor:
        """[B, S, H], of a layer that encodes nothing. One part: what an instance has for the others is not its."""
        if self.cross_attention is None or context.retrieval is None:
            return self._end(hidden_BSH, self._attended(hidden_BSH, context, cache))
        normed_BSH, summed_BSH, added = DecoderLayer.before_encoding(self, hidden_BSH, context, cache)
        states = (hidden_BSH, normed_BSH, summed_BSH, added)
        return DecoderLayer.behind_encoding(self, *states, encoded_neighbors, context, cache)

    def before_encoding(
        self, hidden_BSH: Tensor, context: SequenceContext, cache: Cache | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What cross-attention reads, the stream behind self-attention, and what that adds."""
        assert self.cross_norm is not None
        added = self._attended(hidden_BSH, context, cache)
        normed_BSH, summed_BSH = self.cross_norm(hidden_BSH, added)
        return normed_BSH, summed_BSH, added

    def behind_encoding(
        self,
        hidden_BSH: Tensor,
        normed_BSH: Tensor,
        summed_BSH: Tensor,
        added: Tensor,
        encoded_neighbors: Tensor | None,
        context: SequenceContext,
        cache: Cache | None,
    ) -> Tensor:
        """[B, S, H]: cross-attention, where neighbours are or were, and MLP."""
        assert self.cross_attention is not None and context.retrieval is not None
        retrieval = context.retrieval.of_layer(self.rotation)
        if encoded_neighbors is not None or retrieval.mask_BCE is not None:
            if encoded_neighbors is not None and self.state_read is not None:
                encoded_neighbors = encoded_neighbors[..., self.state_read]
            layer_cache = None if cache is None else cache.layer(self.index)
            found = self.cross_attention(normed_BSH, encoded_neighbors, retrieval, context.cache_slice, layer_cache)
            hidden_BSH, added = summed_BSH, self._dropped(found)
        return self._end(hidden_BSH, added)

    def _attended(self, hidden_BSH: Tensor, context: SequenceContext, cache: Cache | None) -> Tensor:
        layer_cache = None if cache is None else cache.layer(self.index)
        normed_BSH = self.input_norm(hidden_BSH)
        with self.input_norm.recomputed(normed_BSH, hidden_BSH):
            pattern, rotary = context.patterns[self.window], context.rotary.get(self.rotation)
            attended = self.attention(normed_BSH, pattern, rotary, context.cache_slice, layer_cache, context.share)
        return self._dropped(self.post_attention_norm(attended))

    def _end(self, hidden_BSH: Tensor, added: Tensor) -> Tensor:
        normed_BSH, hidden_BSH = self.mlp_norm(hidden_BSH, added)
        with self.mlp_norm.recomputed_from_sum(normed_BSH, hidden_BSH):
            return hidden_BSH + self._dropped(self.post_mlp_norm(self.mlp(normed_BSH)))

    def _dropped(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


def _norm_if(there: bool, config: ModelConfig) -> Norm | NoNorm:
    return Norm(config, config.hidden_size) if there else NoNorm()


def _state_read(config: ModelConfig, retro: RetroConfig, index: int) -> slice | None:
    """Which of the encoder's states, side by side, this layer reads; None where there is one."""
    depths = retro.encoder_depths(config.num_layers)
    different = sorted(set(depths.values()))
    if len(different) == 1:
        return None
    width = retro.encoder_model(config).hidden_size
    place = different.index(depths[index + 1])
    return slice(place * width, (place + 1) * width)


class EncoderLayer(nn.Module):
    """Bidirectional over one neighbour; the first layer also reads the chunk that retrieved it."""

    def __init__(self, config: ModelConfig, retro: RetroConfig, index: int, decoder_size: int | None) -> None:
        super().__init__()
        self.rotation = config.rotation(index + 1)
        self.dropout = config.hidden_dropout
        self.input_norm = _norm_if(config.norms_before(), config)
        self.attention = SelfAttention(config)
        self.post_attention_norm = _norm_if(config.norms_after(), config)
        conditioned = decoder_size is not None
        self.cross_norm = Norm(config, config.hidden_size) if conditioned else None
        self.cross_attention = EncoderCrossAttention(config, retro, decoder_size) if decoder_size is not None else None
        self.adds_to_normed = retro.retro_core_checkpoint
        self.mlp_norm = _norm_if(config.norms_before(), config)
        self.mlp = MLP(config)
        self.post_mlp_norm = _norm_if(config.norms_after(), config)

    def forward(self, hidden_XKRH: Tensor, chunk_XMH: Tensor, context: EncoderContext) -> Tensor:
        """[X, K, R, H] for X chunks."""
        shape = hidden_XKRH.shape[:2]
        normed = self.input_norm(hidden_XKRH)
        with self.input_norm.recomputed(normed, hidden_XKRH):
            rotary = context.rotary.get(self.rotation)
            attended = self.attention(normed.flatten(0, 1), context.pattern, rotary)
        added = self._dropped(torch.unflatten(self.post_attention_norm(attended), 0, shape))
        if self.cross_attention is not None and self.cross_norm is not None:
            normed, hidden_XKRH = self.cross_norm(hidden_XKRH, added)
            kept = self.adds_to_normed
            with nullcontext() if kept else self.cross_norm.recomputed_from_sum(normed, hidden_XKRH):
                found = self.cross_attention(
                    normed, chunk_XMH, context.chunk_mask_XM, context.query_rotary, context.chunk_rotary
                )
            hidden_XKRH = normed if kept else hidden_XKRH
            added = self._dropped(found)
        normed, hidden_XKRH = self.mlp_norm(hidden_XKRH, added)
        with self.mlp_norm.recomputed_from_sum(normed, hidden_XKRH):
            return hidden_XKRH + self._dropped(self.post_mlp_norm(self.mlp(normed)))

    def _dropped(self, hidden: Tensor) -> Tensor:
        return functional.dropout(hidden, self.dropout, self.training) if self.dropout else hidden


def activation_kind(config: ModelConfig) -> str:
    """The configured nonlinearity."""
    if config.swiglu:
        return SWIGLU
    if config.geglu:
        return GEGLU_TANH if config.gelu_tanh else GEGLU
    if config.squared_relu:
        return SQUARED_RELU
    return GELU_TANH if config.gelu_tanh else GELU


class MLP(nn.Module):
    """up, nonlinearity, down; a gated one has two matrices up. The backward pass computes the nonlinearity again."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, bias = config.ffn_width(), not config.disable_bias_linear
        self.kind = activation_kind(config)
        self.up = Linear(config.hidden_size, (2, width) if config.gated() else (width,), bias=bias)
        self.down = Linear(width, (config.hidden_size,), bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [..., H]."""
        projected = self.up(hidden)
        activated = activate(projected, self.kind)
        with recomputed(activated, lambda: activate(projected.detach(), self.kind)):
            output: Tensor = self.down(activated)
        return output
