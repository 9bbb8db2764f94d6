"""How long a step takes: matrix products, memory traffic, communication on each axis, and the pipeline's bubble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_retro.config.hardware import Accelerator
from megatron_retro.planning.data_axis import StageTransfers, exposed_seconds
from megatron_retro.planning.ranks import RankCosts, in_order
from megatron_retro.planning.recorder import PartTrace
from megatron_retro.planning.schedule import (
    MOST_SIMULATED,
    StageSeconds,
    gathers_per_step,
    orders_of,
    pipeline_seconds,
)
from megatron_retro.planning.trace import AFTER, LAYER
from megatron_retro.planning.workload import Layout, Workload

_ALWAYS_EXPOSED = 0.1  # of the data axis: the first layer's parameters, the last one's gradients, stragglers
_SUM_BYTES = 10  # a gradient of a microbatch read, its sum read and written: of what is no matrix of a layer
_OPTIMIZER_BYTES = 28  # weights, gradients and two moments read, three of them written, in float32


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, on the slowest rank. `unplanned` is what whole runs lose to all that has no rate."""

    compute: float
    memory: float
    tensor: float
    context: float
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
    context: float
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
    return CommunicationVolume(
        rank.total.sent_bytes * microbatches,
        rank.total.context_bytes * microbatches,
        rank.border_bytes * microbatches,
        data,
    )


def step_time(ranks: Sequence[RankCosts], work: Workload, layout: Layout, machine: Accelerator) -> StepTime:
    """The slowest rank sets the pace; what does not hide behind computing is added."""
    microbatches = layout.microbatches(work.global_batch)
    slowest = max(ranks, key=lambda rank: _busy(rank.total, layout, machine).total)
    busy, volume = _busy(slowest.total, layout, machine), communication_volume(slowest, work, layout)
    data = volume.data / _data_rate(layout, machine)
    planned = {
        "compute": microbatches * busy.compute,
        "memory": microbatches * busy.memory,
        "tensor": microbatches * busy.tensor,
        "context": microbatches * busy.context,
        "pipeline": 0.5 * volume.pipeline / (machine.network_gb_per_s * 1e9),  # receives do not overlap, sends do
        "bubble": pipeline_seconds(layout, microbatches, stage_seconds(ranks, layout, machine))
        - microbatches * busy.total,
        "data": max(data * _ALWAYS_EXPOSED, _exposed_data(ranks, slowest, work, layout, machine)),
        "optimizer": _optimizer_seconds(slowest, layout, machine),
    }
    return StepTime(**planned, unplanned=sum(planned.values()) * (1 / machine.sustained - 1))


def _exposed_data(
    ranks: Sequence[RankCosts], rank: RankCosts, work: Workload, layout: Layout, machine: Accelerator
) -> float:
    """Of one rank; what is sent with every microbatch runs beside two thirds of it."""
    microbatches, rate = layout.microbatches(work.global_batch), _data_rate(layout, machine)
    if layout.sharding == "full" or (layout.sharding == "gradients" and layout.pipeline == 1):
        beside = microbatches * _busy(rank.total, layout, machine).total * 2 / 3
        return communication_volume(rank, work, layout).data / rate - beside
    ring, whole = (layout.data - 1) / layout.data, layout.sharding == "none"
    transfers = {
        stage.part.index: StageTransfers(
            stage.total.trained_parameters * 4 * ring * (2 if whole else 1) / rate,
            0.0 if whole else stage.total.parameters * work.value_bytes * ring / rate,
            len(stage.part.layers),
        )
        for stage in rank.stages
    }
    order = orders_of(layout, min(microbatches, MOST_SIMULATED * layout.pipeline))[rank.rank]
    return exposed_seconds(order, stage_seconds(ranks, layout, machine), transfers)


def stage_seconds(ranks: Sequence[RankCosts], layout: Layout, machine: Accelerator) -> list[StageSeconds]:
    """Of one microbatch through every stage, in the order of the stages."""
    return [part_seconds(stage.total, layout, machine) for stage in in_order(ranks)]


def part_seconds(total: PartTrace, layout: Layout, machine: Accelerator) -> StageSeconds:
    """Of one microbatch through a part, forward and backward; what moves and is sent, in the ratio of operations."""
    whole = _busy(total, layout, machine).total
    forward = whole * total.forward_flops / max(total.forward_flops + total.backward_flops, 1.0)
    return StageSeconds(forward, whole - forward)


def layer_seconds(ranks: Sequence[RankCosts], layout: Layout, machine: Accelerator) -> float:
    """Of one microbatch through a plain layer, which has the least to do; 0 without one."""
    plain = (part for rank in ranks for stage in rank.stages for name, part in stage.parts if name in (LAYER, AFTER))
    return min((_busy(part, layout, machine).total for part in plain), default=0.0)


@dataclass(frozen=True)
class _Busy:
    """Seconds of one microbatch; `tensor` is what has no product beside it, and `context` has none."""

    compute: float
    memory: float
    tensor: float
    context: float

    @property
    def total(self) -> float:
        """All four."""
        return self.compute + self.memory + self.tensor + self.context


def _busy(total: PartTrace, layout: Layout, machine: Accelerator) -> _Busy:
    link, between = (_rate(ranks, layout, machine) for ranks in (layout.tensor, layout.tensor * layout.context))
    compute = (total.forward_flops + total.backward_flops) / (machine.matmul_tflops * 1e12)
    sums = _SUM_BYTES * min(total.loose_parameters, total.trained_parameters)
    beside = min(total.beside_bytes / link, total.beside_flops / (machine.matmul_tflops * 1e12))
    return _Busy(
        compute=compute,
        memory=(total.moved_bytes + sums) / (machine.memory_tb_per_s * 1e12),
        tensor=total.sent_bytes / link - beside,
        context=total.context_bytes / between,
    )


def _optimizer_seconds(rank: RankCosts, layout: Layout, machine: Accelerator) -> float:
    shards = 1 if layout.sharding == "none" else layout.data
    return rank.total.trained_parameters / shards * _OPTIMIZER_BYTES / (machine.memory_tb_per_s * 1e12)


def _data_rate(layout: Layout, machine: Accelerator) -> float:
    return _rate(layout.world_size, layout, machine)


def _rate(ranks: int, layout: Layout, machine: Accelerator) -> float:
    """Bytes a second between so many neighbours: inside a node where they fit in it."""
    return (machine.node_gb_per_s if ranks <= layout.gpus_per_node else machine.network_gb_per_s) * 1e9
