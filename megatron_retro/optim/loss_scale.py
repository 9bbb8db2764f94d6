"""Dynamic loss scaling for fp16: the scale halves after a step that overflowed and doubles after many that did not.

torch's GradScaler decides from the gradients that one rank holds; here the decision comes from the norm over all axes,
so every rank takes the same one, and the state is two numbers in a checkpoint's JSON.
"""

from __future__ import annotations

from dataclasses import dataclass

SMALLEST = 1.0
LARGEST = 2.0**24


@dataclass
class LossScale:
    """The scale and how many good steps it has seen; a window of 0 keeps the scale as it is."""

    scale: float
    window: int
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Learn from one step."""
        if self.window == 0:
            return
        if not finite:
            self.scale, self.good_steps = max(self.scale / 2, SMALLEST), 0
            return
        self.good_steps += 1
        if self.good_steps >= self.window:
            self.scale, self.good_steps = min(self.scale * 2, LARGEST), 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load_state(self, state: dict[str, float]) -> None:
        """Take up a checkpoint's state."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
