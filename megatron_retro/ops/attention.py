"""Softmax attention of queries to keys under a pattern: causal, windowed, masked, biased, with grouped key/value heads.

A query that may see no key gets exactly zero, never NaN, and a key that no query may see has no influence at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class AttentionPattern:
    """Which key a query may see. The last query stands at the last key's position when it is causal."""

    causal: bool = False
    window: int | None = None
    allowed_BST: Tensor | None = None
    bias_BNST: Tensor | None = None

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """[B or 1, S, T] of bool, or None when every query sees every key."""
        if not self.causal and self.window is None:
            return self.allowed_BST
        offset = num_keys - num_queries
        distance_ST = torch.arange(num_queries, device=device)[:, None] + offset - torch.arange(num_keys, device=device)
        allowed_BST = (distance_ST >= 0)[None] if self.causal else torch.ones_like(distance_ST, dtype=torch.bool)[None]
        if self.window is not None:
            allowed_BST = allowed_BST & (distance_ST < self.window)
        return allowed_BST if self.allowed_BST is None else allowed_BST & self.allowed_BST


def attention(
    query_BSND: Tensor,
    key_BTGD: Tensor,
    value_BTGD: Tensor,
    pattern: AttentionPattern,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """[B, S, N, D]: softmax(QK / sqrt(D)) V; N query heads share G key/value heads in order."""
    num_queries, num_keys = query_BSND.shape[1], key_BTGD.shape[1]
    query, key, value = query_BSND.transpose(1, 2), key_BTGD.transpose(1, 2), value_BTGD.transpose(1, 2)
    grouped = query_BSND.shape[2] != key_BTGD.shape[2]
    plain = pattern.allowed_BST is None and pattern.bias_BNST is None
    windowed = pattern.window is not None and pattern.window < num_keys
    if plain and not windowed and (not pattern.causal or num_queries in (1, num_keys)):
        causal = pattern.causal and num_queries > 1
        out_BNSD = functional.scaled_dot_product_attention(
            query, key, value, dropout_p=dropout, is_causal=causal, enable_gqa=grouped
        )
        return out_BNSD.transpose(1, 2)
    mask_BST = pattern.mask(num_queries, num_keys, query_BSND.device)
    if mask_BST is None:
        out_BNSD = functional.scaled_dot_product_attention(
            query, key, value, attn_mask=pattern.bias_BNST, dropout_p=dropout, enable_gqa=grouped
        )
        return out_BNSD.transpose(1, 2)
    sees_any_BS = mask_BST.any(-1)
    safe_BNST = (mask_BST | ~sees_any_BS[..., None])[:, None]
    if pattern.bias_BNST is not None:
        safe_BNST = pattern.bias_BNST.masked_fill(~safe_BNST, float("-inf"))
    out_BNSD = functional.scaled_dot_product_attention(
        query, key, value, attn_mask=safe_BNST, dropout_p=dropout, enable_gqa=grouped
    )
    out_BSND = out_BNSD.transpose(1, 2)
    if sees_any_BS.device.type == "cpu" and bool(sees_any_BS.all()):
        return out_BSND  # the same bits, without a second copy that a backward pass keeps
    return torch.where(sees_any_BS[:, :, None, None], out_BSND, 0.0)
