"""Where a run stands; what a resumed run takes up, beside tensors."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

_REMEMBERED_LOSSES = 64


@dataclass
class TrainingState:
    """Counters of a run. `bad_samples` are first samples of steps that are to be passed over."""

    step: int = 0
    samples: int = 0
    tokens: int = 0
    skipped_steps: int = 0
    bad_in_a_row: int = 0
    recent_losses: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_LOSSES))
    bad_samples: set[int] = field(default_factory=set)
    last_evaluation: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain values; floats survive JSON bit for bit."""
        return {
            "step": self.step,
            "samples": self.samples,
            "tokens": self.tokens,
            "skipped_steps": self.skipped_steps,
            "bad_in_a_row": self.bad_in_a_row,
            "recent_losses": list(self.recent_losses),
            "bad_samples": sorted(self.bad_samples),
            "last_evaluation": self.last_evaluation,
        }

    def load_json(self, values: dict[str, Any]) -> None:
        """Take up saved counters; steps known to be bad stay known."""
        self.step, self.samples, self.tokens = int(values["step"]), int(values["samples"]), int(values["tokens"])
        self.skipped_steps, self.bad_in_a_row = int(values["skipped_steps"]), int(values["bad_in_a_row"])
        self.recent_losses = deque(values["recent_losses"], maxlen=_REMEMBERED_LOSSES)
        self.bad_samples |= set(values["bad_samples"])
        self.last_evaluation = dict(values["last_evaluation"])
