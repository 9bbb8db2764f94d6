"""The neighbour encoder: each neighbour separately, in the light of the chunk that retrieved it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.model.context import (
    EncoderContext,
    frequencies_by_rotation,
    neighbor_token_positions,
    rotary_tables,
)
from megatron_retro.model.layers import EncoderLayer
from megatron_retro.model.leaves import Norm, TokenEmbedding
from megatron_retro.ops.attention import AttentionPattern


class NeighborEncoder(nn.Module):
    """Two bidirectional layers by default; the first cross-attends to the decoder. As published, no final norm."""

    def __init__(self, model: ModelConfig, retro: RetroConfig) -> None:
        super().__init__()
        config = retro.encoder_model(model)
        self.frequencies = frequencies_by_rotation(config, retro.rotates_neighbors())
        self.first_rotation = config.rotation(1)
        self.depths_read = sorted(set(retro.encoder_depths(model.num_layers).values()))
        self.causal, self.chunk_start = retro.retro_encoder_causal, retro.chunk_start()
        self.embedding = TokenEmbedding(config) if retro.retro_encoder_own_embedding else None
        self.layers = nn.ModuleDict(
            {
                str(index): EncoderLayer(config, retro, index, model.hidden_size if index == 0 else None)
                for index in range(retro.retro_encoder_layers)
            }
        )
        self.final_norm = Norm(config, config.hidden_size) if retro.retro_encoder_final_norm else None

    def forward(
        self,
        hidden_XKRH: Tensor,
        mask_XKR: Tensor | None,
        chunk_XMH: Tensor,
        chunk_mask_XM: Tensor | None,
        retrieved_length: int,
    ) -> Tensor:
        """[X, K, R, H] for X chunks, from embedded neighbours and the decoder's normed state of each chunk.

        Where retrieval layers read several depths, their states stand beside one another in the last dimension.
        `retrieved_length` is R of a whole neighbour, also where `hidden_XKRH` is a part of it.
        """
        shape = (hidden_XKRH.shape[1], retrieved_length)
        context = self._context(shape, hidden_XKRH.device, mask_XKR, chunk_XMH.shape[1], chunk_mask_XM)
        states = [hidden_XKRH]
        for layer in self.layers.values():
            states.append(layer(states[-1], chunk_XMH, context))
        read = [states[depth] for depth in self.depths_read]
        if self.final_norm is not None:
            read = [self.final_norm(state) for state in read]
        return read[0] if len(read) == 1 else torch.cat(read, -1)

    @torch.no_grad()
    def reads_chunks(self) -> bool:
        """Whether a neighbour's states depend on the chunk that retrieved it, asked of what would read it."""
        layer = self.layers["0"]
        assert isinstance(layer, EncoderLayer) and layer.cross_attention is not None
        query, key_value = layer.cross_attention.query.weight, layer.cross_attention.key_value.weight
        neighbor, chunk = query.new_ones(1, 1, 2, query.shape[-1]), key_value.new_ones(1, 2, key_value.shape[-1])
        neighbor[..., ::2], chunk[..., ::3] = -2, 2
        return bool(layer.cross_attention(neighbor, chunk, None, None, None).any())

    def _context(
        self,
        shape: tuple[int, int],
        device: torch.device,
        mask_XKR: Tensor | None,
        chunk_length: int,
        chunk_mask_XM: Tensor | None,
    ) -> EncoderContext:
        num_neighbors, retrieved_length = shape
        own_positions = torch.arange(retrieved_length, device=device)
        query_positions = neighbor_token_positions(num_neighbors, retrieved_length, device)
        chunk_positions = torch.arange(chunk_length, device=device) + self.chunk_start
        return EncoderContext(
            AttentionPattern(self.causal, allowed_BST=None if mask_XKR is None else mask_XKR.flatten(0, 1)[:, None]),
            rotary_tables(own_positions[None], self.frequencies),
            chunk_mask_XM,
            *(
                rotary_tables(positions[None], self.frequencies).get(self.first_rotation)
                for positions in (query_positions, chunk_positions)
            ),
        )
