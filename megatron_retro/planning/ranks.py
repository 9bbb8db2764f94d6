"""What each pipeline rank holds: its pieces, parameters, work and activations. Tensor and data ranks are all alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_retro.model.costs import (
    UnitCost,
    decoder_block,
    decoder_layer_parameters,
    encoder_block,
    gate_parameters,
)
from megatron_retro.parallel.partition import StagePart, even_cut, layer_costs, parts_of_counts
from megatron_retro.planning.trace import AFTER, EMBEDDING, ENCODER, FIRST, HEAD, LAYER, RETRIEVAL, Trace
from megatron_retro.planning.workload import Layout, Tuned, Workload

_LAYERS = (LAYER, FIRST, AFTER, RETRIEVAL, ENCODER)


@dataclass(frozen=True)
class RankPlan:
    """One pipeline rank. Bytes are those of one microbatch through all of its pieces."""

    rank: int
    pieces: tuple[StagePart, ...]
    parameters: int
    trained_parameters: int
    largest_unit: int
    multiply_adds: float
    layer_multiply_adds: float
    backward_multiply_adds: float
    saved_bytes: float
    transient_bytes: float
    neighbor_bytes: float
    tensor_bytes: float
    boundary_bytes: float

    @property
    def layers(self) -> str:
        """`1-12`, or several ranges."""
        return ", ".join(f"{piece.layers.start + 1}-{piece.layers.stop}" for piece in self.pieces)

    @property
    def holds_head(self) -> bool:
        """Losses come out here."""
        return any(piece.last for piece in self.pieces)


def layer_counts(work: Workload, layout: Layout, chosen: Sequence[int] | None = None) -> tuple[int, ...]:
    """Decoder layers of every piece: chosen by hand, or the trainer's own cut."""
    if chosen:
        return tuple(chosen)
    costs = layer_costs(work.model, work.retro, work.seq_length)
    return even_cut(costs, layout.pipeline * layout.pieces_per_rank)


def rank_plans(work: Workload, layout: Layout, traced: Trace, counts: Sequence[int]) -> tuple[RankPlan, ...]:
    """Every pipeline rank in order."""
    pieces = parts_of_counts(work.model, work.retro, counts)
    return tuple(
        _rank_plan(rank, pieces[rank :: layout.pipeline], work, layout, traced) for rank in range(layout.pipeline)
    )


def _rank_plan(rank: int, pieces: Sequence[StagePart], work: Workload, layout: Layout, traced: Trace) -> RankPlan:
    units = [unit for piece in pieces for unit in _units(piece, work)]
    parts = [part for piece in pieces for part in _parts(piece, work)]
    local = [_local_parameters(unit, work, layout) for unit in units]
    again = layout.recompute == "full"
    backward = work.costs.backward_multiply_adds(work.trained)
    return RankPlan(
        rank=rank,
        pieces=tuple(pieces),
        parameters=sum(local),
        trained_parameters=sum(_trained_parameters(unit, work, layout) for unit in units),
        largest_unit=max(local),
        multiply_adds=sum(unit.multiply_adds for unit in units),
        layer_multiply_adds=sum(
            unit.multiply_adds for unit in units if unit.name not in (EMBEDDING, HEAD) and backward[unit.name]
        ),
        backward_multiply_adds=sum(backward[unit.name] for unit in units),
        saved_bytes=sum(_kept(part, traced, layout) for part in parts),
        transient_bytes=_transient(parts, traced, layout),
        neighbor_bytes=float(sum(traced.encoded_bytes for piece in pieces if piece.retrieves)),
        tensor_bytes=sum(traced.part(part).sent_bytes * (1.5 if again and part in _LAYERS else 1.0) for part in parts),
        boundary_bytes=2.0 * sum(_boundary(piece, traced, layout) for piece in pieces),
    )


def _units(piece: StagePart, work: Workload) -> list[UnitCost]:
    """What the piece holds, as parameters and work; a replica of the embedding works nothing."""
    names = [f"layers.{layer}" for layer in piece.layers]
    names += [EMBEDDING] if piece.embedding else []
    names += [ENCODER] if piece.encoder else []
    names += [HEAD] if piece.last else []
    return [work.costs.named(name) for name in names]


