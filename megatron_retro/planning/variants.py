"""Other layouts of the same workload: the change that makes it fit, and the fastest ones for a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, product

from megatron_retro.config.hardware import Accelerator
from megatron_retro.planning.plan import Plan, estimate_build
from megatron_retro.planning.trace import PartTrace, Trace, trace_parts
from megatron_retro.planning.workload import Layout, Workload

_TENSOR_SIZES = (1, 2, 4, 8)
_PIPELINE_SIZES = (1, 2, 3, 4, 6, 8, 12, 16)
_PIECES = (1, 2, 3, 4, 6)
_MICRO_BATCHES = (1, 2, 4, 8)
_RECOMPUTE = ("none", "selective", "full")


def fitting_change(plan: Plan, usable: float) -> str | None:
    """The mildest change, or pair of changes, under which the run fits."""
    single = list(_changes(plan.layout))
    for chosen in [*((change,) for change in single), *combinations(single, 2)]:
        layout = replace(plan.layout, **{field: value for _, field, value in chosen})  # type: ignore[arg-type]
        if len({field for _, field, _ in chosen}) == len(chosen) and is_legal(plan.work, layout):
            other = estimate_build(plan.work, layout, plan.machine, prove=False)
            if other.peak_memory <= usable:
                flags = " ".join(flag for flag, _, _ in chosen)
                return f"{flags} fits ({other.peak_memory / 1e9:.1f} GB)"
    return None


def _changes(layout: Layout) -> Iterator[tuple[str, str, object]]:
    """Flag, field and value of what lowers memory, mildest first."""
    if layout.tensor > 1 and not layout.sequence_parallel:
        yield "--sequence-parallel", "sequence_parallel", True
    if layout.sharding == "none" and layout.data > 1:
        yield "--data-parallel-sharding optimizer", "sharding", "optimizer"
    if layout.micro_batch > 1:
        yield "--micro-batch-size 1", "micro_batch", 1
    for granularity in _RECOMPUTE[_RECOMPUTE.index(layout.recompute) + 1 :]:
        yield f"--recompute-granularity {granularity}", "recompute", granularity
    for size in (layout.tensor * 2, layout.tensor * 4):
        if size <= layout.gpus_per_node:
            yield f"--tensor-model-parallel-size {size}", "tensor", size
    for size in (layout.pipeline * 2, layout.pipeline * 4):
        yield f"--pipeline-model-parallel-size {size}", "pipeline", size
    if layout.sharding != "full" and layout.data > 1 and layout.pipeline == 1:
        yield "--data-parallel-sharding full", "sharding", "full"


def is_legal(work: Workload, layout: Layout) -> bool:
    """The same rules as `config.sections`, for layouts that no recipe describes."""
    model, per_step = work.model, layout.data * layout.micro_batch
    whole_heads = model.num_attention_heads % layout.tensor == 0 and model.num_key_value_heads() % layout.tensor == 0
    pieces = layout.pipeline * layout.pieces_per_rank
    microbatches = work.global_batch // per_step if per_step else 0
    interleaved = layout.pieces_per_rank == 1 or microbatches % layout.pipeline == 0
    sequence = not layout.sequence_parallel or work.seq_length % layout.tensor == 0
    return (
        layout.world_size % layout.model_ranks == 0
        and whole_heads
        and model.ffn_width() % layout.tensor == 0
        and pieces <= model.num_layers
        and (layout.pieces_per_rank == 1 or model.num_layers % pieces == 0)
        and work.global_batch % per_step == 0
        and (layout.pipeline == 1 or microbatches >= layout.pipeline)
        and interleaved
        and sequence
    )


def suggestions(
    work: Workload, world_size: int, gpus_per_node: int, machine: Accelerator, margin: float, number: int = 5
) -> list[Plan]:
    """The fastest layouts that fit, fastest first, at most one for each way of cutting the model."""
    traces = {
        tensor: trace_parts(work, Layout(world_size, tensor=tensor, sequence_parallel=tensor > 1))
        for tensor in _TENSOR_SIZES
        if tensor <= gpus_per_node and is_cut(work, tensor)
    }
    best: dict[tuple[int, int, int], Plan] = {}
    for layout in _layouts(work, world_size, gpus_per_node, list(traces)):
        traced = _scaled(traces[layout.tensor], layout.micro_batch)
        plan = estimate_build(work, layout, machine, traced=traced, prove=False)
        key = (layout.tensor, layout.pipeline, layout.pieces_per_rank)
        fits = plan.peak_memory <= machine.memory_bytes * (1 - margin)
        if fits and (key not in best or plan.time.total < best[key].time.total):
            best[key] = plan
    return sorted(best.values(), key=lambda plan: plan.time.total)[:number]


def is_cut(work: Workload, tensor: int) -> bool:
    """Whether the model can be cut over so many tensor ranks at all."""
    return is_legal(replace(work, global_batch=1), Layout(tensor, tensor=tensor, sequence_parallel=tensor > 1))


def _layouts(work: Workload, world_size: int, gpus_per_node: int, tensors: list[int]) -> Iterator[Layout]:
    choices = product(tensors, _PIPELINE_SIZES, _PIECES, _MICRO_BATCHES, ("optimizer", "full"), _RECOMPUTE)
    for tensor, pipeline, pieces, micro_batch, sharding, recompute in choices:
        if (pipeline == 1 and pieces > 1) or (pipeline > 1 and sharding == "full"):
            continue
        layout = Layout(
            world_size=world_size,
            tensor=tensor,
            pipeline=pipeline,
            pieces_per_rank=pieces,
            sequence_parallel=tensor > 1,
            schedule="interleaved" if pieces > 1 else "1f1b",
            sharding=sharding,
            recompute=recompute,
            micro_batch=micro_batch,
            gpus_per_node=gpus_per_node,
        )
        if is_legal(work, layout):
            yield layout


def _scaled(traced: Trace, micro_batch: int) -> Trace:
    """Everything that is traced grows with the microbatch."""
    parts = {
        name: PartTrace(part.saved_bytes * micro_batch, part.kept_bytes * micro_batch, part.sent_bytes * micro_batch)
        for name, part in traced.parts.items()
    }
    return Trace(parts, traced.hidden_bytes * micro_batch, traced.encoded_bytes * micro_batch)
