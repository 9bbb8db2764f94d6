"""What a newcomer should see, beside what was seen: each claim is checked against the figures of this very run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_retro.reporting.summary_inputs import Story

RECALL_FLOOR = 0.9


@dataclass(frozen=True)
class Expectation:
    """A claim, the figures that it is held against, and whether they bear it out."""

    claim: str
    seen: str
    met: bool

    @property
    def line(self) -> str:
        """For a console."""
        return f"{'seen    ' if self.met else 'NOT SEEN'}  {self.claim}: {self.seen}"


def expectations(story: Story) -> list[Expectation]:
    """All claims that this story has figures for."""
    return [*_retrieval(story), *_neighbors_cost(story), *_leakage_free(story), *_tuning(story)]


def _neighbors_cost(story: Story) -> Iterator[Expectation]:
    if story.retro is None:
        return
    excess = story.retro[1].health[-1][1].excess
    for variant, claim in (
        ("none", "held-out text is easier with its neighbours than with none"),
        ("random", "and easier than with random ones, so it is their content that helps"),
    ):
        cost = excess[variant]
        yield Expectation(claim, f"{variant} cost {cost} nats per token more than real ones", cost.above_zero)


def _retrieval(story: Story) -> Iterator[Expectation]:
    for name, table in (story.quality.tables if story.quality else {}).items():
        if (found := table.recall.get("2")) is not None:
            claim = f"the index finds the nearest chunks ({name})"
            seen = f"recall@2 {found.recall:.3f} against exact search"
            yield Expectation(claim, seen, found.recall >= RECALL_FLOOR)


def _leakage_free(story: Story) -> Iterator[Expectation]:
    audits = [table.audit for table in story.quality.tables.values()] if story.quality else []
    if audits:
        leaks, rows = sum(audit.leaks for audit in audits), sum(audit.rows for audit in audits)
        yield Expectation("no chunk is its own document's neighbour", f"{leaks} leaks in {rows:,} rows", leaks == 0)


def _tuning(story: Story) -> Iterator[Expectation]:
    if len(story.answers) < 2:
        return
    (first, before), (last, after) = story.answers[0], story.answers[-1]
    ended = [sum(one["finish_reason"] == "stop" for one in records) for records in (before, after)]
    seen = f"{ended[0]} of {len(before)} answers ended by themselves {first}, {ended[1]} of {len(after)} {last}"
    yield Expectation("tuned on questions, it answers and stops", seen, ended[1] > ended[0])
