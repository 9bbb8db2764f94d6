"""How long a step takes: matrix products, memory traffic, communication on each axis, and the pipeline's bubble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_retro.config.hardware import Accelerator
from megatron_retro.planning.ranks import RankCosts, in_order
from megatron_retro.planning.recorder import PartTrace
from megatron_retro.planning.schedule import StageSeconds, gathers_per_step, pipeline_seconds
from megatron_retro.planning.workload import Layout, Workload

_OPTIMIZER_BYTES = 28  # weights, gradients and two moments read, three of them written, in float32


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on the slowest rank. `unplanned` is what whole runs lose to all that has no rate."""

    compute: float
    memory: float
    tensor: float
    pipeline: float
    bubble: float
    data: float
    optimizer: float
    unplanned: float

    @property
    def total(self) -> float:
        """The whole step."""
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class CommunicationVolume:
    """Bytes that one rank sends in a step, on each axis."""

    tensor: float
    pipeline: float
    data: float


def communication_volume(rank: RankCosts, work: Workload, layout: Layout) -> CommunicationVolume:
    """What one rank sends; a sum over D replicas of B bytes sends 2B(D-1)/D, a scatter or gather half of that."""
    microbatches = layout.microbatches(work.global_batch)
    ring = (layout.data - 1) / layout.data
    gradients = rank.total.trained_parameters * 4 * ring
    copies = rank.total.parameters * work.value_bytes * ring * gathers_per_step(layout, microbatches)
    reductions = microbatches if layout.pipeline == 1 else 1  # a pipeline's schedule waits for the last backward
    data = {
        "none": 2 * gradients,
        "optimizer": gradients + copies,
        "gradients": gradients * reductions + copies,
        "full": gradients * reductions + copies,
    }[layout.sharding]
    return CommunicationVolume(rank.total.sent_bytes * microbatches, rank.border_bytes * microbatches, data)


def step_time(ranks: Sequence[RankCosts], work: Workload, layout: Layout, machine: Accelerator) -> StepTime:
    """The slowest rank sets the pace; what does not hide behind computing is added."""
    microbatches = layout.microbatches(work.global_batch)
    slowest = max(ranks, key=lambda rank: _busy(rank.total, layout, machine).total)
    busy, volume = _busy(slowest.total, layout, machine), communication_volume(slowest, work, layout)
    data = volume.data / _data_rate(layout, machine)
    often = layout.sharding == "full" or (layout.sharding == "gradients" and layout.pipeline == 1)
    hides = 1.0 if often else 1 / microbatches  # of all that is computed, what the communication runs beside
    planned = {
        "compute": microbatches * busy.compute,
        "memory": microbatches * busy.memory,
        "tensor": microbatches * busy.tensor,
        "pipeline": 0.5 * volume.pipeline / (machine.network_gb_per_s * 1e9),  # receives do not overlap, sends do
        "bubble": pipeline_seconds(layout, microbatches, stage_seconds(ranks, layout, machine))
        - microbatches * busy.total,
        "data": max(data * 0.1, data - microbatches * busy.total * hides * 2 / 3),
        "optimizer": _optimizer_seconds(slowest, layout, machine),
    }
    return StepTime(**planned, unplanned=sum(planned.values()) * (1 / machine.sustained - 1))


def stage_seconds(ranks: Sequence[RankCosts], layout: Layout, machine: Accelerator) -> list[StageSeconds]:
    """Of one microbatch through every stage, in the order of the stages."""
    return [part_seconds(stage.total, layout, machine) for stage in in_order(ranks)]


def part_seconds(total: PartTrace, layout: Layout, machine: Accelerator) -> StageSeconds:
    """Of one microbatch through a part, forward and backward; what moves and is sent, in the ratio of operations."""
    whole = _busy(total, layout, machine).total
    forward = whole * total.forward_flops / max(total.forward_flops + total.backward_flops, 1.0)
    return StageSeconds(forward, whole - forward)


@dataclass(frozen=True)
class _Busy:
    """Seconds of one microbatch, nothing of which overlaps."""

    compute: float
    memory: float
    tensor: float

    @property
    def total(self) -> float:
        """All three."""
        return self.compute + self.memory + self.tensor


def _busy(total: PartTrace, layout: Layout, machine: Accelerator) -> _Busy:
    inside = layout.tensor <= layout.gpus_per_node
    link = (machine.node_gb_per_s if inside else machine.network_gb_per_s) * 1e9
    return _Busy(
        compute=(total.forward_flops + total.backward_flops) / (machine.matmul_tflops * 1e12),
        memory=total.moved_bytes / (machine.memory_tb_per_s * 1e12),
        tensor=total.sent_bytes / link,
    )


def _optimizer_seconds(rank: RankCosts, layout: Layout, machine: Accelerator) -> float:
    shards = 1 if layout.sharding == "none" else layout.data
    return rank.total.trained_parameters / shards * _OPTIMIZER_BYTES / (machine.memory_tb_per_s * 1e12)


def _data_rate(layout: Layout, machine: Accelerator) -> float:
    inside = layout.world_size <= layout.gpus_per_node
    return (machine.node_gb_per_s if inside else machine.network_gb_per_s) * 1e9
