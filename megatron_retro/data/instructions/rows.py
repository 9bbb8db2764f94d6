"""Conversations laid into rows of fixed length, several per row when packed, none seeing another.

With passages for the encoder every conversation starts on a chunk boundary and is padded on the left so that its prompt
ends on one: the first token of the reply is then predicted with the passages in sight. A chunk's neighbours are read by
the chunk after it, so the last chunk of a conversation has none: they would be read by the next conversation.

With buckets, rows of like length are read together: a step of short conversations is a short step. Each block of `size`
rows (a step's) is cut to its longest, rounded up to an eighth of a whole row, so a run meets eight shapes at most.
Blocks come in a shuffled order, and a row's place is a function of (seed, number) as ever.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.instructions.templates import TokenizedConversation
from megatron_retro.data.order import permuted
from megatron_retro.errors import ConfigError
from megatron_retro.microbatch import Array, Microbatch, Neighbors

OPEN_ROWS = 32


@dataclass(frozen=True)
class RowShape:
    """The length of a row; with an encoder also its chunks and the shape of their neighbours."""

    length: int
    padding_token: int
    chunk_length: int | None = None
    num_neighbors: int = 0
    retrieved_length: int = 0

    def __post_init__(self) -> None:
        if self.chunk_length is not None and self.length % self.chunk_length:
            raise ConfigError(
                "--seq-length does not hold whole chunks",
                got=self.length,
                expected=f"a multiple of --retro-chunk-length {self.chunk_length}",
            )

    def left_padding(self, conversation: TokenizedConversation) -> int:
        """Padding before an conversation, so that its prompt ends on a chunk boundary."""
        return -conversation.prompt_length % self.chunk_length if self.chunk_length else 0

    def span(self, conversation: TokenizedConversation) -> int:
        """Positions that an conversation takes; its last token is only ever a label."""
        taken = self.left_padding(conversation) + len(conversation.tokens) - 1
        return taken + (-taken % self.chunk_length if self.chunk_length else 0)


def pack(spans: Sequence[int], row_length: int) -> list[tuple[int, ...]]:
    """Rows of conversation numbers: each conversation goes to the first open row that has room, in the order given."""
    open_rows: list[tuple[int, list[int]]] = []
    rows: list[tuple[int, ...]] = []
    for number, span in enumerate(spans):
        place = next((index for index, (used, _) in enumerate(open_rows) if used + span <= row_length), None)
        if place is None:
            if len(open_rows) == OPEN_ROWS:
                fullest = max(range(OPEN_ROWS), key=lambda index: open_rows[index][0])
                rows.append(tuple(open_rows.pop(fullest)[1]))
            open_rows.append((span, [number]))
        else:
            used, members = open_rows[place]
            open_rows[place] = (used + span, [*members, number])
    return rows + [tuple(members) for _, members in open_rows]


def build_batch(
    rows: Sequence[Sequence[TokenizedConversation]],
    sample_ids: Sequence[int],
    shape: RowShape,
    length: int | None = None,
) -> Microbatch[Array]:
    """The rows as one batch, cut to a length that holds them all."""
    shape = shape if length is None else replace(shape, length=length)
    size = (len(rows), shape.length)
    tokens = np.full(size, shape.padding_token, dtype=np.int32)
    labels = np.full(size, shape.padding_token, dtype=np.int32)
    learned = np.zeros(size, dtype=np.bool_)
    positions = np.zeros(size, dtype=np.int32)
    documents = np.zeros(size, dtype=np.int32)
    neighbors = _NeighborArrays(len(rows), shape) if shape.chunk_length else None
    for row, conversations in enumerate(rows):
        start = 0
        for number, conversation in enumerate(conversations):
            span, padding = shape.span(conversation), shape.left_padding(conversation)
            first, last = start + padding, start + padding + len(conversation.tokens) - 1
            tokens[row, first:last] = conversation.tokens[:-1]
            labels[row, first:last] = conversation.tokens[1:]
            learned[row, first:last] = conversation.learned[1:]
            positions[row, first:last] = np.arange(last - first)
            # Three numbers per conversation keep its padding apart from it, and from the other conversations' padding.
            documents[row, start:first] = 3 * number + 1
            documents[row, first:last] = 3 * number + 2
            documents[row, last : start + span] = 3 * number + 3
            if neighbors is not None:
                neighbors.fill(row, start, span, conversation)
            start += span
    return Microbatch(
        tokens_BS=tokens,
        labels_BS=labels,
        loss_mask_BS=learned,
        position_ids_BS=positions,
        document_ids_BS=documents,
        neighbors=None if neighbors is None else Neighbors(neighbors.tokens, neighbors.mask),
        sample_ids_B=np.asarray(sample_ids, dtype=np.int64),
    )


class _NeighborArrays:
    """Neighbour arrays of a batch, filled conversation by conversation."""

    def __init__(self, num_rows: int, shape: RowShape) -> None:
        self.shape = shape
        self.chunk_length = shape.chunk_length or 1
        size = (num_rows, shape.length // self.chunk_length, shape.num_neighbors, shape.retrieved_length)
        self.tokens: NDArray[np.int32] = np.zeros(size, dtype=np.int32)
        self.mask: NDArray[np.bool_] = np.zeros(size, dtype=np.bool_)

    def fill(self, row: int, start: int, span: int, conversation: TokenizedConversation) -> None:
        """Give an conversation's passages to all its chunks but the last; a passage never leaves its slot."""
        first, last = start // self.chunk_length, (start + span) // self.chunk_length - 1
        for slot, passage in enumerate(conversation.passages[: self.shape.num_neighbors]):
            kept = passage[: self.shape.retrieved_length]
            self.tokens[row, first:last, slot, : len(kept)] = kept
            self.mask[row, first:last, slot, : len(kept)] = True


_SHAPES = 8
_BLOCKS_SORTED_TOGETHER = 32


@dataclass(frozen=True)
class Buckets:
    """Blocks of `size` rows share a length, which is a multiple of `multiple`."""

    size: int
    multiple: int

    def row_length(self, longest: int, whole: int) -> int:
        """The length that rows of up to `longest` positions are cut to."""
        step = -(-whole // (_SHAPES * self.multiple)) * self.multiple
        return min(whole, -(-longest // step) * step)

    def arranged(self, lengths: Sequence[int], first: int, key: int) -> list[int]:
        """The order of an epoch's rows, given in a shuffled order; `first` is the number of its first row."""
        window = _BLOCKS_SORTED_TOGETHER * self.size
        order: list[int] = []
        for start in range(0, len(lengths), window):
            order += sorted(range(start, min(start + window, len(lengths))), key=lambda row: lengths[row])
        head = min(-first % self.size, len(order))
        count = (len(order) - head) // self.size
        blocks = [order[head + number * self.size : head + (number + 1) * self.size] for number in range(count)]
        shuffled = permuted(np.arange(count), count, key) if count else ()
        inner = [row for number in shuffled for row in blocks[int(number)]]
        return [*order[:head], *inner, *order[head + count * self.size :]]
