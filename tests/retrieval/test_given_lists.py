"""Lists searched a few at a time: what one search of all of them finds, by any number of copies of an index."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from megatron_retro.retrieval.faiss_index import faiss_module, inverted_parts, new_index
from megatron_retro.retrieval.given_lists import ListFinder, search_given_lists

VECTORS = np.random.default_rng(0).standard_normal((2000, 32)).astype(np.float32)
QUERIES = VECTORS[:60] + 0.1
LISTS, NPROBE = 32, 23


def filled(index_str: str) -> Any:
    index = new_index(index_str, 32)
    index.train(VECTORS)
    index.add(VECTORS)
    index.nprobe = NPROBE
    return index


def replicas(index: Any) -> Any:
    faiss = faiss_module()
    several = faiss.IndexReplicas(32)
    for copy in (faiss.clone_index(index), faiss.clone_index(index)):
        several.add_replica(copy)
        copy.this.disown()
    several.own_indices = True
    return several


def shards(index: Any) -> Any:
    """Every third vector in each, as faiss cuts an index for its GPUs."""
    faiss = faiss_module()
    several = faiss.IndexShards(32, False, False)
    for number in range(3):
        part = faiss.clone_index(index)
        part.reset()
        index.copy_subset_to(part, faiss.InvertedLists.SUBSET_TYPE_ID_MOD, 3, number)
        several.add_shard(part)
        part.this.disown()
    several.own_indices = True
    return several


def test_the_nearest_lists_are_those_of_the_coarse_quantizer() -> None:
    index = filled(f"IVF{LISTS},Flat")
    distances, lists = ListFinder.of(index.quantizer).nearest(QUERIES, NPROBE)
    expected_distances, expected = index.quantizer.search(QUERIES, NPROBE)
    assert (lists == expected).all() and np.allclose(distances, expected_distances, atol=1e-4)


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16", "PQ8", "RaBitQ"])
@pytest.mark.parametrize("copies", [lambda index: index, replicas, shards])
def test_parts_find_what_one_search_finds(kind: str, copies: Any) -> None:
    index = filled(f"IVF{LISTS},{kind}")
    distances, lists = index.quantizer.search(QUERIES, NPROBE)
    expected_distances, expected = index.search(QUERIES, 40)
    copied = copies(index)
    for at_once in (1, 5, NPROBE):
        found_distances, found = search_given_lists(copied, QUERIES, 40, lists, distances, at_once)
        assert np.array_equal(found_distances, expected_distances) and (found == expected).mean() > 0.999


def test_lists_with_too_few_vectors_leave_places_empty() -> None:
    index = filled(f"IVF{LISTS},Flat")
    distances, lists = index.quantizer.search(QUERIES, 2)
    index.nprobe = 2
    expected = index.search(QUERIES, 500)
    found = search_given_lists(index, QUERIES, 500, lists, distances, 1)
    assert (expected[1] < 0).any() and all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def test_an_index_behind_transforms_is_searched_by_its_lists() -> None:
    index = new_index(f"PCA16,IVF{LISTS},Flat", 32)
    index.train(VECTORS)
    index.add(VECTORS)
    parts = inverted_parts(index)
    assert parts is not None
    parts.inverted.nprobe = NPROBE
    expected = index.search(QUERIES, 10)
    queries = parts.transformed(QUERIES)
    distances, lists = ListFinder.of(parts.inverted.quantizer).nearest(queries, NPROBE)
    found = search_given_lists(parts.inverted, queries, 10, lists, distances, 7)
    assert np.allclose(found[0], expected[0]) and (found[1] == expected[1]).all()
