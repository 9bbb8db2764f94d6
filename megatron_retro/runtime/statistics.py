"""Intervals for means by resampling, without a distribution assumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.runtime.strict_json import number_of

RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """An estimate with its lower and upper bound."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return "not a number"
        if math.isnan(self.low):
            return f"{self.mean:+.4f} (no interval: one document)"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @classmethod
    def from_json(cls, values: Sequence[float | str | None]) -> Interval:
        """What `to_json` gave."""
        return cls(*map(number_of, values))

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    @property
    def side(self) -> int:
        """1 above zero, -1 below, 0 around it or unknown."""
        return (self.low > 0) - (self.high < 0)

    def to_json(self) -> list[float]:
        """Mean, low, high."""
        return [self.mean, self.low, self.high]


def bootstrap_ratio(
    numerators: NDArray[Any],
    denominators: NDArray[Any],
    *,
    seed: int,
    share: float = 0.95,
    units: NDArray[np.int64] | None = None,
) -> Interval:
    """The ratio of two sums over rows (losses and token counts of windows, say), units drawn with replacement.

    `units` names the unit of each row: rows that are no independent observations, windows of one document, are drawn
    together. Without it each row is a unit; one unit alone has no bounds. Paired differences are the case where each
    numerator is a difference within one row. A fixed seed makes the interval a function of the data.
    """
    top: NDArray[Any] = np.asarray(numerators, np.float64)
    bottom: NDArray[Any] = np.asarray(denominators, np.float64)
    if units is not None:
        _, unit = np.unique(units, return_inverse=True)
        top, bottom = np.bincount(unit, weights=top), np.bincount(unit, weights=bottom)
    if len(top) == 0 or bottom.sum() <= 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    if len(top) == 1:
        return Interval(float(top[0] / bottom[0]), float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(top), np.full(len(top), 1 / len(top)), size=RESAMPLES)
    sums = weights @ bottom
    ratios = (weights @ top)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))
