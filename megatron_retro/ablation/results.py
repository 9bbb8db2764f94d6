"""What the runs of a study measured, and configurations against the baseline, paired: over held-out documents, and over
seeds.

Two sources of doubt, two intervals. Over held-out documents: both models read the same text, differences are taken
within a sample, and documents are drawn with replacement, each with all of its samples under all seeds, for samples of
one document gain alike; it says how much the text could have mattered. Over seeds: Student's t of the differences of
runs with the same seed; it says how much the run could have mattered, and needs two seeds at least. A difference counts
only where every interval that exists is clear of zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_retro.ablation.grid import Cell
from megatron_retro.ablation.runs import CellDirectory, Outcome
from megatron_retro.reporting.perplexity_page import PERPLEXITY_RESULT, PerplexityResult, read_perplexity
from megatron_retro.reporting.study_page import Difference
from megatron_retro.runtime.run_log import EVENTS, read_run_log
from megatron_retro.runtime.run_records import EvaluationRecord, HeldOutSamples, RetrievalHealth, RunFacts
from megatron_retro.runtime.statistics import Interval, bootstrap_ratio
from megatron_retro.runtime.strict_json import to_plain

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; 1.96 is the limit.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
_T_BEYOND = 2.12


@dataclass(frozen=True)
class Result:
    """One run of the study, as far as it got."""

    cell: Cell
    outcome: Outcome | None
    step: int = 0
    training_seconds: float = 0.0
    facts: RunFacts | None = None
    evaluations: tuple[EvaluationRecord, ...] = ()
    perplexity: PerplexityResult | None = None

    @property
    def finished(self) -> bool:
        """Whether its figures may be compared."""
        return self.outcome is not None and self.outcome.exit_code == 0 and bool(self.evaluations)

    @property
    def state(self) -> str:
        if self.outcome is None:
            return f"unfinished at step {self.step}" if self.step else "not started"
        if self.outcome.exit_code:
            return f"failed (exit code {self.outcome.exit_code})"
        return "finished" if self.evaluations else "finished without an evaluation"

    @property
    def loss(self) -> float:
        """Held-out loss at the end."""
        return self.evaluations[-1].loss

    @property
    def health(self) -> RetrievalHealth:
        """What the last evaluation found of its use of neighbours; empty where that was not measured."""
        return (self.evaluations[-1].retrieval if self.evaluations else None) or RetrievalHealth()

    def excess(self, variant: str) -> Interval | None:
        """What other neighbours cost more than real ones, over held-out documents."""
        return self.health.excess.get(variant)

    @property
    def shortage(self) -> float | None:
        """Share of rows with fewer than k neighbours."""
        own = self.perplexity.shortage if self.perplexity is not None else None
        return own if own is not None or self.outcome is None else self.outcome.shortage

    @property
    def gate_rate(self) -> float | None:
        """Mean rate of the layers' gates, of those that decide."""
        rates = [use.gate_rate for use in self.health.layers if use.gate_rate is not None]
        return float(np.mean(rates)) if rates else None

    @property
    def operations(self) -> float | None:
        """Floating point operations of the whole training."""
        facts = self.facts
        if facts is None or not facts.total_samples or not math.isfinite(facts.flops_per_token):
            return None
        return facts.flops_per_token * facts.total_samples * facts.seq_length

    def samples(self) -> HeldOutSamples | None:
        """The held-out samples of the last evaluation; one that is of no document, a conversation, is its own."""
        found = self.evaluations[-1].samples
        if found is None or not found.texts:
            return None
        return replace(found, documents=found.documents or found.texts)

    def raw(self) -> dict[str, Any]:
        evaluation = self.evaluations[-1].to_json() if self.evaluations else None
        if evaluation is not None and self.perplexity is not None:
            extra = {"shortage": self.perplexity.shortage, "leakage": to_plain(self.perplexity.leakage)}
            evaluation["facts"] |= extra
        facts = to_plain(self.facts) or {}
        outcome = None if self.outcome is None else vars(self.outcome)
        return {
            "name": self.cell.name,
            "changes": self.cell.changes,
            "state": self.state,
            "outcome": outcome,
            "step": self.step,
            "training_seconds": self.training_seconds,
            **{name: facts.get(name) for name in ("parameters", "flops_per_token", "inputs")},
            "evaluation": evaluation,
        }


def read_result(cell: Cell, directory: CellDirectory) -> Result:
    """The run as it stands."""
    outcome = directory.outcome()
    if (directory.run / PERPLEXITY_RESULT).is_file():
        found = read_perplexity(directory.run / PERPLEXITY_RESULT)
        return Result(cell, outcome, evaluations=(found.as_evaluation(),), perplexity=found)
    if not (directory.run / EVENTS).is_file():
        return Result(cell, outcome)
    log = read_run_log(directory.run)
    seconds = log.training_seconds + sum(record.seconds for record in log.evaluations)
    step = log.steps[-1].step if log.steps else 0
    return Result(cell, outcome, step, seconds, log.facts if log.starts else None, tuple(log.evaluations))


@dataclass(frozen=True)
class Configuration:
    """All runs of one configuration: one per seed."""

    labels: tuple[str, ...]
    results: tuple[Result, ...]

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
        return self._mean([result.operations for result in self.finished])

    @staticmethod
    def _mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None


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
