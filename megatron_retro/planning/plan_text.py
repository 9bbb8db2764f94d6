"""The plan as text: what fits, what it takes, where the time and the memory go, what is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from megatron_retro.assembly.stage_building import checkpoint_bytes
from megatron_retro.config.evaluation import PlanningConfig
from megatron_retro.config.hardware import Accelerator, machine_of
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, OptimizerConfig
from megatron_retro.errors import ConfigError, Violation
from megatron_retro.model.costs import ENCODER
from megatron_retro.planning.compiled_layers import compiles_on_a_gpu
from megatron_retro.planning.data_side import data_faults, data_lines
from megatron_retro.planning.inference import inference_report
from megatron_retro.planning.plan import Plan, build_shards, make_plan, write_figures
from megatron_retro.planning.reach import Reach, reach_of
from megatron_retro.planning.step_time import layer_seconds
from megatron_retro.planning.suggestions import (
    better_partition,
    flags_between,
    memory_faults,
    structural_faults,
    suggestions,
)
from megatron_retro.planning.workload import Workload, with_model_shape
from megatron_retro.runtime.console import readable_bytes, readable_count, readable_seconds, render_table

# Of a layer, forward and backward, compiled and eager: host times of benchmarks/step_cost.py; and how many times that
# with tensor ranks, all products in pieces, without what a GPU's collectives take to begin.
HOST_MS, HOST_CPU = {True: 0.7, False: 1.3}, "an AMD EPYC"
TIMES_WHEN_CUT = {True: 4.2, False: 2.9}
TRAINING_VERBS = ("pretrain", "retrofit", "finetune")


def print_plan(settings: Settings, words: Sequence[str] = ()) -> int:
    """Print everything; raises when the recipe cannot run as it stands. The words are the planned verb's, not read."""
    planning = settings[PlanningConfig]
    settings = with_model_shape(settings)
    if planning.plan_for == "evaluate":
        print(inference_report(settings))
        return 0
    if planning.plan_for not in TRAINING_VERBS:
        print("\n".join(data_lines(settings)))
        return 0
    broken = structural_faults(settings)
    machine = machine_of(planning)
    if planning.suggest and not _beyond_layouts(broken):
        print(_suggestions(settings, machine))
        return 0
    if broken:
        raise ConfigError.from_violations(broken)
    return _print_training(settings, planning, machine)


def _beyond_layouts(broken: list[Violation]) -> bool:
    """Faults that another layout cannot heal."""
    return any(violation.field in ("vocab_size", "seq_length", "retro_layers", "hidden_size") for violation in broken)


def _print_training(settings: Settings, planning: PlanningConfig, machine: Accelerator) -> int:
    plan = make_plan(settings, machine)
    shards = build_shards(plan) if planning.plan_shards else 0
    wrong, absent = data_faults(settings)
    reach = reach_of(plan)
    print("\n".join(plan_lines(plan, planning, shards, reach)))
    data = data_lines(settings) if planning.plan_for != "finetune" else []
    print("\n".join(["", *data, *(f"  note: {note}" for note in absent)]))
    if planning.plan_json:
        write_figures(plan, Path(planning.plan_json), {"reach": asdict(reach)})
    faults = [str(fault) for fault in memory_faults(plan, planning.plan_memory_margin)] + wrong
    print()
    if faults:
        listed = "\n".join(f"  {number}. {fault}" for number, fault in enumerate(faults, 1))
        raise ConfigError(f"this cannot run as it stands, {len(faults)} problem(s):\n{listed}")
    usable = machine.memory_bytes * (1 - planning.plan_memory_margin)
    print(f"fits: {readable_bytes(plan.peak_memory)} of {readable_bytes(usable)} on the fullest rank")
    return 0


def plan_lines(plan: Plan, planning: PlanningConfig, num_shards: int, reach: Reach) -> Iterator[str]:
    """The training side."""
    work, layout = plan.work, plan.layout
    yield f"{planning.plan_for} on {planning.plan_nodes} x {planning.plan_gpus_per_node} {plan.machine.name}"
    yield f"  layout       {layout.describe()}, {layout.schedule}, recompute {layout.recompute}"
    yield (
        f"  batch        {work.global_batch} = {layout.replicas} replicas x {plan.microbatches} microbatches "
        f"of {layout.micro_batch}, sequence {work.seq_length}"
    )
    yield f"  parameters   {readable_count(work.parameters)}{_trained(plan)}{_built(num_shards, layout.world_size)}"
    yield f"  FLOPs        {readable_count(work.training_flops)} per token, forward and backward"
    yield from _retrieval_share(work)
    if plan.settings[OptimizerConfig].fp8_format != "none":
        yield "  FP8          layers multiply in eight bits; times and memory below are those of bf16"
    yield ""
    yield _memory_table(plan)
    yield ""
    yield from _balance_lines(plan)
    yield ""
    yield _time_table(plan)
    yield ""
    yield from host_lines(plan)
    yield from _volume_lines(plan)
    yield from _reach_lines(reach)
    yield ""
    yield from _run_lines(plan, planning)


def _trained(plan: Plan) -> str:
    """How many are trained, where not all are; of the fullest rank where there are several."""
    shares = [rank.total.trained_parameters / rank.total.parameters for rank in plan.ranks]
    return "" if min(shares) == 1 else f", {max(shares):.2%} of them trained"


def _built(num_shards: int, world_size: int) -> str:
    if not num_shards:
        return ""
    return f"; {num_shards} distinct shards built on the meta device at world size {world_size}, as counted"


