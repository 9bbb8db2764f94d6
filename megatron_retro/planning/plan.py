"""The plan of a recipe on a cluster: every number that the report prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_retro.assembly.stage_building import padded_for_cut
from megatron_retro.config.hardware import Accelerator
from megatron_retro.parallel.partition import layer_costs
from megatron_retro.planning.cut import Cut, best_cut, cut_from_bounds
from megatron_retro.planning.memory import Memory, rank_memory
from megatron_retro.planning.ranks import RankPlan, layer_counts, rank_plans
from megatron_retro.planning.step_time import StepTime, Traffic, bubble_share, step_time, step_traffic
from megatron_retro.planning.trace import Trace, trace_parts
from megatron_retro.planning.workload import Layout, Workload


@dataclass(frozen=True)
class Plan:
    """A workload on a layout of a machine's accelerators."""

    work: Workload
    layout: Layout
    machine: Accelerator
    ranks: tuple[RankPlan, ...]
    memory: tuple[Memory, ...]
    time: StepTime
    traffic: tuple[Traffic, ...]
    cut: Cut
    optimum: Cut

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
        return bubble_share(self.layout, self.microbatches)

    @property
    def peak_memory(self) -> float:
        """Bytes on the fullest rank."""
        return max(memory.total for memory in self.memory)


def estimate_build(
    work: Workload,
    layout: Layout,
    machine: Accelerator,
    *,
    counts: Sequence[int] | None = None,
    traced: Trace | None = None,
    prove: bool = True,
) -> Plan:
    """Work everything out; `traced` saves the tracing where it is known, `prove=False` the search for the optimum."""
    work = replace(work, model=padded_for_cut(work.model, layout.tensor))
    traced = traced or trace_parts(work, layout)
    counts = layer_counts(work, layout, counts)
    ranks = rank_plans(work, layout, traced, counts)
    costs = layer_costs(work.model, work.retro, work.seq_length)
    bounds = [sum(counts[:piece]) for piece in range(len(counts) + 1)]
    cut = cut_from_bounds(costs, bounds, layout.pipeline)
    return Plan(
        work=work,
        layout=layout,
        machine=machine,
        ranks=ranks,
        memory=tuple(rank_memory(rank, work, layout) for rank in ranks),
        time=step_time(ranks, work, layout, machine),
        traffic=tuple(step_traffic(rank, work, layout) for rank in ranks),
        cut=cut,
        optimum=best_cut(costs, layout.pipeline, layout.pieces_per_rank) if prove else cut,
    )
