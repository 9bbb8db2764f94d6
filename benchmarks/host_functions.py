"""CPU-seconds of each function of `csrc/host` against the best of NumPy and torch at the same work, results equal.

Collecting the best candidates (`TopCandidates`) is measured against faiss's search and join, by `retrieval.py`; whole
batches with neighbours against megatron-core's dataset, by `dataset.py`.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.neighbors import NeighborReader
from megatron_retro.data.token_index import last_at_or_before
from megatron_retro.retrieval import native, reference
from megatron_retro.testing.benchmarking import Figure, benchmark_main, interleave, median_ratio

sys.path.insert(0, str(Path(__file__).parent))
from dataset import CHUNK, EOD, write_corpus, write_table

ROUNDS, VOCABULARY, RETRIEVED, CANDIDATES = 5, 32_000, 2 * CHUNK, 40
Case = tuple[str, str, Callable[[], Any], Callable[[], Any]]


def counted(texts: Any, present: Any, others: Any, there: Any) -> torch.Tensor:
    """How often each candidate has each token of its text, [N, K, M]."""
    same = torch.from_numpy(others)[:, :, None, :] == torch.from_numpy(texts)[:, None, :, None]
    return (same & torch.from_numpy(there)[:, :, None, :] & torch.from_numpy(present)[:, None, :, None]).sum(3)


def in_torch(texts: Any, present: Any) -> torch.Tensor:
    """Which appearance of its token each token of a text is, [N, M], from 1."""
    wide, mask = torch.from_numpy(texts), torch.from_numpy(present)
    same = (wide[:, :, None] == wide[:, None, :]) & mask[:, None, :]
    return (same & torch.ones(same.shape[1:], dtype=torch.bool).tril()).sum(2)


def overlaps(texts: Any, present: Any, others: Any, there: Any) -> np.ndarray:
    """`token_overlaps`: an appearance counts where the candidate has the token as often."""
    shared = counted(texts, present, others, there) >= in_torch(texts, present)[:, None, :]
    shared &= torch.from_numpy(present)[:, None, :]
    return (shared.sum(2) / torch.from_numpy(present).sum(1, keepdim=True).clamp(min=1)).float().numpy()


def bm25(texts: Any, present: Any, others: Any, there: Any, weights: Any, k1: float, b: float, mean: float) -> Any:
    """`bm25_scores` of every distinct token of a text."""
    times = counted(texts, present, others, there).float()
    norm = k1 * (1 - b + b * torch.from_numpy(there).sum(2) / mean)[:, :, None]
    first = torch.from_numpy(present) & (in_torch(texts, present) == 1)
    scores = torch.from_numpy(weights)[torch.from_numpy(texts).long()][:, None, :] * times * (k1 + 1) / (times + norm)
    return (scores * first[:, None, :]).sum(2).numpy()


def others_kept(candidates: Any, first: Any, last: Any, keep: int) -> np.ndarray:
    """`keep_other_documents` by sorting."""
    order = np.argsort(candidates, axis=1, kind="stable")
    ordered = np.take_along_axis(candidates, order, axis=1)
    dropped = np.zeros(candidates.shape, bool)
    np.put_along_axis(dropped, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    dropped |= (candidates < 0) | ((candidates >= first[:, None]) & (candidates < last[:, None]))
    places = np.argsort(dropped, axis=1, kind="stable")[:, :keep]
    kept = np.take_along_axis(candidates, places, axis=1)
    return np.where(np.take_along_axis(dropped, places, axis=1), -1, kept)


def distances(queries: Any, candidates: Any, vectors: Any) -> np.ndarray:
    """`candidate_distances` by a product of each query with its candidates."""
    found = torch.from_numpy(vectors.view(np.int16)).view(torch.bfloat16)[torch.from_numpy(candidates)].float()
    wide = torch.from_numpy(queries)
    products = torch.bmm(found, wide[:, :, None])[:, :, 0]
    return (wide.square().sum(1, keepdim=True) + found.square().sum(2) - 2 * products).numpy()


def of_texts(rows: int) -> Iterator[Case]:
    """The functions of retrieval, on chunks that share tokens with their candidates."""
    random = np.random.default_rng(0)
    texts = random.zipf(1.2, (rows, CHUNK)).astype(np.int32) % VOCABULARY
    others = random.zipf(1.2, (rows, CANDIDATES, RETRIEVED)).astype(np.int32) % VOCABULARY
    present, there = np.ones(texts.shape, bool), random.random(others.shape) < 0.95
    pair, weights = (texts, present, others, there), random.random(VOCABULARY).astype(np.float32)
    few = (texts[: rows // 8], present[: rows // 8])
    yield (
        "embed_hashed, 384 wide",
        "NumPy",
        lambda: native.embed_hashed(*few, (1, 1, 1), 384),
        lambda: reference.embed_hashed(*few, (1, 1, 1), 384),
    )
    runs = native.longest_common_runs, reference.longest_common_runs
    yield "longest_common_runs", "NumPy", lambda: runs[0](*pair), lambda: runs[1](*pair)
    yield "token_overlaps", "torch", lambda: native.token_overlaps(*pair), lambda: overlaps(*pair)
    scores = partial(native.bm25_scores, k1=1.2, b=0.75, mean_length=120.0)
    yield (
        "bm25_scores",
        "torch",
        lambda: scores(*pair, weights),
        lambda: bm25(*pair, weights, 1.2, 0.75, 120.0),
    )
    ids = random.integers(-1, 50_000, (40 * rows, 200))
    first = random.integers(0, 50_000, len(ids))
    span = (first, first + 1000)
    yield (
        "keep_other_documents, 200 candidates",
        "NumPy",
        lambda: native.keep_other_documents(ids, *span, 20),
        lambda: others_kept(ids, *span, 20),
    )
    vectors = (random.standard_normal((50_000, 384)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    queries, chosen = random.standard_normal((rows, 384)).astype(np.float32), random.integers(0, 50_000, (rows, 200))
    yield (
        "candidate_distances, 384 wide",
        "torch",
        lambda: native.candidate_distances(queries, chosen, vectors),
        lambda: distances(queries, chosen, vectors),
    )


def of_files(folder: Path, documents: int) -> Iterator[Case]:
    """The functions of a chunk database and a token file, at random places of it."""
    file, random = write_corpus(folder / "corpus", documents, 500), np.random.default_rng(1)
    database = ChunkDatabase.create(folder / "db", [file.prefix], CHUNK, eod=EOD)
    assert database.native is not None, "csrc/host is not built"
    write_table(folder / "table", file, database)
    reader = NeighborReader(file, NeighborTable.open(folder / "table"), database, CHUNK, 2, RETRIEVED)
    ids, offsets = random.integers(0, database.num_chunks, 20_000), random.integers(0, file.num_tokens, 128)
    yield (
        "gather, 128 tokens",
        "NumPy",
        lambda: database.gather(ids, RETRIEVED)[0],
        lambda: database.gather_plainly(ids, RETRIEVED)[0],
    )
    yield (
        "documents of 20,000 chunks",
        "NumPy",
        lambda: database.document_of(ids),
        lambda: np.searchsorted(database.chunks_before, ids, side="right") - 1,
    )
    find = file.documents_of, partial(last_at_or_before, file.document_starts, file.num_documents)
    yield (
        "documents of 128 tokens, a hundred times",
        "NumPy",
        lambda: np.stack([find[0](offsets) for _ in range(100)]),
        lambda: np.stack([find[1](offsets) for _ in range(100)]),
    )
    chunks = random.integers(0, reader.table.layout.num_rows - 32, 500)
    saved = np.stack([reader.table.rows(first, first + 32) for first in chunks.tolist()])
    own = reader._own_documents(chunks, 32)
    packed = reader._packed(chunks[:, None] + np.arange(32))
    everything = np.zeros(0, np.uint64)
    rows, excluded = packed.reshape(-1, packed.shape[-1]), np.stack(own, axis=1)
    yield (
        "select, 2 of 20",
        "NumPy, ids unpacked",
        lambda: database.native.select(rows, excluded, 2, everything, False, 1).reshape(500, 32, 2),
        lambda: reader.select_plainly(saved, *own),
    )


def run(quick: bool) -> Iterator[Figure]:
    """A figure for each function."""
    with tempfile.TemporaryDirectory() as room:
        for cases in (of_texts(64 if quick else 256), of_files(Path(room), 5_000 if quick else 200_000)):
            for name, who, ours, peer in cases:
                found, expected = ours(), peer()
                assert np.allclose(found, expected, rtol=1e-3, atol=1e-3), name
                times = interleave({"ours": ours, "peer": peer}, 2 if quick else ROUNDS)
                ratio = median_ratio(times["peer"].cpu, times["ours"].cpu)
                yield Figure(f"{name}: {who} over ours", ratio, "x CPU", 1.0)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