def _retrieval_share(work: Workload) -> Iterator[str]:
    if not work.retro.retro_add_retriever:
        return
    costs = work.costs
    plain = sum(unit.multiply_adds for unit in replace(work, retro=RetroConfig()).costs.units)
    encoder = costs.named(ENCODER).multiply_adds
    cross = costs.forward_flops / 2 - plain - encoder
    layer = costs.named("layers.0").multiply_adds
    yield (
        f"  retrieval    +{(encoder + cross) / plain:.0%} over the GPT: encoder {encoder / plain:.0%} "
        f"(as much as {encoder / layer:.1f} decoder layers), cross-attention {cross / plain:.0%}"
    )


def _memory_table(plan: Plan) -> str:
    kinds = [kind for kind, _ in plan.memory[0].rows()]
    header = ("rank", "layers", "parameters", *kinds, "total (GB)")
    rows = []
    for rank, memory in zip(plan.ranks, plan.memory, strict=True):
        sizes = [*(size for _, size in memory.rows()), memory.total]
        held = readable_count(rank.total.parameters)
        rows.append((rank.rank, rank.layers, held, *(round(size / 1e9, 2) for size in sizes)))
    return render_table(header, rows)


def _balance_lines(plan: Plan) -> Iterator[str]:
    """How even the work is, and how long the pipeline waits."""
    if plan.layout.pipeline == 1:
        return
    yield f"balance       the slowest pipeline rank is busy {plan.over_mean:.1%} longer than the mean"
    better = better_partition(plan)
    if better is None:
        yield "              no partition of the layers was found that takes less time in this schedule"
    else:
        yield f"              --pipeline-layout {better[0]} would take {better[1]:.1%} less time in this schedule"
    yield f"bubble        {plan.bubble / (1 + plan.bubble):.1%} of the step ({plan.microbatches} microbatches)"


def _time_table(plan: Plan) -> str:
    parts = vars(plan.time).items()
    rows = [(name, f"{seconds:.3f}", f"{seconds / plan.time.total:.1%}") for name, seconds in parts]
    return render_table(("step", "seconds", "share"), [*rows, ("all", f"{plan.time.total:.3f}", "")])


def host_lines(plan: Plan) -> Iterator[str]:
    """Where launching a layer takes longer than computing it."""
    computed = 1e3 * layer_seconds(plan.ranks, plan.layout, plan.machine)
    compiled = compiles_on_a_gpu(plan.settings)
    launched = HOST_MS[compiled] * (TIMES_WHEN_CUT[compiled] if plan.layout.tensor > 1 else 1.0)
    if 0 < computed < launched:
        enough = math.ceil(plan.layout.micro_batch * launched / computed)
        yield (
            f"host          sets the pace: a layer takes the GPU {computed:.2f} ms, and a core of {HOST_CPU} "
            f"{launched:.1f} ms to launch; --micro-batch-size {enough} is about as long"
        )


def _volume_lines(plan: Plan) -> Iterator[str]:
    most = {axis: max(getattr(volume, axis) for volume in plan.volume) for axis in vars(plan.volume[0])}
    sent = ", ".join(f"{axis} {readable_bytes(size)}" for axis, size in most.items() if size or axis != "context")
    yield f"sent          {sent} per rank and step"


def _reach_lines(reach: Reach) -> Iterator[str]:
    """What must stay small on a large cluster."""
    yield f"gathers       {reach.gathers} of the parameters of each stage in a step"
    yield (
        f"peak          {readable_bytes(reach.training_bytes)} in training, "
        f"{readable_bytes(reach.evaluation_bytes)} in evaluation, on the fullest rank"
    )
    yield f"host waits    {reach.host_waits} for the device in a step"
    yield f"sockets       {reach.sockets} per rank at most, NCCL's aside"
    yield f"start         {readable_count(reach.numbers_drawn)} numbers drawn on the fullest rank; a resume draws none"


def _run_lines(plan: Plan, planning: PlanningConfig) -> Iterator[str]:
    rate = plan.work.global_batch * plan.work.seq_length / plan.time.total
    yield f"throughput    {readable_count(rate)} tokens/s, {plan.utilization:.1%} of the peak"
    yield (
        f"run           {readable_count(plan.num_steps)} steps, {readable_count(plan.work.num_tokens)} tokens: "
        f"{readable_seconds(plan.hours * 3600)}, {readable_count(plan.gpu_hours)} GPU hours"
    )
    each, kept = checkpoint_bytes(plan.settings), plan.settings[CheckpointConfig].keep_checkpoints
    yield f"checkpoint    {readable_bytes(each)}; --save needs room for {f'{kept + 1}' if kept else 'all'} of them"
    if planning.plan_price_per_gpu_hour is not None:
        yield f"price         {plan.gpu_hours * planning.plan_price_per_gpu_hour:,.0f}"


def _suggestions(settings: Settings, machine: Accelerator) -> str:
    """The best layouts, with the flags that ask for them."""
    plans = suggestions(settings, machine)
    if not plans:
        machines = f"{settings[PlanningConfig].world_size()} x {machine.name}"
        raise ConfigError(f"no layout of this model fits {machines}", fix="take more nodes")
    rows = [
        (
            number,
            plan.layout.describe(),
            plan.layout.micro_batch,
            plan.layout.recompute,
            f"{plan.peak_memory / 1e9:.1f}",
            f"{plan.time.total:.2f}",
            f"{plan.utilization:.1%}",
            readable_count(plan.gpu_hours),
        )
        for number, plan in enumerate(plans, 1)
    ]
    header = ("", "layout", "micro batch", "recompute", "GB", "s/step", "of peak", "GPU hours")
    flags = flags_between(settings, plans[0].settings)
    return "\n".join(
        [render_table(header, rows), "", "the first one, beside what the recipe says:", "  " + " ".join(flags)]
    )
