"""`torch.distributed.checkpoint` onto safetensors shards and a JSON index; nothing here can execute what it reads.

torch's file system storage keeps its metadata in a pickle, which runs code when it is loaded, and its safetensors
storage verifies nothing and derives a tensor's size from the shards that happen to be there. The index of this storage
names every slice of every tensor, its file and its place, and the block checksums of every file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from megatron_retro.artifacts.block_checksums import blocks_digest
from megatron_retro.artifacts.manifest import FileRecord
from megatron_retro.checkpoint.shard_files import (
    DTYPE_NAMES,
    DTYPES,
    Range,
    StoredSlice,
    TensorSlice,
    WrittenShard,
    read_ranges,
    tensor_bytes,
    write_shard,
)
from megatron_retro.errors import DamagedArtifact
from megatron_retro.runtime.strict_json import json_text

INDEX_NAME = "tensors.json"


def shard_name(rank: int) -> str:
    """The file of one rank."""
    return f"shard-{rank:05}.safetensors"


@dataclass(frozen=True)
class ShardFile:
    """Size and block checksums of one shard."""

    num_bytes: int
    checksums: tuple[int, ...]

    def record(self) -> FileRecord:
        """What the manifest says of it."""
        return FileRecord(self.num_bytes, blocks_digest(self.checksums))


@dataclass(frozen=True)
class TensorIndex:
    """Every tensor's type and size, where its slices are, and the checksums of all shards."""

    sizes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    slices: dict[str, tuple[StoredSlice, ...]]
    files: dict[str, ShardFile]

    def to_json(self) -> str:
        """The text on disk."""
        tensors = {
            name: {
                "dtype": self.dtypes[name],
                "size": list(self.sizes[name]),
                "pieces": [
                    {
                        "offsets": list(stored.spec.offsets),
                        "sizes": list(stored.spec.sizes),
                        "file": stored.file,
                        "begin": stored.begin,
                    }
                    for stored in self.slices[name]
                ],
            }
            for name in sorted(self.sizes)
        }
        files = {
            name: {"bytes": file.num_bytes, "crc32": "".join(f"{checksum:08x}" for checksum in file.checksums)}
            for name, file in sorted(self.files.items())
        }
        return json_text({"tensors": tensors, "files": files}) + "\n"

    @classmethod
    def from_json(cls, text: str, source: Path) -> TensorIndex:
        """Parse and check the text on disk."""
        try:
            content = json.loads(text)
            return cls._from_content(content)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedArtifact(
                f"{source} is damaged", got=repr(error), fix="load another checkpoint of this run"
            ) from None

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> TensorIndex:
        files = {
            name: ShardFile(
                int(file["bytes"]), tuple(int(file["crc32"][i : i + 8], 16) for i in range(0, len(file["crc32"]), 8))
            )
            for name, file in content["files"].items()
        }
        tensors = content["tensors"]
        slices = {
            name: tuple(
                StoredSlice(
                    TensorSlice(name, entry["dtype"], tuple(stored["sizes"]), tuple(stored["offsets"])),
                    _known(stored["file"], files),
                    int(stored["begin"]),
                )
                for stored in entry["pieces"]
            )
            for name, entry in tensors.items()
        }
        dtypes = {name: _known(entry["dtype"], DTYPES) for name, entry in tensors.items()}
        return cls({name: tuple(entry["size"]) for name, entry in tensors.items()}, dtypes, slices, files)


def _known(name: str, table: Mapping[str, object]) -> str:
    if name not in table:
        raise ValueError(f"{name!r} is none of {sorted(table)[:5]}")
    return name


def read_index(directory: Path) -> TensorIndex:
    """The index of a checkpoint directory."""
    path = directory / INDEX_NAME
    try:
        return TensorIndex.from_json(path.read_text(encoding="utf-8"), path)
    except FileNotFoundError:
        raise DamagedArtifact(f"{path} is missing", fix="load another checkpoint of this run") from None


