"""Configurations against the baseline, paired: over held-out documents, and over seeds.

Two sources of doubt, two intervals. Over held-out documents: both models read the same text, differences are taken
within a sample, and documents are drawn with replacement, each with all of its samples under all seeds, for samples of
one document gain alike; it says how much the text could have mattered. Over seeds: Student's t of the differences of
runs with the same seed; it says how much the run could have mattered, and needs two seeds at least. A difference counts
only where every interval that exists is clear of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_retro.ablation.results import Result
from megatron_retro.runtime.statistics import Interval, bootstrap_ratio

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 is the limit.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
_T_BEYOND = 2.12


@dataclass(frozen=True)
class Configuration:
    """All runs of one configuration: one per seed."""

    labels: tuple[str, ...]
    results: tuple[Result, ...]

    @property
    def name(self) -> str:
        """For legends and headings."""
        return ", ".join(self.labels) or "all"

    @property
    def finished(self) -> list[Result]:
        """The runs that may be compared."""
        return [result for result in self.results if result.finished]

    @property
    def state(self) -> str:
        """`finished`, or how many are and what the others are."""
        others = [f"{result.cell.seed + ': ' if result.cell.seed else ''}{result.state}" for result in self.unfinished]
        if not others:
            return "finished"
        return f"{len(self.finished)} of {len(self.results)} finished; " + "; ".join(others)

    @property
    def unfinished(self) -> list[Result]:
        """The runs that may not."""
        return [result for result in self.results if not result.finished]

    def loss(self) -> float | None:
        """Mean over the finished seeds."""
        losses = [result.loss for result in self.finished]
        return float(np.mean(losses)) if losses else None

    def excess(self, variant: str) -> Interval | None:
        """What other neighbours cost; of one seed over held-out documents, of several over seeds."""
        found = [excess for result in self.finished if (excess := result.excess(variant)) is not None]
        if not found:
            return None
        return found[0] if len(found) == 1 else student_interval([one.mean for one in found])

    def shortage(self) -> float | None:
        """Share of rows with fewer than k neighbours."""
        return self._mean([result.shortage for result in self.finished])

    def gate_rate(self) -> float | None:
        """Share of chunks that read."""
        return self._mean([result.gate_rate for result in self.finished])

    def operations(self) -> float | None:
        """Floating point operations of a run."""
        return self._mean([result.operations for result in self.finished])

    @staticmethod
    def _mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None


@dataclass(frozen=True)
class Difference:
    """A configuration minus the baseline, on the seeds that both finished; why an interval is absent is in words."""

    by_seed: tuple[float, ...]
    over_documents: Interval | str
    over_seeds: Interval | str

    @property
    def mean(self) -> float:
        """Over seeds."""
        return float(np.mean(self.by_seed))

    @property
    def clear(self) -> bool:
        """Whether an interval exists and each that does is on one side of zero."""
        sides = {_side(one) for _, one in self._intervals if isinstance(one, Interval)}
        return sides in ({1}, {-1})

    @property
    def words(self) -> str:
        """Which of the intervals are clear of zero, and why one is missing."""
        return ", ".join(
            f"{'clear' if _side(one) else 'not clear'} over {name}" if isinstance(one, Interval) else one
            for name, one in self._intervals
        )

    @property
    def _intervals(self) -> tuple[tuple[str, Interval | str], ...]:
        return ("documents", self.over_documents), ("seeds", self.over_seeds)


def configurations(results: Sequence[Result]) -> list[Configuration]:
    """Runs grouped by everything but the seed, in the order of the study."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(result.cell.configuration, []).append(result)
    return [Configuration(labels, tuple(group)) for labels, group in groups.items()]


def difference(configuration: Configuration, baseline: Configuration) -> Difference | None:
    """Held-out loss of a configuration minus that of the baseline; None while no seed of both is finished."""
    by_seed = {result.cell.seed: result for result in baseline.finished}
    pairs = [(result, by_seed[result.cell.seed]) for result in configuration.finished if result.cell.seed in by_seed]
    if not pairs:
        return None
    means = [one.loss - other.loss for one, other in pairs]
    over_seeds = student_interval(means) if len(means) > 1 else "one seed"
    return Difference(tuple(means), _over_documents(pairs), over_seeds)


def student_interval(values: Sequence[float]) -> Interval:
    """95 % interval of the mean of a few independent values, two at least."""
    mean, degrees = float(np.mean(values)), len(values) - 1
    quantile = _T[degrees - 1] if degrees <= len(_T) else _T_BEYOND
    half = quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def _side(one: Interval) -> int:
    """1 above zero, -1 below, 0 around it or unknown."""
    return (one.low > 0) - (one.high < 0)


def _over_documents(pairs: Sequence[tuple[Result, Result]]) -> Interval | str:
    tops, bottoms, units = [], [], []
    for one, other in pairs:
        ours, theirs = one.samples(), other.samples()
        if ours is None or theirs is None:
            return "no losses of single samples"
        if ours.texts != theirs.texts:
            return "other held-out samples"
        tops.append(np.asarray(ours.losses, np.float64) - np.asarray(theirs.losses, np.float64))
        bottoms.append(np.asarray(ours.tokens, np.float64))
        units.append(np.asarray(ours.documents, np.int64))
    return bootstrap_ratio(np.concatenate(tops), np.concatenate(bottoms), seed=0, units=np.concatenate(units))
