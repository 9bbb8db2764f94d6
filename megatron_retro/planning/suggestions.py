"""Other layouts of the same recipe: the change that makes it fit, and the fastest ones for a cluster.

A search scales traces of single samples; what is recommended is planned from a trace of its own, so that its flags give
the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate, combinations, pairwise, product
from typing import Any

from megatron_retro.assembly.stage_building import trained_parts
from megatron_retro.config.command_line import UNSET, opposite
from megatron_retro.config.data import DataConfig
from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.fields import FieldSpec, field_specs
from megatron_retro.config.hardware import Accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import violations
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.errors import Violation
from megatron_retro.parallel.partition import best_partition, improved_partition, layer_costs
from megatron_retro.planning.plan import Plan, make_plan
from megatron_retro.planning.ranks import in_order
from megatron_retro.planning.schedule import NO_TIME, StageSeconds, orders_of, pipeline_seconds
from megatron_retro.planning.step_time import part_seconds
from megatron_retro.planning.trace import ENCODER, HEAD, LAYERS, StageTraces, trace_stages
from megatron_retro.planning.workload import Layout, layout_of
from megatron_retro.runtime.console import readable_bytes

_TENSOR_SIZES = (1, 2, 4, 8)
_PIPELINE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
_STAGES_PER_RANK = (1, 2, 3, 4, 6)
_MICRO_BATCHES = (1, 2, 4, 8)
_RECOMPUTE = ("none", "full")
_SIMULATED_ACTIONS = 200_000  # in the search for a better partition: about a second
_WORTH_SAYING = 0.002


def structural_faults(settings: Settings) -> list[Violation]:
    """Broken rules between settings, and between settings and the number of processes."""
    found = violations(settings, settings[PlanningConfig].world_size())
    found += [*_missing_vocabulary(settings), *_sequence_against_chunk(settings)]
    unique = {(violation.field, str(violation.got)): violation for violation in found}
    return list(unique.values())


def _missing_vocabulary(settings: Settings) -> Iterator[Violation]:
    if settings[ModelConfig].vocab_size is None:
        yield Violation("vocab_size", None, "the size of the vocabulary", "a plan opens no tokenizer: set it")


def _sequence_against_chunk(settings: Settings) -> Iterator[Violation]:
    data, retro = settings[DataConfig], settings[RetroConfig]
    if retro.retro_add_retriever and data.seq_length % retro.retro_chunk_length:
        below = data.seq_length // retro.retro_chunk_length * retro.retro_chunk_length
        yield Violation(
            "seq_length",
            data.seq_length,
            f"a multiple of --retro-chunk-length {retro.retro_chunk_length}",
            f"as {max(below, retro.retro_chunk_length)} or {below + retro.retro_chunk_length}",
        )


def memory_faults(plan: Plan, margin: float) -> list[Violation]:
    """Does the fullest rank fit?"""
    usable = plan.machine.memory_bytes * (1 - margin)
    if plan.peak_memory <= usable:
        return []
    rank = max(range(len(plan.memory)), key=lambda index: plan.memory[index].total)
    kind, size = max(plan.memory[rank].rows(), key=lambda row: row[1])
    change = fitting_change(plan, usable)
    return [
        Violation(
            "plan_hardware",
            f"{plan.machine.name}, {readable_bytes(plan.peak_memory)} needed on pipeline rank {rank} "
            f"({readable_bytes(size)} of it {kind})",
            f"at most {readable_bytes(usable)} ({plan.machine.memory_gb:g} GB less {margin:.0%})",
            change or "no one or two changes of the layout make it fit: try --suggest, or more nodes",
        )
    ]


def fitting_change(plan: Plan, usable: float) -> str | None:
    """The mildest change, or pair of changes, under which the run fits."""
    single, traces = list(_changes(plan.layout)), _Traces(plan.settings)
    for chosen in [*((change,) for change in single), *combinations(single, 2)]:
        fields = {field: value for change in chosen for field, value in change.items()}
        if len(fields) < sum(map(len, chosen)):
            continue  # two values for one field
        layout = replace(plan.layout, **fields)
        settings = layout.applied_to(plan.settings)
        if not structural_faults(settings):
            other = make_plan(settings, plan.machine, traces=traces.exact(settings, layout))
            if other.peak_memory <= usable:
                return f"{' '.join(flags_between(plan.settings, settings))} fits ({other.peak_memory / 1e9:.1f} GB)"
    return None


def _changes(layout: Layout) -> Iterator[dict[str, Any]]:
    """What lowers memory, mildest first."""
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield {"sequence_parallel": True}
    if layout.sharding == "none" and layout.data > 1:
        yield {"sharding": "optimizer"}
    if layout.micro_batch > 1:
        yield {"micro_batch": 1}
    for granularity in _RECOMPUTE[_RECOMPUTE.index(layout.recompute) + 1 :]:
        yield {"recompute": granularity}
    for size in (layout.tensor * 2, layout.tensor * 4):
        if size <= layout.gpus_per_node:
            yield {"tensor": size}
    for size in (layout.pipeline * 2, layout.pipeline * 4):
        yield {"pipeline": size, "pipeline_layout": None}
    if layout.sharding != "full" and layout.data > 1 and layout.pipeline == 1:
        yield {"sharding": "full"}


def better_partition(plan: Plan) -> tuple[str, float] | None:
    """A `--pipeline-layout` under which a step takes less time, and by which share; None where none was found."""
    layout = plan.layout
    if layout.pipeline == 1:
        return None
    before, layers, behind = _seconds_of_parts(plan)

    def seconds(sizes: tuple[int, ...]) -> float:
        starts = [0, *accumulate(sizes)]
        stages = [sum(layers[start:stop], NO_TIME) for start, stop in pairwise(starts)]
        stages[0], stages[-1] = stages[0] + before, stages[-1] + behind
        return pipeline_seconds(layout, plan.microbatches, stages)

    now = tuple(len(stage.layers) for stage in plan.stages)
    even = best_partition(layer_costs(plan.work.model, plan.work.retro, plan.work.seq_length), len(now))
    tries = _SIMULATED_ACTIONS // sum(map(len, orders_of(layout, plan.microbatches)))
    best = min((improved_partition(sizes, seconds, tries) for sizes in sorted({now, even})), key=seconds)
    gain = 1 - seconds(best) / seconds(now)
    return (",".join(map(str, best)), gain) if gain > _WORTH_SAYING else None


def _seconds_of_parts(plan: Plan) -> tuple[StageSeconds, list[StageSeconds], StageSeconds]:
    """Before the decoder's layers; of each layer with its encoder; behind the layers."""
    before, layers, behind = NO_TIME, [], NO_TIME
    for name, part in (pair for stage in in_order(plan.ranks) for pair in stage.parts):
        seconds = part_seconds(part, plan.layout, plan.machine)
        if name in LAYERS:
            layers.append(seconds)
        elif name == ENCODER:
            layers[-1] += seconds
        elif name == HEAD:
            behind += seconds
        elif not layers:
            before += seconds
    return before, layers, behind


