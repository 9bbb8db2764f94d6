"""An index copied to the GPUs of faiss: which indexes can be copied, how much memory that takes, and its search.

A copy answers as the index on disk does, query by query. On several GPUs it is repeated where it fits one of them, and
split over them where it does not. An HNSW coarse quantizer becomes a flat one, which misses no list.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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

MOST_SELECTED = 2048
_CODE_BYTES = (1, 2, 3, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 96)
_SINGLE_PRECISION_CODES = 48
_SCALARS = ("QT_8bit", "QT_8bit_uniform", "QT_8bit_direct", "QT_6bit", "QT_4bit", "QT_4bit_uniform", "QT_fp16")
_LIST_BYTES, _LIST_PADDING, _ID_BYTES = 1024, 32, 8
_WORKING_BYTES = 1 << 31


@dataclass(frozen=True)
class GpuIndex:
    """An index on all GPUs of faiss."""

    index: Any

    def set_lists(self, nprobe: int) -> None:
        """How many lists a search looks into, at most `MOST_SELECTED`."""
        faiss_module().GpuParameterSpace().set_index_parameter(self.index, "nprobe", nprobe)

    def search(self, vectors: NDArray[np.float32], keep: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Distances and ids of the nearest, `keep` at most `MOST_SELECTED`."""
        try:
            distances, ids = self.index.search(vectors, keep)
        except RuntimeError as error:
            raise EnvironmentProblem(
                "faiss cannot search on the GPU", got=reason_of(error), fix="give --retro-faiss-device cpu"
            ) from None
        return distances, ids


def num_gpus() -> int:
    """The GPUs that faiss sees: none without a GPU build of it."""
    return int(faiss_module().get_num_gpus())


def not_supported_reasons(index: Any, nprobe: int, keep: int) -> tuple[str, ...]:
    """Why an index cannot be searched on GPUs; empty where it can."""
    if num_gpus() == 0:
        return ("faiss sees no GPU",)
    found = list(_unsupported(index))
    found += [f"{nprobe} lists of a query are more than {MOST_SELECTED}"] if nprobe > MOST_SELECTED else []
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
    """GPU memory of a copy with this many chunks; lists are padded to whole warps."""
    parts = inverted_parts(index)
    if parts is None:
        return 4 * int(searched_index(index).d) * chunks
    padded = chunks + parts.num_lists * _LIST_PADDING // 2
    return padded * (parts.code_size + _ID_BYTES) + parts.num_lists * (4 * parts.dimension + _LIST_BYTES)


def copy_to_gpus(index: Any, chunks: int) -> GpuIndex:
    """Copy an index to every GPU, in parts where one GPU cannot hold it; raises what faiss says if it cannot."""
    faiss = faiss_module()
    options = faiss.GpuMultipleClonerOptions()
    free, needed = free_bytes(), copy_bytes(index, chunks)
    options.shard = free is not None and needed > min(free) - _WORKING_BYTES
    parts = inverted_parts(index)
    options.useFloat16 = parts is not None and hasattr(parts.inverted, "pq") and _needs_half_precision(parts)
    resources = [faiss.StandardGpuResources() for _ in range(num_gpus())]
    try:
        with _flat_quantizer(parts):
            return GpuIndex(faiss.index_cpu_to_gpu_multiple_py(resources, index, options))
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


def _needs_half_precision(parts: InvertedParts) -> bool:
    """Whether a query's distance tables fit a GPU's shared memory in half precision only."""
    return bool(parts.inverted.pq.M > _SINGLE_PRECISION_CODES)


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
