"""What a compiler makes of traced layers. A plan traces eager ones, in seconds; runs on GPUs compile them.

The shares are those of `benchmarks/step_cost.py`, which lowers the compiled layers of the published sizes: alike to a
few hundredths for 823M, 8.5B and 48B, cut and whole. Which collectives stand beside products `tests/planning/
test_operator_counts.py` counts in the order that `ops/overlap.py` gives them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_retro.config.parallel import ParallelConfig, against_compiling
from megatron_retro.config.settings import Settings
from megatron_retro.planning.recorder import PartTrace
from megatron_retro.planning.trace import AFTER, ENCODER, FIRST, LAYER, RETRIEVAL, StageTraces, Trace


@dataclass(frozen=True)
class CompiledShare:
    """Of an eager part: how much still moves beside products, and how much of what is sent has products beside it."""

    moved: float
    beside: float


COMPILED = {
    LAYER: CompiledShare(0.70, 3 / 8),
    AFTER: CompiledShare(0.70, 3 / 8),
    FIRST: CompiledShare(0.53, 4 / 12),
    RETRIEVAL: CompiledShare(0.57, 5 / 12),
    ENCODER: CompiledShare(0.68, 8 / 20),
}


def compiles_on_a_gpu(settings: Settings) -> bool:
    """Whether layers are compiled there."""
    return settings[ParallelConfig].compile is not False and not any(against_compiling(settings))


def as_a_gpu_runs(traces: StageTraces, settings: Settings) -> StageTraces:
    """Compiled layers, where nothing speaks against compiling them."""
    if not compiles_on_a_gpu(settings):
        return traces
    again = (
        settings[ParallelConfig].recompute_granularity == "full"
    )  # then half as much again is sent, by the forward alone
    first = _compiled(traces.first, again)
    return StageTraces(first, first if traces.later is traces.first else _compiled(traces.later, again))


def _compiled(trace: Trace, again: bool) -> Trace:
    return replace(trace, parts={name: _part(part, COMPILED.get(name), again) for name, part in trace.parts.items()})


def _part(part: PartTrace, share: CompiledShare | None, again: bool) -> PartTrace:
    if share is None:
        return part
    beside = share.beside * (2 / 3 if again else 1.0)
    return replace(part, moved_bytes=part.moved_bytes * share.moved, beside_bytes=part.sent_bytes * beside)
