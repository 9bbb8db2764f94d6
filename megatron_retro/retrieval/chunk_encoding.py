"""Chunks -> vectors -> codes sorted by inverted list, one file per block, and those files.

Vectors live for a batch only, unless they are to be kept. What a block holds depends on the block alone, so any number
of workers in any order write the same bytes. A block is a safetensors file, so that a reader maps it and takes rows
without reading the rest; the checksums of its arrays are in its header.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.artifacts.block_checksums import checksum_of
from megatron_retro.artifacts.files import make_folder, named_disk_errors, write_file
from megatron_retro.errors import ArtifactError
from megatron_retro.retrieval.chunk_vectors import ChunkVectors
from megatron_retro.retrieval.faiss_index import InvertedParts, inverted_parts
from megatron_retro.retrieval.work_blocks import WorkBlock
from megatron_retro.runtime.console import Advance, unseen
from megatron_retro.runtime.strict_json import json_text

BATCH_CHUNKS = 8192


@dataclass(frozen=True)
class ChunkEncoder:
    """Encodes chunks of a database as codes of a trained index."""

    chunk_vectors: ChunkVectors
    trained: Any
    facts: dict[str, Any]

    def vectors(self, block: WorkBlock, advance: Advance = unseen) -> Iterator[NDArray[np.float32]]:
        """Vectors of a block's chunks, a batch at a time."""
        for first in range(block.first, block.last, BATCH_CHUNKS):
            yield self.chunk_vectors.of(np.arange(first, min(first + BATCH_CHUNKS, block.last)), advance)

    def write_block(self, block: WorkBlock, path: Path, kept: KeptVectors | None, advance: Advance = unseen) -> None:
        """Encode a block; its codes are written last, so that their presence means all of it is there."""
        parts = inverted_parts(self.trained)
        encoded: list[dict[str, NDArray[Any]]] = []
        first, checksum = block.first, 0
        for vectors in self.vectors(block, advance):
            encoded.append(_encoded(parts, vectors))
            if kept is not None:
                checksum = checksum_of(kept.write(first, vectors), checksum)
            first += len(vectors)
        joined = {name: np.concatenate([part[name] for part in encoded]) for name in encoded[0]}
        facts = self.facts
        if kept is not None:
            facts = {**facts, "first": block.first, "last": block.last, "vectors_crc32": checksum}
        write_arrays(path, _by_list(joined, block) if parts else joined, facts)


@dataclass(frozen=True)
class KeptVectors:
    """Vectors of all chunks in bfloat16, one file that workers fill in parts."""

    path: Path
    num_chunks: int
    dimension: int

    def write(self, first: int, vectors: NDArray[np.float32]) -> bytes:
        """Put vectors in the place of the chunks from `first` on; returns the bytes that they have there."""
        content = as_bfloat16(vectors).tobytes()
        with named_disk_errors(self.path):
            make_folder(self.path.parent)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                if os.fstat(descriptor).st_size != self.num_chunks * self.dimension * 2:
                    os.ftruncate(descriptor, self.num_chunks * self.dimension * 2)
                os.pwrite(descriptor, content, first * self.dimension * 2)
            finally:
                os.close(descriptor)
        return content

    def verify(self, facts: dict[str, Any]) -> None:
        """Refuse vectors that are not those of the block that noted `facts`."""
        rows = np.ascontiguousarray(self.mapped()[facts["first"] : facts["last"]])
        if checksum_of(rows.data) != facts["vectors_crc32"]:
            raise ArtifactError(
                f"{self.path} is damaged at the vectors of the chunks {facts['first']} to {facts['last']}",
                fix="remove the codes of these chunks and encode again",
            )

    def mapped(self) -> NDArray[np.uint16]:
        """All vectors [chunks, dimension], as bits."""
        if not self.path.is_file() or self.path.stat().st_size != self.num_chunks * self.dimension * 2:
            raise ArtifactError(
                f"{self.path} does not hold the vectors of all chunks",
                fix="build the index with --retro-keep-embeddings",
            )
        return np.memmap(self.path, np.uint16, mode="r", shape=(self.num_chunks, self.dimension))