def _parts(piece: StagePart, work: Workload) -> list[str]:
    """The traced parts that stand for what the piece runs."""
    retrieval = [number - 1 for number in work.retro.retrieval_layers(work.model.num_layers)]
    first = min(retrieval, default=-1)
    names = [EMBEDDING] if piece.first else []
    for layer in piece.layers:
        plain = AFTER if retrieval and layer > first else LAYER
        names.append(FIRST if layer == first else RETRIEVAL if layer in retrieval else plain)
        names += [ENCODER] if layer == first else []
    return names + ([HEAD] if piece.last else [])


def _kept(part: str, traced: Trace, layout: Layout) -> float:
    """What a part keeps of a microbatch from its forward to its backward."""
    if part not in _LAYERS or layout.recompute == "none" or not traced.part(part).saved_bytes:
        return traced.part(part).saved_bytes
    own_input = 0 if part == ENCODER else traced.hidden_bytes  # the encoder runs inside its layer's call
    return own_input + (traced.part(part).kept_bytes if layout.recompute == "selective" else 0)


def _transient(parts: Sequence[str], traced: Trace, layout: Layout) -> float:
    """What the backward computes again and holds for one layer at a time; the encoder belongs to its layer."""
    if layout.recompute == "none":
        return 0.0
    sizes = [float(traced.part(part).saved_bytes) for part in parts if part in _LAYERS and part != ENCODER]
    if ENCODER in parts:
        sizes.append(float(traced.part(FIRST).saved_bytes + traced.part(ENCODER).saved_bytes))
    return max(sizes, default=0.0)


def _boundary(piece: StagePart, traced: Trace, layout: Layout) -> float:
    """What the piece sends on, in the form in which it travels."""
    if piece.last:
        return 0.0
    shared = layout.tensor if layout.sequence_parallel else 1
    return traced.hidden_bytes + (traced.encoded_bytes / shared if piece.sends_neighbors else 0.0)


def _local_parameters(unit: UnitCost, work: Workload, layout: Layout) -> int:
    """A tensor rank's share: matrices are cut, vectors of the residual stream are not."""
    whole = _whole_parameters(unit, work)
    return (unit.parameters - whole) // layout.tensor + whole + _tuned_parameters(unit, work, layout)


def _tuned_parameters(unit: UnitCost, work: Workload, layout: Layout) -> int:
    return work.tuned.get(unit.name, Tuned()).local(layout.tensor)


def _whole_parameters(unit: UnitCost, work: Workload) -> int:
    block = decoder_block(work.model)
    norm, bias = block.norm_parameters(), work.model.hidden_size if block.bias else 0
    if unit.name == HEAD:
        return norm
    if unit.name == EMBEDDING:
        return unit.parameters - work.model.padded_vocab_size() * work.model.hidden_size
    if unit.name == ENCODER:
        inner = encoder_block(work.model, work.retro)
        vectors = 2 * inner.norm_parameters() + (2 * inner.width if inner.bias else 0) + inner.head_norm_parameters()
        return work.retro.retro_encoder_layers * vectors + inner.norm_parameters()
    retrieves = int(unit.name.split(".")[1]) + 1 in work.retro.retrieval_layers(work.model.num_layers)
    return 2 * norm + 2 * bias + block.head_norm_parameters() + (_cross_vectors(work) if retrieves else 0)


def _cross_vectors(work: Workload) -> int:
    """A cross-attention's norm and gate."""
    block = decoder_block(work.model)
    return block.norm_parameters() + gate_parameters(block, work.retro)


def _trained_parameters(unit: UnitCost, work: Workload, layout: Layout) -> int:
    if not work.trained.weights:
        return _tuned_parameters(unit, work, layout)
    if work.trained.decoder or unit.name == ENCODER:
        return _local_parameters(unit, work, layout)
    return _added_parameters(unit, work, layout)


def _added_parameters(unit: UnitCost, work: Workload, layout: Layout) -> int:
    """What retro-fitting adds to a frozen decoder layer: its cross-attention."""
    if not unit.name.startswith("layers."):
        return 0
    more = unit.parameters - decoder_layer_parameters(work.model)
    if more == 0:
        return 0
    whole = _cross_vectors(work)
    return (more - whole) // layout.tensor + whole
