"""What a step waits for on the data axis: by hand for one stage, and that nothing hides where there is no room."""

from __future__ import annotations

import pytest

from megatron_retro.planning.compiled_layers import COMPILED, as_a_gpu_runs
from megatron_retro.planning.data_axis import StageTransfers, exposed_seconds
from megatron_retro.planning.recorder import PartTrace
from megatron_retro.planning.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Action, StageSeconds
from megatron_retro.planning.trace import HEAD, LAYER, StageTraces, Trace
from tests.planning.recipes import recipe

ONE = (StageSeconds(1.0, 2.0),)
ORDER = (Action(FORWARD, 0, 0), Action(BACKWARD, 0, 0))


@pytest.mark.parametrize(
    ("reduced", "gathered", "exposed"),
    [
        (0.0, 0.0, 0.0),
        (1.0, 0.5, 0.1),  # the last of ten layers is reduced behind its backward
        (3.0, 0.0, 1.0),  # begun with the backward of two seconds
        (0.0, 2.0, 1.1),  # the last layer's forward follows its parameters
    ],
)
def test_one_stage_by_hand(reduced: float, gathered: float, exposed: float) -> None:
    assert exposed_seconds(ORDER, ONE, {0: StageTransfers(reduced, gathered, 10)}) == pytest.approx(exposed)


def test_deferred_gradients_are_reduced_when_they_are_there() -> None:
    order = (Action(FORWARD, 0, 0), Action(INPUT, 0, 0), Action(WEIGHT, 0, 0))
    assert exposed_seconds(order, ONE, {0: StageTransfers(3.0, 0.0, 10)}) == pytest.approx(3.0)


def test_another_stage_of_the_rank_hides_what_is_still_under_way() -> None:
    order = (*ORDER[:1], Action(FORWARD, 1, 0), Action(BACKWARD, 1, 0), *ORDER[1:])
    transfers = {0: StageTransfers(0.0, 0.0, 1), 1: StageTransfers(4.0, 0.0, 1)}
    assert exposed_seconds(order, ONE * 2, transfers) == pytest.approx(2.0)


def test_layers_are_planned_as_they_run() -> None:
    part = PartTrace(moved_bytes=100.0)
    trace = Trace({LAYER: part, HEAD: part}, 0.0, 0.0)
    compiled = as_a_gpu_runs(StageTraces(trace, trace), recipe()).first
    assert compiled.part(HEAD) == part
    assert compiled.part(LAYER).moved_bytes == 100.0 * COMPILED[LAYER]
    for change in ({"compile": False}, {"hidden_dropout": 0.1}):
        assert as_a_gpu_runs(StageTraces(trace, trace), recipe(**change)).first is trace
