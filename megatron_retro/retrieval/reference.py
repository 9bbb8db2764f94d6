"""What `_native` computes, in NumPy: the definition that tests compare with, and the way without a compiler."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1


def mix(value: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One step of splitmix64."""
    with np.errstate(over="ignore"):
        x = value + np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return mixed


def embed_hashed(
    tokens: NDArray[np.int32], present: NDArray[np.bool_], weights: tuple[int, ...], dimension: int
) -> NDArray[np.float32]:
    """Sum of the sign vectors of a chunk's distinct n-grams, weighted by their length, scaled to length one."""
    rows = [_embed_row(row, mask, weights, dimension) for row, mask in zip(tokens, present, strict=True)]
    return np.stack(rows) if rows else np.zeros((0, dimension), np.float32)


def _embed_row(
    tokens: NDArray[np.int32], present: NDArray[np.bool_], weights: tuple[int, ...], dimension: int
) -> NDArray[np.float32]:
    sums, total = np.zeros(dimension, np.int64), 0
    for size, weight in enumerate(weights, 1):
        hashes = _ngram_hashes(tokens.astype(np.uint32).astype(np.uint64), present, size)
        total += weight * len(hashes)
        words = np.arange(dimension // 64, dtype=np.uint64)
        with np.errstate(over="ignore"):
            signs = mix(hashes[:, None] + words * np.uint64(0xD1342543DE82EF95))
        bits = (signs[:, :, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
        sums += weight * bits.sum(axis=0).reshape(-1).astype(np.int64)
    sums = 2 * sums - total
    length = math.sqrt(int((sums * sums).sum()))
    return (sums * (1.0 / length if length else 0.0)).astype(np.float32)


def _ngram_hashes(tokens: NDArray[np.uint64], present: NDArray[np.bool_], size: int) -> NDArray[np.uint64]:
    count = len(tokens) - size + 1
    if count <= 0:
        return np.zeros(0, np.uint64)
    whole = np.ones(count, np.bool_)
    hashes = np.broadcast_to(mix(np.array([size], np.uint64)), count)
    for offset in range(size):
        whole &= present[offset : offset + count]
        hashes = mix(hashes ^ tokens[offset : offset + count])
    return np.unique(hashes[whole])


def longest_common_runs(
    texts: NDArray[np.int32],
    texts_present: NDArray[np.bool_],
    candidates: NDArray[np.int32],
    candidates_present: NDArray[np.bool_],
) -> NDArray[np.int32]:
    """Longest run of tokens that text i shares with each of its candidates."""
    runs = np.zeros((*candidates.shape[:2], candidates.shape[2] + 1), np.int32)
    best = np.zeros(candidates.shape[:2], np.int32)
    for place in range(texts.shape[1]):
        same = (candidates == texts[:, place, None, None]) & candidates_present & texts_present[:, place, None, None]
        runs[..., 1:] = np.where(same, runs[..., :-1] + 1, 0)
        best = np.maximum(best, runs.max(axis=2))
    return best


def token_overlaps(
    texts: NDArray[np.int32],
    texts_present: NDArray[np.bool_],
    candidates: NDArray[np.int32],
    candidates_present: NDArray[np.bool_],
) -> NDArray[np.float32]:
    """Share of a text's tokens that a candidate has too, as multisets."""
    result = np.zeros(candidates.shape[:2], np.float32)
    for row, text in _counted(texts, texts_present):
        for column, other in _counted(candidates[row], candidates_present[row]):
            result[row, column] = (text & other).total() / max(text.total(), 1)
    return result


def bm25_scores(
    texts: NDArray[np.int32],
    texts_present: NDArray[np.bool_],
    candidates: NDArray[np.int32],
    candidates_present: NDArray[np.bool_],
    weights: NDArray[np.float32],
    k1: float,
    b: float,
    mean_length: float,
) -> NDArray[np.float32]:
    """BM25 of each candidate for its text; `weights` is the inverse document frequency by token id."""
    result = np.zeros(candidates.shape[:2], np.float32)
    for row, text in _counted(texts, texts_present):
        for column, other in _counted(candidates[row], candidates_present[row]):
            norm = k1 * (1 - b + b * other.total() / mean_length)
            result[row, column] = sum(
                float(weights[token]) * other[token] * (k1 + 1) / (other[token] + norm)
                for token in text
                if token in other and 0 <= token < len(weights)
            )
    return result


def _counted(tokens: NDArray[np.int32], present: NDArray[np.bool_]) -> list[tuple[int, Counter[int]]]:
    return [(row, Counter(tokens[row][present[row]].tolist())) for row in range(len(tokens))]


def keep_other_documents(
    candidates: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64], keep: int
) -> NDArray[np.int64]:
    """The first `keep` candidates of each row that exist, lie outside [first, last) and are not repeated."""
    result = np.full((len(candidates), keep), -1, np.int64)
    for row, (ids, low, high) in enumerate(zip(candidates.tolist(), first.tolist(), last.tolist(), strict=True)):
        foreign = [one for one in dict.fromkeys(ids) if one >= 0 and not low <= one < high][:keep]
        result[row, : len(foreign)] = foreign
    return result


def candidate_distances(
    queries: NDArray[np.float32], candidates: NDArray[np.int64], vectors: NDArray[np.uint16]
) -> NDArray[np.float32]:
    """Squared distances of queries to their candidates' vectors (bfloat16 bits); infinite for an absent candidate."""
    bits: NDArray[Any] = vectors[np.maximum(candidates, 0)].astype(np.uint32) << np.uint32(16)
    distances = np.square(queries[:, None, :] - bits.view(np.float32)).sum(axis=2)
    return np.where(candidates >= 0, distances, np.inf).astype(np.float32)
