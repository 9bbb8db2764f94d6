"""How far a recipe reaches, counted: what must not grow with the cluster, the microbatches or the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.model import RetroConfig
from megatron_retro.planning.memory import evaluation_memory
from megatron_retro.planning.plan import Plan
from megatron_retro.planning.schedule import gathers_per_step
from megatron_retro.planning.trace import trace_parts


@dataclass(frozen=True)
class Reach:
    """Of a stage, the fullest rank, and a step."""

    gathers: int
    training_bytes: float
    evaluation_bytes: float
    host_waits: int


def reach_of(plan: Plan) -> Reach:
    """Traces a forward without gradients for the evaluation."""
    evaluated = trace_parts(plan.settings, evaluating=True).parts
    working = {name: part.working_bytes for name, part in evaluated.items()}
    retro = plan.settings[RetroConfig]
    budget = retro.reads_neighbors() and retro.retro_gate_type == "adaptive"  # its loss is a number of its own
    in_layers = max(rank.total.host_waits for rank in plan.ranks) * plan.microbatches
    return Reach(
        gathers=gathers_per_step(plan.layout, plan.microbatches),
        training_bytes=plan.peak_memory,
        evaluation_bytes=max(evaluation_memory(plan.ranks, plan.work, plan.layout, working)),
        host_waits=1 + budget + in_layers,  # the verdict on a step is read once, with all its numbers
    )
