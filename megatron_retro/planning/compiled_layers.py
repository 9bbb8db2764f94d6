"""What a compiler makes of traced layers. A plan traces eager ones, in seconds; runs on GPUs compile them.

The shares are those of `benchmarks/step_cost.py`, which lowers the compiled layers of the published sizes: alike to a
few hundredths for 823M, 8.5B and 48B, cut and whole.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_retro.config.parallel import ParallelConfig, against_compiling
from megatron_retro.config.settings import Settings
from megatron_retro.planning.trace import AFTER, ENCODER, FIRST, LAYER, RETRIEVAL, StageTraces, Trace

# of what an eager part moves beside products
COMPILED = {LAYER: 0.74, AFTER: 0.74, FIRST: 0.58, RETRIEVAL: 0.62, ENCODER: 0.74}


def compiles_on_a_gpu(settings: Settings) -> bool:
    """Whether layers are compiled there."""
    return settings[ParallelConfig].compile is not False and not any(against_compiling(settings))


def as_a_gpu_runs(traces: StageTraces, settings: Settings) -> StageTraces:
    """Compiled layers, where nothing speaks against compiling them."""
    if not compiles_on_a_gpu(settings):
        return traces
    first = _compiled(traces.first)
    return StageTraces(first, first if traces.later is traces.first else _compiled(traces.later))


def _compiled(trace: Trace) -> Trace:
    return replace(
        trace,
        parts={
            name: replace(part, moved_bytes=part.moved_bytes * COMPILED.get(name, 1.0))
            for name, part in trace.parts.items()
        },
    )
