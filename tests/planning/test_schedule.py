"""Orders of torch's schedules: what they hold and how long they take, by hand where a hand can tell."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.distributed.pipelining.schedules import _ComputationType

from megatron_retro.config.data import DataConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.parallel.mesh import PIPELINE
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.parallel.schedules import Boundary, build_schedule
from megatron_retro.parallel.stages import Stage
from megatron_retro.planning.fake_device import fake_rank
from megatron_retro.planning.schedule import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Action,
    StageSeconds,
    most_held,
    orders_of,
    pipeline_seconds,
    simulated_seconds,
)
from megatron_retro.planning.workload import Layout
from tests.planning.recipes import recipe

LAYOUT = Layout(4, pipeline=4)
INTERLEAVED = replace(LAYOUT, schedule="interleaved", stages_per_rank=2)
ZERO_BUBBLE = replace(LAYOUT, schedule="zero-bubble")
LAYOUTS = [LAYOUT, replace(LAYOUT, schedule="gpipe"), INTERLEAVED, ZERO_BUBBLE]
EVEN = StageSeconds(1.0, 2.0)


@pytest.mark.parametrize("layout", [INTERLEAVED, ZERO_BUBBLE], ids=lambda layout: layout.schedule)
def test_orders_are_those_of_the_schedule_that_the_trainer_builds(layout: Layout) -> None:
    split = {"num_layers_per_virtual_pipeline_stage": 1} if layout.stages_per_rank > 1 else {}
    cut = {"pipeline_model_parallel_size": 4, "pipeline_schedule": layout.schedule, **split}
    settings = recipe(num_layers=8, **cut)
    parts = stage_parts(settings, settings[DataConfig].seq_length)
    with fake_rank(0, 4, settings[ParallelConfig]) as mesh:
        own = [Stage(torch.nn.Identity(), part, None) for part in parts[::4]]  # type: ignore[arg-type]
        boundary = Boundary((1, 8, 8), None, (1, 8), torch.float32)
        group, how = mesh.group(PIPELINE), {"training": True, "gather_once": True}
        built = build_schedule(layout.schedule, own, 8, boundary, mesh.device, group, **how)
    kinds = {
        _ComputationType.FORWARD: FORWARD,
        _ComputationType.FULL_BACKWARD: BACKWARD,
        _ComputationType.BACKWARD_INPUT: INPUT,
        _ComputationType.BACKWARD_WEIGHT: WEIGHT,
    }
    for rank, order in enumerate(orders_of(layout, 8)):
        actions = [action for action in built.pipeline_order[rank] if action is not None]
        found = [Action(kinds[each.computation_type], each.stage_index, each.microbatch_index) for each in actions]
        assert list(order) == found


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.schedule)
def test_every_microbatch_passes_every_stage_once_each_way(layout: Layout) -> None:
    orders, stages = orders_of(layout, 8), layout.pipeline * layout.stages_per_rank
    for rank, order in enumerate(orders):
        own = {(stage, number) for stage in range(rank, stages, layout.pipeline) for number in range(8)}
        passes = [(action.stage, action.microbatch) for action in order if action.kind == FORWARD]
        back = [(action.stage, action.microbatch) for action in order if action.kind in (BACKWARD, INPUT)]
        assert (len(passes), set(passes), len(back), set(back)) == (len(own), own, len(own), own)
        for stage, number in own:
            forward = order.index(Action(FORWARD, stage, number))
            assert forward < min(
                place for place, each in enumerate(order) if each[1:] == (stage, number) and each[0] != FORWARD
            )


def test_microbatches_on_their_way_are_those_of_the_schedules() -> None:
    held = dict.fromkeys(range(8), 1.0)
    assert [most_held(order, held) for order in orders_of(LAYOUT, 8)] == [(4, 3), (3, 2), (2, 1), (1, 0)]
    gpipe = replace(LAYOUT, schedule="gpipe")
    assert [most_held(order, held) for order in orders_of(gpipe, 8)] == [(8, 7)] * 4
    assert orders_of(LAYOUT, 3) == orders_of(gpipe, 3), "too few for 1F1B, as the trainer has it"
    assert [most_held(order, held)[0] for order in orders_of(INTERLEAVED, 8)] == [11, 9, 7, 5]
    assert most_held(orders_of(Layout(1), 8)[0], held) == (1, 0)


def test_what_stages_hold_differs() -> None:
    """A rank's fullest moment is found with the stages' own sizes: all forwards of the large one wait for the small."""
    large_first, large_last = {0: 9.0, 4: 1.0}, {0: 1.0, 4: 9.0}
    order = orders_of(INTERLEAVED, 8)[0]
    assert most_held(order, large_first)[0] > most_held(order, large_last)[0]


@pytest.mark.parametrize("microbatches", [8, 16, 64])
def test_bubbles_of_even_stages_are_the_published_ones(microbatches: int) -> None:
    """(p - 1) / m of 1F1B and GPipe, / v of interleaving, a third of it of ZB-H1."""
    for layout, bubble in (
        (LAYOUT, 3 / microbatches),
        (replace(LAYOUT, schedule="gpipe"), 3 / microbatches),
        (INTERLEAVED, 3 / microbatches / 2),
        (ZERO_BUBBLE, 3 / microbatches / 3),
    ):
        busy = 3.0 * microbatches * layout.stages_per_rank
        stages = [EVEN] * layout.pipeline * layout.stages_per_rank
        assert pipeline_seconds(layout, microbatches, stages) == pytest.approx(busy * (1 + bubble))


def test_many_microbatches_are_some_and_their_further_rounds() -> None:
    stages = [StageSeconds(*pair) for pair in ((1, 2), (2, 3), (1, 3), (1, 1), (3, 4), (1, 2), (1, 2), (2, 2))]
    for layout in (replace(INTERLEAVED, pipeline=4), replace(ZERO_BUBBLE, stages_per_rank=2)):
        whole = simulated_seconds(orders_of(layout, 80), stages)
        assert pipeline_seconds(layout, 80, stages) == pytest.approx(whole, rel=1e-9)


def test_even_ranks_of_uneven_stages_wait_for_each_other() -> None:
    """Each rank holds 8 seconds of forward; the schedule still loses a second a round where stages are uneven."""
    layout = Layout(2, pipeline=2, schedule="interleaved", stages_per_rank=2)
    even = [StageSeconds(4, 8)] * 4
    uneven = [StageSeconds(6, 12), StageSeconds(2, 4), StageSeconds(2, 4), StageSeconds(6, 12)]
    assert pipeline_seconds(layout, 8, uneven) > 1.08 * pipeline_seconds(layout, 8, even)
