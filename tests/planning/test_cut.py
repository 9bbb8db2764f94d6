"""The best cut against every cut there is."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest

from megatron_retro.planning.cut import best_cut, cut_from_bounds


def best_of_all(costs: list[float], num_ranks: int, rounds: int) -> float:
    count = len(costs)
    inner = itertools.combinations(range(1, count), num_ranks * rounds - 1)
    return min(cut_from_bounds(costs, (0, *bounds, count), num_ranks).slowest for bounds in inner)


def test_no_cut_is_better_than_the_best_one(count: Callable[[int, int], int]) -> None:
    random.seed(7)
    for _ in range(count(150, 2000)):
        num_ranks, rounds = random.randint(1, 3), random.choice((1, 1, 2))
        costs = [random.choice((1.0, 2.5, 7.0, random.random())) for _ in range(random.randint(6, 10))]
        cut = best_cut(costs, num_ranks, rounds)
        assert cut.slowest == pytest.approx(best_of_all(costs, num_ranks, rounds), rel=1e-9)
        assert cut.proven
        assert sum(cut.rank_loads) == pytest.approx(sum(costs))
        assert all(start < stop for start, stop in itertools.pairwise(cut.bounds))


def test_a_proof_is_not_claimed_where_the_search_gave_up() -> None:
    random.seed(3)
    costs = [random.random() for _ in range(64)]
    cut = best_cut(costs, 8, 4)
    assert cut.lower_bound <= cut.slowest
    assert cut.proven == (cut.slowest <= cut.lower_bound * (1 + 1e-9))
