"""`torch.distributed.checkpoint` onto safetensors shards and a JSON index; nothing here can execute what it reads.

torch's file system storage keeps its metadata in a pickle, which runs code when it is loaded, and its safetensors
storage verifies nothing and derives a tensor's size from the shards that happen to be there. The index of this storage
names every slice of every tensor, its file and its place, and the block checksums of every file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
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
)
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from megatron_retro.artifacts.block_checksums import blocks_digest
from megatron_retro.artifacts.manifest import FileRecord
from megatron_retro.checkpoint.shard_files import (
    DTYPES,
    Range,
    StoredSlice,
    TensorSlice,
    read_ranges,
    tensor_bytes,
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

    def to_json(self) -> dict[str, Any]:
        """As it stands in the index."""
        return {"bytes": self.num_bytes, "crc32": "".join(f"{checksum:08x}" for checksum in self.checksums)}

    @classmethod
    def from_json(cls, file: Mapping[str, Any]) -> ShardFile:
        """What `to_json` gave."""
        text = file["crc32"]
        return cls(int(file["bytes"]), tuple(int(text[start : start + 8], 16) for start in range(0, len(text), 8)))


@dataclass(frozen=True)
class TensorIndex:
    """Every tensor's type and size, where its slices are, and the checksums of all shards."""

    sizes: dict[str, tuple[int, ...]]
    dtypes: dict[str, str]
    slices: Mapping[str, tuple[StoredSlice, ...]]
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
        return index_text(json_text(tensors), self.files)

    @classmethod
    def from_json(cls, text: str, source: Path) -> TensorIndex:
        """Parse and check the text on disk."""
        try:
            content = json.loads(text)
            return cls._from_content(content)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise DamagedArtifact(
                f"{source} is damaged", got=repr(error), fix="load another checkpoint of this run"
            ) from None

    def to_shared(self) -> str:
        """For other ranks: the slices of each tensor as text, which is parsed where it is asked for."""
        assert isinstance(self.slices, _SlicesOfFile)
        return json_text(
            {
                "sizes": self.sizes,
                "dtypes": self.dtypes,
                "slices": self.slices.texts(),
                "files": {name: file.to_json() for name, file in self.files.items()},
            }
        )

    @classmethod
    def from_shared(cls, text: str) -> TensorIndex:
        """What the first rank has read and checked."""
        content = json.loads(text)
        files = {name: ShardFile.from_json(file) for name, file in content["files"].items()}
        sizes = {name: tuple(size) for name, size in content["sizes"].items()}
        return cls(sizes, content["dtypes"], _SlicesOfFile(content["slices"], files), files)

    @classmethod
    def _from_content(cls, content: Mapping[str, Any]) -> TensorIndex:
        files = {name: ShardFile.from_json(file) for name, file in content["files"].items()}
        tensors = content["tensors"]
        dtypes = {name: _known(entry["dtype"], DTYPES) for name, entry in tensors.items()}
        sizes = {name: tuple(entry["size"]) for name, entry in tensors.items()}
        return cls(sizes, dtypes, _SlicesOfFile(tensors, files), files)


class _SlicesOfFile(Mapping[str, tuple[StoredSlice, ...]]):
    """The slices of each tensor, made when it is asked for: a rank needs those of its own tensors, not a million."""

    def __init__(self, tensors: Mapping[str, Any], files: Mapping[str, ShardFile]) -> None:
        self._tensors, self._files = tensors, files

    def texts(self) -> dict[str, str]:
        """Each entry by itself."""
        return {name: json_text(entry, separators=(",", ":")) for name, entry in self._tensors.items()}

    def __getitem__(self, name: str) -> tuple[StoredSlice, ...]:
        entry = self._tensors[name]
        try:
            entry = json.loads(entry) if isinstance(entry, str) else entry
            return tuple(
                StoredSlice(
                    TensorSlice(name, entry["dtype"], tuple(stored["sizes"]), tuple(stored["offsets"])),
                    _known(stored["file"], self._files),
                    int(stored["begin"]),
                )
                for stored in entry["pieces"]
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DamagedArtifact(
                f"{INDEX_NAME} is damaged: {name}", got=repr(error), fix="load another checkpoint of this run"
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def index_text(tensors_text: str, files: Mapping[str, ShardFile]) -> str:
    """The text on disk, from that of its tensors."""
    rendered = json_text({name: file.to_json() for name, file in sorted(files.items())})
    return f'{{"tensors": {tensors_text}, "files": {rendered}}}\n'


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


class ShardReader(StorageReader):
    """Reads verified slices of the named tensors; knows only what the index names."""

    def __init__(self, directory: Path, index: TensorIndex, names: Iterable[str]) -> None:
        self.directory = directory
        self.index = index
        self._slices = {name: index.slices[name] for name in names}
        self._places = {(name, stored.spec.offsets): stored for name, found in self._slices.items() for stored in found}

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
                    for stored in found
                ],
            )
            for name, found in self._slices.items()
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
