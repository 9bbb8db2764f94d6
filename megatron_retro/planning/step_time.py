"""How long a step takes: matrix products, memory traffic, communication on each axis, and the pipeline's bubble."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_retro.config.hardware import Accelerator
from megatron_retro.model.costs import decoder_block, encoder_block
from megatron_retro.planning.ranks import RankPlan
from megatron_retro.planning.workload import Layout, Workload

# Values read or written per token and layer by what is not a matrix product, forward and backward together: two norms,
# residual sums, rotation (in widths), the nonlinearity (in feed-forward widths).
_WIDTHS, _FEED_FORWARDS = 44.0, 9.0


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
class Traffic:
    """Bytes that one rank sends in a step, on each axis."""

    tensor: float
    pipeline: float
    data: float


def bubble_share(layout: Layout, microbatches: int) -> float:
    """Idle time of the pipeline in units of the busy time."""
    stages = layout.pipeline - 1
    if layout.schedule == "zero-bubble":
        return stages / (3 * layout.pieces_per_rank * microbatches)
    return stages / (layout.pieces_per_rank * microbatches)


def step_traffic(plan: RankPlan, work: Workload, layout: Layout) -> Traffic:
    """What one rank sends; a sum over D replicas of B bytes sends 2B(D-1)/D, a scatter or gather half of that."""
    microbatches = layout.microbatches(work.global_batch)
    ring = (layout.data - 1) / layout.data
    gradients = plan.trained_parameters * 4 * ring
    copies = plan.parameters * work.value_bytes * ring
    data = {
        "none": 2 * gradients,
        "optimizer": gradients + copies,
        "gradients": gradients * microbatches + copies,
        "full": (gradients + 2 * copies) * microbatches,
    }[layout.sharding]
    return Traffic(plan.tensor_bytes * microbatches, plan.boundary_bytes * microbatches, data)


def step_time(plans: Sequence[RankPlan], work: Workload, layout: Layout, machine: Accelerator) -> StepTime:
    """The slowest rank sets the pace; what does not hide behind computing is added."""
    microbatches = layout.microbatches(work.global_batch)
    slowest = max(plans, key=lambda plan: _microbatch_seconds(plan, work, layout, machine))
    traffic = step_traffic(slowest, work, layout)
    compute = microbatches * _compute_seconds(slowest, work, layout, machine)
    memory = microbatches * _memory_seconds(slowest, work, layout, machine)
    tensor = traffic.tensor / _tensor_rate(layout, machine)
    pipeline = traffic.pipeline / (machine.network_gb_per_s * 1e9)
    busy = compute + memory + tensor
    data = traffic.data / (_data_rate(layout, machine))
    hidden = busy * (1.0 if layout.sharding in ("gradients", "full") else 1 / microbatches) * 2 / 3
    planned = {
        "compute": compute,
        "memory": memory,
        "tensor": tensor,
        "pipeline": pipeline * 0.5,  # sends overlap with the next microbatch, receives do not
        "bubble": busy * bubble_share(layout, microbatches),
        "data": max(data * 0.1, data - hidden),
        "optimizer": _optimizer_seconds(slowest, layout, machine),
    }
    return StepTime(**planned, unplanned=sum(planned.values()) * (1 / machine.sustained - 1))


def _microbatch_seconds(plan: RankPlan, work: Workload, layout: Layout, machine: Accelerator) -> float:
    return (
        _compute_seconds(plan, work, layout, machine)
        + _memory_seconds(plan, work, layout, machine)
        + plan.tensor_bytes / _tensor_rate(layout, machine)
    )


def _compute_seconds(plan: RankPlan, work: Workload, layout: Layout, machine: Accelerator) -> float:
    again = plan.layer_multiply_adds if layout.recompute == "full" else 0.0
    flops = 2 * (plan.multiply_adds + plan.backward_multiply_adds + again)
    tokens = layout.micro_batch * work.seq_length
    return flops * tokens / layout.tensor / (machine.matmul_tflops * 1e12)


def _memory_seconds(plan: RankPlan, work: Workload, layout: Layout, machine: Accelerator) -> float:
    """Norms and residual sums shrink with the tensor size only under sequence parallelism, the rest always."""
    block, tokens = decoder_block(work.model), layout.micro_batch * work.seq_length
    layers = sum(len(piece.layers) for piece in plan.pieces)
    stream = 1 / layout.tensor if layout.sequence_parallel else 1.0
    values = layers * tokens * (_WIDTHS * block.width * stream + _FEED_FORWARDS * block.feed_forward / layout.tensor)
    if any(piece.encoder for piece in plan.pieces):
        inner, more = encoder_block(work.model, work.retro), layout.micro_batch * work.neighbor_tokens
        per_token = _WIDTHS * inner.width * stream + _FEED_FORWARDS * inner.feed_forward / layout.tensor
        values += work.retro.retro_encoder_layers * more * per_token
    again = 4 / 3 if layout.recompute != "none" else 1.0
    return values * work.value_bytes * again / (machine.memory_tb_per_s * 1e12)


def _optimizer_seconds(plan: RankPlan, layout: Layout, machine: Accelerator) -> float:
    """Weights, gradients and two moments read, three of them written, in float32."""
    shards = 1 if layout.sharding == "none" else layout.data
    return plan.trained_parameters / shards * 28 / (machine.memory_tb_per_s * 1e12)


def _tensor_rate(layout: Layout, machine: Accelerator) -> float:
    inside = layout.tensor <= layout.gpus_per_node
    return (machine.node_gb_per_s if inside else machine.network_gb_per_s) * 1e9


def _data_rate(layout: Layout, machine: Accelerator) -> float:
    inside = layout.world_size <= layout.gpus_per_node
    return (machine.node_gb_per_s if inside else machine.network_gb_per_s) * 1e9
