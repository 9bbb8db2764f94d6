"""Suggested layouts are legal, fit, are the fastest first, and their printed flags give the same plan."""

from __future__ import annotations

import itertools
import random
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.hardware import accelerator, read_hardware
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import ALL_SECTIONS, violations
from megatron_retro.config.settings import Settings
from megatron_retro.config.toml_files import render_toml
from megatron_retro.config.training import TrainingConfig
from megatron_retro.parallel.partition import best_partition, improved_partition
from megatron_retro.planning.plan import figures, make_plan
from megatron_retro.planning.suggestions import better_partition, flags_between, structural_faults, suggestions
from megatron_retro.planning.workload import Layout, layout_of
from tests.planning.recipes import recipe

A100 = accelerator("A100")


def pasted(settings: Settings, flags: list[str], directory: Path) -> Settings:
    """The recipe as a file, with the printed flags on the command line; flags ask for nothing but layouts."""
    changing = [settings[ParallelConfig], settings[TrainingConfig]]
    path = directory / "recipe.toml"
    path.write_text(render_toml(Settings(changing)))
    words = ["--config", str(path), *shlex.split(" ".join(flags))]
    parsed, _ = parse_settings("plan", [*map(type, changing)], words, all_sections=ALL_SECTIONS)
    others = [section for section in settings if type(section) not in (ParallelConfig, TrainingConfig)]
    return Settings([*others, *parsed])


def values(settings: Settings) -> dict[type, Any]:
    return {type(section): section for section in settings}


def random_recipe(draw: random.Random) -> Settings:
    """A model of any shape on a cluster of any size, in a layout that its recipe need not be able to run."""
    heads, nodes, gpus = draw.choice((4, 6, 8, 16)), draw.choice((1, 2, 3, 8)), draw.choice((1, 4, 8))
    shape: dict[str, Any] = {
        "num_layers": draw.choice((4, 6, 8, 12)),
        "hidden_size": 16 * heads,
        "num_attention_heads": heads,
        "ffn_hidden_size": draw.choice((None, 96, 200)),
        "swiglu": draw.random() < 0.5,
        "retro_add_retriever": draw.random() < 0.7,
        "retro_layers": (2, 4),
        "retro_encoder_num_attention_heads": draw.choice((None, 2, heads)),
        "seq_length": draw.choice((128, 192, 512)),
        "global_batch_size": draw.choice((8, 12, 48, 96)),
        "plan_nodes": nodes,
        "plan_gpus_per_node": gpus,
        "plan_hardware": draw.choice(list(read_hardware())),
    }
    parallel = {
        "tensor_model_parallel_size": draw.choice((1, 2, 3)),
        "sequence_parallel": draw.random() < 0.5,
        "pipeline_model_parallel_size": draw.choice((1, 2)),
        "num_layers_per_virtual_pipeline_stage": draw.choice((None, 1, 2)),
        "pipeline_schedule": draw.choice(("1f1b", "interleaved", "zero-bubble")),
        "pipeline_layout": draw.choice((None, "1,3", "2,2")),
        "data_parallel_sharding": draw.choice(("none", "optimizer", "full")),
        "use_distributed_optimizer": draw.random() < 0.3,
        "recompute_granularity": draw.choice(("none", "full")),
        "micro_batch_size": draw.choice((1, 2)),
    }
    return recipe(**shape, **parallel)


def random_layout(draw: random.Random, settings: Settings) -> Layout:
    tensor, pipeline = draw.choice((1, 2, 4)), draw.choice((1, 2, 4))
    stages = draw.choice((1, 2)) if pipeline > 1 else 1
    return replace(
        layout_of(settings),
        tensor=tensor,
        sequence_parallel=tensor > 1,
        pipeline=pipeline,
        stages_per_rank=stages,
        schedule="interleaved" if stages > 1 else "1f1b",
        pipeline_layout=None,
        sharding=draw.choice(("none", "optimizer", "full")),
        recompute=draw.choice(("none", "full")),
        micro_batch=draw.choice((1, 2, 4)),
    )


