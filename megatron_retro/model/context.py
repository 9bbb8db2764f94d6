"""What every layer of one forward needs to know of the sequence: positions, masks, neighbours. Computed once."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_retro.config.model import ModelConfig
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.cache import CacheSlice
from megatron_retro.ops.attention import AttentionPattern
from megatron_retro.ops.rotary import RotaryFrequencies, RotaryTable, rotary_table


@dataclass(frozen=True)
class NeighborContext:
    """The neighbour side: chunk u of the model's grid is attended from grid position (u+1)*m - 1 on.

    `neighbors` are to be encoded in this forward (None: nothing new); with a cache, one row per completed chunk.
    `first_position` is the grid position of the sequence's first token: 0, or more where the first chunk is short.
    """

    neighbors: Neighbors[Tensor] | None
    retrieved_length: int
    mask_BCE: Tensor | None
    chunk_mask_XM: Tensor | None
    query_positions_BS: Tensor
    query_rotary: RotaryTable | None
    key_rotary: RotaryTable | None
    first_position: int

    def of_row(self, row: int) -> NeighborContext:
        """What concerns one row's queries."""
        positions = (
            self.query_positions_BS[row : row + 1] if len(self.query_positions_BS) > 1 else self.query_positions_BS
        )
        return replace(self, query_positions_BS=positions)


@dataclass(frozen=True)
class SequenceContext:
    """Handed to every layer."""

    pattern: AttentionPattern
    rotary: RotaryTable | None
    position_ids_BS: Tensor
    retrieval: NeighborContext | None
    cache_slice: CacheSlice | None


def decoder_frequencies(config: ModelConfig) -> RotaryFrequencies | None:
    """The rotary frequencies of the decoder's heads; None with other positions."""
    return rotary_frequencies(config) if config.position_embedding_type == "rope" else None


def rotary_frequencies(config: ModelConfig) -> RotaryFrequencies | None:
    """The configured frequencies of a head; None when no dimension is rotated."""
    rotated = int(config.head_size() * config.rotary_percent) // 2 * 2
    if rotated == 0:
        return None
    return RotaryFrequencies(
        rotated,
        config.rotary_base,
        config.rope_scaling_type,
        config.rope_scaling_factor,
        config.rope_scaling_low_freq_factor,
        config.rope_scaling_high_freq_factor,
        config.rope_scaling_original_max_positions,
    )


def neighbor_token_positions(num_neighbors: int, retrieved_length: int, device: torch.device) -> Tensor:
    """[E]: each neighbour's tokens count from 0."""
    return torch.arange(retrieved_length, device=device).repeat(num_neighbors)


def table_or_none(positions_S: Tensor, frequencies: RotaryFrequencies | None) -> RotaryTable | None:
    """The table of positions shared by the batch."""
    return None if frequencies is None else rotary_table(positions_S[None], frequencies)


def sequence_pattern(
    config: ModelConfig, document_ids_BS: Tensor | None, padding_mask_BS: Tensor | None
) -> AttentionPattern:
    """Who sees whom in a whole sequence: the past, inside the window, the own document, real tokens."""
    allowed_BST: Tensor | None = None
    if document_ids_BS is not None:
        allowed_BST = document_ids_BS[:, :, None] == document_ids_BS[:, None, :]
    if padding_mask_BS is not None:
        real_BST = padding_mask_BS[:, None, :].expand(-1, padding_mask_BS.shape[1], -1)
        allowed_BST = real_BST if allowed_BST is None else allowed_BST & real_BST
    return AttentionPattern(causal=True, window=config.sliding_window, allowed_BST=allowed_BST)


@dataclass(frozen=True)
class EncoderContext:
    """What every layer of the neighbour encoder needs to know; X = chunks, their neighbours' masks flattened."""

    pattern: AttentionPattern
    rotary: RotaryTable | None
    chunk_mask_XM: Tensor | None
    query_rotary: RotaryTable | None
    chunk_rotary: RotaryTable | None
