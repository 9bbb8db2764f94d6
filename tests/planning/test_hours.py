"""Planned against published GPU hours."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_retro.config.command_line import parse_settings
from megatron_retro.config.hardware import accelerator
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.planning.plan import make_plan
from megatron_retro.planning.workload import Layout, layout_of

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("size", "retriever", "hours", "layout"),
    [
        ("2.5b", False, 3226, Layout(64, micro_batch=4, sharding="optimizer")),
        ("2.5b", True, 4096, Layout(64, micro_batch=4, sharding="optimizer")),
        ("9.5b", True, 17325, Layout(128, tensor=2, sequence_parallel=True, micro_batch=2, sharding="optimizer")),
    ],
)
def test_planned_gpu_hours_are_near_the_published_ones(
    size: str, retriever: bool, hours: float, layout: Layout
) -> None:
    """100B tokens on A100s, in the fastest layout that fits."""
    words = ["--preset", f"retro-{size}", "--config", str(ROOT / "examples/recipes/retrofit.toml")]
    settings, _ = parse_settings("x", ALL_SECTIONS, words, all_sections=ALL_SECTIONS)
    cluster = {"plan_nodes": layout.world_size // 8, "plan_gpus_per_node": 8}
    settings = layout.applied_to(settings.replace(retro_add_retriever=retriever, **cluster))
    assert layout_of(settings) == layout
    plan = make_plan(settings, accelerator("A100"))
    assert plan.peak_memory < plan.machine.memory_bytes
    assert plan.gpu_hours == pytest.approx(hours, rel=0.2)
