"""Attention of the model: among the tokens of a sequence, and between decoder and neighbours.

`SelfAttention`: grouped heads, optional query/key norm, positions and a cache. `ChunkedCrossAttention`: decoder tokens
read encoded neighbours. `EncoderCrossAttention`: neighbours, while they are encoded, read the chunk that found them.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.model.cache import CacheSlice, LayerCache
from megatron_retro.model.context import NeighborContext
from megatron_retro.model.gates import AdaptiveGate, HeadGate, ScalarGate, gate_of
from megatron_retro.model.leaves import AttendingBias, HeadsToHidden, Linear, RelativePositions, norm_of_heads
from megatron_retro.model.sequence_share import SequenceShare
from megatron_retro.ops.attention import AttentionPattern, attention
from megatron_retro.ops.chunked_cross_attention import chunked_cross_attention
from megatron_retro.ops.chunking import attending_spans, spread_over_queries
from megatron_retro.ops.rotary import RotaryTable, apply_rotary, rotate_both, split_heads


class SelfAttention(nn.Module):
    """One matrix gives, for each key/value head, its query heads, key and value."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        heads, groups, head_size = config.num_attention_heads, config.num_key_value_heads(), config.head_size()
        self.head_size = head_size
        self.interleaved = config.rotary_interleaved
        self.dropout = config.attention_dropout
        bias = not config.disable_bias_linear
        rows = (heads // groups + 2) * head_size
        self.query_key_value = Linear(config.hidden_size, (groups, rows), bias=bias or config.add_qkv_bias)
        self.query_norm = norm_of_heads(config, heads) if config.qk_layernorm else None
        self.key_norm = norm_of_heads(config, groups) if config.qk_layernorm else None
        self.relative = RelativePositions(config) if config.position_embedding_type == "relative" else None
        self.output = HeadsToHidden(heads, head_size, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_BSH: Tensor,
        pattern: AttentionPattern,
        rotary: RotaryTable | None,
        cache_slice: CacheSlice | None = None,
        cache: LayerCache | None = None,
        share: SequenceShare | None = None,
    ) -> Tensor:
        """[B, S, H]. With a cache the keys are all that it holds, these included; with a share, those of all ranks."""
        query, key, value = self._heads(hidden_BSH, rotary)
        if share is not None:
            key, value = torch.split(share.whole(torch.cat((key, value), -1)), self.head_size, -1)
        if cache is not None and cache_slice is not None:
            key, value = cache.append("key", key, cache_slice), cache.append("value", value, cache_slice)
        if self.relative is not None:
            pattern = replace(pattern, bias_BNST=self._relative_scores(self.relative, query, key.shape[1], cache_slice))
        attended = attention(query, key, value, pattern, dropout=self.dropout if self.training else 0.0)
        output: Tensor = self.output(attended)
        return output

    def _heads(self, hidden_BSH: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        projected = torch.unflatten(self.query_key_value(hidden_BSH), -1, (-1, self.head_size))
        norms = self.query_norm is not None and self.key_norm is not None
        query, key, value = split_heads(projected, None if norms else rotary, interleaved=self.interleaved)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
            if rotary is not None:
                query, key = rotate_both(query, key, rotary, interleaved=self.interleaved)
        if rotary is not None and value.requires_grad:
            value = value.contiguous()  # else it would keep what queries and keys were rotated from
        return query, key, value

    @staticmethod
    def _relative_scores(
        relative: RelativePositions, query_BSND: Tensor, num_keys: int, cache_slice: CacheSlice | None
    ) -> Tensor:
        """[B or 1, N, S, T]; rows of a cache may stand at different slots."""
        keys_T = torch.arange(num_keys, device=query_BSND.device)
        if cache_slice is None or cache_slice.uniform:
            width = query_BSND.shape[1]
            scores: Tensor = relative(query_BSND, keys_T[num_keys - width :], keys_T, (1 - width, num_keys - 1))
            return scores
        slots_BS = cache_slice.slots_BS(query_BSND.device)
        rows = [
            relative(
                query_BSND[row : row + 1], slots_BS[row], keys_T, (start + 1 - num_keys, start + cache_slice.width - 1)
            )
            for row, start in enumerate(cache_slice.starts)
        ]
        return torch.cat(rows)


class CrossAttention(nn.Module):
    """Projections that both share. No biases but in Megatron core's function: absence must give exactly zero."""

    def __init__(self, config: ModelConfig, retro: RetroConfig, source_size: int, *, closing_bias: bool) -> None:
        super().__init__()
        bias = retro.biased_cross_attention(config)
        heads, groups, head_size = config.num_attention_heads, config.num_key_value_heads(), config.head_size()
        self.num_heads, self.head_size = heads, head_size
        self.interleaved = config.rotary_interleaved
        self.attention_dropout = config.attention_dropout
        self.query = Linear(config.hidden_size, (heads, head_size), bias=bias)
        self.key_value = Linear(source_size, (groups, 2 * head_size), bias=bias)
        self.relative = RelativePositions(config) if retro.neighbor_positions() == "relative" else None
        self.output = HeadsToHidden(heads, head_size, config.hidden_size, bias=bias and closing_bias)

    def _dropout(self) -> float:
        return self.attention_dropout if self.training else 0.0

    def _rotated(self, heads: Tensor, table: RotaryTable | None) -> Tensor:
        return heads if table is None else apply_rotary(heads, table, interleaved=self.interleaved)

    def _keys_values(self, source: Tensor, table: RotaryTable | None) -> tuple[Tensor, Tensor]:
        """[X, T, G, D] twice, from [X, T, H]."""
        key, value = torch.split(self.key_value(source), self.head_size, -1)
        return self._rotated(key, table), value


class ChunkedCrossAttention(CrossAttention):
    """Attending chunks read the encoded neighbours of their chunk, scaled by the gate."""

    def __init__(self, config: ModelConfig, retro: RetroConfig, encoder_size: int) -> None:
        super().__init__(config, retro, encoder_size, closing_bias=False)
        self.attending = AttendingBias(config.hidden_size) if retro.biased_cross_attention(config) else None
        self.chunk_length = retro.retro_chunk_length
        self.fixed_gate = retro.retro_attention_gate if retro.retro_gate_type == "fixed" else 1.0
        self.gate = gate_of(config, retro)

    def forward(
        self,
        normed_BSH: Tensor,
        encoded_BCKRH: Tensor | None,
        retrieval: NeighborContext,
        cache_slice: CacheSlice | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, S, H]: what neighbours add, zero where there are none."""
        query_BSND = self.query(normed_BSH)
        if cache_slice is not None and cache is not None:
            query_BSND = self._rotated(query_BSND, retrieval.query_rotary)
            key, value = self._chunk_keys_values(encoded_BCKRH, retrieval.key_rotary)
            attended = self._attend_cached(query_BSND, key, value, normed_BSH, retrieval, cache_slice, cache)
        else:
            key, value = self._chunk_keys_values(encoded_BCKRH, None)
            assert key is not None and value is not None
            attended = self._attend(
                retrieval.by_span(query_BSND),
                key,
                value,
                retrieval,
                retrieval.mask_BCE,
                retrieval.first_position,
                tables=(retrieval.query_rotary, retrieval.key_rotary),
            )
            attended = self._gated(retrieval.joined(attended), normed_BSH, key.shape[1], retrieval.first_position)
        output: Tensor = self.output(attended)
        if self.attending is not None:
            share = query_BSND.shape[2] / self.num_heads  # of the heads, where ranks add up what they give
            output = output + share * self.attending(self._attends(retrieval, query_BSND, cache_slice))
        return output

    def _attends(self, retrieval: NeighborContext, query_BSND: Tensor, cache_slice: CacheSlice | None) -> Tensor:
        """[B, S] which tokens see a chunk that has neighbours."""
        assert retrieval.mask_BCE is not None
        present_BC = retrieval.mask_BCE.any(-1)
        if cache_slice is not None:
            return present_BC.gather(1, cache_slice.visible_chunk_BS(query_BSND.device))
        return spread_over_queries(present_BC, query_BSND.shape[1], self.chunk_length, retrieval.first_position)

    def _chunk_keys_values(
        self, encoded_BCKRH: Tensor | None, table: RotaryTable | None
    ) -> tuple[Tensor | None, Tensor | None]:
        if encoded_BCKRH is None:
            return None, None
        shape = encoded_BCKRH.shape[:2]
        key, value = self._keys_values(encoded_BCKRH.flatten(2, 3).flatten(0, 1), table)
        return torch.unflatten(key, 0, shape), torch.unflatten(value, 0, shape)

    def _attend(
        self,
        query_BSND: Tensor,
        key_BCEGD: Tensor,
        value_BCEGD: Tensor,
        retrieval: NeighborContext,
        mask_BCE: Tensor | None,
        first_position: int,
        tables: tuple[RotaryTable | None, RotaryTable | None] = (None, None),
    ) -> Tensor:
        bias = self._relative_scores(query_BSND, key_BCEGD.shape[2], retrieval)
        return chunked_cross_attention(
            query_BSND,
            key_BCEGD,
            value_BCEGD,
            mask_BCE,
            self.chunk_length,
            first_position=first_position,
            bias_BNSE=bias,
            dropout=self._dropout(),
            query_table=tables[0],
            key_table=tables[1],
            interleaved=self.interleaved,
        )

    def _relative_scores(self, query_BSND: Tensor, num_keys: int, retrieval: NeighborContext) -> Tensor | None:
        if self.relative is None:
            return None
        keys = torch.arange(retrieval.retrieved_length, device=query_BSND.device)
        keys = keys.repeat(num_keys // retrieval.retrieved_length)
        reach = (self.chunk_length - retrieval.retrieved_length, 2 * self.chunk_length - 2)
        scores_BNSE: Tensor = self.relative(query_BSND, retrieval.query_positions_BS[0], keys, reach)
        return scores_BNSE

    def attention_received(self, normed_BSH: Tensor, encoded_BCKRH: Tensor, retrieval: NeighborContext) -> Tensor:
        """[B, C, N, E]: the attention that each neighbour's token gets from those who read it, summed over them.

        Scaled by the gate, as what they read is. For looking at: the operators that attend never hold these weights.
        """
        query_BSND = self._rotated(self.query(normed_BSH), retrieval.query_rotary)
        key_BCEGD, _ = self._chunk_keys_values(encoded_BCKRH, retrieval.key_rotary)
        assert key_BCEGD is not None
        num_chunks, num_keys, groups = key_BCEGD.shape[1:4]
        bias_BNSE = self._relative_scores(query_BSND, num_keys, retrieval)
        gate_BSN = self._gated(torch.ones_like(query_BSND), normed_BSH, num_chunks, retrieval.first_position)[..., 0]
        received = query_BSND.new_zeros(query_BSND.shape[0], num_chunks, query_BSND.shape[2], num_keys)
        keys = key_BCEGD.repeat_interleave(query_BSND.shape[2] // groups, -2)
        for span in attending_spans(query_BSND.shape[1], self.chunk_length, num_chunks, retrieval.first_position):
            some, seen = slice(span.start, span.stop), slice(span.first_chunk, span.first_chunk + span.num_chunks)
            query, gate = (torch.unflatten(each[:, some], 1, (span.num_chunks, -1)) for each in (query_BSND, gate_BSN))
            scores = torch.einsum("bcmnd,bcend->bcmne", query, keys[:, seen]) / self.head_size**0.5
            if bias_BNSE is not None:
                scores = scores + torch.unflatten(bias_BNSE[:, :, some].movedim(1, 2), 1, (span.num_chunks, -1))
            if retrieval.mask_BCE is not None:
                scores = scores.masked_fill(~retrieval.mask_BCE[:, seen, None, None], -torch.inf)
            weights = scores.softmax(-1).nan_to_num(0.0)
            received[:, seen] += (weights * gate.abs()[..., None]).sum(2)
        return received

    def _gated(self, attended_BSND: Tensor, normed_BSH: Tensor, num_chunks: int, first_position: int) -> Tensor:
        if isinstance(self.gate, AdaptiveGate):
            ends = slice(self.chunk_length - 1 - first_position, None, self.chunk_length)
            rates_BC = self.gate(normed_BSH[:, ends][:, :num_chunks])
            rates_BS = spread_over_queries(rates_BC, attended_BSND.shape[1], self.chunk_length, first_position)
            return attended_BSND * rates_BS[..., None, None].to(attended_BSND.dtype)
        if isinstance(self.gate, ScalarGate | HeadGate):
            factor: Tensor = self.gate()
            return attended_BSND * factor
        return attended_BSND if self.fixed_gate == 1.0 else attended_BSND * self.fixed_gate

    def _attend_cached(
        self,
        query_BSND: Tensor,
        key_PCEGD: Tensor | None,
        value_PCEGD: Tensor | None,
        normed_BSH: Tensor,
        retrieval: NeighborContext,
        cache_slice: CacheSlice,
        cache: LayerCache,
    ) -> Tensor:
        """As `_attend`, over the chunk that was complete before and those that this slice completes."""
        key = cache.over_visible_chunks("neighbor_key", None if key_PCEGD is None else key_PCEGD[:, 0], cache_slice)
        value = cache.over_visible_chunks(
            "neighbor_value", None if value_PCEGD is None else value_PCEGD[:, 0], cache_slice
        )
        if key is None or value is None or retrieval.mask_BCE is None:
            return torch.zeros_like(query_BSND)
        attended = self._attend_rows(query_BSND, key, value, retrieval, retrieval.mask_BCE, cache_slice)
        if not isinstance(self.gate, AdaptiveGate):
            return self._gated(attended, normed_BSH, 0, 0)
        ends = [
            stop - 1 - cache_slice.starts[row]
            for row, stop in zip(cache_slice.rows, cache_slice.chunk_stops, strict=True)
        ]
        rates = cache.over_visible_chunks("rate", self.gate(normed_BSH[cache_slice.rows, ends]), cache_slice)
        assert rates is not None
        seen = cache_slice.visible_chunk_BS(query_BSND.device)
        return attended * rates.gather(1, seen)[..., None, None].to(attended.dtype)

    def _attend_rows(
        self,
        query_BSND: Tensor,
        key_BCEGD: Tensor,
        value_BCEGD: Tensor,
        retrieval: NeighborContext,
        mask_BCE: Tensor,
        cache_slice: CacheSlice,
    ) -> Tensor:
        """Rows at the same place of their chunk go together; single tokens fetch their chunk; others row by row."""
        first_positions = cache_slice.first_positions
        if len(set(first_positions)) == 1:
            return self._attend(query_BSND, key_BCEGD, value_BCEGD, retrieval, mask_BCE, first_positions[0])
        if cache_slice.width == 1 and self.relative is None:
            rows = torch.arange(query_BSND.shape[0], device=query_BSND.device)
            seen = cache_slice.visible_chunk_BS(query_BSND.device)[:, 0]
            one = [tensor[rows, seen][:, None] for tensor in (key_BCEGD, value_BCEGD, mask_BCE)]
            return self._attend(query_BSND, one[0], one[1], retrieval, one[2], self.chunk_length - 1)
        rows_of_queries = [
            self._attend(
                query_BSND[row : row + 1],
                key_BCEGD[row : row + 1],
                value_BCEGD[row : row + 1],
                retrieval.of_row(row),
                mask_BCE[row : row + 1],
                first_position,
            )
            for row, first_position in enumerate(first_positions)
        ]
        return torch.cat(rows_of_queries)


class EncoderCrossAttention(CrossAttention):
    """Neighbour tokens read the decoder's state of the chunk that retrieved them."""

    def __init__(self, config: ModelConfig, retro: RetroConfig, decoder_size: int) -> None:
        super().__init__(config, retro, decoder_size, closing_bias=True)

    def forward(
        self,
        normed_XKRH: Tensor,
        chunk_XMH: Tensor,
        chunk_mask_XM: Tensor | None,
        query_rotary: RotaryTable | None,
        chunk_rotary: RotaryTable | None,
    ) -> Tensor:
        """[X, K, R, H] for X chunks; a chunk's keys and values serve all its neighbours."""
        num_neighbors, retrieved_length = normed_XKRH.shape[1:3]
        query = self._rotated(self.query(normed_XKRH.flatten(1, 2)), query_rotary)
        key, value = self._keys_values(chunk_XMH, chunk_rotary)
        bias = None
        if self.relative is not None:
            positions = torch.arange(retrieved_length, device=query.device).repeat(num_neighbors)
            chunk = torch.arange(chunk_XMH.shape[1], device=query.device)
            bias = self.relative(query, positions, chunk, (1 - len(chunk), retrieved_length - 1))
        allowed = None if chunk_mask_XM is None else chunk_mask_XM[:, None].expand(-1, query.shape[1], -1)
        attended = attention(
            query, key, value, AttentionPattern(allowed_BST=allowed, bias_BNST=bias), dropout=self._dropout()
        )
        output: Tensor = self.output(attended)
        return torch.unflatten(output, 1, (num_neighbors, retrieved_length))
