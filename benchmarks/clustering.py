"""Lists of 4 million chunks trained in parts: by one process, by three at once, and by faiss with the sample in memory.

Both ways must write the same index, byte for byte. Quality is the mean squared distance of other chunks to their
lists' centroids, against that of faiss's k-means on the same sample. Memory is anonymous, of the largest process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np
from retrieval_scale import anonymous_bytes, write_corpus

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.retrieval.chunk_vectors import EmbeddedChunks
from megatron_retro.retrieval.embedders import HashedEmbedder
from megatron_retro.retrieval.index_training import TRAINED_FILE, sampled_vectors
from megatron_retro.retrieval.work_blocks import uniform_sample
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main

WIDTH, POINTS, ROUNDS, PROCESSES = 64, 64, 10, 3
MEMORY_GB, CHECKED = 0.1, 50_000


def train(folder: Path, corpus: str, lists: int, processes: int) -> tuple[float, float]:
    """CPU-seconds of all processes, and the most bytes that one of them held."""
    command = [
        *(sys.executable, "-m", "megatron_retro.cli.main", "build-retrieval", "--retro-project-dir", str(folder)),
        *("--retro-database-corpus", corpus, "--no-retro-database-eod"),
        *("--retro-index-str", f"IVF{lists},Flat", "--retro-memory-gb", str(MEMORY_GB), "--retro-tasks", "train"),
        *("--retro-embedder-dimension", str(WIDTH)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = {
        process.pid: process
        for shard in range(processes)
        for process in [subprocess.Popen([*command, "--shard", f"{shard}/{processes}"], env=environment, stderr=-3)]
    }
    cpu = most = 0.0
    while running:
        most = max([most, *(anonymous_bytes(process) for process in running)])
        done, status, usage = os.wait4(-1, os.WNOHANG)
        if done:
            running.pop(done).returncode = os.waitstatus_to_exitcode(status)
            cpu += usage.ru_utime + usage.ru_stime
            if status:
                raise RuntimeError(f"a worker failed: {' '.join(command)}")
        time.sleep(0.02)
    return cpu, most


def centroids_of(project: Path) -> np.ndarray:
    """The centroids of a trained index."""
    index = faiss.read_index(str(project / "index/trained" / TRAINED_FILE))
    return np.asarray(index.quantizer.reconstruct_n(0, index.nlist))


def mean_distance(vectors: np.ndarray, centroids: np.ndarray) -> float:
    """Of vectors to the nearest centroid."""
    return float(faiss.knn(vectors, centroids, 1)[0].mean())


def run(quick: bool) -> Sequence[Figure]:
    """One size."""
    chunks, lists = (120_000, 1024) if quick else (4_000_000, 8192)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus", chunks)
        spent = {}
        for processes in (1, PROCESSES):
            cpu, most = spent[processes] = train(folder / str(processes), corpus, lists, processes)
            say(f"  {processes} processes: {cpu:.0f} CPU-seconds, {most / 1e6:.0f} MB")
        one, several = (folder / str(processes) / "index/trained" / TRAINED_FILE for processes in (1, PROCESSES))
        same = one.read_bytes() == several.read_bytes()
        database = ChunkDatabase.open(folder / "1" / "database")
        sample = uniform_sample(database.num_chunks, POINTS * lists)
        others = np.setdiff1d(np.random.default_rng(0).integers(0, database.num_chunks, CHECKED), sample)
        embedded = EmbeddedChunks(database, HashedEmbedder(WIDTH))
        vectors, checked = (sampled_vectors(embedded, ids) for ids in (sample, others))
        start = time.process_time()
        whole = faiss.Kmeans(WIDTH, lists, niter=ROUNDS)
        whole.train(vectors)
        in_memory = time.process_time() - start
        quality = mean_distance(checked, centroids_of(folder / "1")) / mean_distance(checked, whole.centroids)
    held = max(most for _, most in spent.values())
    return [
        Figure(f"{PROCESSES} processes train the same bytes as one", float(same), "yes", 1.0),
        Figure("distance to the lists over that of faiss in memory", quality, "x", 1.01, LOWER),
        Figure("one process, all of training", spent[1][0], "CPU-seconds"),
        Figure(f"{PROCESSES} processes over one", spent[PROCESSES][0] / spent[1][0], "x CPU-seconds", 1.2, LOWER),
        Figure("faiss's k-means of the sample in memory", in_memory, "CPU-seconds"),
        Figure("most memory of a process", held / 1e9, "GB"),
        Figure("bytes of the sample's vectors", vectors.nbytes / 1e9, "GB"),
    ]


if __name__ == "__main__":
    benchmark_main(__doc__, run)