class ShardWriter(StorageWriter):
    """Writes one shard per rank; the coordinator writes the index."""

    def __init__(self, directory: Path, rank: int) -> None:
        self.directory = directory
        self.rank = rank
        self.files: dict[str, ShardFile] = {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between saves."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The directory exists already."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Refuse what is not a tensor before anything is written."""
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO or item.tensor_data is None:
                raise TypeError(f"{item.index.fqn} is not a tensor; state that is none belongs in state.json")
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Each rank keeps its plan."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's shard; a rank without a share writes nothing."""
        results: list[WriteResult] = []
        if plan.items:
            written = self._write(plan.items, planner)
            results = [
                WriteResult(item.index, stored.spec.num_bytes, (stored, written.num_bytes, written.checksums))
                for item, stored in zip(plan.items, written.slices, strict=True)
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(results)
        return future

    def _write(self, items: Sequence[WriteItem], planner: SavePlanner) -> WrittenShard:
        def load(number: int) -> Tensor:
            tensor = planner.resolve_data(items[number])
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{items[number].index.fqn} is not a tensor")
            return tensor

        return write_shard(self.directory / shard_name(self.rank), [_slice_of(item) for item in items], load)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index from what all ranks wrote (coordinator only)."""
        slices: dict[str, list[StoredSlice]] = {}
        for result in (result for of_rank in results for result in of_rank):
            stored, num_bytes, checksums = result.storage_data
            slices.setdefault(result.index.fqn, []).append(stored)
            self.files[stored.file] = ShardFile(num_bytes, checksums)
        sizes = {name: tuple(entry.size) for name, entry in _tensors(metadata).items()}
        dtypes = {name: DTYPE_NAMES[entry.properties.dtype] for name, entry in _tensors(metadata).items()}
        index = TensorIndex(sizes, dtypes, {name: tuple(found) for name, found in slices.items()}, self.files)
        (self.directory / INDEX_NAME).write_text(index.to_json(), encoding="utf-8")

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any local path."""
        return True


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    return {
        name: entry for name, entry in metadata.state_dict_metadata.items() if isinstance(entry, TensorStorageMetadata)
    }


def _slice_of(item: WriteItem) -> TensorSlice:
    data = item.tensor_data
    if data is None:
        raise TypeError(f"{item.index.fqn} is not a tensor")
    dtype = DTYPE_NAMES[data.properties.dtype]
    return TensorSlice(item.index.fqn, dtype, tuple(data.chunk.sizes), tuple(data.chunk.offsets))


class ShardReader(StorageReader):
    """Reads verified slices of shards; knows only what the index names."""

    def __init__(self, directory: Path, index: TensorIndex) -> None:
        self.directory = directory
        self.index = index
        self._places = {(name, stored.spec.offsets): stored for name, found in index.slices.items() for stored in found}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing is kept between loads."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index in torch's words."""
        entries: dict[str, Any] = {
            name: TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[self.index.dtypes[name]]),
                torch.Size(self.index.sizes[name]),
                [
                    ChunkStorageMetadata(torch.Size(stored.spec.offsets), torch.Size(stored.spec.sizes))
                    for stored in self.index.slices[name]
                ],
            )
            for name in self.index.sizes
        }
        return Metadata(entries)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """The index was read when the reader was built."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Each rank reads what it planned."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Each rank reads what it planned."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """One pass over each file that holds something for this rank."""
        by_file: dict[str, list[Range]] = {}
        for item in plan.items:
            stored = self._place(item.storage_index)
            by_file.setdefault(stored.file, []).append(_range_of(item, stored, planner))
        for name, ranges in sorted(by_file.items()):
            file = self.index.files[name]
            read_ranges(self.directory / name, file.num_bytes, file.checksums, ranges)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _place(self, index: MetadataIndex) -> StoredSlice:
        return self._places[index.fqn, tuple(index.offset or ())]

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Any local path."""
        return True


def _range_of(item: ReadItem, stored: StoredSlice, planner: LoadPlanner) -> Range:
    """The bytes that hold an item's slice: whole rows of the stored slice, straight into place where they fit."""
    sizes, dtype = stored.spec.sizes, DTYPES[stored.spec.dtype]
    first, rows = (item.storage_offsets[0], item.lengths[0]) if sizes else (0, 1)
    row_sizes = tuple(sizes[1:])
    row_bytes = dtype.itemsize
    for size in row_sizes:
        row_bytes *= size
    inner = [slice(start, start + length) for start, length in zip(item.storage_offsets, item.lengths, strict=True)][1:]
    whole_rows = tuple(item.lengths[1:]) == row_sizes
    staging: list[Tensor] = []

    def open_target() -> memoryview:
        target = planner.resolve_tensor(item).detach()
        if whole_rows and target.is_contiguous() and target.dtype == dtype and target.device.type == "cpu":
            return tensor_bytes(target)
        staging.append(torch.empty((rows, *row_sizes) if sizes else (), dtype=dtype))
        return tensor_bytes(staging[0])

    def finish() -> None:
        target = planner.resolve_tensor(item).detach()
        if staging:
            where: tuple[slice, ...] = (slice(None), *inner) if sizes else ()
            target.copy_(staging.pop()[where])
        planner.commit_tensor(item, target)

    return Range(stored.begin + first * row_bytes, rows * row_bytes, open_target, finish)
