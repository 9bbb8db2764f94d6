"""Softmax attention of queries to keys under a pattern: causal, windowed, masked, biased, with grouped key/value heads.

A query that may see no key gets exactly zero, never NaN, and a key that no query may see has no influence at all.

Rows of several documents, and windows, go to torch's variable-length attention on a GPU that has it, which does the
work of each document alone; everywhere else a mask says the same, at the price of the whole square.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from megatron_retro.ops.backends import constant_when_compiled
from megatron_retro.ops.cpu_products import is_slow

_FLASH_CAPABILITY = (8, 0)
_WIDEST_HEAD = 256
# Others have no backward for heads of more than 192 numbers, but of more than 224 without dropout.
_WIDE_CAPABILITIES, _WIDE_HEAD, _WIDER_HEAD = ((8, 0), (9, 0), (10, 0)), 192, 224
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Documents:
    """Who belongs together: an id for each token, one run of tokens for each id; where they begin, if that is known.

    Every row has the same number of bounds, the last ones at its end: documents that are empty. Queries are the tokens
    from `first_query` on, keys are all.
    """

    ids_BS: Tensor
    bounds_BD: Tensor | None = None
    first_query: int = 0
    # Where documents begin, counted through all rows, and at last the number of tokens; int32.
    key_starts_N: Tensor | None = field(init=False)
    query_starts_N: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        """Here once, and not in every layer."""
        object.__setattr__(self, "key_starts_N", self._starts_N(0))
        object.__setattr__(self, "query_starts_N", self._starts_N(self.first_query))

    def part(self, first: int, first_query: int, stop: int) -> Documents:
        """With keys from `first` on and queries from `first_query` on, both before `stop`."""
        bounds_BD = None if self.bounds_BD is None else (self.bounds_BD - first).clamp(0, stop - first)
        return Documents(self.ids_BS[:, first:stop], bounds_BD, first_query - first)

    @property
    def same_BST(self) -> Tensor:
        """Whether query and key are of one document."""
        return self.ids_BS[:, self.first_query :, None] == self.ids_BS[:, None, :]

    def _starts_N(self, first: int) -> Tensor | None:
        if self.bounds_BD is None:
            return None
        num_rows, length = self.ids_BS.shape
        first_B1 = torch.arange(num_rows, device=self.ids_BS.device)[:, None] * (length - first)
        ends_N = ((self.bounds_BD[:, 1:] - first).clamp(min=0) + first_B1).flatten()
        return functional.pad(ends_N, (1, 0)).to(torch.int32)


@dataclass(frozen=True)
class AttentionPattern:
    """Which key a query may see. The last query stands at the last key's position when it is causal.

    Where there are spans, they say it instead.
    """

    causal: bool = False
    window: int | None = None
    allowed_BST: Tensor | None = None
    bias_BNST: Tensor | None = None
    documents: Documents | None = None
    spans: tuple[QuerySpan, ...] = ()

    def mask(self, num_queries: int, num_keys: int, device: torch.device) -> Tensor | None:
        """[B or 1, S, T] of bool, or None when every query sees every key."""
        allowed = self._allowed_BST()
        if not self.causal and self.window is None:
            return allowed
        offset = num_keys - num_queries
        distance_ST = torch.arange(num_queries, device=device)[:, None] + offset - torch.arange(num_keys, device=device)
        allowed_BST = (distance_ST >= 0)[None] if self.causal else torch.ones_like(distance_ST, dtype=torch.bool)[None]
        if self.window is not None:
            allowed_BST = allowed_BST & (distance_ST < self.window)
        return allowed_BST if allowed is None else allowed_BST & allowed

    def _allowed_BST(self) -> Tensor | None:
        if self.documents is None:
            return self.allowed_BST
        same_BST = self.documents.same_BST
        return same_BST if self.allowed_BST is None else same_BST & self.allowed_BST


@dataclass(frozen=True)
class QuerySpan:
    """So many queries, behind those of the spans before; keys `first_key` to `stop` are the only ones they can see."""

    num_queries: int
    first_key: int
    stop: int
    pattern: AttentionPattern


def attention(
    query_BSND: Tensor,
    key_BTGD: Tensor,
    value_BTGD: Tensor,
    pattern: AttentionPattern,
    *,
    dropout: float = 0.0,
) -> Tensor:
    """[B, S, N, D]: softmax(QK / sqrt(D)) V; N query heads share G key/value heads in order."""
    if pattern.spans:
        return _attention_of_spans(query_BSND, key_BTGD, value_BTGD, pattern.spans, dropout)
    lengths = _lengths(query_BSND, key_BTGD, pattern, dropout)
    if lengths is not None and has_variable_length_attention(query_BSND):
        return _of_variable_length(query_BSND, key_BTGD, value_BTGD, lengths, pattern.window)
    if is_slow(query_BSND) and pattern.bias_BNST is None and _may_train():
        # the backward is what is slow
        wide = attention(query_BSND.float(), key_BTGD.float(), value_BTGD.float(), pattern, dropout=dropout)
        return wide.to(query_BSND.dtype)
    num_queries, num_keys = query_BSND.shape[1], key_BTGD.shape[1]
    query, key, value = query_BSND.transpose(1, 2), key_BTGD.transpose(1, 2), value_BTGD.transpose(1, 2)
    plain = pattern.allowed_BST is None and pattern.bias_BNST is None and pattern.documents is None
    windowed = pattern.window is not None and pattern.window < num_keys
    if plain and not windowed and (not pattern.causal or num_queries in (1, num_keys)):
        causal = pattern.causal and num_queries > 1
        return _scaled_products(query, key, value, dropout, causal=causal).transpose(1, 2)
    if plain and not windowed and _flash_takes(query, dropout):
        # torch's own function takes `is_causal` for the upper left there, its flash kernel for the lower right
        attended: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout, True)[0]
        return attended.transpose(1, 2)
    mask_BST = pattern.mask(num_queries, num_keys, query_BSND.device)
    if mask_BST is None:
        return _scaled_products(query, key, value, dropout, mask=pattern.bias_BNST).transpose(1, 2)
    sees_any_BS = mask_BST.any(-1)
    safe_BNST = (mask_BST | ~sees_any_BS[..., None])[:, None]
    if pattern.bias_BNST is not None:
        safe_BNST = pattern.bias_BNST.masked_fill(~safe_BNST, float("-inf"))
    out_BSND = _scaled_products(query, key, value, dropout, mask=safe_BNST).transpose(1, 2)
    looks = sees_any_BS.device.type == "cpu" and not torch.compiler.is_compiling()
    if looks and bool(sees_any_BS.all()):
        return out_BSND  # the same bits, without a second copy that a backward pass keeps
    return torch.where(sees_any_BS[:, :, None, None], out_BSND, 0.0)


def _scaled_products(
    query_BNSD: Tensor,
    key_BGTD: Tensor,
    value_BGTD: Tensor,
    dropout: float,
    *,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    share = query_BNSD.shape[1] // key_BGTD.shape[1]
    if share > 1 and query_BNSD.device.type != "cpu" and (mask is not None or not _flash_takes(query_BNSD, dropout)):
        # what torch has for these on a GPU takes no grouped heads: it would write out all scores
        key_BGTD, value_BGTD = (each.repeat_interleave(share, 1) for each in (key_BGTD, value_BGTD))
        share = 1
    return functional.scaled_dot_product_attention(
        query_BNSD, key_BGTD, value_BGTD, attn_mask=mask, dropout_p=dropout, is_causal=causal, enable_gqa=share > 1
    )


def _attention_of_spans(
    query_BSND: Tensor, key_BTGD: Tensor, value_BTGD: Tensor, spans: tuple[QuerySpan, ...], dropout: float
) -> Tensor:
    queries = torch.split(query_BSND, [span.num_queries for span in spans], 1)
    attended = []
    for span, query in zip(spans, queries, strict=True):
        key, value = (each[:, span.first_key : span.stop] for each in (key_BTGD, value_BTGD))
        attended.append(attention(query, key, value, span.pattern, dropout=dropout))
    return torch.cat(attended, 1)


def _flash_takes(heads: Tensor, dropout: float) -> bool:
    """Whether torch's flash attention takes such heads on their device; a plan's device stands for a GPU."""
    size = heads.shape[-1]
    if heads.dtype not in _HALF or size % 8 or size > _WIDEST_HEAD:
        return False
    on_gpu = heads.device.type == "cuda" and _gpu_has_flash(heads.device.index, size, dropout > 0.0)
    return on_gpu or heads.device.type == "meta"


@constant_when_compiled
def _gpu_has_flash(index: int | None, head_size: int, drops: bool) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < _FLASH_CAPABILITY:
        return False
    is_wide = torch.cuda.get_device_capability(index) in _WIDE_CAPABILITIES
    return is_wide or head_size <= _WIDE_HEAD or (head_size > _WIDER_HEAD and not drops)


def _may_train() -> bool:
    return torch.compiler.is_compiling() or not torch.is_inference_mode_enabled()


def _lengths(
    query_BSND: Tensor, key_BTGD: Tensor, pattern: AttentionPattern, dropout: float
) -> tuple[Tensor, Tensor, int, int] | None:
    """Where queries and keys of each document begin, and the most of each, if documents and a window say all."""
    documents, num_rows = pattern.documents, len(query_BSND)
    num_queries, num_keys = query_BSND.shape[1], key_BTGD.shape[1]
    if not pattern.causal or pattern.allowed_BST is not None or pattern.bias_BNST is not None or dropout > 0.0:
        return None
    starts: tuple[Tensor | None, Tensor | None] = None, None
    if documents is not None:
        if documents.ids_BS.shape[1] != num_keys or num_keys - documents.first_query != num_queries:
            return None
        starts = documents.query_starts_N, documents.key_starts_N
    elif pattern.window is not None and pattern.window < num_keys and num_queries > 1:
        numbers = torch.arange(num_rows + 1, dtype=torch.int32, device=query_BSND.device)
        starts = numbers * num_queries, numbers * num_keys
    return None if starts[0] is None or starts[1] is None else (starts[0], starts[1], num_queries, num_keys)


def has_variable_length_attention(heads: Tensor) -> bool:
    """Whether torch and this GPU have one that takes such heads."""
    return heads.device.type == "cuda" and _flash_takes(heads, 0.0) and _torch_has_variable_length_attention()


@constant_when_compiled
def _torch_has_variable_length_attention() -> bool:
    return torchs_variable_length_attention() is not None


@cache
def torchs_variable_length_attention() -> Callable[..., Any] | None:
    """Torch's, if it takes windows and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if {"window_size", "enable_gqa"} <= set(inspect.signature(varlen_attn).parameters) else None


def _of_variable_length(
    query_BSND: Tensor,
    key_BTGD: Tensor,
    value_BTGD: Tensor,
    lengths: tuple[Tensor, Tensor, int, int],
    window: int | None,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn  # two seconds of each process that does not need it

    window_size = (-1 if window is None else window - 1, 0)
    grouped = query_BSND.shape[2] != key_BTGD.shape[2]
    rows = (each.flatten(0, 1) for each in (query_BSND, key_BTGD, value_BTGD))
    attend: Callable[..., Any] = varlen_attn
    attended_TND: Tensor = attend(*rows, *lengths, window_size=window_size, enable_gqa=grouped)
    return torch.unflatten(attended_TND, 0, query_BSND.shape[:2])