def test_printed_flags_give_the_same_recipe_and_so_the_same_plan(
    tmp_path: Path, count: Callable[[int, int], int]
) -> None:
    """Whatever the recipe says (interleaving, layouts by hand, shardings), nothing stays that is not suggested."""
    draw, planned = random.Random(11), 0
    for _ in range(count(200, 2000)):
        settings = random_recipe(draw)
        layout = random_layout(draw, settings)
        suggested = layout.applied_to(settings)
        again = pasted(settings, flags_between(settings, suggested), tmp_path)
        assert values(again) == values(suggested)
        if layout_of(suggested) != layout or structural_faults(suggested):
            continue
        planned += 1
        if planned <= 3:
            machine = accelerator(settings[PlanningConfig].plan_hardware)
            assert figures(make_plan(again, machine)) == figures(make_plan(suggested, machine))
    assert planned > 20


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2, "pipeline_layout": "1,2,3,2"},
        {"freeze_decoder": True, "plan_nodes": 2},
    ],
    ids=str,
)
def test_suggestions_are_legal_fit_and_come_fastest_first(changes: dict[str, Any], tmp_path: Path) -> None:
    settings = recipe(**{"pipeline_schedule": "interleaved", **changes}) if changes else recipe()
    found = suggestions(settings, A100)
    assert 1 <= len(found) <= 5
    for plan in found:
        assert violations(plan.settings, plan.layout.world_size) == []
        assert plan.peak_memory <= A100.memory_bytes * 0.92
        again = pasted(settings, flags_between(settings, plan.settings), tmp_path)
        assert values(again) == values(plan.settings)
    for plan in (found[0], found[-1]):
        assert figures(make_plan(plan.settings, A100)) == figures(plan), "to the digit"
    times = [plan.time.total for plan in found]
    assert times == sorted(times)


@pytest.mark.parametrize(
    "encoder",
    [
        {"retro_encoder_num_attention_heads": 1},
        {"retro_encoder_hidden_size": 33, "retro_encoder_kv_channels": 8, "swiglu": False},
    ],
    ids=str,
)
def test_no_layout_is_suggested_that_cuts_the_encoder_where_it_cannot_be_cut(encoder: dict[str, Any]) -> None:
    """A model that only tensor ranks could make fit: its decoder can be cut in eight, its encoder in one or four."""
    own = {"retro_encoder_own_embedding": True} if "retro_encoder_hidden_size" in encoder else {}
    settings = recipe(hidden_size=1024, **encoder, **own)
    small = replace(A100, memory_gb=2.0)
    assert all(violations(plan.settings, 8) == [] for plan in suggestions(settings, small))
    eight = replace(layout_of(settings), tensor=8, sequence_parallel=True).applied_to(settings)
    assert {fault.field for fault in structural_faults(eight)} <= {
        "retro_encoder_num_attention_heads",
        "retro_encoder_ffn_hidden_size",
    }


def test_moving_layers_takes_what_is_better_and_stops() -> None:
    weights = (5.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 3.0)

    def slowest(sizes: tuple[int, ...]) -> float:
        ends = [0, *itertools.accumulate(sizes)]
        return max(sum(weights[start:stop]) for start, stop in itertools.pairwise(ends))

    best = slowest(best_partition(weights, 3))
    assert slowest(improved_partition((5, 1, 2), slowest, 1000)) == best < slowest((5, 1, 2))
    assert improved_partition((5, 1, 2), slowest, 0) == (5, 1, 2)
    assert improved_partition((1, 1, 6), slowest, 1000)[0] >= 1


def test_a_better_partition_is_better_when_it_is_planned() -> None:
    cut = {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 2, "plan_gpus_per_node": 2}
    settings = recipe(**cut, pipeline_schedule="interleaved", pipeline_layout="5,1,1,1")
    plan = make_plan(settings, A100)
    found = better_partition(plan)
    assert found is not None
    better = make_plan(settings.replace(pipeline_layout=found[0]), A100)
    assert better.time.total < plan.time.total
    assert better_partition(better) is None
