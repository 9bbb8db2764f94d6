"""How much of the data axis a step waits for: gradients that are reduced, parameters that are gathered.

Parameters of a stage are gathered layer by layer beside its first forward, and its gradients reduced layer by layer
beside its last backward; what is still under way then goes on beside the rank's other stages. The network carries one
thing at a time. Idle time of the pipeline is not counted on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_retro.planning.schedule import FORWARD, INPUT, WEIGHT, Action, StageSeconds


@dataclass(frozen=True)
class StageTransfers:
    """Seconds that one stage's gradients and parameters take by themselves, in pieces for its layers."""

    reduced: float
    gathered: float
    pieces: int


def exposed_seconds(
    order: Sequence[Action], seconds: Sequence[StageSeconds], transfers: Mapping[int, StageTransfers]
) -> float:
    """Of one rank and step: before its first forwards end, and behind its last backward."""
    return _exposed_gathers(order, seconds, transfers) + _exposed_reductions(order, seconds, transfers)


def _exposed_gathers(
    order: Sequence[Action], seconds: Sequence[StageSeconds], transfers: Mapping[int, StageTransfers]
) -> float:
    clock = network = busy = 0.0
    waiting = dict(transfers)
    for action in order:
        taken = seconds[action.stage].of(action.kind)
        clock, busy = clock + taken, busy + taken
        if action.kind == FORWARD and action.stage in waiting:
            transfer = waiting.pop(action.stage)
            network += transfer.gathered
            clock = max(clock, network + taken / transfer.pieces)  # the last layer's come last
    return clock - busy


def _exposed_reductions(
    order: Sequence[Action], seconds: Sequence[StageSeconds], transfers: Mapping[int, StageTransfers]
) -> float:
    left = Counter(action.stage for action in order if action.kind not in (FORWARD, INPUT))
    clock = network = 0.0
    for action in order:
        start, clock = clock, clock + seconds[action.stage].of(action.kind)
        if action.kind in (FORWARD, INPUT):
            continue
        left[action.stage] -= 1
        if left[action.stage] == 0:
            transfer = transfers[action.stage]
            begin = clock if action.kind == WEIGHT else start  # deferred gradients are there at the end
            network = max(max(network, begin) + transfer.reduced, clock + transfer.reduced / transfer.pieces)
    return max(0.0, network - clock)
