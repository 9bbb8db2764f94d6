"""The cache of keys, values and neighbours, for sequences that are fed slice by slice, as generation does.

Slots count from 0 in each row's own buffer, and the chunk grid runs over slots. A row may begin with padding slots
(left padding: they stay, masked) and a slice may end with padding (right padding: its slots are written again), so rows
of different lengths share a batch. Of the neighbours only the newest complete chunk's keys and values are kept: no
later token sees an older one. The chunks whose neighbours a slice's tokens may see are its VISIBLE chunks: index 0 is
the newest chunk that was complete before, the others are those that the slice completes.

A row's chunk grid may be moved between slices (`end_chunk_at`), so that a chunk ends, and neighbours are read anew, at
any token: what is retrieved every few tokens is for the last m of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_retro.errors import DataError


@dataclass(frozen=True)
class CacheSlice:
    """What one forward adds: row b's tokens go to slots starts[b] .. starts[b] + width - 1, of which counts[b] stay.

    The first `counts` tokens complete chunks: the p-th completed one is of row `rows[p]` and has index
    `chunk_indices[p]` among that row's visible chunks. Slot s of row b is at s + offsets[b] of the row's chunk grid.
    """

    starts: tuple[int, ...]
    counts: tuple[int, ...]
    width: int
    chunk_length: int
    offsets: tuple[int, ...]

    @property
    def uniform(self) -> bool:
        """All rows stand at the same slot."""
        return len(set(self.starts)) == 1

    @property
    def longest(self) -> int:
        """Slots in use after this slice, padding included."""
        return max(self.starts) + self.width

    @property
    def completed(self) -> tuple[int, ...]:
        """How many chunks each row completes."""
        length = self.chunk_length
        pairs = zip(self.grid_starts, self.counts, strict=True)
        return tuple((start + count) // length - start // length for start, count in pairs)

    @property
    def grid_starts(self) -> tuple[int, ...]:
        """Where each row's slice starts on its chunk grid."""
        return tuple(start + offset for start, offset in zip(self.starts, self.offsets, strict=True))

    @property
    def rows(self) -> list[int]:
        """The row of each completed chunk."""
        return [row for row, count in enumerate(self.completed) for _ in range(count)]

    @property
    def chunk_indices(self) -> list[int]:
        """The index of each completed chunk among the visible ones of its row, from 1."""
        return [index for count in self.completed for index in range(1, count + 1)]

    @property
    def chunk_stops(self) -> list[int]:
        """The slot after each completed chunk."""
        length = self.chunk_length
        before = [
            start // length * length - offset for start, offset in zip(self.grid_starts, self.offsets, strict=True)
        ]
        return [before[row] + index * length for row, index in zip(self.rows, self.chunk_indices, strict=True)]

    def chunk_slots_PM(self, device: torch.device) -> Tensor:
        """[P, m] the slots of each completed chunk."""
        stops_P = torch.tensor(self.chunk_stops, dtype=torch.long, device=device)
        return stops_P[:, None] + torch.arange(-self.chunk_length, 0, device=device)

    @property
    def num_visible_chunks(self) -> int:
        """The chunk before the slice and the most that a row completes."""
        return 1 + max(self.completed)

    @property
    def first_positions(self) -> tuple[int, ...]:
        """Each row's first grid position, counted from the first visible chunk."""
        return tuple(start % self.chunk_length + self.chunk_length for start in self.grid_starts)

    def visible_chunk_BS(self, device: torch.device) -> Tensor:
        """[B, S] which of the visible chunks each token sees."""
        first_B1 = torch.tensor(self.first_positions, device=device)[:, None]
        positions_BS = first_B1 + torch.arange(self.width, device=device)
        index = torch.div(positions_BS + 1, self.chunk_length, rounding_mode="floor") - 1
        return index.clamp(max=self.num_visible_chunks - 1)

    def slots_BS(self, device: torch.device) -> Tensor:
        """[B, S] the slot of each token."""
        return torch.tensor(self.starts, device=device)[:, None] + torch.arange(self.width, device=device)


