"""The plan's numbers as JSON, for programs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import write_file
from megatron_retro.planning.plan import Plan
from megatron_retro.runtime.strict_json import json_text


def write_figures(plan: Plan, path: Path) -> None:
    """Write them."""
    write_file(path, json_text(figures(plan), indent=1) + "\n")


def figures(plan: Plan) -> dict[str, Any]:
    """Every number, in bytes, seconds and hours."""
    return {
        "layout": asdict(plan.layout),
        "hardware": asdict(plan.machine),
        "parameters": plan.work.costs.parameters,
        "training_flops_per_token": plan.work.training_flops,
        "microbatches": plan.microbatches,
        "ranks": [
            {
                "rank": rank.rank,
                "layers": rank.layers,
                "parameters": rank.parameters,
                "memory": dict(memory.rows()),
                "memory_total": memory.total,
                "sent": asdict(traffic),
            }
            for rank, memory, traffic in zip(plan.ranks, plan.memory, plan.traffic, strict=True)
        ],
        "balance_over_mean": plan.cut.over_mean,
        "best_balance_over_mean": plan.optimum.over_mean,
        "best_balance_is_proven": plan.optimum.proven,
        "bubble": plan.bubble,
        "step_seconds": asdict(plan.time) | {"total": plan.time.total},
        "utilization": plan.utilization,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
    }
