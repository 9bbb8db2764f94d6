"""Self-attention with grouped heads, optional query/key norm, positions and a cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from megatron_retro.config.model import ModelConfig
from megatron_retro.model.cache import CacheSlice, LayerCache
from megatron_retro.model.leaves import HeadsToHidden, Linear, Norm, RelativePositions
from megatron_retro.ops.attention import AttentionPattern, attention
from megatron_retro.ops.rotary import RotaryTable, apply_rotary


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
        self.query_norm = Norm(config, head_size) if config.qk_layernorm else None
        self.key_norm = Norm(config, head_size) if config.qk_layernorm else None
        self.relative = RelativePositions(config) if config.position_embedding_type == "relative" else None
        self.output = HeadsToHidden(heads, head_size, config.hidden_size, bias=bias)

    def forward(
        self,
        hidden_BSH: Tensor,
        pattern: AttentionPattern,
        rotary: RotaryTable | None,
        cache_slice: CacheSlice | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, S, H]. With a cache the keys are all that it holds, these included."""
        query, key, value = self._heads(hidden_BSH, rotary)
        if cache is not None and cache_slice is not None:
            key, value = cache.append("key", key, cache_slice), cache.append("value", value, cache_slice)
        if self.relative is not None:
            pattern = replace(pattern, bias_BNST=self._relative_scores(self.relative, query, key.shape[1], cache_slice))
        attended = attention(query, key, value, pattern, dropout=self.dropout if self.training else 0.0)
        output: Tensor = self.output(attended)
        return output

    def _heads(self, hidden_BSH: Tensor, rotary: RotaryTable | None) -> tuple[Tensor, Tensor, Tensor]:
        projected = torch.unflatten(self.query_key_value(hidden_BSH), -1, (-1, self.head_size))
        query, key, value = torch.split(projected, [projected.shape[-2] - 2, 1, 1], -2)
        query, key, value = query.flatten(2, 3), key.squeeze(-2), value.squeeze(-2)
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = (
                apply_rotary(each, rotary, interleaved=self.interleaved, may_overwrite=True) for each in (query, key)
            )
            if value.requires_grad:
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
