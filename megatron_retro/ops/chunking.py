"""The one-token overlap between a chunk and the tokens that may see its neighbours, and nothing else.

Positions and chunks count from 0. The neighbours of chunk u may influence position p only if p >= (u+1)*m - 1: the last
token of chunk u (whose output predicts the first token of chunk u+1) and the m-1 tokens after it. Those m positions
are the ATTENDING chunk of u. Every shift by m-1 in the code comes from here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def num_complete_chunks(length: int, chunk_length: int) -> int:
    """Chunks that lie wholly in a sequence; the neighbours of a short last one are never attended to."""
    return length // chunk_length


def attended_chunk(position: int, chunk_length: int) -> int:
    """The chunk whose neighbours a position sees; -1 for the first m-1 positions."""
    return (position + 1) // chunk_length - 1


def query_positions(num_queries: int, first_position: int, chunk_length: int, device: torch.device) -> Tensor:
    """[S] distance of each position from the start of the chunk whose neighbours it sees: m-1 .. 2m-2.

    Neighbour tokens count from 0, so query i of an attending chunk and neighbour token j are i - j + m - 1 apart.
    """
    positions = torch.arange(first_position, first_position + num_queries, device=device)
    return (positions + 1) % chunk_length + chunk_length - 1


@dataclass(frozen=True)
class AttendingSpan:
    """Queries [start, stop) attend to chunks [first_chunk, first_chunk + num_chunks), the same number to each."""

    start: int
    stop: int
    first_chunk: int
    num_chunks: int


def attending_spans(
    num_queries: int, chunk_length: int, num_chunks: int, first_position: int = 0
) -> tuple[AttendingSpan, ...]:
    """How queries at positions first_position, first_position + 1, ... fall on chunks 0 .. num_chunks-1.

    At most three spans: the rest of a chunk that began before the queries, whole attending chunks, and a short end.
    Queries before the first span or after the last one see no neighbour.
    """
    spans = []
    start = max(0, chunk_length - 1 - first_position)
    stop = min(num_queries, (num_chunks + 1) * chunk_length - 1 - first_position)
    while start < stop:
        chunk = attended_chunk(first_position + start, chunk_length)
        chunk_stop = (chunk + 2) * chunk_length - 1 - first_position
        whole = chunk_stop - start == chunk_length and chunk_stop <= stop
        count = (stop - start) // chunk_length if whole else 1
        end = start + count * chunk_length if whole else min(stop, chunk_stop)
        spans.append(AttendingSpan(start, end, chunk, count))
        start = end
    return tuple(spans)


def whole_span(spans: tuple[AttendingSpan, ...], chunk_length: int, first_position: int = 0) -> AttendingSpan:
    """One span for all of them; of several, in whole attending chunks, which may begin or end beyond the queries."""
    if len(spans) == 1:
        return spans[0]
    first, last = spans[0].first_chunk, spans[-1].first_chunk + spans[-1].num_chunks
    start = (first + 1) * chunk_length - 1 - first_position
    return AttendingSpan(start, start + (last - first) * chunk_length, first, last - first)


def spread_over_queries(
    value_BC: Tensor, num_queries: int, chunk_length: int, first_position: int = 0, fill: float = 0.0
) -> Tensor:
    """[B, S] from a value per chunk: each query gets the value of the chunk that it sees, others `fill`."""
    positions = torch.arange(first_position, first_position + num_queries, device=value_BC.device)
    chunks = torch.div(positions + 1, chunk_length, rounding_mode="floor") - 1
    seen = (chunks >= 0) & (chunks < value_BC.shape[1])
    spread_BS = value_BC[:, chunks.clamp(0, max(value_BC.shape[1] - 1, 0))]
    return torch.where(seen, spread_BS, torch.full_like(spread_BS, fill))