class LayerCache:
    """One layer's buffers, made at the first use in the shape of what is put in (so a cut model makes its part)."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._buffers: dict[str, Tensor] = {}
        self._current: dict[str, Tensor] = {}

    def append(self, name: str, tensor_BSX: Tensor, cache_slice: CacheSlice) -> Tensor:
        """Put a slice's tensors into its slots; gives all slots in use."""
        if name not in self._buffers:
            shape = (tensor_BSX.shape[0], self._capacity, *tensor_BSX.shape[2:])
            self._buffers[name] = tensor_BSX.new_zeros(shape)
        buffer = self._buffers[name]
        if cache_slice.uniform:
            buffer[:, cache_slice.starts[0] : cache_slice.longest] = tensor_BSX
        else:
            rows = torch.arange(buffer.shape[0], device=buffer.device)[:, None]
            buffer[rows, cache_slice.slots_BS(buffer.device)] = tensor_BSX
        return buffer[:, : cache_slice.longest]

    def chunks(self, name: str, cache_slice: CacheSlice) -> Tensor:
        """[P, m, ...] the slots of the chunks that this slice completes."""
        buffer = self._buffers[name]
        rows_P1 = torch.tensor(cache_slice.rows, dtype=torch.long, device=buffer.device)[:, None]
        return buffer[rows_P1, cache_slice.chunk_slots_PM(buffer.device)]

    def over_visible_chunks(self, name: str, new_PX: Tensor | None, cache_slice: CacheSlice) -> Tensor | None:
        """[B, visible chunks, ...]: what was current, then what is new; the newest of each row becomes current."""
        current = self._current.get(name)
        if new_PX is None and current is None:
            return None
        if new_PX is None and current is not None and not any(cache_slice.completed):
            return current[:, None]
        sample = current if current is not None else new_PX
        assert sample is not None
        span = sample.new_zeros(len(cache_slice.starts), cache_slice.num_visible_chunks, *sample.shape[1:])
        if current is not None:
            span[:, 0] = current
        if new_PX is not None:
            span[cache_slice.rows, cache_slice.chunk_indices] = new_PX
        self._current[name] = span[list(range(len(cache_slice.starts))), list(cache_slice.completed)]
        return span

    def select_rows(self, rows: Tensor) -> None:
        """Row i becomes what row rows[i] was."""
        self._buffers = {name: buffer.index_select(0, rows) for name, buffer in self._buffers.items()}
        self._current = {name: value.index_select(0, rows) for name, value in self._current.items()}

    def resize(self, rows: Sequence[int | None], capacity: int, used: int) -> None:
        """Row i becomes what rows[i] was, or empty; `used` slots are kept of each."""
        kept = [row for row, source in enumerate(rows) if source is not None]
        sources = [source for source in rows if source is not None]
        buffers = {}
        for name, old in self._buffers.items():
            buffers[name] = old.new_zeros(len(rows), capacity, *old.shape[2:])
            buffers[name][kept, :used] = old[sources, :used]
        current = {name: old.new_zeros(len(rows), *old.shape[1:]) for name, old in self._current.items()}
        for name, old in self._current.items():
            current[name][kept] = old[sources]
        self._capacity, self._buffers, self._current = capacity, buffers, current

    def insert(self, row: int, other: LayerCache, source: int, used: int, num_rows: int) -> None:
        """Row `row` becomes what row `source` of another cache is."""
        for name, theirs in other._buffers.items():
            if name not in self._buffers:
                self._buffers[name] = theirs.new_zeros(num_rows, self._capacity, *theirs.shape[2:])
            self._buffers[name][row, :used] = theirs[source, :used]
        for ours in self._current.values():
            ours[row] = 0
        for name, theirs in other._current.items():
            if name not in self._current:
                self._current[name] = theirs.new_zeros(num_rows, *theirs.shape[1:])
            self._current[name][row] = theirs[source]