def as_bfloat16(vectors: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The bits of vectors in bfloat16, which NumPy does not know."""
    bits: NDArray[np.uint16] = torch.from_numpy(vectors).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The reverse of `as_bfloat16`."""
    wide: NDArray[np.float32] = (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return wide


def _encoded(parts: InvertedParts | None, vectors: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    if parts is None:
        return {"vectors": vectors}
    lists, codes = parts.encoded(vectors)
    return {"lists": lists, "codes": codes}


def _by_list(encoded: dict[str, NDArray[Any]], block: WorkBlock) -> dict[str, NDArray[Any]]:
    """Codes in the order of their lists (ids ascend within one), which lists there are, and where each starts."""
    order = np.argsort(encoded["lists"], kind="stable")
    present, starts = np.unique(encoded["lists"][order], return_index=True)
    return {
        "lists": present,
        "starts": np.append(starts, len(order)).astype(np.int64),
        "ids": order + block.first,
        "codes": encoded["codes"][order],
    }


_ABOUT = "block"
_REMEDY = "remove this file and run the same command again: only this block is made again"


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]], facts: Mapping[str, Any]) -> None:
    """Write a block atomically; `facts` say what it was made from."""
    from safetensors.numpy import save

    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    # One entry: safetensors writes several in an order that changes from run to run.
    about = {"facts": facts, "crc32": _checksums(ordered), "shapes": _shapes(ordered)}
    header = {_ABOUT: json_text(about, sort_keys=True)}
    write_file(path, save(ordered, metadata=header))  # its own writer ignores the umask


def map_arrays(path: Path, facts: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of a block as views of the file, made from the same facts; checksums are `verify_arrays`'."""
    arrays, found, _ = _opened(path)
    wrong = sorted(name for name in facts if found.get(name) != facts[name])
    if wrong:
        raise ArtifactError(
            f"{path}: {wrong[0]} does not match", got=found.get(wrong[0]), expected=facts[wrong[0]], fix=_REMEDY
        )
    return arrays


def verify_arrays(path: Path, facts: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The same, with every byte checked."""
    arrays = map_arrays(path, facts)
    expected = _opened(path)[2]
    damaged = sorted(name for name, value in _checksums(arrays).items() if value != expected.get(name))
    if damaged:
        raise ArtifactError(f"{path} is damaged: the checksum of {', '.join(damaged)} is wrong", fix=_REMEDY)
    return arrays


def facts_of(path: Path) -> dict[str, Any]:
    """What a block says that it was made from."""
    return _opened(path)[1]


_DTYPES = {"I64": np.int64, "U8": np.uint8, "U16": np.uint16, "F32": np.float32, "I32": np.int32}


def _opened(path: Path) -> tuple[dict[str, NDArray[Any]], dict[str, Any], dict[str, int]]:
    """The arrays as views of the file, the facts and the checksums; nothing in the file is believed before it fits."""
    try:
        content = np.memmap(path, np.uint8, mode="r")
        start = 8 + int(content[:8].view("<u8")[0])
        header = json.loads(bytes(content[8:start]))
        about = json.loads(header.pop("__metadata__")[_ABOUT])
        arrays = {
            name: content[start:][slice(*entry["data_offsets"])].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
            for name, entry in header.items()
        }
        size = start + sum(array.nbytes for array in arrays.values())
        if len(content) != size:
            raise ValueError(f"{len(content)} bytes, not {size}")
        if about.get("shapes", _shapes(arrays)) != _shapes(arrays):
            raise ValueError("its header has changed")
        return arrays, dict(about["facts"]), dict(about["crc32"])
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing", fix="run the same command again") from None
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} is damaged", got=error, fix=_REMEDY) from None


def _shapes(arrays: Mapping[str, NDArray[Any]]) -> dict[str, list[int | str]]:
    return {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}


def _checksums(arrays: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    return {name: checksum_of(array.reshape(-1).view(np.uint8).data) for name, array in arrays.items()}
