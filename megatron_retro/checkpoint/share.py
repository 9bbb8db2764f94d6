"""Who writes which slice of a checkpoint: agreed once, and kept while the tensors stay what they are.

torch's planner says what a rank holds. Its global plan would cost a minute and a half of Python at a thousand ranks,
in every save and beside the training that it holds up; here ranks send plain rows, and only when something changed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.planner import WriteItem

from megatron_retro.checkpoint.dcp import TrimmingSavePlanner
from megatron_retro.checkpoint.shard_files import DTYPE_NAMES, DTYPES, TensorSlice, WrittenShard, write_shard
from megatron_retro.checkpoint.storage import ShardFile, shard_name
from megatron_retro.errors import DistributedError
from megatron_retro.runtime.store_channel import StoreChannel
from megatron_retro.runtime.strict_json import json_text

# name, dtype, size of the whole tensor, offsets and sizes of the slice
Row = tuple[str, str, list[int], list[int], list[int]]
_SAME, _NEW = "same", "new"


@dataclass(frozen=True)
class _Agreement:
    """For tensors of one signature: the items of this rank; on the first rank the rows of all ranks' shares."""

    signature: tuple[Any, ...]
    items: tuple[WriteItem, ...]
    rows: tuple[Sequence[Row], ...]


class SaveShares:
    """This rank's share of each checkpoint. Every rank of the channel has one and calls the same methods."""

    def __init__(self, channel: StoreChannel) -> None:
        self._channel = channel
        self._agreed: _Agreement | None = None
        self._tensors_text: str | None = None  # of the index: the same in every save

    def items(self, tensors: Mapping[str, Tensor], planner: TrimmingSavePlanner) -> tuple[WriteItem, ...]:
        """What this rank writes; the planner then resolves it."""
        signature: tuple[Any, ...] = ()

        def compared() -> str:
            nonlocal signature
            signature = _signature(tensors)
            planner.set_up_planner(dict(tensors))
            return _SAME if self._agreed is not None and self._agreed.signature == signature else _NEW

        said = self._channel.gather(compared)
        if self._channel.first(lambda: _NEW if _NEW in said else _SAME) == _NEW:
            self._agreed, self._tensors_text = self._agree(signature, planner), None
        assert self._agreed is not None
        return self._agreed.items

    def _agree(self, signature: tuple[Any, ...], planner: TrimmingSavePlanner) -> _Agreement:
        items = planner.create_local_plan().items
        texts = self._channel.gather(lambda: json_text([row_of(item) for item in items], separators=(",", ":")))
        rows: list[list[Row]] = [json.loads(text) for text in texts]
        shares: list[list[int]] = []

        def divided() -> list[str]:
            shares.extend(share_out(rows))
            return [json_text(share) for share in shares]

        own = json.loads(self._channel.scatter(divided))
        kept = (tuple([of_rank[number] for number in share]) for of_rank, share in zip(rows, shares, strict=True))
        return _Agreement(signature, tuple(items[number] for number in own), tuple(kept))

    def tensors_text(self, begins: Sequence[Sequence[int]]) -> str:
        """The index's part about tensors, from where each rank's slices begin in its file; on the first rank."""
        if self._tensors_text is None:
            assert self._agreed is not None
            self._tensors_text = render_tensors(self._agreed.rows, begins)
        return self._tensors_text


def row_of(item: WriteItem) -> Row:
    """What other ranks need to know of a slice."""
    data = item.tensor_data
    assert data is not None
    dtype = DTYPE_NAMES[data.properties.dtype]
    return item.index.fqn, dtype, list(data.size), list(data.chunk.offsets), list(data.chunk.sizes)


def share_out(rows: Sequence[Sequence[Row]]) -> list[list[int]]:
    """The numbers of the slices that each rank writes: of several equal ones that of the rank with the least so far.

    Refuses slices that do not make up whole tensors.
    """
    holders: dict[tuple[str, tuple[int, ...]], list[tuple[int, int]]] = {}
    for rank, of_rank in enumerate(rows):
        for number, (name, _, _, offsets, _) in enumerate(of_rank):
            holders.setdefault((name, tuple(offsets)), []).append((rank, number))
    loads, shares = [0] * len(rows), [[] for _ in rows]  # type: tuple[list[int], list[list[int]]]
    missing: dict[str, int] = {}
    for (name, _), places in holders.items():
        rank, number = min(places, key=lambda place: loads[place[0]])
        _, dtype, size, _, sizes = rows[rank][number]
        missing[name] = missing.get(name, math.prod(size)) - math.prod(sizes)
        loads[rank] += math.prod(sizes) * DTYPES[dtype].itemsize
        shares[rank].append(number)
    wrong = [name for name, count in missing.items() if count]
    if wrong:
        raise DistributedError(
            "the slices of all ranks do not make up whole tensors", got=", ".join(wrong[:8]), expected="each value once"
        )
    return [sorted(share) for share in shares]


def render_tensors(rows: Sequence[Sequence[Row]], begins: Sequence[Sequence[int]]) -> str:
    """The JSON object of all tensors, by name."""
    tensors: dict[str, dict[str, Any]] = {}
    for rank, (of_rank, places) in enumerate(zip(rows, begins, strict=True)):
        file = shard_name(rank)
        for (name, dtype, size, offsets, sizes), begin in zip(of_rank, places, strict=True):
            entry = tensors.setdefault(name, {"dtype": dtype, "size": size, "pieces": []})
            entry["pieces"].append({"offsets": offsets, "sizes": sizes, "file": file, "begin": begin})
    return json_text(dict(sorted(tensors.items())))


def write_share(
    directory: Path, rank: int, items: Sequence[WriteItem], planner: TrimmingSavePlanner
) -> WrittenShard | None:
    """Write this rank's shard; a rank without a share writes nothing."""
    if not items:
        return None

    def load(number: int) -> Tensor:
        tensor = planner.resolve_data(items[number])
        assert isinstance(tensor, Tensor)
        return tensor

    specs = [
        TensorSlice(name, dtype, tuple(sizes), tuple(offsets)) for name, dtype, _, offsets, sizes in map(row_of, items)
    ]
    return write_shard(directory / shard_name(rank), specs, load)


def report_of(written: WrittenShard | None) -> str:
    """What the first rank is told of a shard."""
    if written is None:
        return json_text({"begins": []})
    file = ShardFile(written.num_bytes, written.checksums)
    return json_text({"begins": [stored.begin for stored in written.slices], "file": file.to_json()})


def _signature(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} is not a tensor; state that is none belongs in state.json")
    return tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items())
