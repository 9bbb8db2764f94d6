"""Bytes on one rank at the worst moment of a step, by kind.

Parameters are float32 and their own master weights. Under bf16 the trainer computes on copies, made once per step and
kept to its end (under `full` sharding only for the unit that runs). The head's logits exist for a block of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_retro.planning.ranks import RankPlan
from megatron_retro.planning.workload import Layout, Workload

MASTER_BYTES, MOMENT_BYTES = 4, 8
_LOSS_BLOCK_TOKENS = 1024  # as parallel.vocabulary and ops.linear_cross_entropy take them
_LOSS_COPIES = 3.0  # logits, their float32 form and its slope


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


def microbatches_in_flight(layout: Layout, rank: int, microbatches: int) -> float:
    """How many microbatches' activations a rank holds at most, in units of all of its pieces."""
    if layout.pipeline == 1:
        return 1.0
    if layout.schedule == "gpipe":
        return float(microbatches)
    if layout.pieces_per_rank == 1:
        return float(min(layout.pipeline - rank, microbatches))
    pieces = 2 * (layout.pipeline - rank - 1) + (layout.pieces_per_rank - 1) * layout.pipeline + 1
    return min(pieces, microbatches * layout.pieces_per_rank) / layout.pieces_per_rank


def rank_memory(plan: RankPlan, work: Workload, layout: Layout) -> Memory:
    """The worst moment: the backward of the oldest microbatch while all others in flight wait."""
    microbatches = layout.microbatches(work.global_batch)
    in_flight = microbatches_in_flight(layout, plan.rank, microbatches)
    loss = _loss_bytes(work, layout) if plan.holds_head else 0.0
    weights, gradients = _weights(plan, work, layout), _gradients(plan, layout, microbatches)
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=plan.trained_parameters * MOMENT_BYTES / _shards(layout),
        activations=in_flight * plan.saved_bytes + max(plan.transient_bytes - loss, 0.0),
        neighbors=in_flight * plan.neighbor_bytes,
        communication=_buffers(plan, work, layout),
        loss=loss,
    )


def _shards(layout: Layout) -> int:
    return 1 if layout.sharding == "none" else layout.data


def _weights(plan: RankPlan, work: Workload, layout: Layout) -> float:
    masters = plan.parameters * MASTER_BYTES / _shards(layout)
    if layout.sharding == "full" and layout.data > 1:
        return masters + 2 * plan.largest_unit * work.value_bytes
    if work.value_bytes != MASTER_BYTES or _shards(layout) > 1:
        return masters + plan.parameters * work.value_bytes
    return masters


def _gradients(plan: RankPlan, layout: Layout, microbatches: int) -> float:
    whole = plan.trained_parameters * MASTER_BYTES
    if _shards(layout) == 1:
        return whole
    kept_whole = layout.sharding == "optimizer" and microbatches > 1
    unit = min(plan.largest_unit, plan.trained_parameters) * MASTER_BYTES
    return whole / layout.data + (whole if kept_whole else 2 * unit)


def _buffers(plan: RankPlan, work: Workload, layout: Layout) -> float:
    """Boundary tensors being received and sent; gathered or reduced units of the data axis."""
    boundary = 2 * plan.boundary_bytes if layout.pipeline > 1 else 0.0
    data = plan.largest_unit * MASTER_BYTES if layout.data > 1 else 0.0
    return boundary + data


def _loss_bytes(work: Workload, layout: Layout) -> float:
    """Logits of a block of tokens over this rank's rows, and the vocabulary matrix's gradient in float32."""
    tokens = min(_LOSS_BLOCK_TOKENS, layout.micro_batch * work.seq_length)
    rows = work.model.padded_vocab_size() / layout.tensor
    return rows * (tokens * MASTER_BYTES * _LOSS_COPIES + work.model.hidden_size * MASTER_BYTES)
