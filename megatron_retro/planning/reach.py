"""How far a recipe reaches, counted: what must not grow with the cluster, the microbatches or the evaluation."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.assembly.stage_building import numbers_drawn_at_start
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.planning.fake_device import fake_rank
from megatron_retro.planning.memory import evaluation_memory
from megatron_retro.planning.plan import Plan
from megatron_retro.planning.ranks import RankCosts
from megatron_retro.planning.schedule import gathers_per_step
from megatron_retro.planning.trace import trace_parts
from megatron_retro.runtime.process_group import most_sockets


@dataclass(frozen=True)
class Reach:
    """Of a stage, the fullest rank, a step, and a start from nothing; a resume draws no number."""

    gathers: int
    training_bytes: float
    evaluation_bytes: float
    host_waits: int
    sockets: int
    numbers_drawn: int


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
        sockets=most_sockets(plan.layout.world_size),
        numbers_drawn=max(_numbers_drawn(plan, rank) for rank in plan.ranks),
    )


def _numbers_drawn(plan: Plan, rank: RankCosts) -> int:
    """By the first tensor and data rank of a pipeline place."""
    first = rank.rank * plan.layout.world_size // plan.layout.pipeline
    with fake_rank(first, plan.layout.world_size, plan.settings[ParallelConfig]) as mesh:
        return sum(numbers_drawn_at_start(plan.settings, stage.part, mesh) for stage in rank.stages)
