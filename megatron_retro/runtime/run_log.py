"""A run's event log, read. Steps and evaluations that a resumed run repeated count once, as they were last done."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.events import read_events
from megatron_retro.runtime.run_records import EvaluationRecord, RetrievalHealth, RunFacts, StepRecord
from megatron_retro.runtime.strict_json import from_plain

# What the directory of a run holds beside its checkpoints.
EVENTS = "events.jsonl"
CONFIG = "config.toml"
RANKS = "ranks"
CULPRITS = "culprits.json"
FLIGHT = "flight"
_RANK_BYTES = 1 << 15  # of the end of each rank's file
Record = TypeVar("Record", StepRecord, EvaluationRecord)


@dataclass
class RunLog:
    """What a run told, in order; `incidents` are all other events, as they stand in the log."""

    facts: RunFacts = field(default_factory=RunFacts)
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    incidents: list[dict[str, Any]] = field(default_factory=list)
    saves: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and values of one field."""
        return [float(step.step) for step in self.steps], [float(getattr(step, name)) for step in self.steps]

    @property
    def training_seconds(self) -> float:
        """Time of all steps, each counted once."""
        return sum(step.step_seconds for step in self.steps)

    @property
    def health(self) -> list[tuple[int, RetrievalHealth]]:
        """What the evaluations found that compared other neighbours with the real ones, each with its step."""
        return [(record.step, record.retrieval) for record in self.evaluations if record.retrieval is not None]


def read_run_log(run: Path) -> RunLog:
    """The log of a run's directory."""
    path = run / EVENTS
    if not path.is_file():
        raise ArtifactError(f"{run} is no run", expected=str(path), fix="give what --save named")
    log = RunLog()
    try:
        for event in read_events(path):
            _add(log, event)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        raise ArtifactError(f"{path} has an event that is none of a run's", got=repr(error)[:200]) from None
    log.steps = _last_of_each_step(log.steps)
    log.evaluations = _last_of_each_step(log.evaluations)
    return log


def read_rank_steps(run: Path) -> dict[int, list[StepRecord]]:
    """The newest steps that each rank of a run wrote down for itself; empty for a run of one process."""
    found: dict[int, list[StepRecord]] = {}
    for path in sorted((run / RANKS).glob("rank-*.jsonl")):
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - _RANK_BYTES))
            lines = stream.read().decode("utf-8", errors="replace").split("\n")
        whole = [line for line in lines[:-1] if line.startswith("{") and line.endswith("}")]
        try:
            found[int(path.stem.removeprefix("rank-"))] = [from_plain(StepRecord, json.loads(line)) for line in whole]
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise ArtifactError(f"{path} has a line that is no step of a rank", got=repr(error)[:200]) from None
    return {rank: records for rank, records in found.items() if records}


def _add(log: RunLog, event: dict[str, Any]) -> None:
    kind = event["event"]
    if kind == "started":
        log.facts = from_plain(RunFacts, event)
        log.starts.append(int(event.get("step", 0)))
    elif kind == "step":
        log.steps.append(from_plain(StepRecord, event))
    elif kind == "evaluation":
        log.evaluations.append(from_plain(EvaluationRecord, event))
    elif kind == "saved":
        log.saves.append(int(event["step"]))
    elif kind != "ended":
        log.incidents.append(event)


def _last_of_each_step(records: Iterable[Record]) -> list[Record]:
    by_step = {record.step: record for record in records}
    return [by_step[step] for step in sorted(by_step)]
