"""The compiled functions compute what `reference.py` says."""

from __future__ import annotations

import difflib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_retro.retrieval import native, reference
from megatron_retro.retrieval.chunk_encoding import as_bfloat16, from_bfloat16

pytestmark = pytest.mark.skipif(native.native_module() is None, reason="installed without a compiler")
SEEDS = st.integers(0, 100_000)


def random_pairs(seed: int, vocabulary: int = 6):
    random = np.random.default_rng(seed)
    rows, number, length, longer = (
        random.integers(1, 5),
        random.integers(1, 5),
        random.integers(1, 20),
        random.integers(1, 40),
    )
    texts = random.integers(0, vocabulary, (rows, length)).astype(np.int32)
    others = random.integers(0, vocabulary, (rows, number, longer)).astype(np.int32)
    return texts, random.random(texts.shape) < 0.9, others, random.random(others.shape) < 0.9


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_shared_tokens_and_runs(seed: int) -> None:
    texts, present, others, there = random_pairs(seed)
    weights = np.random.default_rng(seed).random(5).astype(np.float32)
    assert (
        native.longest_common_runs(texts, present, others, there)
        == reference.longest_common_runs(texts, present, others, there)
    ).all()
    assert np.allclose(
        native.token_overlaps(texts, present, others, there), reference.token_overlaps(texts, present, others, there)
    )
    options = {"k1": 1.2, "b": 0.75, "mean_length": 7.0}
    assert np.allclose(
        native.bm25_scores(texts, present, others, there, weights, **options),
        reference.bm25_scores(texts, present, others, there, weights, *options.values()),
        rtol=1e-5,
    )


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_runs_agree_with_difflib(seed: int) -> None:
    texts, _, others, _ = random_pairs(seed)
    runs = native.longest_common_runs(texts, np.ones(texts.shape, bool), others, np.ones(others.shape, bool))
    for row, column in np.ndindex(runs.shape):
        matcher = difflib.SequenceMatcher(None, texts[row].tolist(), others[row, column].tolist(), autojunk=False)
        assert runs[row, column] == matcher.find_longest_match().size


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([(1,), (3, 2, 1), (0, 1, 5, 2)]), st.sampled_from([64, 192]))
def test_hashed_vectors_have_the_same_bits(seed: int, weights: tuple[int, ...], dimension: int) -> None:
    texts, present, _, _ = random_pairs(seed, vocabulary=70_000)
    fast = native.embed_hashed(texts, present, weights, dimension)
    assert (fast == reference.embed_hashed(texts, present, weights, dimension)).all()
    lengths = np.linalg.norm(fast, axis=1)
    assert ((abs(lengths - 1) < 1e-6) | (lengths == 0)).all()


@settings(max_examples=60, deadline=None)
@given(SEEDS)
def test_own_chunks_are_dropped_in_order(seed: int) -> None:
    random = np.random.default_rng(seed)
    ids = random.integers(-1, 12, (random.integers(1, 6), random.integers(1, 15)))
    first = random.integers(0, 12, len(ids))
    last = first + random.integers(0, 6, len(ids))
    keep = int(random.integers(1, 18))
    kept = native.keep_other_documents(ids, first, last, keep)
    assert (kept == reference.keep_other_documents(ids, first, last, keep)).all()


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_candidates_are_the_best_of_all_that_was_offered(seed: int) -> None:
    random = np.random.default_rng(seed)
    queries, ids, keep = int(random.integers(1, 8)), int(random.integers(1, 300)), int(random.integers(1, 40))
    products = random.integers(0, 50, (queries, ids)).astype(np.float32)
    offsets = random.integers(0, 5, ids).astype(np.float32)
    scores = products + offsets
    first = random.integers(0, ids, queries)
    last = first + random.integers(0, 30, queries)
    candidates = native.top_candidates(queries, keep)
    candidates.exclude(first, last)
    for start in range(0, ids, 37):
        part = np.arange(start, min(start + 37, ids))
        rows = random.permutation(queries)
        candidates.offer(rows, np.ascontiguousarray(products[rows][:, part]), offsets[part], part)
    found_scores, found_ids = candidates.best()
    for row in range(queries):
        allowed = [number for number in range(ids) if not first[row] <= number < last[row]]
        expected = sorted((scores[row, allowed]).tolist(), reverse=True)[:keep]
        there = found_ids[row] >= 0
        assert found_scores[row][there].tolist() == expected
        assert there.sum() == len(expected)
        assert (scores[row, found_ids[row][there]] == found_scores[row][there]).all()
        assert set(found_ids[row][there]) <= set(allowed)
        assert len(set(found_ids[row][there])) == there.sum()


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.sampled_from([1, 20, 70]), st.sampled_from([1e-3, 1.0, 100.0]))
def test_rounded_products_give_exactly_what_exact_ones_give(seed: int, dimension: int, scale: float) -> None:
    """Near ties by the dozen: what rounding may have hidden is always computed again."""
    random = np.random.default_rng(seed)
    queries = (random.standard_normal((9, dimension)) * scale).astype(np.float32)
    vectors = np.repeat(random.standard_normal((30, dimension)), 10, axis=0) * scale
    vectors = (vectors * (1 + 1e-3 * random.standard_normal(vectors.shape))).astype(np.float32)
    offsets = -np.square(vectors).sum(axis=1) / 2
    left, right = native.top_candidates(9, 12), native.top_candidates(9, 12)
    rows = np.arange(9)
    for start in range(0, 300, 50):
        part = np.arange(start, start + 50)
        left.offer(rows, queries @ vectors[part].T, offsets[part], part)
        product = torch.from_numpy(queries).bfloat16() @ torch.from_numpy(vectors[part]).bfloat16().T
        wider = torch.nn.functional.pad(product, (0, 14, 0, 5)).view(torch.int16).numpy().view(np.uint16)
        right.offer_rounded(rows, wider, offsets[part], part, queries, vectors[part])
    (scores, _), (found, ids) = left.best(), right.best()
    size = np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(vectors, axis=1).max()
    assert (np.abs(scores - found) <= 2e-6 * size + 1e-6 * np.abs(offsets).max()).all()
    exact = np.take_along_axis(queries @ vectors.T + offsets, ids, axis=1)
    assert np.allclose(found, exact, rtol=1e-4, atol=1e-5 * scale**2)


def test_distances_to_kept_vectors() -> None:
    random = np.random.default_rng(0)
    vectors, queries = random.standard_normal((50, 37)), random.standard_normal((9, 37)).astype(np.float32)
    bits = as_bfloat16(vectors.astype(np.float32))
    ids = random.integers(-1, 50, (9, 12))
    found = native.candidate_distances(queries, ids, bits)
    assert np.allclose(found, reference.candidate_distances(queries, ids, bits), rtol=1e-4)
    assert np.abs(from_bfloat16(bits) - vectors).max() < 0.02
    with pytest.raises(ValueError, match="no vector"):
        native.candidate_distances(queries, ids + 60, bits)
