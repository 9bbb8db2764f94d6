"""A run's events as curves: steps that were repeated after a resume count once, as they were last done."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.events import read_events
from megatron_retro.runtime.strict_json import number_of

EVENTS = "events.jsonl"


@dataclass
class RunLog:
    """What a run told, in order."""

    facts: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one field."""
        return [float(step["step"]) for step in self.steps], [number_of(step[name]) for step in self.steps]


def read_run_log(run: Path) -> RunLog:
    """The log of a run's directory."""
    path = run / EVENTS
    if not path.is_file():
        raise ArtifactError(f"{run} is no run", expected=str(path), fix="give what --save named")
    log = RunLog()
    for event in read_events(path):
        _add(log, event)
    log.steps = _last_of_each_step(log.steps)
    log.evaluations = _last_of_each_step(log.evaluations)
    return log


def _add(log: RunLog, event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "started":
        log.facts = event
        log.starts.append(int(event["step"]))
    elif kind == "step":
        log.steps.append(event)
    elif kind == "evaluation":
        log.evaluations.append(event)
    elif kind == "saved":
        log.saves.append(int(event["step"]))
    elif kind != "ended":
        log.incidents.append(event)


def _last_of_each_step(records: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    by_step = {int(record["step"]): record for record in records}
    return [by_step[step] for step in sorted(by_step)]
