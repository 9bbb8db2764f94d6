"""Bytes on one rank at the worst moment of a step, by kind.

Parameters are float32 and their own master weights. Under bf16 the trainer computes on copies, made once per step and
kept to its end (under `full` sharding only for the unit that runs). The head's logits exist for a block of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_retro.ops.linear_cross_entropy import BLOCK_BYTES
from megatron_retro.planning.ranks import RankPlan
from megatron_retro.planning.workload import Layout, Workload

MASTER_BYTES, MOMENT_BYTES = 4, 8
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
    """The worse of two moments of the oldest microbatch's backward: its start, with every activation and the loss, or
    its end, with every gradient. Gradients of earlier microbatches are there at both."""
    start, end = (_at(moment, plan, work, layout) for moment in ("start", "end"))
    return max(start, end, key=lambda memory: memory.total)


def _at(moment: str, plan: RankPlan, work: Workload, layout: Layout) -> Memory:
    microbatches = layout.microbatches(work.global_batch)
    in_flight = microbatches_in_flight(layout, plan.rank, microbatches)
    starts = moment == "start"
    waiting = in_flight if starts else in_flight - 1.0
    loss = 0.0
    if plan.holds_head:
        loss = _loss_bytes(work, layout) if starts else _kept_loss_bytes(work, layout)
    return Memory(
        weights=_weights(plan, work, layout),
        gradients=_earlier_gradients(plan, layout, microbatches) if starts else _gradients(plan, layout),
        optimizer=plan.trained_parameters * MOMENT_BYTES / _shards(layout),
        activations=waiting * plan.saved_bytes + max(plan.transient_bytes - (loss if starts else 0.0), 0.0),
        neighbors=waiting * plan.neighbor_bytes,
        communication=_buffers(plan, layout, starts),
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


def _earlier_gradients(plan: RankPlan, layout: Layout, microbatches: int) -> float:
    """Those of the microbatches before: whole unless each was reduced at once."""
    whole = float(plan.trained_parameters * MASTER_BYTES)
    if microbatches == 1:
        return 0.0
    return whole / layout.data if _reduces_each(layout) else whole


def _gradients(plan: RankPlan, layout: Layout) -> float:
    """At the end of a backward; without a pipeline each sharded unit is reduced as soon as it is complete."""
    whole = float(plan.trained_parameters * MASTER_BYTES)
    if _shards(layout) == 1 or layout.pipeline > 1:
        return whole
    return whole / layout.data + min(plan.largest_unit, plan.trained_parameters) * MASTER_BYTES


def _reduces_each(layout: Layout) -> bool:
    return layout.sharding in ("gradients", "full") and layout.data > 1 and layout.pipeline == 1


def _buffers(plan: RankPlan, layout: Layout, starts: bool) -> float:
    """Boundary tensors being received and sent; a unit being reduced over the data ranks."""
    boundary = 2 * plan.boundary_bytes if layout.pipeline > 1 else 0.0
    reduced = min(plan.largest_unit, plan.trained_parameters) * MASTER_BYTES if layout.data > 1 and not starts else 0.0
    return boundary + reduced


def _loss_bytes(work: Workload, layout: Layout) -> float:
    """Logits of a block and the vocabulary matrix's gradient in float32; later that gradient twice, to scale it."""
    rows, positions = work.model.padded_vocab_size() / layout.tensor, layout.micro_batch * work.seq_length
    gradient, block = _vocabulary_gradient(work, layout), min(BLOCK_BYTES, positions * rows * MASTER_BYTES)
    return gradient + (max(block, gradient) if layout.tensor == 1 else block * _LOSS_COPIES)


def _kept_loss_bytes(work: Workload, layout: Layout) -> float:
    """An uncut model's loss makes the vocabulary's gradient in its forward; it is there until the backward ends."""
    return _vocabulary_gradient(work, layout) if layout.tensor == 1 else 0.0


def _vocabulary_gradient(work: Workload, layout: Layout) -> float:
    """None of a frozen decoder's."""
    trained = work.trained.decoder and work.trained.weights
    rows = work.model.padded_vocab_size() / layout.tensor if trained else 0
    return float(rows * work.model.hidden_size * MASTER_BYTES)
