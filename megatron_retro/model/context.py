"""What every layer of one forward needs to know of the sequence: where tokens stand, what they may see, how the chunk
grid lies. Computed once, before the first layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.config.model import GLOBAL, LOCAL, ModelConfig, RetroConfig
from megatron_retro.errors import DataError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.cache import Cache, CacheSlice
from megatron_retro.model.sequence_share import SequenceShare, sequence_pattern
from megatron_retro.ops.attention import AttentionPattern, Documents
from megatron_retro.ops.chunking import num_complete_chunks, query_positions
from megatron_retro.ops.rotary import RotaryFrequencies, RotaryTable, rotary_table

# by what a layer's `rotation` is; a layer without rotary positions finds none
Frequencies = Mapping[str | None, RotaryFrequencies]
RotaryTables = Mapping[str | None, RotaryTable]


@dataclass(frozen=True)
class NeighborContext:
    """The neighbour side: chunk u of the model's grid is attended from grid position (u+1)*m - 1 on.

    `neighbors` are to be encoded in this forward (None: nothing new); with a cache, one row per completed chunk.
    `first_position` is the grid position of the sequence's first token: 0, or more where the first chunk is short, or
    where the grid begins with the chunk before a span.
    """

    neighbors: Neighbors[Tensor] | None
    retrieved_length: int
    mask_BCE: Tensor | None
    chunk_mask_XM: Tensor | None
    query_positions_BS: Tensor
    query_tables: RotaryTables
    key_tables: RotaryTables
    first_position: int
    query_rotary: RotaryTable | None
    key_rotary: RotaryTable | None
    num_spans: int = 1

    @property
    def encoded_shape(self) -> tuple[int, int, int, int]:
        """[B, C, K, R] of the encoded neighbours that layers read."""
        assert self.mask_BCE is not None
        size, num_chunks, num_tokens = self.mask_BCE.shape
        return size, num_chunks, num_tokens // self.retrieved_length, self.retrieved_length

    def by_span(self, queries_BSX: Tensor) -> Tensor:
        """[B * spans, S / spans, ...]: as rows of `mask_BCE`."""
        if self.num_spans == 1:
            return queries_BSX
        return torch.unflatten(queries_BSX, 1, (self.num_spans, -1)).flatten(0, 1)

    def joined(self, rows_BSX: Tensor) -> Tensor:
        """The inverse."""
        return rows_BSX if self.num_spans == 1 else torch.unflatten(rows_BSX, 0, (-1, self.num_spans)).flatten(1, 2)

    def of_layer(self, rotation: str | None) -> NeighborContext:
        """With the rotary tables of one layer."""
        return replace(self, query_rotary=self.query_tables.get(rotation), key_rotary=self.key_tables.get(rotation))

    def of_row(self, row: int) -> NeighborContext:
        """What concerns one row's queries."""
        positions = (
            self.query_positions_BS[row : row + 1] if len(self.query_positions_BS) > 1 else self.query_positions_BS
        )
        return replace(self, query_positions_BS=positions)


@dataclass(frozen=True)
class SequenceContext:
    """Handed to every layer, which picks the pattern of its window and the table of its rotation."""

    patterns: Mapping[int | None, AttentionPattern]
    rotary: RotaryTables
    position_ids_BS: Tensor
    retrieval: NeighborContext | None
    cache_slice: CacheSlice | None
    share: SequenceShare | None = None


def frequencies_by_rotation(config: ModelConfig, there: bool) -> Frequencies:
    """All that the layers of one model have; none where positions are of another kind."""
    found = {rotation: rotary_frequencies(config, rotation) for rotation in (GLOBAL, LOCAL)} if there else {}
    return {rotation: frequencies for rotation, frequencies in found.items() if frequencies is not None}


def rotary_frequencies(config: ModelConfig, rotation: str = GLOBAL) -> RotaryFrequencies | None:
    """The configured frequencies of a head; None when no dimension is rotated, or no layer is so."""
    rotated = int(config.head_size() * config.rotary_percent) // 2 * 2
    if rotated == 0:
        return None
    if rotation == LOCAL:
        return None if config.rotary_base_local is None else RotaryFrequencies(rotated, config.rotary_base_local)
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


def rotary_tables(positions_BS: Tensor, frequencies: Frequencies) -> RotaryTables:
    """The tables of the given positions."""
    return {rotation: rotary_table(positions_BS, each) for rotation, each in frequencies.items()}


@dataclass(frozen=True)
class EncoderContext:
    """What every layer of the neighbour encoder needs to know; X = chunks, their neighbours' masks flattened."""

    pattern: AttentionPattern
    rotary: RotaryTables
    chunk_mask_XM: Tensor | None
    query_rotary: RotaryTable | None
    chunk_rotary: RotaryTable | None


