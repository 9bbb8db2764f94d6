"""What the 48B recipe reaches on 128 x 8 GPUs, and what is counted for it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.distributed.pipelining.schedules import _ComputationType

from megatron_retro.config.data import DataConfig
from megatron_retro.config.hardware import accelerator
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.parallel.mesh import PIPELINE
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.parallel.schedules import Boundary, build_schedule
from megatron_retro.parallel.stages import Stage
from megatron_retro.planning.fake_device import fake_rank
from megatron_retro.planning.memory import evaluation_memory
from megatron_retro.planning.plan import Plan, make_plan
from megatron_retro.planning.reach import reach_of
from megatron_retro.planning.schedule import gathers_per_step, most_received
from megatron_retro.planning.trace import trace_parts
from megatron_retro.planning.workload import Layout
from tests.examples.test_recipes import settings
from tests.planning.recipes import recipe


@pytest.fixture(scope="module")
def large() -> Plan:
    return make_plan(settings("retrofit", "48b"), accelerator("H100"))


def test_the_48b_on_1024_gpus(large: Plan) -> None:
    reach = reach_of(large)
    assert large.layout.world_size == 1024
    assert reach.gathers == 1
    assert reach.evaluation_bytes < reach.training_bytes < 60e9
    assert reach.host_waits == 1
    assert reach.sockets <= 32
    assert 0 < reach.numbers_drawn < large.ranks[1].total.parameters


def test_the_48b_recomputes_what_is_best(large: Plan) -> None:
    """It fits as it is, and nothing that recomputes more is faster."""
    full = make_plan(large.settings.replace(recompute_granularity="full"), accelerator("H100"))
    assert large.layout.recompute == "none"
    assert large.time.total < full.time.total


@pytest.mark.parametrize("schedule", ["interleaved", "zero-bubble"])
@pytest.mark.parametrize("sharding", ["optimizer", "full"])
def test_gathers_are_those_of_the_schedule_that_the_trainer_builds(schedule: str, sharding: str) -> None:
    cut = {"pipeline_model_parallel_size": 2, "pipeline_schedule": schedule, "num_layers_per_virtual_pipeline_stage": 1}
    changed = recipe(num_layers=8, **cut)
    parts = stage_parts(changed, changed[DataConfig].seq_length)
    with fake_rank(0, 2, changed[ParallelConfig]) as mesh:
        own = [Stage(torch.nn.Identity(), part, None) for part in parts[::2]]  # type: ignore[arg-type]
        boundary = Boundary((1, 8, 8), None, (1, 8), torch.float32)
        how = {"training": True, "gather_once": sharding != "full"}
        built = build_schedule(schedule, own, 8, boundary, mesh.device, mesh.group(PIPELINE), **how)
    counts = [
        Counter(each.stage_index for each in order if each.computation_type == _ComputationType.UNSHARD)
        for order in built.pipeline_order_with_comms.values()
    ]
    layout = Layout(4, pipeline=2, stages_per_rank=4, schedule=schedule, sharding=sharding)
    assert gathers_per_step(layout, 8) == max(max(each.values()) for each in counts)
    assert (gathers_per_step(layout, 8) == 1) == (sharding == "optimizer")


def test_nothing_is_gathered_where_nothing_is_sharded() -> None:
    assert gathers_per_step(Layout(4, sharding="none"), 8) == gathers_per_step(Layout(1, sharding="full"), 8) == 0
    assert gathers_per_step(Layout(4, sharding="full"), 8) == 16


def test_an_evaluation_holds_weights_one_part_and_borders() -> None:
    """By hand: no gradients, no moments of replicas, logits by blocks; a stage may have received all of a group."""
    plan = make_plan(recipe(plan_gpus_per_node=1), accelerator("H100"))
    working = {name: part.working_bytes for name, part in trace_parts(plan.settings, evaluating=True).parts.items()}
    (found,) = evaluation_memory(plan.ranks, plan.work, plan.layout, working)
    parameters = plan.ranks[0].total.parameters
    kept = parameters * (4 + 2 + 8)
    assert kept < found < kept + 8 * 512 * 4096 * 4
    assert found < plan.peak_memory
    assert most_received(2, 4, 8, dict.fromkeys(range(4), 1.0))[1] <= 8
    assert most_received(1, 1, 8, {0: 0.0}) == [0.0]


def test_a_gate_that_learns_its_rate_costs_one_wait_more() -> None:
    plain, gated = (make_plan(recipe(retro_gate_type=kind), accelerator("H100")) for kind in ("fixed", "adaptive"))
    assert (reach_of(plain).host_waits, reach_of(gated).host_waits) == (1, 2)
    waiting = replace(plain.ranks[0], total=replace(plain.ranks[0].total, host_waits=1))
    assert reach_of(replace(plain, ranks=(waiting,))).host_waits == 1 + plain.microbatches
