"""Intervals for means by resampling, without a distribution assumed."""

from __future__ import annotations

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
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"

    @classmethod
    def of(cls, values: Sequence[float | str | None]) -> Interval:
        """What `as_list` gave, read back from JSON."""
        return cls(*map(number_of, values))

    @property
    def above_zero(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.low > 0

    def as_list(self) -> list[float]:
        """Mean, low, high."""
        return [self.mean, self.low, self.high]


def bootstrap_ratio(
    numerators: NDArray[Any], denominators: NDArray[Any], *, seed: int, share: float = 0.95
) -> Interval:
    """The ratio of two sums over units (losses and token counts of sequences, say), units drawn with replacement.

    Paired differences are the case where each numerator is a difference within one unit. A fixed seed makes the
    interval a function of the data.
    """
    top, bottom = np.asarray(numerators, np.float64), np.asarray(denominators, np.float64)
    if len(top) == 0 or bottom.sum() <= 0:
        return Interval(float("nan"), float("nan"), float("nan"))
    random = np.random.default_rng(seed)
    weights = random.multinomial(len(top), np.full(len(top), 1 / len(top)), size=RESAMPLES)
    sums = weights @ bottom
    ratios = (weights @ top)[sums > 0] / sums[sums > 0]
    low, high = np.quantile(ratios, [(1 - share) / 2, (1 + share) / 2])
    return Interval(float(top.sum() / bottom.sum()), float(low), float(high))
