"""What a run tells those who watch it, and what its event log holds: frozen facts, no live objects.

Fields that older logs do not have take their defaults when a log is read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_retro.runtime.statistics import Interval
from megatron_retro.runtime.strict_json import from_plain, number_of, to_plain


@dataclass(frozen=True)
class RunFacts:
    """What does not change during a run."""

    rank: int = 0
    world_size: int = 1
    is_reporter: bool = True
    parameters: int = 0
    flops_per_token: float = math.nan
    peak_flops: float | None = None
    total_samples: int = 0
    seq_length: int = 0
    inputs: Mapping[str, str] = field(default_factory=dict)
    backends: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One step, done or skipped. `tokens` counts those with loss so far, `positions` the step's with padding.

    `seconds` are of the reporting rank, by phase; `waiting_seconds` are those of them that it waited for other ranks.
    """

    step: int
    samples: int = 0
    tokens: int = 0
    batch_size: int = 0
    positions: int = 0
    loss: float = math.nan
    gradient_norm: float = math.nan
    learning_rate: float = math.nan
    applied: bool = True
    clipped: bool = False
    loss_scale: float = 1.0
    extra_losses: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    memory_bytes: int = 0
    waiting_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Wall time of the step, data and waiting included."""
        return sum(self.seconds.values())

    @property
    def computing_seconds(self) -> float:
        """The step without what this rank waited for others, and without saving."""
        return max(0.0, self.step_seconds - self.waiting_seconds - self.seconds.get("save", 0.0))


@dataclass(frozen=True)
class HeldOutSamples:
    """Loss and number of tokens of each held-out sample, a checksum of what was predicted, and its document.

    Two measurements whose checksums are equal have read the same text, and can be paired.
    """

    losses: Sequence[float]
    tokens: Sequence[int]
    texts: Sequence[int] = ()
    documents: Sequence[int] = ()


@dataclass(frozen=True)
class LayerUse:
    """What one cross-attention adds, as a share of the norm of what it is added to, and how open its gate is."""

    layer: int
    share: float
    gate_rate: float | None


@dataclass(frozen=True)
class RetrievalHealth:
    """Losses with each variant of neighbours, what each costs more than the real ones, where in the chunk, and how much
    each layer uses them. Intervals are of 95 % over held-out documents.
    """

    losses: Mapping[str, Interval] = field(default_factory=dict)
    excess: Mapping[str, Interval] = field(default_factory=dict)
    excess_by_position: Mapping[str, Sequence[float]] = field(default_factory=dict)
    layers: Sequence[LayerUse] = ()


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation. `samples` and `retrieval` are absent where they were not measured."""

    step: int
    seconds: float
    loss: float
    tokens: int = 0
    samples: HeldOutSamples | None = None
    retrieval: RetrievalHealth | None = None
    alarms: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As it stands in the event log."""
        facts = {"tokens": self.tokens, "samples": to_plain(self.samples), **(to_plain(self.retrieval) or {})}
        return {
            "step": self.step,
            "seconds": self.seconds,
            "loss": self.loss,
            "facts": facts,
            "alarms": list(self.alarms),
        }

    @classmethod
    def from_json(cls, event: Mapping[str, Any]) -> EvaluationRecord:
        """What `to_json` gave, of this version or an older one."""
        facts = event.get("facts", {})
        return cls(
            step=event["step"],
            seconds=event.get("seconds", 0.0),
            loss=number_of(event["loss"]),
            tokens=facts.get("tokens", 0),
            samples=from_plain(HeldOutSamples, facts["samples"]) if facts.get("samples") else None,
            retrieval=from_plain(RetrievalHealth, facts) if "excess" in facts else None,
            alarms=tuple(event.get("alarms", ())),
        )