class ContextBuilder:
    """Builds the context of a forward; holds configuration only, and how ranks share sequences, where they do."""

    def __init__(self, model: ModelConfig, retro: RetroConfig) -> None:
        self.config, self.retro = model, retro
        self.chunk_length = retro.retro_chunk_length
        self.reads = retro.reads_neighbors()
        self.share: SequenceShare | None = None
        self.windows = model.windows()
        self.frequencies = frequencies_by_rotation(model, model.position_embedding_type == "rope")
        self.neighbor_frequencies = frequencies_by_rotation(model, retro.rotates_neighbors())

    def whole_sequence(
        self,
        length: int,
        device: torch.device,
        position_ids_BS: Tensor | None,
        padding_mask_BS: Tensor | None,
        neighbors: Neighbors[Tensor] | None,
        documents: Documents | None,
    ) -> SequenceContext:
        """The context of sequences that are given whole, or in this rank's spans."""
        spans = () if self.share is None else self.share.spans(length)
        if position_ids_BS is None:
            ranges = [torch.arange(span.start, span.stop, device=device) for span in spans or (range(length),)]
            position_ids_BS = torch.cat(ranges)[None]
            if padding_mask_BS is not None:
                position_ids_BS = (padding_mask_BS.long().cumsum(1) - 1).clamp(min=0)
        self._require_room(position_ids_BS, max([length, *(span.stop for span in spans)]))
        return SequenceContext(
            {window: sequence_pattern(window, documents, padding_mask_BS, spans) for window in self.windows},
            rotary_tables(position_ids_BS, self.frequencies),
            position_ids_BS,
            self._retrieval(length, device, neighbors, padding_mask_BS, len(spans)),
            None,
            self.share,
        )

    def _require_room(self, position_ids_BS: Tensor, longest: int) -> None:
        """Positions may end; padding may let a longer row fit, so then the positions are looked at."""
        room = self.config.position_limit()
        if room is None or longest <= room or not position_ids_BS.numel():
            return
        highest = int(position_ids_BS.max())
        if highest >= room:
            raise DataError(
                "a text is longer than the model's positions",
                got=f"a token at position {highest}, counted from 0",
                expected=f"at most {room} tokens (max_position_embeddings)",
                fix="shorten the text or what is to be generated, or use a model whose positions do not end",
            )

    def chunks(self, states_BSX: Tensor, num_chunks: int) -> Tensor:
        """[B, C, M, ...] the tokens of each chunk; a short first chunk is filled up with zeros at its end."""
        short = self._first_position(states_BSX.shape[1])
        if short:
            first = functional.pad(states_BSX[:, : self.chunk_length - short], (0, 0, 0, short))
            states_BSX = torch.cat((first, states_BSX[:, self.chunk_length - short :]), 1)
        return torch.unflatten(states_BSX[:, : num_chunks * self.chunk_length], 1, (num_chunks, self.chunk_length))

    def _first_position(self, length: int) -> int:
        """Grid position of the first token: 0; in Megatron's checkpoints the grid ends with the sequence."""
        return -length % self.chunk_length if self.retro.computes_as_megatron() else 0

    def _retrieval(
        self,
        length: int,
        device: torch.device,
        neighbors: Neighbors[Tensor] | None,
        padding_mask_BS: Tensor | None,
        num_spans: int,
    ) -> NeighborContext | None:
        first_position = self._first_position(length)
        num_chunks = num_complete_chunks(length + first_position, self.chunk_length)
        if not self.reads or neighbors is None or num_chunks == 0 or neighbors.is_empty:
            return None
        neighbors = neighbors.first_chunks(num_chunks)
        chunk_mask_XM = None
        if padding_mask_BS is not None and not self.retro.computes_as_megatron():
            chunk_mask_XM = self.chunks(padding_mask_BS, num_chunks).flatten(0, 1)
        mask_BCE = neighbors.mask_BCKR.flatten(2)
        if num_spans:
            first_position, length = self.chunk_length, length // num_spans
            mask_BCE = neighbors.mask_of_spans().flatten(2)
        positions_BS = query_positions(length, first_position, self.chunk_length, device)[None]
        shape = neighbors.tokens_BCKR.shape[2:]
        context = self._neighbor_context(neighbors, shape, mask_BCE, chunk_mask_XM, positions_BS, first_position)
        return replace(context, num_spans=num_spans or 1)

    def _neighbor_context(
        self,
        neighbors: Neighbors[Tensor] | None,
        neighbor_shape: tuple[int, ...],
        mask_BCE: Tensor | None,
        chunk_mask_XM: Tensor | None,
        positions_BS: Tensor,
        first_position: int,
    ) -> NeighborContext:
        num_neighbors, retrieved_length = neighbor_shape
        frequencies = self.neighbor_frequencies
        keys_E = neighbor_token_positions(num_neighbors, retrieved_length, positions_BS.device)
        query_tables = rotary_tables(positions_BS + self.retro.chunk_start(), frequencies)
        key_tables = rotary_tables(keys_E[None], frequencies)
        return NeighborContext(
            neighbors,
            retrieved_length,
            mask_BCE,
            chunk_mask_XM,
            positions_BS,
            query_tables,
            key_tables,
            first_position,
            query_tables.get(GLOBAL),
            key_tables.get(GLOBAL),
        )

    def cached_sequence(
        self,
        batch_size: int,
        length: int,
        device: torch.device,
        position_ids_BS: Tensor | None,
        padding_mask_BS: Tensor | None,
        neighbors: Neighbors[Tensor] | None,
        document_ids_BS: Tensor | None,
        cache: Cache,
    ) -> SequenceContext:
        """The context of the next tokens of sequences whose earlier ones are in a cache."""
        if document_ids_BS is not None:
            raise DataError(
                "several documents in one row cannot be fed in pieces", fix="give each document its own row"
            )
        if batch_size != len(cache.lengths):
            raise DataError(
                "the cache is for another batch", got=f"{batch_size} rows", expected=f"{len(cache.lengths)}"
            )
        cache_slice = cache.next_slice(length, padding_mask_BS)
        real_BT = cache.record_padding(padding_mask_BS, cache_slice, device)
        slots_BS = cache_slice.slots_BS(device)
        if position_ids_BS is None:
            position_ids_BS = (
                slots_BS if real_BT is None else (real_BT.long().cumsum(1) - 1).clamp(min=0).gather(1, slots_BS)
            )
        self._require_room(position_ids_BS, cache_slice.longest)
        return SequenceContext(
            {window: self._cached_pattern(window, cache_slice, real_BT, slots_BS) for window in self.windows},
            rotary_tables(position_ids_BS, self.frequencies),
            position_ids_BS,
            self._cached_retrieval(cache_slice, real_BT, neighbors, cache, device) if self.reads else None,
            cache_slice,
        )

    @staticmethod
    def _cached_pattern(
        window: int | None, cache_slice: CacheSlice, real_BT: Tensor | None, slots_BS: Tensor
    ) -> AttentionPattern:
        """The last token of a uniform slice stands at the last slot: plain causal. Others are spelled out."""
        if cache_slice.uniform:
            return AttentionPattern(True, window, None if real_BT is None else real_BT[:, None])
        distance_BST = slots_BS[:, :, None] - torch.arange(cache_slice.longest, device=slots_BS.device)
        allowed_BST = distance_BST >= 0
        if window is not None:
            allowed_BST = allowed_BST & (distance_BST < window)
        return AttentionPattern(allowed_BST=allowed_BST if real_BT is None else allowed_BST & real_BT[:, None])

    def _cached_retrieval(
        self,
        cache_slice: CacheSlice,
        real_BT: Tensor | None,
        neighbors: Neighbors[Tensor] | None,
        cache: Cache,
        device: torch.device,
    ) -> NeighborContext:
        """One row of neighbours for each chunk that this slice completes; where none are given, the mask says so."""
        rows, indices = cache_slice.rows, cache_slice.chunk_indices
        shape = cache.neighbor_shape
        fresh, fresh_mask_PE = None, None
        if neighbors is not None and not neighbors.is_empty and rows:
            given = [index - 1 for index in indices]
            shape = tuple(neighbors.first_chunks(max(cache_slice.completed)).tokens_BCKR.shape[2:])
            cache.require_neighbor_shape(shape)
            fresh = Neighbors(neighbors.tokens_BCKR[rows, given][:, None], neighbors.mask_BCKR[rows, given][:, None])
            fresh_mask_PE = fresh.mask_BCKR[:, 0].flatten(1)
        chunk_mask_XM = None
        if real_BT is not None and fresh is not None:
            rows_P1 = torch.tensor(rows, device=device)[:, None]
            chunk_mask_XM = real_BT[rows_P1, cache_slice.chunk_slots_PM(device)]
        mask_BCE = cache.neighbors.over_visible_chunks("mask", fresh_mask_PE, cache_slice)
        starts = torch.tensor(cache_slice.first_positions, device=device)[:, None] + torch.arange(
            cache_slice.width, device=device
        )
        positions_BS = (starts + 1) % self.chunk_length + self.chunk_length - 1
        return self._neighbor_context(fresh, shape or (1, 1), mask_BCE, chunk_mask_XM, positions_BS, 0)
