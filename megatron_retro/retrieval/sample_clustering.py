"""K-means over a sample that no worker holds: each embeds parts of it, and sums parts of it in every round.

faiss's way over many machines, through files. A round reads its centroids; every part gives the sum and the number of
its vectors in each list; one worker adds the parts, in their order, to the centroids of the next round. So any number
of workers end with the same lists, and one that dies costs a part of a round.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS, verify_arrays, write_arrays
from megatron_retro.retrieval.faiss_index import faiss_module
from megatron_retro.retrieval.gpu_index import num_gpus
from megatron_retro.retrieval.work_blocks import WorkBlock, ignore_failure_if_done
from megatron_retro.runtime.console import Advance, Progress

ROUNDS = 10
_SEED = 1234
_ROWS = 1 << 16

Vectors = NDArray[np.float32]
Claim = Callable[[Sequence[str], Callable[[str], bool]], Iterator[str]]
Nearest = Callable[[Vectors], NDArray[np.int64]]


@dataclass(frozen=True)
class SampleClustering:
    """The vectors of a sample in `parts`, and the centroids of `num_lists` lists among them, as files of `folder`.

    `facts` say what the vectors were made from; `claim` shares named blocks among the workers.
    """

    folder: Path
    facts: dict[str, Any]
    parts: tuple[WorkBlock, ...]
    num_lists: int
    device: str
    claim: Claim

    @property
    def size(self) -> int:
        """Vectors of the sample."""
        return self.parts[-1].last

    def write_vectors(self, vectors_of: Callable[[WorkBlock, Advance], Vectors]) -> None:
        """Write the vectors of the parts that no worker has written yet."""
        with Progress("vectors of a sample", self.size, "chunks") as progress:
            for part in self._claimed("vectors", lambda part: self._vectors(part).exists(), progress):
                write_arrays(self._vectors(part), {"vectors": vectors_of(part, progress.advance)}, self.facts)

    def run(self) -> None:
        """All rounds, as far as no worker has done them."""
        for _ in self.claim(["centroids-00"], lambda _: self._centroids(0).exists()):
            rows = np.random.default_rng(_SEED).choice(self.size, self.num_lists, replace=False, shuffle=False)
            write_arrays(self._centroids(0), {"centroids": self.rows(np.sort(rows))}, self.facts)
        for number in range(ROUNDS):
            self._run_round(number)

    def centroids(self) -> Vectors:
        """The centroids of all lists after all rounds, [num_lists, dimension]."""
        return self._read(self._centroids(ROUNDS), "centroids")

    def rows(self, numbers: NDArray[np.int64]) -> Vectors:
        """Vectors of the sample by their ascending numbers."""
        found = []
        for part in self.parts:
            within = numbers[np.searchsorted(numbers, part.first) : np.searchsorted(numbers, part.last)]
            if len(within):
                found.append(self._read(self._vectors(part), "vectors")[within - part.first])
        return np.concatenate(found)

    def _run_round(self, number: int) -> None:
        after = self._centroids(number + 1)
        if after.exists():
            return
        nearest: Nearest | None = None
        with Progress(f"k-means, round {number + 1} of {ROUNDS}", self.size, "chunks") as progress:

            def summed(part: WorkBlock) -> bool:
                return self._sums(number, part).exists() or after.exists()

            for part in self._claimed(f"round-{number:02d}", summed, progress):
                with ignore_failure_if_done(after.exists):
                    nearest = nearest or self._nearest(self._read(self._centroids(number), "centroids"))
                    self._write_sums(number, part, nearest, progress.advance)
        for _ in self.claim([f"centroids-{number + 1:02d}"], lambda _: after.exists()):
            with ignore_failure_if_done(after.exists):
                write_arrays(after, {"centroids": self._next_centroids(number)}, self.facts)
            for part in self.parts:
                self._sums(number, part).unlink(missing_ok=True)

    def _nearest(self, centroids: Vectors) -> Nearest:
        """The number of the nearest centroid of each vector, found on the GPUs where faiss has any."""
        faiss = faiss_module()
        if self.device == "cpu" or num_gpus() == 0:
            return lambda vectors: faiss.knn(vectors, centroids, 1)[1][:, 0]
        finder = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(centroids.shape[1]))
        finder.add(centroids)
        return lambda vectors: finder.search(vectors, 1)[1][:, 0]

    def _write_sums(self, number: int, part: WorkBlock, nearest: Nearest, advance: Advance) -> None:
        vectors = self._read(self._vectors(part), "vectors")
        sums = np.zeros((self.num_lists, vectors.shape[1]), np.float32)
        counts = np.zeros(self.num_lists, np.int64)
        for first in range(0, len(vectors), BATCH_CHUNKS):
            batch = np.ascontiguousarray(vectors[first : first + BATCH_CHUNKS])
            lists = nearest(batch)
            order = np.argsort(lists, kind="stable")
            present, starts, sizes = np.unique(lists[order], return_index=True, return_counts=True)
            sums[present] += np.add.reduceat(batch[order], starts, axis=0)
            counts[present] += sizes
            advance(len(batch))
        write_arrays(self._sums(number, part), {"sums": sums, "counts": counts}, self.facts)

    def _next_centroids(self, number: int) -> Vectors:
        """Means of the lists; an empty list takes half of a large one, as in faiss."""
        from faiss.contrib.clustering import reassign_centroids

        parts = [verify_arrays(self._sums(number, part), self.facts) for part in self.parts]
        counts = np.sum([part["counts"] for part in parts], axis=0)
        centroids = np.empty(parts[0]["sums"].shape, np.float32)
        for first in range(0, self.num_lists, _ROWS):
            rows = slice(first, first + _ROWS)
            total = np.zeros(centroids[rows].shape)
            for part in parts:
                total += part["sums"][rows]
            centroids[rows] = total / np.maximum(counts[rows], 1)[:, None]
        dice = np.random.RandomState(_SEED + number)
        reassign_centroids(counts, centroids, dice)  # type: ignore[no-untyped-call]  # faiss leaves it untyped
        return centroids

    def _claimed(self, what: str, is_done: Callable[[WorkBlock], bool], progress: Progress) -> Iterator[WorkBlock]:
        by_name = {f"{what}-{part.name}": part for part in self.parts}
        progress.advance(sum(part.size for part in self.parts if is_done(part)))
        return (by_name[name] for name in self.claim(list(by_name), lambda name: is_done(by_name[name])))

    def _read(self, path: Path, name: str) -> Vectors:
        return verify_arrays(path, self.facts)[name]

    def _vectors(self, part: WorkBlock) -> Path:
        return self.folder / f"vectors-{part.name}.safetensors"

    def _sums(self, number: int, part: WorkBlock) -> Path:
        return self.folder / f"sums-{number:02d}-{part.name}.safetensors"

    def _centroids(self, number: int) -> Path:
        return self.folder / f"centroids-{number:02d}.safetensors"
