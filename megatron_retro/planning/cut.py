"""The best cut of a row of units into pipeline pieces, with its proof.

Units keep their order; piece i goes to rank i modulo the number of ranks. The best cut has the smallest load on the
slowest rank. With one piece per rank a table over all cuts finds and so proves it; with several, a search under a
falling limit proves it when it has no possibility left, and otherwise states the bound that it could not reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

_SEARCH_STATES = 200_000


@dataclass(frozen=True)
class Cut:
    """`bounds[i] : bounds[i + 1]` are the units of piece i."""

    bounds: tuple[int, ...]
    num_ranks: int
    rank_loads: tuple[float, ...]
    lower_bound: float

    @property
    def slowest(self) -> float:
        """The load that sets the pace."""
        return max(self.rank_loads)

    @property
    def over_mean(self) -> float:
        """By how much the slowest rank is over the mean: 0.03 is 3 %."""
        return self.slowest * self.num_ranks / sum(self.rank_loads) - 1

    @property
    def proven(self) -> bool:
        """No cut is better."""
        return self.slowest <= self.lower_bound * (1 + 1e-9)


def cut_from_bounds(costs: Sequence[float], bounds: Sequence[int], num_ranks: int, lower_bound: float = 0.0) -> Cut:
    """A given cut, measured."""
    loads = [0.0] * num_ranks
    for piece, (start, stop) in enumerate(pairwise(bounds)):
        loads[piece % num_ranks] += sum(costs[start:stop])
    return Cut(tuple(bounds), num_ranks, tuple(loads), lower_bound)


def best_cut(costs: Sequence[float], num_ranks: int, pieces_per_rank: int = 1) -> Cut:
    """The best cut into `num_ranks * pieces_per_rank` pieces, none empty."""
    if pieces_per_rank == 1:
        bounds, slowest = _best_contiguous(costs, num_ranks)
        return cut_from_bounds(costs, bounds, num_ranks, slowest)
    return _Interleaved(costs, num_ranks, pieces_per_rank).best()


def _best_contiguous(costs: Sequence[float], pieces: int) -> tuple[list[int], float]:
    """Table over (pieces, end): the smallest maximum of the first `end` units in so many pieces."""
    total = [0.0, *accumulate(costs)]
    count = len(costs)
    best = [total[end] if end else float("inf") for end in range(count + 1)]
    choices: list[list[int]] = []
    for number in range(2, pieces + 1):
        row, choice = [float("inf")] * (count + 1), [0] * (count + 1)
        for end in range(number, count + 1):
            row[end], choice[end] = min(
                (max(best[start], total[end] - total[start]), start) for start in range(number - 1, end)
            )
        best = row
        choices.append(choice)
    bounds = [count]
    for choice in reversed(choices):
        bounds.append(choice[bounds[-1]])
    return [0, *reversed(bounds)], best[count]


class _Interleaved:
    """Depth-first search over cuts in which rank loads add up over rounds; remembers states that lead nowhere."""

    def __init__(self, costs: Sequence[float], num_ranks: int, rounds: int) -> None:
        self.costs, self.num_ranks, self.pieces = costs, num_ranks, num_ranks * rounds
        self.total = [0.0, *accumulate(costs)]
        self.limit, self.states = 0.0, 0
        self.dead: set[tuple[int, int, tuple[float, ...]]] = set()

    def best(self) -> Cut:
        """Halve the gap between the bound and the best cut found; at the end prove that nothing is strictly better."""
        low = max(self.total[-1] / self.num_ranks, max(self.costs))
        found = cut_from_bounds(self.costs, self._even_bounds(), self.num_ranks)
        while found.slowest > low * (1 + 1e-9):
            close = found.slowest < low * 1.001
            limit = found.slowest * (1 - 1e-9) if close else (low + found.slowest) / 2
            bounds = self._first_below(limit)
            if bounds is not None:
                found = cut_from_bounds(self.costs, bounds, self.num_ranks)
            elif self.states > _SEARCH_STATES:
                break
            else:
                low = found.slowest if close else limit
        return cut_from_bounds(self.costs, found.bounds, self.num_ranks, min(low, found.slowest))

    def _even_bounds(self) -> list[int]:
        count = len(self.costs)
        return [count * piece // self.pieces for piece in range(self.pieces + 1)]

    def _first_below(self, limit: float) -> list[int] | None:
        """Bounds of a cut whose every rank load is at most `limit`; None when there is none or the search gave up."""
        self.limit, self.states = limit, 0
        self.dead.clear()
        bounds = [0]
        return bounds if self._extend(bounds, [0.0] * self.num_ranks) else None

    def _extend(self, bounds: list[int], loads: list[float]) -> bool:
        piece, start, end = len(bounds) - 1, bounds[-1], len(self.costs)
        if piece == self.pieces:
            return start == end
        state = (piece, start, tuple(loads))
        room = self.limit * self.num_ranks - sum(loads)
        if state in self.dead or self.total[end] - self.total[start] > room * (1 + 1e-12):
            return False
        self.states += 1
        if self.states > _SEARCH_STATES:
            return False
        rank = piece % self.num_ranks
        for stop in self._stops(piece, start, self.limit - loads[rank]):
            before = loads[rank]
            loads[rank] = before + self.total[stop] - self.total[start]
            bounds.append(stop)
            if self._extend(bounds, loads):
                return True
            bounds.pop()
            loads[rank] = before
        self.dead.add(state)
        return False

    def _stops(self, piece: int, start: int, room: float) -> list[int]:
        """Where the piece may end, nearest to this rank's even share of what room it has left first."""
        end, rounds_left = len(self.costs), (self.pieces - piece - 1) // self.num_ranks + 1
        last = end - (self.pieces - piece - 1)
        first = end if piece == self.pieces - 1 else start + 1
        legal = [stop for stop in range(first, last + 1) if self.total[stop] - self.total[start] <= room]
        return sorted(legal, key=lambda stop: abs(self.total[stop] - self.total[start] - room / rounds_left))
