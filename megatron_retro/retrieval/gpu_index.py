"""An index copied to the GPUs of faiss: which indexes can be copied, how much memory that takes, and its search.

A copy answers as the index on disk does, query by query. On several GPUs it is repeated where it fits one of them, and
split over them where it does not. An HNSW coarse quantizer becomes a flat one, which misses no list. Where faiss is
built with cuVS, its kernels search what both have; they search no given lists, which more than `MOST_SELECTED` take.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.errors import EnvironmentProblem
from megatron_retro.retrieval.faiss_index import (
    InvertedParts,
    faiss_module,
    inverted_parts,
    reason_of,
    searched_index,
)
from megatron_retro.retrieval.given_lists import ListFinder, search_given_lists

MOST_SELECTED = 2048
_CODE_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
_SINGLE_PRECISION_CODES = 48
_SCALARS = ("QT_8bit", "QT_8bit_uniform", "QT_8bit_direct", "QT_6bit", "QT_4bit", "QT_4bit_uniform", "QT_fp16")
_LIST_BYTES, _LIST_PADDING, _ID_BYTES = 1024, 32, 8
_CUVS_KINDS = ("IndexFlat", "IndexFlatL2", "IndexIVFFlat", "IndexIVFPQ")
_WORKING_BYTES = 1 << 31
_QUERIES_AT_ONCE = 4096


@dataclass
class GpuIndex:
    """An index on all GPUs of faiss, the lists of the one that it is a copy of, and how many a search looks into."""

    index: Any
    parts: InvertedParts | None
    uses_cuvs: bool = False
    nprobe: int = 1

    @property
    def most_lists(self) -> int:
        """The most that a search can look into."""
        lists = self.parts.num_lists if self.parts else 1
        return min(lists, MOST_SELECTED) if self.uses_cuvs else lists

    def set_lists(self, nprobe: int) -> None:
        """How many lists a search looks into; more than `MOST_SELECTED` are searched a part at a time."""
        self.nprobe = min(nprobe, self.most_lists)
        if self.nprobe <= MOST_SELECTED:
            faiss_module().GpuParameterSpace().set_index_parameter(self.index, "nprobe", self.nprobe)

    def search(self, vectors: NDArray[np.float32], keep: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances and ids of the nearest, `keep` at most `MOST_SELECTED`."""
        try:
            if self.parts is not None and self.nprobe > MOST_SELECTED:
                return self._search_in_parts(self.parts.transformed(vectors), keep)
            distances, ids = self.index.search(vectors, keep)
        except RuntimeError as error:
            raise EnvironmentProblem(
                "faiss cannot search on the GPU", got=reason_of(error), fix="give --retro-faiss-device cpu"
            ) from None
        return distances, ids

    def _search_in_parts(
        self, queries: NDArray[np.float32], keep: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        index, found = searched_index(self.index), []
        for start in range(0, max(len(queries), 1), _QUERIES_AT_ONCE):
            some = queries[start : start + _QUERIES_AT_ONCE]
            distances, lists = self._list_finder.nearest(some, self.nprobe)
            found.append(search_given_lists(index, some, keep, lists, distances, MOST_SELECTED))
        return np.concatenate([part[0] for part in found]), np.concatenate([part[1] for part in found])

    @cached_property
    def _list_finder(self) -> ListFinder:
        assert self.parts is not None
        return ListFinder.of(self.parts.inverted.quantizer)


def num_gpus() -> int:
    """The GPUs that faiss sees: none without a GPU build of it."""
    return int(faiss_module().get_num_gpus())


def not_supported_reasons(index: Any, keep: int) -> tuple[str, ...]:
    """Why an index cannot be searched on GPUs; empty where it can."""
    if num_gpus() == 0:
        return ("faiss sees no GPU",)
    found = list(_unsupported(index))
    found += [f"{keep} candidates of a query are more than {MOST_SELECTED}"] if keep > MOST_SELECTED else []
    return tuple(found)


def lack_of_memory(needed: int, host_bytes: float) -> str | None:
    """Why a copy of this size does not fit the GPUs; None where it fits or free memory is unknown."""
    usable = [max(0, free - _WORKING_BYTES) for free in free_bytes() or ()]
    if not usable or needed <= min(usable):
        return None
    if needed > sum(usable):
        return f"a copy takes {needed / 1e9:.1f} GB and the GPUs have {sum(usable) / 1e9:.1f} GB"
    if needed > host_bytes:
        return f"a copy in parts passes {needed / 1e9:.1f} GB through memory, more than --retro-memory-gb"
    return None


def free_bytes() -> tuple[int, ...] | None:
    """Free memory of each GPU, where torch can tell."""
    if not torch.cuda.is_available():
        return None
    return tuple(int(torch.cuda.mem_get_info(device)[0]) for device in range(torch.cuda.device_count()))


def copy_bytes(index: Any, chunks: int) -> int:
    """GPU memory of a copy with this many chunks; lists are padded to whole warps, centroids may be there twice."""
    parts = inverted_parts(index)
    if parts is None:
        return 4 * int(searched_index(index).d) * chunks
    padded = chunks + parts.num_lists * _LIST_PADDING // 2
    return padded * (parts.code_size + _ID_BYTES) + parts.num_lists * (8 * parts.dimension + _LIST_BYTES)


def copy_to_gpus(index: Any, chunks: int) -> GpuIndex:
    """Copy an index to every GPU, in parts where one GPU cannot hold it; raises what faiss says if it cannot."""
    faiss = faiss_module()
    options = faiss.GpuMultipleClonerOptions()
    free, needed = free_bytes(), copy_bytes(index, chunks)
    options.shard = free is not None and needed > min(free) - _WORKING_BYTES
    parts = inverted_parts(index)
    options.useFloat16 = parts is not None and hasattr(parts.inverted, "pq") and _needs_half_precision(parts)
    options.use_cuvs = bool(getattr(options, "use_cuvs", False)) and _is_for_cuvs(index, parts)
    resources = [faiss.StandardGpuResources() for _ in range(num_gpus())]
    try:
        with _flat_quantizer(parts), _few_lists(parts):
            return GpuIndex(faiss.index_cpu_to_gpu_multiple_py(resources, index, options), parts, options.use_cuvs)
    except RuntimeError as error:
        raise EnvironmentProblem(
            "faiss cannot copy the index to the GPU", got=reason_of(error), fix="give --retro-faiss-device cpu"
        ) from None


def _unsupported(index: Any) -> Iterator[str]:
    """What of an index faiss has no GPU kernels for."""
    faiss, searched = faiss_module(), searched_index(index)
    kind = type(searched).__name__
    if kind == "IndexIVFPQ":
        if searched.pq.nbits != 8:
            yield f"codes of {searched.pq.nbits} bits (8 are supported)"
        if searched.pq.M not in _CODE_BYTES:
            yield f"{searched.pq.M} codes of a vector (supported: {', '.join(map(str, _CODE_BYTES))})"
        if not searched.by_residual:
            yield "codes of whole vectors rather than residuals"
    elif kind == "IndexIVFScalarQuantizer":
        if searched.sq.qtype not in {getattr(faiss.ScalarQuantizer, name) for name in _SCALARS}:
            yield "this scalar quantizer"
    elif kind not in ("IndexIVFFlat", "IndexFlat", "IndexFlatL2"):
        yield f"faiss searches no {kind} on GPUs"


def _is_for_cuvs(index: Any, parts: InvertedParts | None) -> bool:
    """Whether cuVS, where faiss is built with it, searches such an index, in as many lists as it is set to."""
    few = parts is None or int(parts.inverted.nprobe) <= MOST_SELECTED
    return few and type(searched_index(index)).__name__ in _CUVS_KINDS


def _needs_half_precision(parts: InvertedParts) -> bool:
    """Whether a query's distance tables fit a GPU's shared memory in half precision only."""
    return bool(parts.inverted.pq.M > _SINGLE_PRECISION_CODES)


@contextmanager
def _few_lists(parts: InvertedParts | None) -> Iterator[None]:
    """Set the index to no more lists than a GPU takes at once, which faiss checks while it is copied."""
    if parts is None:
        yield
        return
    nprobe = int(parts.inverted.nprobe)
    parts.inverted.nprobe = min(nprobe, MOST_SELECTED)
    try:
        yield
    finally:
        parts.inverted.nprobe = nprobe


@contextmanager
def _flat_quantizer(parts: InvertedParts | None) -> Iterator[None]:
    """Replace an HNSW coarse quantizer, which GPUs do not search, by a flat one while the index is copied."""
    faiss = faiss_module()
    if parts is None or isinstance(faiss.downcast_index(parts.inverted.quantizer), faiss.IndexFlat):
        yield
        return
    finder = faiss.downcast_index(parts.inverted.quantizer)
    flat = faiss.IndexFlatL2(parts.dimension)
    flat.add(finder.reconstruct_n(0, parts.num_lists))
    parts.inverted.quantizer = flat
    try:
        yield
    finally:
        parts.inverted.quantizer = finder
        flat.thisown = True
