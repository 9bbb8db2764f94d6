"""Sequences that several ranks share, each holding spans of every one; what the model needs to know of it.

Queries of a span see the keys of all ranks up to its end. For chunked cross-attention spans are rows of their own, with
the chunk before each in front of its own chunks: the first m - 1 tokens of a span read its neighbours.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from megatron_retro.ops.attention import AttentionPattern, Documents, QuerySpan


class SequenceShare(Protocol):
    """What this rank holds of every sequence, and what it hears of those that hold the rest; all of them must call."""

    def spans(self, length: int) -> tuple[range, ...]:
        """The positions that `length` tokens here have in the sequence, span by span."""

    def whole(self, part_BSX: Tensor) -> Tensor:
        """[B, S, ...] of the whole sequence, in its order."""

    def behind_chunk_before(self, part_BCX: Tensor) -> Tensor:
        """[B * spans, 1 + C / spans, ...]: the chunks of each span behind the chunk before it, zeros where none is."""


def sequence_pattern(
    window: int | None, documents: Documents | None, padding_mask_BS: Tensor | None, spans: tuple[range, ...] = ()
) -> AttentionPattern:
    """Who sees whom in a whole sequence: the past, inside the window, the own document, real tokens.

    With spans, queries are those alone, and the past of each is what it can see.
    """
    if spans:
        return AttentionPattern(spans=tuple(_span_pattern(window, documents, span) for span in spans))
    real_BST: Tensor | None = None
    if padding_mask_BS is not None:
        real_BST = padding_mask_BS[:, None, :].expand(-1, padding_mask_BS.shape[1], -1)
    return AttentionPattern(causal=True, window=window, allowed_BST=real_BST, documents=documents)


def _span_pattern(window: int | None, documents: Documents | None, span: range) -> QuerySpan:
    first_key = 0 if window is None else max(0, span.start + 1 - window)
    own = None if documents is None else documents.part(first_key, span.start, span.stop)
    return QuerySpan(len(span), first_key, span.stop, AttentionPattern(causal=True, window=window, documents=own))