class Cache:
    """Give the same object to every forward of a batch of sequences."""

    def __init__(self, batch_size: int, max_length: int, chunk_length: int = 1) -> None:
        self.chunk_length = chunk_length
        self.capacity = -(-max_length // chunk_length) * chunk_length
        self.lengths = [0] * batch_size
        self.offsets = [0] * batch_size
        self.neighbors = LayerCache(self.capacity)
        self.neighbor_shape: tuple[int, ...] | None = None
        self._layers: dict[int, LayerCache] = {}
        self._real_BT: Tensor | None = None

    def layer(self, index: int) -> LayerCache:
        """The buffers of a layer."""
        return self._layers.setdefault(index, LayerCache(self.capacity))

    def next_slice(self, width: int, padding_mask_BS: Tensor | None) -> CacheSlice:
        """Where the next tokens go."""
        counts = [width] * len(self.lengths)
        if padding_mask_BS is not None:
            last_real = padding_mask_BS.long() * torch.arange(1, width + 1, device=padding_mask_BS.device)
            counts = last_real.amax(1).tolist()
        cache_slice = CacheSlice(tuple(self.lengths), tuple(counts), width, self.chunk_length, tuple(self.offsets))
        if cache_slice.longest > self.capacity:
            raise DataError(
                "the sequence is longer than its cache",
                got=cache_slice.longest,
                expected=f"at most {self.capacity} tokens",
            )
        return cache_slice

    def record_padding(
        self, padding_mask_BS: Tensor | None, cache_slice: CacheSlice, device: torch.device
    ) -> Tensor | None:
        """[B, T] which slots in use hold real tokens; None when all do."""
        if padding_mask_BS is None and self._real_BT is None:
            return None
        if self._real_BT is None:
            self._real_BT = torch.ones(len(self.lengths), self.capacity, dtype=torch.bool, device=device)
        rows = torch.arange(len(self.lengths), device=device)[:, None]
        self._real_BT[rows, cache_slice.slots_BS(device)] = True if padding_mask_BS is None else padding_mask_BS
        return self._real_BT[:, : cache_slice.longest]

    def require_neighbor_shape(self, shape: tuple[int, ...]) -> None:
        """Every slice has neighbours of one number and length."""
        if self.neighbor_shape not in (None, shape):
            raise DataError(
                "neighbours changed their number or length within a sequence",
                got=shape,
                expected=self.neighbor_shape,
                fix="fill up with absent neighbours under the mask",
            )
        self.neighbor_shape = shape

    def commit(self, cache_slice: CacheSlice) -> None:
        """The slice has passed all layers: its slots are taken."""
        self.lengths = [start + count for start, count in zip(cache_slice.starts, cache_slice.counts, strict=True)]

    def end_chunk_at(self, row: int, slot: int) -> None:
        """Move a row's grid so that a chunk ends with this slot, not fed yet; the m slots up to it must be its own."""
        if slot + 1 < self.chunk_length or slot < self.lengths[row]:
            raise ValueError(f"no chunk of {self.chunk_length} can end at slot {slot} after {self.lengths[row]} tokens")
        self.offsets[row] = -(slot + 1) % self.chunk_length

    def resize(self, rows: Sequence[int | None], capacity: int) -> None:
        """Row i becomes what row rows[i] was, or empty, with room for `capacity` tokens."""
        if self._real_BT is not None:
            raise ValueError("a cache with padding cannot be resized")
        self.capacity = -(-capacity // self.chunk_length) * self.chunk_length
        used = max((self.lengths[source] for source in rows if source is not None), default=0)
        for layer in (self.neighbors, *self._layers.values()):
            layer.resize(rows, self.capacity, used)
        self.lengths = [0 if source is None else self.lengths[source] for source in rows]
        self.offsets = [0 if source is None else self.offsets[source] for source in rows]

    def insert(self, row: int, other: Cache, source: int = 0) -> None:
        """Row `row` becomes what row `source` of another cache is that has passed the same layers."""
        used = other.lengths[source]
        if used > self.capacity or other._real_BT is not None:
            raise ValueError("only a row without padding that fits can be inserted")
        if other.neighbor_shape is not None:
            self.require_neighbor_shape(other.neighbor_shape)
        self.neighbors.insert(row, other.neighbors, source, used, len(self.lengths))
        for index, theirs in other._layers.items():
            self.layer(index).insert(row, theirs, source, used, len(self.lengths))
        self.lengths[row], self.offsets[row] = used, other.offsets[source]

    def select_rows(self, rows: Tensor) -> None:
        """Keep, drop or repeat rows: row i becomes what row rows[i] was."""
        self.lengths = [self.lengths[row] for row in rows.tolist()]
        self.offsets = [self.offsets[row] for row in rows.tolist()]
        for layer in (self.neighbors, *self._layers.values()):
            layer.select_rows(rows)
        if self._real_BT is not None:
            self._real_BT = self._real_BT.index_select(0, rows)
