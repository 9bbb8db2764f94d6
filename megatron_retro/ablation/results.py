"""What the runs of a study measured: read from their event logs, whether they ended or not."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_retro.ablation.directories import CellDirectory, Outcome
from megatron_retro.ablation.grid import Cell
from megatron_retro.reporting.perplexity_page import PERPLEXITY_RESULT, PerplexityResult, read_perplexity
from megatron_retro.runtime.run_log import EVENTS, read_run_log
from megatron_retro.runtime.run_records import EvaluationRecord, HeldOutSamples, RetrievalHealth, RunFacts
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import to_plain


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
        """In words, for tables."""
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
        """Plain JSON."""
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
