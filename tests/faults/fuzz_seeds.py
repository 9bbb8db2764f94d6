"""First inputs of the fuzz targets, made of a small corpus and its chunk database; the format is `fuzz/inputs.h`'s."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import pack_ids
from megatron_retro.retrieval.native import embed_hashed
from megatron_retro.testing.retrieval_projects import CHUNK, EOD, echoing_documents, write_corpus

Array = NDArray[Any]
LENGTH = 2 * CHUNK


def number(value: float, kind: str = "<i8") -> bytes:
    """One number."""
    return np.array(value, kind).tobytes()


def numbers(values: Array) -> bytes:
    """An array in one dimension, or a flat list: how many numbers, then each."""
    return number(values.size, "<u2") + np.ascontiguousarray(values).tobytes()


def table(values: Array) -> bytes:
    """An array in two or three dimensions: its sizes but the first, then its numbers."""
    return bytes(values.shape[1:]) + numbers(values)


def seeds(folder: Path) -> dict[str, bytes]:
    """One sound input of each entry point."""
    prefixes = [write_corpus(folder / f"corpus{n}", echoing_documents(n, 4, longest=60)) for n in (1, 2)]
    database = ChunkDatabase.create(folder / "database", prefixes, chunk_length=CHUNK, eod=EOD)
    ids = np.arange(-1, database.num_chunks, 3)
    return {**_of_data(database, ids), **_of_retrieval(database, ids)}


def _of_data(database: ChunkDatabase, ids: Array) -> dict[str, bytes]:
    narrow = 4 * (database.token_dtype.itemsize == 2)
    opened = bytes([len(database.files) - 1 | narrow])
    for file, corpus, before in zip(database.files, database.corpora, database.documents_before, strict=False):
        opened += b"".join(numbers(array) for array in file.native_arrays[1:])
        opened += number(corpus.first_document) + number(before)
    opened += numbers(database.chunks_before) + number(CHUNK) + number(EOD)
    rows = np.resize(np.maximum(ids, 0), (4, 3))
    intervals = np.array([[0, 2], [3, 4]])
    limits = np.full(len(database.files), 1 << 62, np.uint64)
    arrays = database.files[0].native_arrays[1:]
    return {
        "gather": opened + bytes([LENGTH, narrow // 4]) + numbers(ids),
        "select": opened + bytes([2, 0]) + table(pack_ids(rows)) + table(intervals) + numbers(limits),
        "documents": opened + numbers(np.maximum(ids, 0)),
        "token_documents": bytes([narrow]) + b"".join(map(numbers, arrays)) + numbers(np.arange(0, 90, 9)),
    }


def _of_retrieval(database: ChunkDatabase, ids: Array) -> dict[str, bytes]:
    tokens, mask = database.gather(ids[:3], CHUNK)
    candidates, there = database.gather(np.resize(ids, (3, 2)), LENGTH)
    tokens, candidates = tokens.astype("<i4"), candidates.astype("<i4")
    pairs = table(tokens) + table(candidates) + table(mask) + table(there)
    embedded = embed_hashed(tokens, mask, (1, 2), 64)[:, :8].copy()
    halves = (embedded.view(np.uint32) >> 16).astype(np.uint16)
    rows, three, floats = np.arange(3), np.array([[0, 2], [1, -1], [2, 0]]), np.zeros(3, np.float32)
    offered = numbers(rows) + numbers(rows + 7) + numbers(floats)
    scores = (embedded @ embedded.T).astype(np.float32)
    rounded = (scores.view(np.uint32) >> 16).astype(np.uint16)
    top = bytes([3, 2, 3]) + numbers(rows) + numbers(rows + 1) + numbers(floats) + b"\0"
    top += offered + b"\1" + table(scores) + offered + b"\2" + table(rounded) + table(embedded) + table(embedded)
    return {
        "embed_hashed": table(tokens) + table(mask) + numbers(np.array([1, 2], np.int8)) + number(64, "<i2"),
        "longest_common_runs": pairs,
        "token_overlaps": pairs,
        "bm25_scores": pairs + numbers(np.linspace(1, 2, EOD + 1).astype(np.float32)) + number(CHUNK, "<f4"),
        "keep_other_documents": table(three) + numbers(rows) + numbers(rows + 2) + b"\2",
        "candidate_distances": table(embedded) + table(three) + table(halves),
        "top_candidates": top,
    }
