"""State between the pieces of a sequence that is fed little by little, as generation does.

Slots count from 0 in each row's own buffer, and the chunk grid runs over slots. A row may begin with padding slots
(left padding: they stay, masked) and a piece may end with padding (right padding: its slots are written again), so rows
of different lengths share a batch. Of the neighbours only the newest complete chunk's keys and values are kept: no
later token sees an older one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.errors import DataError


@dataclass(frozen=True)
class Piece:
    """What one forward adds: row b's tokens go to slots starts[b] .. starts[b] + width - 1, of which counts[b] stay.

    The first `counts` tokens complete chunks: pair p is chunk `chunks[p]` of row `rows[p]`, at place `places[p]` among
    the chunks that this piece's tokens may see (place 0 is the chunk that was complete before).
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    width: int
    chunk_length: int

    @property
    def uniform(self) -> bool:
        """All rows stand at the same slot."""
        return len(set(self.starts)) == 1

    @property
    def longest(self) -> int:
        """Slots in use after this piece, padding included."""
        return max(self.starts) + self.width

    @property
    def completed(self) -> tuple[int, ...]:
        """How many chunks each row completes."""
        length = self.chunk_length
        pairs = zip(self.starts, self.counts, strict=True)
        return tuple((start + count) // length - start // length for start, count in pairs)

    @property
    def rows(self) -> list[int]:
        """The row of each completed chunk."""
        return [row for row, count in enumerate(self.completed) for _ in range(count)]

    @property
    def places(self) -> list[int]:
        """The place of each completed chunk, from 1."""
        return [place for count in self.completed for place in range(1, count + 1)]

    @property
    def chunks(self) -> list[int]:
        """The number of each completed chunk in its row."""
        before = [start // self.chunk_length - 1 for start in self.starts]
        return [before[row] + place for row, place in zip(self.rows, self.places, strict=True)]

    @property
    def num_places(self) -> int:
        """The chunk before the piece and the most that a row completes."""
        return 1 + max(self.completed)

    @property
    def first_positions(self) -> tuple[int, ...]:
        """Each row's first grid position, counted from the chunk at place 0."""
        return tuple(start % self.chunk_length + self.chunk_length for start in self.starts)

    def slots_BS(self, device: torch.device) -> Tensor:
        """[B, S] the slot of each token."""
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.width, device=device)


class LayerCache:
    """One layer's buffers, made at the first use in the shape of what is put in (so a cut model makes its part)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}

    def append(self, name: str, tensor_BSX: Tensor, piece: Piece) -> Tensor:
        """Put a piece into its slots; gives all slots in use."""
        if name not in self._buffers:
            shape = (tensor_BSX.shape[0], self._capacity, *tensor_BSX.shape[2:])
            self._buffers[name] = tensor_BSX.new_zeros(shape)
        buffer = self._buffers[name]
        if piece.uniform:
            buffer[:, piece.starts[0] : piece.longest] = tensor_BSX
        else:
            rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
            buffer[rows, piece.slots_BS(buffer.device)] = tensor_BSX
        return buffer[:, : piece.longest]

    def chunks(self, name: str, piece: Piece) -> Tensor:
        """[P, m, ...] the slots of the chunks that this piece completes."""
        buffer = self._buffers[name]
        per_chunk = torch.unflatten(buffer, 1, (-1, piece.chunk_length))
        return per_chunk[piece.rows, piece.chunks]

    def over_places(self, name: str, new_PX: Tensor | None, piece: Piece) -> Tensor | None:
        """[B, places, ...]: what was current, then what is new; the newest of each row becomes current."""
        current = self._current.get(name)
        if new_PX is None and current is None:
            return None
        sample = current if current is not None else new_PX
        assert sample is not None
        span = sample.new_zeros(len(piece.starts), piece.num_places, *sample.shape[1:])
        if current is not None:
            span[:, 0] = current
        if new_PX is not None:
            span[piece.rows, piece.places] = new_PX
        self._current[name] = span[list(range(len(piece.starts))), list(piece.completed)]
        return span

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        self._buffers = {name: buffer.index_select(0, rows) for name, buffer in self._buffers.items()}
        self._current = {name: value.index_select(0, rows) for name, value in self._current.items()}


class Cache:
    """Give the same object to every forward of a batch of sequences."""

    def __init__(self, batch_size: int, max_length: int, chunk_length: int = 1) -> None:
        self.chunk_length = chunk_length
        self.capacity = -(-max_length // chunk_length) * chunk_length
        self.lengths = [0] * batch_size
        self.neighbors = LayerCache(self.capacity)
        self.neighbor_shape: tuple[int, ...] | None = None
        self._layers: dict[int, LayerCache] = {}
        self._real_BT: Tensor | None = None

    def layer(self, index: int) -> LayerCache:
        """The buffers of a layer."""
        return self._layers.setdefault(index, LayerCache(self.capacity))

    def begin(self, width: int, padding_mask_BS: Tensor | None) -> Piece:
        """Where the next tokens go."""
        counts = [width] * len(self.lengths)
        if padding_mask_BS is not None:
            last_real = padding_mask_BS.long() * torch.arange(1, width + 1, device=padding_mask_BS.device)
            counts = last_real.amax(1).tolist()
        piece = Piece(tuple(self.lengths), tuple(counts), width, self.chunk_length)
        if piece.longest > self.capacity:
            raise DataError(
                "the sequence is longer than its cache", got=piece.longest, expected=f"at most {self.capacity} tokens"
            )
        return piece

    def record_padding(self, padding_mask_BS: Tensor | None, piece: Piece, device: torch.device) -> Tensor | None:
        """[B, T] which slots in use hold real tokens; None when all do."""
        if padding_mask_BS is None and self._real_BT is None:
            return None
        if self._real_BT is None:
            self._real_BT = torch.ones(len(self.lengths), self.capacity, dtype=torch.bool, device=device)
        rows = torch.arange(len(self.lengths), device=device)[:, None]
        self._real_BT[rows, piece.slots_BS(device)] = True if padding_mask_BS is None else padding_mask_BS
        return self._real_BT[:, : piece.longest]

    def require_neighbor_shape(self, shape: tuple[int, ...]) -> None:
        """Every piece has neighbours of one number and length."""
        if self.neighbor_shape not in (None, shape):
            raise DataError(
                "neighbours changed their number or length within a sequence",
                got=shape,
                expected=self.neighbor_shape,
                fix="fill up with absent neighbours under the mask",
            )
        self.neighbor_shape = shape

    def commit(self, piece: Piece) -> None:
        """The piece has passed all layers: its slots are taken."""
        self.lengths = [start + count for start, count in zip(piece.starts, piece.counts, strict=True)]

    def select_rows(self, rows: Tensor) -> None:
        """Keep, drop or repeat rows: row i becomes what row rows[i] was."""
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        for layer in (self.neighbors, *self._layers.values()):
            layer.select_rows(rows)
        if self._real_BT is not None:
            self._real_BT = self._real_BT.index_select(0, rows)
