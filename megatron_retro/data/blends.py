"""Blends: which source the k-th sample of a run comes from, and its number within that source.

A balanced binary tree over the sources; each node sends its k-th sample left or right by rounding the exact
fraction, so there is no table, any k is answered alone, and a prefix strays from the weights by at most
1 + log2(number of sources) samples per source.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from megatron_retro.errors import ConfigError


@dataclass(frozen=True)
class WeightedPath:
    """A source of a blend as the command line gives it."""

    path: str
    weight: Fraction


@dataclass(frozen=True)
class Blend:
    """Positive weights of the sources, one at least."""

    weights: tuple[Fraction, ...]

    def locate(self, position: int) -> tuple[int, int]:
        """The source of a sample of the run, and its number within that source."""
        first, last = 0, len(self.weights)
        while last - first > 1:
            middle, share = self._nodes[first, last]
            before = _rounded(position, share)
            if _rounded(position + 1, share) > before:
                position, last = before, middle
            else:
                position, first = position - before, middle
        return first, position

    @cached_property
    def _nodes(self) -> dict[tuple[int, int], tuple[int, Fraction]]:
        """Of each node of the tree, by its sources [first, last): where it divides and the share that goes left."""
        nodes = {}
        pending = [(0, len(self.weights))]
        while pending:
            first, last = pending.pop()
            if last - first > 1:
                middle = (first + last) // 2
                left = sum(self.weights[first:middle], Fraction(0))
                nodes[first, last] = middle, left / sum(self.weights[first:last], Fraction(0))
                pending += [(first, middle), (middle, last)]
        return nodes

    def counts(self, samples: int) -> list[int]:
        """How many of the first `samples` samples come from each source."""
        counts = [0] * len(self.weights)
        self._count(samples, 0, len(self.weights), counts)
        return counts

    def _count(self, samples: int, first: int, last: int, counts: list[int]) -> None:
        if last - first == 1:
            counts[first] = samples
            return
        middle, share = self._nodes[first, last]
        taken = _rounded(samples, share)
        self._count(taken, first, middle, counts)
        self._count(samples - taken, middle, last, counts)


def _rounded(count: int, share: Fraction) -> int:
    """count * share to the nearest whole number, exactly."""
    return (2 * count * share.numerator + share.denominator) // (2 * share.denominator)


def parse_data_path(words: Sequence[str], flag: str = "--data-path") -> tuple[WeightedPath, ...]:
    """`p`, `p1 p2` (equal weights, where Megatron takes lengths) or `w1 p1 w2 p2`; `flag` is what they stood behind."""
    if not words:
        raise ConfigError(f"{flag} is empty", fix="give paths, or weights and paths")
    first = _weight(words[0])
    if first is None:
        return tuple(WeightedPath(word, Fraction(1)) for word in words)
    if len(words) % 2:
        raise ConfigError(f"{flag} mixes weights and paths", got=" ".join(words), expected="w1 p1 w2 p2 ...")
    sources = []
    for text, path in zip(words[::2], words[1::2], strict=True):
        weight = _weight(text)
        if weight is None or weight <= 0:
            raise ConfigError(f"{flag}: the weight of {path} must be a number above 0", got=text)
        sources.append(WeightedPath(path, weight))
    return tuple(sources)


def _weight(text: str) -> Fraction | None:
    try:
        return Fraction(text)
    except (ValueError, ZeroDivisionError):
        return None
