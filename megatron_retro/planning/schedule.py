"""The order in which a pipeline works, as torch's schedules decide it: how long a step takes, and what a rank holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch.distributed.pipelining import ScheduleInterleaved1F1B, ScheduleInterleavedZeroBubble
from torch.distributed.pipelining.schedules import _add_unshard_reshard, _ComputationType

from megatron_retro.parallel.schedules import forward_order, gathered_once
from megatron_retro.planning.workload import Layout

FORWARD, BACKWARD, INPUT, WEIGHT = "forward", "backward", "gradient of the input", "gradient of the weights"
_KINDS = {
    _ComputationType.FORWARD: FORWARD,
    _ComputationType.FULL_BACKWARD: BACKWARD,
    _ComputationType.BACKWARD_INPUT: INPUT,
    _ComputationType.BACKWARD_WEIGHT: WEIGHT,
}


class Action(NamedTuple):
    """What a rank does next: a pass of a microbatch through one of its stages."""

    kind: str
    stage: int
    microbatch: int


_ONE_STAGE = ("1f1b", "gpipe")
MOST_SIMULATED = 6  # microbatches for each rank
Orders = tuple[tuple[Action, ...], ...]


class _Interleaved(ScheduleInterleaved1F1B):
    """Its order alone."""

    def _prepare_schedule_with_comms(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing is run."""


class _ZeroBubble(ScheduleInterleavedZeroBubble):
    """Its order alone."""

    def _prepare_schedule_with_comms(self, *arguments: Any, **keywords: Any) -> None:
        """Nothing is run."""


def orders_of(layout: Layout, microbatches: int) -> Orders:
    """What each pipeline rank does, in order."""
    if layout.pipeline == 1:  # one after the other, so one tells of all
        return ((Action(FORWARD, 0, 0), Action(BACKWARD, 0, 0)),)
    kind = layout.schedule
    if kind == "1f1b" and microbatches < layout.pipeline:
        kind = "gpipe"  # as the trainer has it
    return _orders(kind, layout.pipeline, layout.stages_per_rank, microbatches)


def gathers_per_step(layout: Layout, microbatches: int) -> int:
    """How often a step gathers the parameters of a stage, at most."""
    if _keeps_whole(layout):
        return 0
    if layout.pipeline == 1 or layout.schedule in _ONE_STAGE:  # FSDP2's hooks gather: forward, and backward if freed
        return 2 * microbatches if layout.sharding == "full" else 1
    most = 0
    for order in _torch_order(layout.schedule, layout.pipeline, layout.stages_per_rank, microbatches).values():
        actions = _add_unshard_reshard(list(order))
        kept = actions if layout.sharding == "full" else gathered_once(actions)
        counts = Counter(each.stage_index for each in kept if each.computation_type == _ComputationType.UNSHARD)
        most = max(most, *counts.values())
    return most


def _keeps_whole(layout: Layout) -> bool:
    return layout.sharding == "none" or layout.data == 1


def most_received(ranks: int, stages: int, microbatches: int, received: Mapping[int, float]) -> list[float]:
    """Bytes that are received and not yet read on each rank, at most, as an evaluation goes through the stages."""
    most = []
    for order in forward_order(ranks, stages, microbatches, gather_once=True).values():
        now = peak = 0.0
        for action in order:
            if action.computation_type == _ComputationType.RECV_F:
                now += received[action.stage_index]
            elif action.computation_type == _ComputationType.FORWARD:
                peak = max(peak, now)
                now -= received[action.stage_index]
        most.append(peak)
    return most


@cache
def _orders(kind: str, ranks: int, stages_per_rank: int, microbatches: int) -> Orders:
    if kind in _ONE_STAGE:
        ahead = [microbatches if kind == "gpipe" else min(ranks - rank, microbatches) for rank in range(ranks)]
        return tuple(_one_stage(rank, microbatches, ahead[rank]) for rank in range(ranks))
    order = _torch_order(kind, ranks, stages_per_rank, microbatches)
    return tuple(
        tuple(
            Action(_KINDS[action.computation_type], action.stage_index, action.microbatch_index or 0)
            for action in order[rank]
            if action is not None
        )
        for rank in range(ranks)
    )


@cache
def _torch_order(kind: str, ranks: int, stages_per_rank: int, microbatches: int) -> dict[int, list[Any]]:
    stages: list[Any] = [_place(number, ranks, stages_per_rank) for number in range(stages_per_rank)]
    schedule = _Interleaved if kind == "interleaved" else _ZeroBubble
    order: dict[int, list[Any]] = schedule(stages, microbatches, loss_fn=lambda output, target: output).pipeline_order
    return order