def suggestions(settings: Settings, machine: Accelerator, number: int = 5) -> list[Plan]:
    """The fastest layouts that fit, fastest first, at most one for each way of cutting the model."""
    usable = machine.memory_bytes * (1 - settings[PlanningConfig].plan_memory_margin)
    traces = _Traces(settings)
    best: dict[tuple[int, int, int], Plan] = {}
    for layouts in _layouts(settings):
        for layout in layouts:
            changed = layout.applied_to(settings)
            if layout_of(changed) != layout or structural_faults(changed):
                break
            plan = make_plan(changed, machine, traces=traces.scaled(changed, layout))
            if plan.peak_memory <= usable:  # what recomputes more is slower
                key = (layout.tensor, layout.pipeline, layout.stages_per_rank)
                best[key] = min((plan, best.get(key, plan)), key=lambda each: each.time.total)
                break
    nearly = sorted(best.values(), key=lambda plan: plan.time.total)[: number + 1]
    exact = [make_plan(plan.settings, machine, traces=traces.exact(plan.settings, plan.layout)) for plan in nearly]
    return sorted((plan for plan in exact if plan.peak_memory <= usable), key=lambda plan: plan.time.total)[:number]


class _Traces:
    """Traces of each way of cutting and recomputing a layer, for each size of microbatch."""

    def __init__(self, settings: Settings) -> None:
        self._frozen = not trained_parts(settings).decoder
        self._known: dict[tuple[Any, ...], StageTraces] = {}

    def exact(self, settings: Settings, layout: Layout) -> StageTraces:
        """For a recipe in this layout."""
        border = self._frozen and layout.pipeline > 1
        key = (layout.tensor, layout.sequence_parallel, layout.context, layout.recompute, layout.micro_batch, border)
        if key not in self._known:
            self._known[key] = trace_stages(settings)
        return self._known[key]

    def scaled(self, settings: Settings, layout: Layout) -> StageTraces:
        """Nearly the same: of one sample, times the samples of a microbatch."""
        one = self.exact(settings.replace(micro_batch_size=1), replace(layout, micro_batch=1))
        return one.times(layout.micro_batch)


def _layouts(settings: Settings) -> Iterator[list[Layout]]:
    """Layouts that differ in what they recompute, least first."""
    planning, batch = settings[PlanningConfig], settings[TrainingConfig].global_batch_size
    context = settings[ParallelConfig].context_parallel_size
    choices = product(_TENSOR_SIZES, _PIPELINE_SIZES, _STAGES_PER_RANK, _MICRO_BATCHES, ("optimizer", "full"))
    for tensor, pipeline, stages_per_rank, micro_batch, sharding in choices:
        if (pipeline == 1 and stages_per_rank > 1) or (pipeline > 1 and sharding == "full"):
            continue
        layout = Layout(
            world_size=planning.world_size(),
            gpus_per_node=planning.plan_gpus_per_node,
            tensor=tensor,
            sequence_parallel=tensor > 1,
            context=context,
            pipeline=pipeline,
            stages_per_rank=stages_per_rank,
            schedule="interleaved" if stages_per_rank > 1 else "1f1b",
            sharding=sharding,
            micro_batch=micro_batch,
        )
        divides = tensor <= layout.gpus_per_node and layout.world_size % (tensor * context * pipeline) == 0
        if divides and layout.microbatches(batch) >= pipeline:
            yield [replace(layout, recompute=granularity) for granularity in _RECOMPUTE]


def flags_between(before: Settings, after: Settings) -> list[str]:
    """The flags that turn one recipe into another."""
    return [
        _flag(spec, getattr(section, spec.name))
        for section in after
        if section != before[type(section)]
        for spec in field_specs(section.__class__)
        if getattr(section, spec.name) != getattr(before[type(section)], spec.name)
    ]


def _flag(spec: FieldSpec, value: Any) -> str:
    if spec.kind is bool:
        return spec.flag if value else opposite(spec.flag)
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([spec.flag, *(UNSET if each is None else str(each) for each in values)])
