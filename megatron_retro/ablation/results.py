"""What the runs of a study measured: read from their event logs, whether they ended or not."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.ablation.directories import EVENTS, CellDirectory, Outcome
from megatron_retro.ablation.grid import Cell
from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.events import read_events
from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import number_of

PERPLEXITY_RESULT = "perplexity.json"


@dataclass(frozen=True)
class Samples:
    """Loss, number of tokens, checksum of what was predicted, and document of each held-out sample."""

    losses: NDArray[np.float64]
    tokens: NDArray[np.float64]
    texts: tuple[int, ...]
    documents: tuple[int, ...]


@dataclass(frozen=True)
class Result:
    """One run of the study, as far as it got."""

    cell: Cell
    outcome: Outcome | None
    step: int = 0
    training_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    evaluations: tuple[dict[str, Any], ...] = ()

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
        return number_of(self.evaluations[-1]["loss"])

    def excess(self, variant: str) -> Interval | None:
        """What other neighbours cost more than real ones: mean, low, high over held-out documents."""
        found = self.evaluations[-1]["facts"].get("excess", {}).get(variant) if self.evaluations else None
        return None if found is None else Interval.of(found)

    @property
    def shortage(self) -> float | None:
        """Share of rows with fewer than k neighbours."""
        own: float | None = self.evaluations[-1]["facts"].get("shortage") if self.evaluations else None
        return own if own is not None or self.outcome is None else self.outcome.shortage

    @property
    def gate_rate(self) -> float | None:
        """Mean rate of the layers' gates, of those that decide."""
        layers = self.evaluations[-1]["facts"].get("layers", ()) if self.evaluations else ()
        rates = [layer["gate_rate"] for layer in layers if layer["gate_rate"] is not None]
        return float(np.mean(rates)) if rates else None

    @property
    def operations(self) -> float | None:
        """Floating point operations of the whole training."""
        per_token = self.facts.get("flops_per_token")
        if per_token is None or "total_samples" not in self.facts:
            return None
        return float(per_token * self.facts["total_samples"] * self.facts["seq_length"])

    def samples(self) -> Samples | None:
        """The held-out samples of the last evaluation; one that is of no document, a conversation, is its own."""
        found = self.evaluations[-1]["facts"].get("samples")
        if found is None or "texts" not in found:
            return None
        losses = np.array([*map(number_of, found["losses"])], np.float64)
        tokens, texts = np.asarray(found["tokens"], np.float64), tuple(found["texts"])
        return Samples(losses, tokens, texts, tuple(found.get("documents", texts)))

    def raw(self) -> dict[str, Any]:
        """Plain JSON."""
        last = self.evaluations[-1] if self.evaluations else None
        outcome = None if self.outcome is None else vars(self.outcome)
        return {
            "name": self.cell.name,
            "changes": self.cell.changes,
            "state": self.state,
            "outcome": outcome,
            "step": self.step,
            "training_seconds": self.training_seconds,
            "parameters": self.facts.get("parameters"),
            "flops_per_token": self.facts.get("flops_per_token"),
            "inputs": self.facts.get("inputs"),
            "evaluation": last,
        }


def read_result(cell: Cell, directory: CellDirectory) -> Result:
    """The run as it stands; steps done twice after a resume count as they were last done."""
    if (directory.run / PERPLEXITY_RESULT).is_file():
        return Result(cell, directory.outcome(), evaluations=(_perplexity(directory.run / PERPLEXITY_RESULT),))
    path = directory.run / EVENTS
    if not path.is_file():
        return Result(cell, directory.outcome())
    facts: dict[str, Any] = {}
    seconds: dict[int, float] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for event in read_events(path):
        if event["event"] == "started":
            facts = event
        elif event["event"] == "step":
            seconds[int(event["step"])] = sum(event["seconds"].values())
        elif event["event"] == "evaluation":
            evaluations[int(event["step"])] = event
    training = sum(seconds.values()) + sum(float(event["seconds"]) for event in evaluations.values())
    ordered = tuple(evaluations[step] for step in sorted(evaluations))
    return Result(cell, directory.outcome(), max(seconds, default=0), training, facts, ordered)


def _perplexity(path: Path) -> dict[str, Any]:
    """What `evaluate perplexity` wrote, in the form of a run's evaluation."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        variants = found["variants"]
        excess = {name: one["excess"] for name, one in variants.items() if "excess" in one}
        facts = {"samples": found["samples"], "shortage": found["shortage"], "leakage": found.get("leakage")}
        facts |= {"losses": {name: one["loss"] for name, one in variants.items()}, "excess": excess}
        return {"step": 0, "seconds": 0.0, "loss": variants["real"]["loss"][0], "facts": facts}
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no result of evaluate perplexity", got=repr(error), fix="run it again"
        ) from None