def _one_stage(rank: int, microbatches: int, ahead: int) -> tuple[Action, ...]:
    """So many forwards first, then a backward and a forward in turn, and what is left of the backwards."""
    forwards = [Action(FORWARD, rank, number) for number in range(microbatches)]
    backwards = [Action(BACKWARD, rank, number) for number in range(microbatches)]
    turns = zip_longest(backwards, forwards[ahead:])
    return (*forwards[:ahead], *(action for pair in turns for action in pair if action is not None))


def _place(number: int, ranks: int, stages_per_rank: int) -> SimpleNamespace:
    """A stage that only says where it stands, for torch's classes to order."""
    return SimpleNamespace(
        stage_index=number * ranks,
        num_stages=ranks * stages_per_rank,
        group_size=ranks,
        group_rank=0,
        group=None,
        is_first=number == 0,
        is_last=False,
        has_backward=True,
        device=None,
        submod=None,
        stage_index_to_group_rank=None,
    )


@dataclass(frozen=True)
class StageSeconds:
    """Of one microbatch through one stage."""

    forward: float
    backward: float

    def __add__(self, other: StageSeconds) -> StageSeconds:
        return StageSeconds(self.forward + other.forward, self.backward + other.backward)

    def of(self, kind: str) -> float:
        """Of one action. The gradient of the weights takes what their products took forward."""
        return {
            FORWARD: self.forward,
            BACKWARD: self.backward,
            INPUT: max(self.backward - self.forward, 0.0),
            WEIGHT: min(self.forward, self.backward),
        }[kind]


NO_TIME = StageSeconds(0.0, 0.0)


def pipeline_seconds(layout: Layout, microbatches: int, seconds: Sequence[StageSeconds]) -> float:
    """All microbatches of a step, simulated; many are some, and then what each further round adds."""
    few, more = (MOST_SIMULATED - 2) * layout.pipeline, MOST_SIMULATED * layout.pipeline
    if layout.pipeline == 1:
        return microbatches * (seconds[0].forward + seconds[0].backward)
    if microbatches <= more:
        return simulated_seconds(orders_of(layout, microbatches), seconds)
    some, further = (simulated_seconds(orders_of(layout, count), seconds) for count in (few, more))
    return further + (further - some) / (more - few) * (microbatches - more)


def simulated_seconds(orders: Orders, seconds: Sequence[StageSeconds]) -> float:
    """From the first action to the last, each as early as its rank and what it needs from neighbours allow."""
    ends: dict[tuple[bool, int, int], float] = {}  # (forward or not, stage, microbatch)
    clocks, places = [0.0] * len(orders), [0] * len(orders)
    waiting = set(range(len(orders)))
    while waiting:
        before = sum(places)
        for rank in list(waiting):
            order = orders[rank]
            while places[rank] < len(order):
                action = order[places[rank]]
                ready = _ready(action, ends, len(seconds))
                if ready is None:
                    break
                clocks[rank] = max(clocks[rank], ready) + seconds[action.stage].of(action.kind)
                if action.kind != WEIGHT:
                    ends[action.kind == FORWARD, action.stage, action.microbatch] = clocks[rank]
                places[rank] += 1
            if places[rank] == len(order):
                waiting.discard(rank)
        if waiting and sum(places) == before:
            raise RuntimeError("the schedule waits for itself")
    return max(clocks)


def _ready(action: Action, ends: Mapping[tuple[bool, int, int], float], num_stages: int) -> float | None:
    """When another stage has given what an action needs; None if it has not yet."""
    if action.kind == WEIGHT:
        return 0.0
    forward = action.kind == FORWARD
    other = action.stage - 1 if forward else action.stage + 1
    if not 0 <= other < num_stages:
        return 0.0
    return ends.get((forward, other, action.microbatch))


def most_held(order: Sequence[Action], held: Mapping[int, float]) -> tuple[float, float]:
    """Bytes that microbatches on their way leave on a rank at most: as a backward starts, and as one ends.

    `held` says how much one leaves on each stage; deferred gradients of weights hold it until they are computed.
    """
    now = start = end = 0.0
    for action in order:
        if action.kind == FORWARD:
            now += held[action.stage]
            continue
        start = max(start, now)
        now -= held[action.stage] if action.kind != INPUT else 0.0
        end = max(end, now)
    return start, end
