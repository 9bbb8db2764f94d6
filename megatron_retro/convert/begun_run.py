"""How far a run of another program had come, as a checkpoint of ours says it: counters, and the state of its AdamW."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from megatron_retro.checkpoint.live_state import MOMENTS, OPTIMIZER
from megatron_retro.checkpoint.training_state import TrainingState


@dataclass(frozen=True)
class BegunRun:
    """Its counters; `moment` gives a moment (`exp_avg`, `exp_avg_sq`) of a parameter, in its shape."""

    training: TrainingState
    adam_step: int
    moment: Callable[[str, str], Tensor]
    loss_scale: Mapping[str, float] = field(default_factory=lambda: {"scale": 1.0, "good_steps": 0})

    def tensors(self, parameters: Iterable[str]) -> dict[str, Callable[[], Tensor]]:
        """The optimizer's tensors by name, each read when it is its turn."""
        found: dict[str, Callable[[], Tensor]] = {}
        for name in parameters:
            for moment in MOMENTS:
                found[f"{OPTIMIZER}{name}.{moment}"] = partial(self.moment, name, moment)
            found[f"{OPTIMIZER}{name}.step"] = partial(torch.tensor, float(self.adam_step))
        return found

    def state(self) -> dict[str, Any]:
        """What lies beside the tensors. Samples were read in an order that is not ours."""
        return {
            "training": self.training.to_json(),
            "optimizer": {"loss_scale": dict(self.loss_scale)},
            "loader": {"consumed_samples": self.training.samples, "order": None},
        }
