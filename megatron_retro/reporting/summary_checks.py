"""What a newcomer should see, beside what was seen: each claim is checked against the figures of this very run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_retro.reporting.summary_inputs import SummaryInputs

RECALL_FLOOR = 0.9


@dataclass(frozen=True)
class Check:
    """A claim, the figures that it is held against, and whether they bear it out."""

    claim: str
    seen: str
    met: bool

    @property
    def line(self) -> str:
        return f"{'seen    ' if self.met else 'NOT SEEN'}  {self.claim}: {self.seen}"


def summary_checks(inputs: SummaryInputs) -> list[Check]:
    """A check for each claim that there are figures for."""
    return [*_recall(inputs), *_gain(inputs), *_leaks(inputs), *_tuning(inputs)]


def _recall(inputs: SummaryInputs) -> Iterator[Check]:
    for name, table in (inputs.quality.tables if inputs.quality else {}).items():
        if (found := table.recall.get("2")) is not None:
            claim = f"the index finds the nearest chunks ({name})"
            yield Check(claim, f"recall@2 {found.recall:.3f} against exact search", found.recall >= RECALL_FLOOR)


def _gain(inputs: SummaryInputs) -> Iterator[Check]:
    if inputs.retro is None:
        return
    _, health = inputs.retro[1].health[-1]
    for variant, claim in (
        ("none", "held-out text is easier with its neighbours than with none"),
        ("random", "and easier than with random ones, so it is their content that helps"),
    ):
        cost = health.excess[variant]
        yield Check(claim, f"{variant} cost {cost} nats per token more than real ones", cost.above_zero)


def _leaks(inputs: SummaryInputs) -> Iterator[Check]:
    audits = [table.audit for table in inputs.quality.tables.values()] if inputs.quality else []
    if audits:
        leaks, rows = sum(audit.leaks for audit in audits), sum(audit.rows for audit in audits)
        yield Check("no chunk is its own document's neighbour", f"{leaks} leaks in {rows:,} rows", leaks == 0)


def _tuning(inputs: SummaryInputs) -> Iterator[Check]:
    if len(inputs.answers) < 2:
        return
    ended = [(name, sum(text.ended for text in texts), len(texts)) for name, texts in inputs.answers.items()]
    (first, before, asked), (last, after, _) = ended[0], ended[-1]
    seen = f"{before} of {asked} answers ended by themselves {first}, {after} of {asked} {last}"
    yield Check("tuned on questions, it answers and stops", seen, after > before)
