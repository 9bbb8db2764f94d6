"""A faiss index: build, take apart, save, load.

An index is a chain of transforms before an inverted file (`IVF`) whose lists hold one code per chunk. Such an index is
encoded in blocks and merged on disk. Any other index of the factory is filled in memory, chunk after chunk.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import new_file
from megatron_retro.artifacts.manifest import Manifest
from megatron_retro.artifacts.verified import identity_of, require_whole
from megatron_retro.errors import ArtifactError, ConfigError, DamagedArtifact
from megatron_retro.runtime.environment import require

_BLOCKABLE = ("IndexIVFFlat", "IndexIVFPQ", "IndexIVFScalarQuantizer", "IndexIVFRaBitQ")
_CHILD = "import faiss, sys; faiss.read_index(sys.argv[1], int(sys.argv[2]))"


@cache
def faiss_module() -> Any:
    """faiss, or an error that says how to get it."""
    require("faiss", "retrieval")
    import faiss

    return faiss


def new_index(index_str: str, dimension: int) -> Any:
    """An untrained index; squared distances."""
    faiss = faiss_module()
    try:
        index = faiss.index_factory(dimension, index_str, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ConfigError(
            f"faiss makes no index of --retro-index-str {index_str!r} for vectors {dimension} wide",
            got=reason_of(error),
            fix="give --retro-index-str auto, or a factory string whose parts divide the width",
        ) from None
    _refuse_unknown_parts(index, index_str)
    parts = inverted_parts(index)
    if parts is not None and hasattr(parts.inverted, "do_polysemous_training"):
        # It orders codes for a filter that no search here uses, and takes a second for each code of a vector.
        parts.inverted.do_polysemous_training = False
    return index


def _refuse_unknown_parts(index: Any, index_str: str) -> None:
    """Refuse IDMap and coarse quantizers other than flat and HNSW: blocks, estimates and checks do not know them."""
    faiss, parts = faiss_module(), inverted_parts(index)
    quantizer = faiss.downcast_index(parts.inverted.quantizer) if parts else None
    if isinstance(index, faiss.IndexIDMap) or (
        quantizer and not isinstance(quantizer, (faiss.IndexFlat, faiss.IndexHNSW))
    ):
        raise ConfigError(
            f"--retro-index-str {index_str!r} cannot be built here",
            got=type(quantizer or index).__name__,
            expected="an index without IDMap whose lists, if any, are found by all centroids or by HNSW",
            fix="give IVF.. or IVF.._HNSW.., or --retro-index-str auto",
        )


def reason_of(error: RuntimeError) -> str:
    """What faiss says, without where in its source it says so."""
    return str(error).split("Error: ")[-1].split("\n")[0]


@dataclass(frozen=True)
class InvertedParts:
    """An index taken apart: the whole with its transforms, and the inverted file behind them."""

    index: Any
    inverted: Any

    @property
    def num_lists(self) -> int:
        """Inverted lists."""
        return int(self.inverted.nlist)

    @property
    def code_size(self) -> int:
        """Bytes of a code."""
        return int(self.inverted.code_size)

    @property
    def dimension(self) -> int:
        """Width of the vectors that the lists see."""
        return int(self.inverted.d)

    def transformed(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Vectors as the inverted file wants them."""
        result = np.ascontiguousarray(vectors, np.float32)
        if self.index is not self.inverted:
            for number in range(self.index.chain.size()):
                result = faiss_module().downcast_VectorTransform(self.index.chain.at(number)).apply(result)
        return result

    def encoded(self, vectors: NDArray[np.float32]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """The list and the code of each vector."""
        faiss, seen = faiss_module(), self.transformed(vectors)
        _, found = self.inverted.quantizer.search(seen, 1)
        lists = np.ascontiguousarray(found[:, 0])
        codes = np.zeros((len(seen), self.code_size), np.uint8)
        if len(seen):
            self.inverted.encode_vectors(
                len(seen), faiss.swig_ptr(seen), faiss.swig_ptr(lists), faiss.swig_ptr(codes), False
            )
        return lists, codes

    def decoded(self, list_number: int, codes: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The vectors that codes of one list stand for."""
        if type(self.inverted).__name__ == "IndexIVFFlat":
            return codes.view(np.float32)
        faiss = faiss_module()
        lists = np.full(len(codes), list_number, np.int64)
        vectors = np.empty((len(codes), self.dimension), np.float32)
        self.inverted.decode_vectors(len(codes), faiss.swig_ptr(codes), faiss.swig_ptr(lists), faiss.swig_ptr(vectors))
        return vectors


def searched_index(index: Any) -> Any:
    """The index behind the transforms."""
    faiss = faiss_module()
    return faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index


def inverted_parts(index: Any) -> InvertedParts | None:
    """The parts of an index that can be encoded in blocks, or None."""
    inner = searched_index(index)
    return InvertedParts(index, inner) if type(inner).__name__ in _BLOCKABLE else None


def write_index(index: Any, path: Path) -> None:
    """Write an index file atomically."""
    with new_file(path) as partial:
        faiss_module().write_index(index, str(partial))


def read_index(artifact: Path, manifest: Manifest, name: str, *, fix: str, flags: int = 0) -> Any:
    """Read the index of an artifact, of which every byte was compared with its checksum before faiss sees it.

    faiss believes what it reads: damage there ends in a crash. One that another user made is read by a child first.
    """
    path = artifact / name
    identity = require_whole(artifact, manifest, name, fix=fix)
    if path.stat().st_uid != os.getuid():
        _read_by_a_child(path, flags)
    try:
        with _without_output():
            index = faiss_module().read_index(str(path), flags)
    except RuntimeError as error:
        raise ArtifactError(f"{path} cannot be read", got=str(error).split("\n")[0], fix=fix) from None
    if identity_of(path) != identity:
        raise DamagedArtifact(f"{path} changed while it was read", fix=f"wait for whoever writes it, or {fix}")
    return index


def _read_by_a_child(path: Path, flags: int) -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD, str(path), str(flags)], capture_output=True, text=True)
    if done.returncode:
        raise ArtifactError(
            f"{path} was made by another user and is no index that faiss can read",
            got=f"exit status {done.returncode} of a child that tried; {done.stderr.strip().splitlines()[-1:]}",
            fix="ask its owner for a sound one, or build it",
        )


@contextmanager
def _without_output() -> Iterator[None]:
    """Silence standard output, where faiss prints the place of an index's lists."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def set_search_effort(index: Any, nprobe: int, ef_search: int) -> None:
    """Set nprobe of the lists, and efSearch of a graph."""
    parts = inverted_parts(index)
    if parts is None:
        if hasattr(index, "hnsw"):
            index.hnsw.efSearch = ef_search
        return
    parts.inverted.nprobe = nprobe
    quantizer = faiss_module().downcast_index(parts.inverted.quantizer)
    if hasattr(quantizer, "hnsw"):
        quantizer.hnsw.efSearch = max(ef_search, nprobe)


def search_one_by_one(index: Any) -> None:
    """Prepare for single queries: faiss would start 32 threads per search to read lists ahead."""
    parts = inverted_parts(index)
    if parts is None:
        return
    lists = faiss_module().downcast_InvertedLists(parts.inverted.invlists)
    if hasattr(lists, "prefetch_nthread"):
        lists.prefetch_nthread = 0


@contextmanager
def list_content(lists: Any, number: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint8]]]:
    """Ids and codes of an inverted list, as views that end with the block."""
    faiss = faiss_module()
    size, width = int(lists.list_size(number)), int(lists.code_size)
    ids, codes = lists.get_ids(number), lists.get_codes(number)
    try:
        if size == 0:
            yield np.zeros(0, np.int64), np.zeros((0, width), np.uint8)
        else:
            yield faiss.rev_swig_ptr(ids, size), faiss.rev_swig_ptr(codes, size * width).reshape(size, width)
    finally:
        lists.release_ids(number, ids)
        lists.release_codes(number, codes)
