"""What each pipeline rank holds, computes and sends: the sum of its parts. Tensor and data ranks are all alike."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import reduce

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.parallel.partition import StagePart
from megatron_retro.planning.recorder import STAGE, PartTrace
from megatron_retro.planning.trace import (
    EMBEDDING,
    ENCODER,
    FIRST,
    HEAD,
    NEIGHBORS,
    POSITIONS,
    StageTraces,
    Trace,
    layer_kinds,
)

BORDER = "what comes over the border"


@dataclass(frozen=True)
class StageCosts:
    """One pipeline stage, for one microbatch: its parts in the order of the forward, and what crosses its borders."""

    part: StagePart
    parts: tuple[tuple[str, PartTrace], ...]
    received_bytes: float
    sent_bytes: float

    @property
    def total(self) -> PartTrace:
        """All parts together."""
        return _sum(part for _, part in self.parts)

    @property
    def saved_bytes(self) -> float:
        """Held from the forward to the backward, less what the head holds."""
        return sum(part.saved_bytes for name, part in self.parts if name != HEAD)

    @property
    def neighbor_bytes(self) -> float:
        """Of that, the encoded neighbours."""
        return sum(part.saved_bytes for name, part in self.parts if name == NEIGHBORS)


@dataclass(frozen=True)
class RankCosts:
    """One pipeline rank. Bytes and operations are those of one microbatch through all of its stages."""

    rank: int
    stages: tuple[StageCosts, ...]
    total: PartTrace

    @property
    def layers(self) -> str:
        """`1-12`, or several ranges."""
        return ", ".join(f"{stage.part.layers.start + 1}-{stage.part.layers.stop}" for stage in self.stages)

    @property
    def head(self) -> PartTrace:
        """The end of the model; nothing on a rank without it."""
        return _sum(part for stage in self.stages for name, part in stage.parts if name == HEAD)

    @property
    def largest_unit(self) -> int:
        """Parameters of the largest unit of FSDP2: a layer, or what a stage holds beside its layers."""
        return max(self.total.largest_unit, *(stage.total.loose_parameters for stage in self.stages))

    @property
    def working_bytes(self) -> float:
        """By how much the backward of its layers rises over what the forward left; it ends less than it holds."""
        most, held = 0.0, 0.0
        for stage in self.stages:
            for name, part in stage.parts:
                held += 0.0 if name == HEAD else part.saved_bytes
                most = max(most, held + (0.0 if name == HEAD else part.working_bytes))
        return most - held

    @property
    def border_bytes(self) -> float:
        """Sent to other stages, forward and backward."""
        return sum(stage.received_bytes + stage.sent_bytes for stage in self.stages)


def rank_costs(settings: Settings, traces: StageTraces, parts: Sequence[StagePart]) -> tuple[RankCosts, ...]:
    """Every pipeline rank in order."""
    ranks = settings[ParallelConfig].pipeline_model_parallel_size
    stages = [_stage_costs(part, settings, traces.of(part)) for part in parts]
    own = [tuple(stages[rank::ranks]) for rank in range(ranks)]
    return tuple(RankCosts(rank, held, _sum(stage.total for stage in held)) for rank, held in enumerate(own))


def in_order(ranks: Iterable[RankCosts]) -> list[StageCosts]:
    """The stages of all ranks, from the model's first to its last."""
    return sorted((stage for rank in ranks for stage in rank.stages), key=lambda stage: stage.part.index)


def _stage_costs(part: StagePart, settings: Settings, trace: Trace) -> StageCosts:
    kinds = layer_kinds(settings[RetroConfig], settings[ModelConfig].num_layers)
    names = [STAGE]
    names += [EMBEDDING, POSITIONS] if part.first else []
    for layer in part.layers:
        names += [kinds[layer]]
        names += [ENCODER] if kinds[layer] == FIRST else []
    again = settings[ParallelConfig].recompute_granularity == "full" and kinds[part.layers.stop - 1] == FIRST
    names += [NEIGHBORS] if part.retrieves and not again else []  # where the only reader encodes them again, none stay
    names += [HEAD] if part.last else []
    received = 0.0 if part.first else trace.hidden_bytes + _neighbors(part.receives_neighbors, settings, trace)
    sent = 0.0 if part.last else trace.hidden_bytes + _neighbors(part.sends_neighbors, settings, trace)
    border = _over_borders(part, settings, trace, copied=2 * received + 4 * sent)
    parts = [(BORDER, border), *((name, trace.part(name)) for name in names)]
    if part.embedding and not part.first:
        parts.append((EMBEDDING, trace.part(EMBEDDING).only_parameters()))
    return StageCosts(part, tuple(parts), received, sent)


def _over_borders(part: StagePart, settings: Settings, trace: Trace, copied: float) -> PartTrace:
    """What came in is kept by the first layer, and what goes out by torch, until its gradient comes (the hidden state
    in place of the last layer's own). Neighbours that came in are gathered for those that read them. What crosses is
    copied to be contiguous, and gathered neighbours and their gradient are."""
    size = settings[ParallelConfig].tensor_model_parallel_size
    gathered = trace.encoded_bytes if part.receives_neighbors and part.retrieves else 0.0
    last = layer_kinds(settings[RetroConfig], settings[ModelConfig].num_layers)[part.layers.stop - 1]
    kept = 0.0 if part.first else trace.hidden_bytes
    kept += 0.0 if part.last or trace.part(last).saved_bytes else trace.hidden_bytes
    return PartTrace(
        saved_bytes=kept + _neighbors(part.sends_neighbors, settings, trace),
        moved_bytes=copied + 4 * gathered * settings[ParallelConfig].sequence_parallel,
        sent_bytes=2 * gathered * (size - 1) / size,
    )


def _neighbors(cross: bool, settings: Settings, trace: Trace) -> float:
    """Encoded neighbours in the form in which they travel: under sequence parallelism a rank's part of each."""
    parallel = settings[ParallelConfig]
    return trace.encoded_bytes / (parallel.tensor_model_parallel_size if parallel.sequence_parallel else 1) * cross


def _sum(parts: Iterable[PartTrace]) -> PartTrace:
    return reduce(PartTrace.__add__, parts, PartTrace())
