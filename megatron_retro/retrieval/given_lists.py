"""Search of more lists than a GPU of faiss looks into at once: they are found here, and searched a few at a time.

faiss's GPU kernels select at most 2,048, of lists as of neighbours. The lists of a query are found by torch, which has
no such limit; faiss searches given lists part by part (`search_preassigned`), and the nearest of all parts are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.retrieval.faiss_index import faiss_module

_SCORES_AT_ONCE = 1 << 28

Vectors = NDArray[np.float32]
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class ListFinder:
    """The centroids of all lists, [L, D], on the device that finds the nearest of them."""

    centroids_LD: torch.Tensor

    @classmethod
    def of(cls, quantizer: Any) -> ListFinder:
        """That of a coarse quantizer, on the GPU where torch sees one."""
        centroids_LD = torch.from_numpy(quantizer.reconstruct_n(0, quantizer.ntotal))
        return cls(centroids_LD.to("cuda" if torch.cuda.is_available() else "cpu"))

    def nearest(self, queries: Vectors, count: int) -> tuple[Vectors, Ids]:
        """Squared distances and numbers of the `count` nearest lists of each query, nearest first."""
        step = max(1, _SCORES_AT_ONCE // len(self.centroids_LD))
        parts = [self._nearest(queries[start : start + step], count) for start in range(0, len(queries), step)]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _nearest(self, queries: Vectors, count: int) -> tuple[Vectors, Ids]:
        queries_QD = torch.from_numpy(queries).to(self.centroids_LD)
        halves_L = self.centroids_LD.square().sum(1) / 2
        best = torch.addmm(-halves_L, queries_QD, self.centroids_LD.T).topk(count, dim=1)
        distances = (queries_QD.square().sum(1, keepdim=True) - 2 * best.values).clamp_(min=0)
        return distances.cpu().numpy(), best.indices.cpu().numpy()


def search_given_lists(
    index: Any, queries: Vectors, keep: int, lists: Ids, list_distances: Vectors, at_once: int
) -> tuple[Vectors, Ids]:
    """Distances and ids of the nearest in given lists, `at_once` lists at a time: what one search of all finds.

    The index is an inverted file, or several with equal lists: replicas share the queries, shards the vectors.
    """
    faiss = faiss_module()
    if not isinstance(index, (faiss.IndexReplicas, faiss.IndexShards)):
        return _in_parts(index, queries, keep, lists, list_distances, at_once)
    copies = [faiss.downcast_index(index.at(number)) for number in range(index.count())]
    splits = isinstance(index, faiss.IndexReplicas)
    cuts = np.linspace(0, len(queries), len(copies) + 1).astype(int)
    rows = [slice(*cut) if splits else slice(None) for cut in pairwise(cuts)]
    with ThreadPoolExecutor(len(copies)) as pool:
        found = list(
            pool.map(
                lambda copy, some: _in_parts(copy, queries[some], keep, lists[some], list_distances[some], at_once),
                copies,
                rows,
            )
        )
    if splits:
        return np.concatenate([distances for distances, _ in found]), np.concatenate([ids for _, ids in found])
    return _nearest_of(found, len(queries), keep)


def _in_parts(
    index: Any, queries: Vectors, keep: int, lists: Ids, list_distances: Vectors, at_once: int
) -> tuple[Vectors, Ids]:
    def parts() -> Iterator[tuple[Vectors, Ids]]:
        for first in range(0, lists.shape[1], at_once):
            some = slice(first, first + at_once)
            index.nprobe = lists[:, some].shape[1]
            yield index.search_preassigned(queries, keep, lists[:, some], list_distances[:, some])

    return _nearest_of(parts(), len(queries), keep)


def _nearest_of(found: Iterable[tuple[Vectors, Ids]], queries: int, keep: int) -> tuple[Vectors, Ids]:
    heap = faiss_module().ResultHeap(queries, keep)
    for distances, ids in found:
        heap.add_result(distances, ids)
    heap.finalize()
    return heap.D, heap.I
