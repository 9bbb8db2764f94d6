"""The host C++ of retrieval behind typed functions; `reference.py` defines what each one computes.

Without a compiler the package has no `_native`: the references answer then, slower, and `build-retrieval` says so.
Searching list by list exists only in C++ and is refused without it.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_retro.errors import EnvironmentProblem
from megatron_retro.retrieval import reference

Tokens = NDArray[Any]
Mask = NDArray[np.bool_]


class Candidates(Protocol):
    """The best candidates of many queries, offered a block of scores at a time."""

    def exclude(self, first: NDArray[np.int64], last: NDArray[np.int64]) -> None:
        """Per query, an interval of ids that are never candidates."""

    def offer(
        self,
        rows: NDArray[np.int64],
        products: NDArray[np.float32],
        offsets: NDArray[np.float32],
        ids: NDArray[np.int64],
    ) -> None:
        """`products[i, j] + offsets[j]`: how near vector `ids[j]` is to query `rows[i]`; larger is nearer."""

    def offer_rounded(
        self,
        rows: NDArray[np.int64],
        products: NDArray[np.uint16],
        offsets: NDArray[np.float32],
        ids: NDArray[np.int64],
        queries: NDArray[np.float32],
        vectors: NDArray[np.float32],
    ) -> None:
        """The same from a product in bfloat16 (its bits): what may be among the best is computed again in float32."""

    def best(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and ids, nearest first, -inf and -1 where there are too few."""


@cache
def native_module() -> Any | None:
    """The compiled module, or None where the package was installed without a compiler."""
    try:
        return importlib.import_module("megatron_retro.retrieval._native")
    except ImportError:
        return None


def top_candidates(num_queries: int, keep: int) -> Candidates:
    """An empty set of candidates."""
    module = native_module()
    if module is None:
        raise EnvironmentProblem(
            "searching list by list needs the compiled part of megatron_retro.retrieval, which was not built",
            fix="install a C++ compiler and megatron_retro again, or give --retro-query-method queries",
        )
    candidates: Candidates = module.TopCandidates(num_queries, keep, torch.get_num_threads())
    return candidates


def embed_hashed(tokens: Tokens, present: Mask, weights: tuple[int, ...], dimension: int) -> NDArray[np.float32]:
    """Signed random projection of the hashed n-grams of each chunk [N, M], `weights` by their length; length one."""
    module, wide = native_module(), tokens.astype(np.int32)
    if module is None:
        return reference.embed_hashed(wide, present, weights, dimension)
    vectors: NDArray[np.float32] = module.embed_hashed(wide, present, weights, dimension, torch.get_num_threads())
    return vectors


def longest_common_runs(texts: Tokens, present: Mask, candidates: Tokens, there: Mask) -> NDArray[np.int32]:
    """Longest run of tokens that text i [N, M] shares with each of its candidates [N, K, R]."""
    module, (left, right) = native_module(), (texts.astype(np.int32), candidates.astype(np.int32))
    if module is None:
        return reference.longest_common_runs(left, present, right, there)
    runs: NDArray[np.int32] = module.longest_common_runs(left, present, right, there, torch.get_num_threads())
    return runs


def token_overlaps(texts: Tokens, present: Mask, candidates: Tokens, there: Mask) -> NDArray[np.float32]:
    """Share of a text's tokens that a candidate has too, as multisets."""
    module, (left, right) = native_module(), (texts.astype(np.int32), candidates.astype(np.int32))
    if module is None:
        return reference.token_overlaps(left, present, right, there)
    shares: NDArray[np.float32] = module.token_overlaps(left, present, right, there, torch.get_num_threads())
    return shares


def bm25_scores(
    texts: Tokens,
    present: Mask,
    candidates: Tokens,
    there: Mask,
    weights: NDArray[np.float32],
    *,
    k1: float,
    b: float,
    mean_length: float,
) -> NDArray[np.float32]:
    """BM25 of each candidate for its text; `weights` is the inverse document frequency by token id."""
    module, (left, right) = native_module(), (texts.astype(np.int32), candidates.astype(np.int32))
    if module is None:
        return reference.bm25_scores(left, present, right, there, weights, k1, b, mean_length)
    scores: NDArray[np.float32] = module.bm25_scores(
        left, present, right, there, weights, k1, b, mean_length, torch.get_num_threads()
    )
    return scores


def keep_other_documents(
    candidates: NDArray[np.int64], first: NDArray[np.int64], last: NDArray[np.int64], keep: int
) -> NDArray[np.int64]:
    """The first `keep` candidates of each row that exist, lie outside its interval and are not repeated."""
    module = native_module()
    if module is None:
        return reference.keep_other_documents(candidates, first, last, keep)
    kept: NDArray[np.int64] = module.keep_other_documents(candidates, first, last, keep)
    return kept


def candidate_distances(
    queries: NDArray[np.float32], candidates: NDArray[np.int64], vectors: NDArray[np.uint16]
) -> NDArray[np.float32]:
    """Squared distances of queries to their candidates' vectors, which are bits of bfloat16."""
    module = native_module()
    if module is None:
        return reference.candidate_distances(queries, candidates, vectors)
    distances: NDArray[np.float32] = module.candidate_distances(queries, candidates, vectors, torch.get_num_threads())
    return distances
