"""Bytes on one rank at the worst moment of a step, by kind.

Parameters are float32 and their own master weights. Under bf16 the trainer computes on copies, made once per step and
kept to its end (under `full` sharding only for the unit that runs). What a microbatch keeps, and what a backward needs
beside, come from the trace.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from megatron_retro.assembly.pipeline_runs import EVALUATED_AT_ONCE
from megatron_retro.planning.ranks import RankCosts, StageCosts
from megatron_retro.planning.schedule import Action, most_held, most_received, orders_of
from megatron_retro.planning.workload import Layout, Workload

MASTER_BYTES, MOMENT_BYTES = 4, 8
_START, _END = 0, 1  # of a backward, as `most_held` gives them


@dataclass(frozen=True)
class Memory:
    """One rank, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    neighbors: float
    communication: float
    loss: float

    @property
    def total(self) -> float:
        """All kinds together."""
        return float(sum(getattr(self, field.name) for field in fields(self)))

    def rows(self) -> list[tuple[str, float]]:
        """Kind and bytes, for a table."""
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def rank_memory(rank: RankCosts, work: Workload, layout: Layout) -> Memory:
    """The worse of two moments of a backward: its start, with every activation and the loss, or its end, with every
    gradient. Gradients of earlier microbatches are there at both."""
    start, end = (_at(moment, rank, work, layout) for moment in (_START, _END))
    return max(start, end, key=lambda memory: memory.total)


def evaluation_memory(
    ranks: Sequence[RankCosts], work: Workload, layout: Layout, working: Mapping[str, float]
) -> list[float]:
    """Bytes on each rank in an evaluation: no gradients, what the part that runs holds (`working`), and borders."""
    stages = layout.pipeline * layout.stages_per_rank
    together = EVALUATED_AT_ONCE * stages  # microbatches
    received = {stage.part.index: stage.received_bytes for rank in ranks for stage in rank.stages}
    buffers = most_received(layout.pipeline, stages, together, received)
    losses = together * layout.micro_batch * work.seq_length * MASTER_BYTES
    return [
        _weights(rank, work, layout)
        + rank.total.trained_parameters * MOMENT_BYTES / _shards(layout)
        + max(working.get(name, 0.0) for stage in rank.stages for name, _ in stage.parts)
        + buffers[rank.rank]
        + sum(3 * stage.sent_bytes for stage in rank.stages)  # two sends are under way while the next output is made
        + losses
        for rank in ranks
    ]


def _at(moment: int, rank: RankCosts, work: Workload, layout: Layout) -> Memory:
    microbatches, starts = layout.microbatches(work.global_batch), moment == _START
    order = orders_of(layout, microbatches)[rank.rank]
    held = most_held(order, {stage.part.index: stage.saved_bytes for stage in rank.stages})[moment]
    neighbors = most_held(order, {stage.part.index: stage.neighbor_bytes for stage in rank.stages})[moment]
    loss = rank.head.saved_bytes + rank.head.working_bytes if starts else 0.0
    working = max(rank.working_bytes - loss, 0.0) if starts else 0.0
    return Memory(
        weights=_weights(rank, work, layout),
        gradients=_earlier_gradients(rank, layout, microbatches) if starts else _gradients(rank, layout),
        optimizer=rank.total.trained_parameters * MOMENT_BYTES / _shards(layout),
        activations=held - neighbors + working,
        neighbors=neighbors,
        communication=_buffers(rank, layout, order, moment),
        loss=loss,
    )


def _shards(layout: Layout) -> int:
    return 1 if layout.sharding == "none" else layout.data


def _weights(rank: RankCosts, work: Workload, layout: Layout) -> float:
    masters = rank.total.parameters * MASTER_BYTES / _shards(layout)
    if layout.sharding == "full" and layout.data > 1:
        return masters + 2 * rank.largest_unit * work.value_bytes
    if work.value_bytes != MASTER_BYTES or _shards(layout) > 1:
        return masters + rank.total.parameters * work.value_bytes
    return masters


def _earlier_gradients(rank: RankCosts, layout: Layout, microbatches: int) -> float:
    """Those of the microbatches before: whole unless each was reduced at once."""
    whole = float(rank.total.trained_parameters * MASTER_BYTES)
    if microbatches == 1:
        return 0.0
    return whole / layout.data if _reduces_each(layout) else whole


def _gradients(rank: RankCosts, layout: Layout) -> float:
    """At the end of a backward; without a pipeline each sharded unit is reduced as soon as it is complete."""
    whole = float(rank.total.trained_parameters * MASTER_BYTES)
    if _shards(layout) == 1 or layout.pipeline > 1:
        return whole
    return whole / layout.data + min(rank.largest_unit, rank.total.trained_parameters) * MASTER_BYTES


def _reduces_each(layout: Layout) -> bool:
    return layout.sharding in ("gradients", "full") and layout.data > 1 and layout.pipeline == 1


def _buffers(rank: RankCosts, layout: Layout, order: Sequence[Action], moment: int) -> float:
    """What crosses borders, and a unit that is reduced over the data ranks."""
    reduced = 0.0
    if layout.data > 1 and moment == _END:
        reduced = min(rank.largest_unit, rank.total.trained_parameters) * MASTER_BYTES
    return border_buffers(rank.stages, order)[moment] + reduced


def border_buffers(stages: Sequence[StageCosts], order: Sequence[Action]) -> tuple[float, float]:
    """Of a rank's stages under a schedule, as a backward starts and as it ends.

    `parallel.schedules.BoundedStage` keeps what came in from its receive to the end of its microbatch's backward. One
    more microbatch is being received, and one gradient each way; two sends of every stage are not waited for, of which
    outputs count as activations. Evaluations keep less: nothing waits for a backward.
    """
    start, end = most_held(order, {stage.part.index: stage.received_bytes for stage in stages})
    passing = max(2 * stage.received_bytes + 2 * stage.sent_bytes for stage in stages)
    passing += sum(2 * stage.received_bytes for stage in stages if len(stages) > 1)
    return start + passing, end + passing
