"""The order is a permutation without a table, and blends keep to their weights at every prefix."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_retro.data.blends import Blend, parse_data_path
from megatron_retro.data.order import key_of, mix, mix_array, permuted
from megatron_retro.errors import ConfigError


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_every_position_is_taken_once(size: int, key: int) -> None:
    assert sorted(permuted(np.arange(size), size, key).tolist()) == list(range(size))


def test_a_position_alone_is_the_same_as_among_others() -> None:
    whole = permuted(np.arange(1001), 1001, 5)
    assert [int(permuted(np.array([p]), 1001, 5)[0]) for p in range(1001)] == whole.tolist()


def test_orders_of_keys_are_unrelated() -> None:
    size = 5000
    orders = [permuted(np.arange(size), size, key_of(7, number)) for number in range(4)]
    for number, order in enumerate(orders):
        correlation = np.corrcoef(np.arange(size), order)[0, 1]
        assert abs(correlation) < 0.06
        assert all((order == other).mean() < 0.005 for other in orders[:number])
        neighbours = np.abs(np.diff(order)) == 1
        assert neighbours.mean() < 0.005


def test_small_orders_are_all_reached_about_equally() -> None:
    seen: dict[tuple[int, ...], int] = {}
    for key in range(3000):
        order = tuple(permuted(np.arange(3), 3, key_of(key)).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 6 and max(abs(n - 500) for n in seen.values()) < 100


def test_nineteen_billion_samples_need_no_table() -> None:
    size = 19_000_000_000
    asked = np.arange(size - 1000, size)
    tracemalloc.start()
    found = permuted(asked, size, 1)
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < 40 * asked.nbytes
    assert len(set(found.tolist())) == 1000 and found.min() >= 0 and found.max() < size
    assert np.histogram(found, 4, (0, size))[0].min() > 150


def test_scalars_and_arrays_mix_alike() -> None:
    values = [0, 1, 2**63, 2**64 - 1, 12345]
    assert mix_array(np.array(values, np.uint64)).tolist() == [mix(value) for value in values]


weights = st.lists(st.fractions(Fraction(1, 10_000), 100), min_size=1, max_size=20)


@settings(max_examples=60, deadline=None)
@given(weights)
def test_every_prefix_keeps_to_the_weights(shares: list[Fraction]) -> None:
    blend, total = Blend(tuple(shares)), sum(shares)
    allowed = 1 + np.log2(len(shares))
    counts = [0] * len(shares)
    for position in range(400):
        source, number = blend.locate(position)
        assert number == counts[source]
        counts[source] += 1
        assert all(
            abs(count - (position + 1) * share / total) <= allowed for count, share in zip(counts, shares, strict=True)
        )
    assert blend.counts(400) == counts


@settings(max_examples=100, deadline=None)
@given(weights, st.integers(0, 10**13))
def test_far_positions_are_answered_alone(shares: list[Fraction], position: int) -> None:
    blend, total = Blend(tuple(shares)), sum(shares)
    before, after = blend.counts(position), blend.counts(position + 1)
    source, number = blend.locate(position)
    assert number == before[source] and after[source] == before[source] + 1 and sum(after) == sum(before) + 1
    allowed = 1 + np.log2(len(shares))
    assert all(abs(n - position * share / total) <= allowed for n, share in zip(before, shares, strict=True))


def test_data_paths_have_weights_or_equal_ones() -> None:
    assert [(p.path, p.weight) for p in parse_data_path(["a"])] == [("a", 1)]
    assert [(p.path, p.weight) for p in parse_data_path(["a", "b"])] == [("a", 1), ("b", 1)]
    assert [(p.path, p.weight) for p in parse_data_path(["0.3", "a", "7", "b"])] == [("a", Fraction("0.3")), ("b", 7)]


@pytest.mark.parametrize("words", [[], ["0.3", "a", "b"], ["0", "a", "1", "b"], ["-1", "a"], ["1", "a", "b", "c"]])
def test_blends_that_cannot_be_are_refused(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="--data-path"):
        parse_data_path(words)


def test_keys_depend_on_order(count: Callable[[int, int], int]) -> None:
    keys = {key_of(a, b) for a in range(40) for b in range(40)}
    assert len(keys) == 1600
