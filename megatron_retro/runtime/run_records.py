"""What observers are told: frozen facts, no live objects."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class RunFacts:
    """What does not change during a run."""

    rank: int
    world_size: int
    is_reporter: bool
    parameters: int
    flops_per_token: float
    peak_flops: float | None
    total_samples: int
    seq_length: int
    inputs: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StepRecord:
    """One step, done or skipped. `tokens` counts those with loss so far, `positions` the step's with padding."""

    step: int
    samples: int
    tokens: int
    batch_size: int
    positions: int
    loss: float
    gradient_norm: float
    learning_rate: float
    applied: bool
    clipped: bool
    loss_scale: float
    extra_losses: dict[str, float]
    seconds: dict[str, float]
    memory_bytes: int

    @property
    def step_seconds(self) -> float:
        """Wall time of the step, data and waiting included."""
        return sum(self.seconds.values())


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation; `facts` is plain JSON: losses, intervals, per position, per layer."""

    step: int
    seconds: float
    loss: float
    facts: dict[str, Any]
    alarms: tuple[str, ...] = ()
