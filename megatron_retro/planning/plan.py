"""The plan of a recipe on a cluster: every number that is printed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_retro.artifacts.files import write_file
from megatron_retro.assembly.stage_building import checkpoint_bytes, stage_on_meta
from megatron_retro.config.hardware import Accelerator
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import MegatronRetroError
from megatron_retro.ops.local_tensors import local
from megatron_retro.parallel.partition import StagePart, stage_parts
from megatron_retro.planning.compiled_layers import as_a_gpu_runs
from megatron_retro.planning.fake_device import GPU, fake_rank
from megatron_retro.planning.memory import Memory, rank_memory
from megatron_retro.planning.ranks import RankCosts, rank_costs
from megatron_retro.planning.step_time import (
    CommunicationVolume,
    StepTime,
    communication_volume,
    stage_seconds,
    step_time,
)
from megatron_retro.planning.trace import StageTraces, trace_stages
from megatron_retro.planning.workload import Layout, Workload, layout_of, workload_of
from megatron_retro.runtime.strict_json import json_text


@dataclass(frozen=True)
class Plan:
    """A recipe on a machine's accelerators."""

    settings: Settings
    work: Workload
    layout: Layout
    machine: Accelerator
    stages: tuple[StagePart, ...]
    ranks: tuple[RankCosts, ...]
    memory: tuple[Memory, ...]
    time: StepTime
    volume: tuple[CommunicationVolume, ...]

    @property
    def microbatches(self) -> int:
        """Microbatches of one step on one replica."""
        return self.layout.microbatches(self.work.global_batch)

    @property
    def num_steps(self) -> float:
        """Steps of the run."""
        return self.work.num_samples / self.work.global_batch

    @property
    def hours(self) -> float:
        """Wall time of the run."""
        return self.num_steps * self.time.total / 3600

    @property
    def gpu_hours(self) -> float:
        """Accelerator hours of the run."""
        return self.hours * self.layout.world_size

    @property
    def utilization(self) -> float:
        """Counted operations (nothing recomputed) over what the data sheet allows."""
        flops = self.work.training_flops * self.work.global_batch * self.work.seq_length
        return flops / self.time.total / (self.layout.world_size * self.machine.peak_tflops * 1e12)

    @property
    def bubble(self) -> float:
        """Idle share of the pipeline, in units of the busy time."""
        time = self.time
        return time.bubble / (time.compute + time.memory + time.tensor + time.context)

    @property
    def peak_memory(self) -> float:
        """Bytes on the fullest rank."""
        return max(memory.total for memory in self.memory)

    @property
    def over_mean(self) -> float:
        """By how much longer than the mean the slowest pipeline rank is busy: 0.03 is 3 %."""
        busy = [0.0] * self.layout.pipeline
        for number, seconds in enumerate(stage_seconds(self.ranks, self.layout, self.machine)):
            busy[number % self.layout.pipeline] += seconds.forward + seconds.backward
        return max(busy) * len(busy) / sum(busy) - 1


def make_plan(
    settings: Settings, machine: Accelerator, *, traces: StageTraces | None = None, device: torch.device = GPU
) -> Plan:
    """Work everything out; `traces` saves the tracing where it is known."""
    work, layout = workload_of(settings), layout_of(settings)
    stages = stage_parts(settings, work.seq_length)
    traces = as_a_gpu_runs(traces or trace_stages(settings, device), settings)
    ranks = rank_costs(settings, traces, stages)
    return Plan(
        settings=settings,
        work=work,
        layout=layout,
        machine=machine,
        stages=stages,
        ranks=ranks,
        memory=tuple(rank_memory(rank, work, layout) for rank in ranks),
        time=step_time(ranks, work, layout, machine),
        volume=tuple(communication_volume(rank, work, layout) for rank in ranks),
    )


class PlanIsWrong(MegatronRetroError):
    """What a plan counts and what the trainer builds disagree: a fault of ours."""


def build_shards(plan: Plan) -> int:
    """Build every distinct rank's stages at the real world size, and count what they hold; the number of ranks.

    Tensor ranks hold equal parts and data ranks the same ones, so one rank of each pipeline place stands for all.
    """
    apart = plan.layout.world_size // plan.layout.pipeline
    for rank in plan.ranks:
        with fake_rank(rank.rank * apart, plan.layout.world_size, plan.settings[ParallelConfig]) as mesh:
            models = [stage_on_meta(plan.settings, stage.part, mesh).model for stage in rank.stages]
            held = {id(each): each for model in models for each in model.parameters()}.values()
            sizes = [(local(each).numel(), each.requires_grad) for each in held]
        found = (sum(size for size, _ in sizes), sum(size for size, trains in sizes if trains))
        expected = (rank.total.parameters, rank.total.trained_parameters)
        if found != expected:
            raise PlanIsWrong(
                f"pipeline rank {rank.rank} holds and trains other parameters than planned",
                got=found,
                expected=expected,
            )
    return len(plan.ranks)


def write_figures(plan: Plan, path: Path, more: Mapping[str, Any]) -> None:
    """Write the numbers as JSON, for programs."""
    write_file(path, json_text({**figures(plan), **more}, indent=1) + "\n")


def figures(plan: Plan) -> dict[str, Any]:
    """Every number, in bytes, seconds and hours."""
    return {
        "layout": asdict(plan.layout),
        "hardware": asdict(plan.machine),
        "parameters": plan.work.parameters,
        "training_flops_per_token": plan.work.training_flops,
        "microbatches": plan.microbatches,
        "ranks": [
            {
                "rank": rank.rank,
                "layers": rank.layers,
                "parameters": rank.total.parameters,
                "memory": dict(memory.rows()),
                "memory_total": memory.total,
                "sent": asdict(volume),
            }
            for rank, memory, volume in zip(plan.ranks, plan.memory, plan.volume, strict=True)
        ],
        "checkpoint_bytes": checkpoint_bytes(plan.settings),
        "balance_over_mean": plan.over_mean,
        "bubble": plan.bubble,
        "step_seconds": asdict(plan.time) | {"total": plan.time.total},
        "utilization": plan.utilization,
        "hours": plan.hours,
        "gpu_hours": plan.gpu_hours,
    }
