"""Chunked cross-attention: each attending chunk's queries attend to all neighbour tokens of its chunk in one softmax.

Queries that see no chunk (the first m-1 of a sequence) and queries of a chunk whose neighbours are all absent get
exactly zero. The overlap by one token is `chunking`'s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_retro.ops.attention import AttentionPattern, attention
from megatron_retro.ops.backends import uses_native
from megatron_retro.ops.chunking import AttendingSpan, attending_spans, whole_span
from megatron_retro.ops.rotary import RotaryTable, apply_rotary


def chunked_cross_attention(
    query_BSND: Tensor,
    key_BCEGD: Tensor,
    value_BCEGD: Tensor,
    mask_BCE: Tensor | None,
    chunk_length: int,
    *,
    first_position: int = 0,
    bias_BNSE: Tensor | None = None,
    dropout: float = 0.0,
    query_table: RotaryTable | None = None,
    key_table: RotaryTable | None = None,
    interleaved: bool = False,
) -> Tensor:
    """[B, S, N, D]. E = k*r neighbour tokens of a chunk; `first_position` is the first query's, counted from chunk 0.

    `bias_BNSE` is added to the scores of each query; it and dropout are the reference's alone. Tables rotate queries
    [1, S, pairs] and keys [1, E, pairs] inside.
    """
    kind = query_BSND.device.type, query_BSND.dtype
    if bias_BNSE is None and not dropout and uses_native("chunked_cross_attention", *kind):
        return _native(
            query_BSND,
            key_BCEGD,
            value_BCEGD,
            mask_BCE,
            chunk_length,
            first_position,
            query_table,
            key_table,
            interleaved,
        )
    if query_table is not None and key_table is not None:
        query_BSND = apply_rotary(query_BSND, query_table, interleaved=interleaved)
        rotated = apply_rotary(key_BCEGD.flatten(0, 1), key_table, interleaved=interleaved)
        key_BCEGD = torch.unflatten(rotated, 0, key_BCEGD.shape[:2])
    num_chunks = key_BCEGD.shape[1]
    spans = attending_spans(query_BSND.shape[1], chunk_length, num_chunks, first_position)
    if not spans:
        return torch.zeros_like(query_BSND) + _nothing_of(query_BSND, key_BCEGD, value_BCEGD, bias_BNSE)
    span = whole_span(spans, chunk_length, first_position)
    attended = _attend_span(span, query_BSND, key_BCEGD, value_BCEGD, mask_BCE, bias_BNSE, dropout)
    return _rows(attended, -span.start, query_BSND.shape[1] - span.start)


def _rows(rows_BSND: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop`, zero where there are none: written once, where `pad` fills and then copies."""
    size, length, *head = rows_BSND.shape
    before, after = (rows_BSND.new_zeros(size, max(count, 0), *head) for count in (-start, stop - length))
    there = rows_BSND[:, max(start, 0) : min(stop, length)]
    return torch.cat((before, there, after), 1) if start < 0 or stop > length else there


def _nothing_of(*inputs: Tensor | None) -> Tensor:
    """Zero that is made of the inputs, whatever they hold: where nothing attends, gradients are zero, not absent."""
    empty = [each[:0].sum() for each in inputs if each is not None]
    return torch.stack(empty).sum()


def _native(
    query_BSND: Tensor,
    key_BCEGD: Tensor,
    value_BCEGD: Tensor,
    mask_BCE: Tensor | None,
    chunk_length: int,
    first_position: int,
    query_table: RotaryTable | None,
    key_table: RotaryTable | None,
    interleaved: bool,
) -> Tensor:
    heads = [each if each.stride(-1) == 1 else each.contiguous() for each in (query_BSND, key_BCEGD, value_BCEGD)]
    tables: list[Tensor | None] = [None] * 4
    if query_table is not None and key_table is not None:
        rotary = (query_table.cosine, query_table.sine, key_table.cosine, key_table.sine)
        tables = [table.squeeze(0).contiguous() for table in rotary]
    mask_BCE = None if mask_BCE is None else mask_BCE.contiguous()
    scale = 1 / math.sqrt(query_BSND.shape[-1])
    attended: Tensor = torch.ops.megatron_retro.chunked_cross_attention(
        *heads, mask_BCE, chunk_length, first_position, scale, *tables, interleaved
    )[0]
    return attended


def _attend_span(
    span: AttendingSpan,
    query_BSND: Tensor,
    key_BCEGD: Tensor,
    value_BCEGD: Tensor,
    mask_BCE: Tensor | None,
    bias_BNSE: Tensor | None,
    dropout: float,
) -> Tensor:
    batch = query_BSND.shape[0]
    chunks = slice(span.first_chunk, span.first_chunk + span.num_chunks)
    queries_BSND = _rows(query_BSND, span.start, span.stop)
    queries = torch.unflatten(queries_BSND, 1, (span.num_chunks, -1)).flatten(0, 1)
    allowed = None if mask_BCE is None else mask_BCE[:, chunks].flatten(0, 1)[:, None, :]
    bias = None
    if bias_BNSE is not None:
        bias_BSNE = _rows(bias_BNSE.transpose(1, 2), span.start, span.stop)
        bias = torch.unflatten(bias_BSNE, 1, (span.num_chunks, -1)).transpose(2, 3).flatten(0, 1)
    out = attention(
        queries,
        key_BCEGD[:, chunks].flatten(0, 1),
        value_BCEGD[:, chunks].flatten(0, 1),
        AttentionPattern(allowed_BST=allowed, bias_BNST=bias),
        dropout=dropout,
    )
    return torch.unflatten(out, 0, (batch, span.num_chunks)).flatten(1, 2)
