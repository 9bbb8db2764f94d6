"""Counts the kernels of compiled layers: what torch's inductor would launch, without a GPU and without compiling.

Every graph of `compile_layers` is lowered and scheduled as for a GPU, on tensors without memory; then its schedule is
counted, and the graph runs as it stands, so that the next layer is reached. Kernels are products, attentions and what
inductor fuses between them (concatenations as a GPU's, part of the kernel that reads them). What runs within an
operator that goes with a collective (`parallel.overlap`) is counted by running it on tensors without memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._functorch import config as graph_config
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import (
    _recursive_post_grad_passes,
    _recursive_record_original_output_strides,
    compile_fx,
)
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.utils._pytree import tree_map

from megatron_retro.assembly.stage_building import compute_dtype, stage_on_meta
from megatron_retro.config.data import DataConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig
from megatron_retro.model.retro import Retro
from megatron_retro.ops import compilation, cpu_products
from megatron_retro.parallel.layer_transforms import compile_layers
from megatron_retro.parallel.overlap import OPERATORS
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.planning.fake_device import CPU, GPU, fake_rank, without_memory
from megatron_retro.planning.operator_counts import OperatorCounter
from megatron_retro.planning.recorder import STAGE, size
from megatron_retro.planning.trace import ENCODER, LAYER, RETRIEVAL, full_neighbors, hold_plainly, local_shapes

_KERNELS = ("SchedulerNode", "FusedSchedulerNode", "ExternKernelOut", "FallbackKernel")
_COLLECTIVE = "_CollectiveKernel"


@dataclass
class CompiledCounts:
    """Forward and backward of one part."""

    kernels: int = 0
    collectives: int = 0
    moved_bytes: float = 0.0  # that kernels read and write
    kept_bytes: float = 0.0  # that the forward makes for the backward


def compiled_counts(settings: Settings) -> dict[str, CompiledCounts]:
    """A plain layer, a retrieval layer and the encoder, on tensor rank 0."""
    settings = settings.replace(num_layers=4, retro_layers=(2, 4), retro_init="noise", retro_open_heads=None)
    counts, parallel = {name: CompiledCounts() for name in (LAYER, RETRIEVAL, ENCODER)}, settings[ParallelConfig]
    with fake_rank(0, parallel.tensor_model_parallel_size, parallel) as mesh, _as_on_a_gpu():
        (part,) = stage_parts(settings, settings[DataConfig].seq_length)
        model = stage_on_meta(settings, part, mesh).model
        shapes = local_shapes(model)
        with without_memory(CPU):
            hold_plainly(model, shapes, CPU, compute_dtype(settings[OptimizerConfig]))
            _count_layers(model, counts)
            length = settings[DataConfig].seq_length
            tokens_BS = torch.zeros(1, length, dtype=torch.long)
            context = model.train().prepare(1, length, CPU, neighbors=full_neighbors(settings, CPU))
            model.run_layers(model.embed(tokens_BS, context), None, context)
    return counts


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Kernels are fused by a GPU's rules, and bfloat16 is multiplied as it is; backwards are lowered at once."""
    with ExitStack() as entered:
        for change in (
            inductor_config.patch(cpu_backend="triton", force_pointwise_cat=True, force_disable_caches=True),
            graph_config.patch(force_non_lazy_backward_lowering=True),
            mock.patch.object(cpu_products, "_has_instructions", lambda: True),
        ):
            entered.enter_context(change)
        yield


def _count_layers(model: Retro, counts: dict[str, CompiledCounts]) -> None:
    """Compile every layer; what is made of one kind is counted."""
    running = CompiledCounts()

    def turn_to(count: CompiledCounts, function: Callable[..., Any], *arguments: Any) -> Any:
        nonlocal running
        running = count
        return function(*arguments)

    def backend(graph: Any, inputs: Sequence[Any]) -> Any:
        return compile_fx(graph, inputs, inner_compile=partial(_count, running))

    with mock.patch.object(compilation, "BACKEND", backend):
        compile_layers(model)
    assert model.encoder is not None
    decoder = (("0", LAYER), ("3", RETRIEVAL))
    parts = [(model.layers[place], "whole", counts[name]) for place, name in decoder]
    parts += [(layer, "forward", counts[ENCODER]) for layer in model.encoder.layers.values()]
    parts += [(model.layers["1"], name, CompiledCounts()) for name in ("before_encoding", "behind_encoding")]
    for layer, name, count in parts:
        vars(layer)[name] = partial(turn_to, count, vars(layer)[name])


def _count(counts: CompiledCounts, graph: Any, inputs: Sequence[Any], **more: Any) -> Any:
    """Stands in for inductor's compilation of one graph, forward or backward."""
    fake = torch._guards.detect_fake_mode(inputs)
    backward = bool(more.get("is_backward"))
    if not backward:
        metadata = torch._guards.TracingContext.get().fw_metadata
        assert metadata is not None
        made = graph.graph.find_nodes(op="output")[0].args[0][metadata.num_forward :]
        counts.kept_bytes += sum(size(node.meta["val"]) for node in made if _is_new(node))
    with V.set_fake_mode(fake), DebugContext():
        _recursive_record_original_output_strides(graph)
        _recursive_post_grad_passes(graph, is_inference=False)
        lowered = GraphLowering(graph, example_inputs=inputs, is_backward=backward)
        with V.set_graph_handler(lowered):
            lowered.run(*inputs)
            lowered._update_scheduler()
            for node in lowered.scheduler.nodes:
                kind = type(node).__name__
                kind = type(node.node).__name__ if kind == "ExternKernelSchedulerNode" else kind
                counts.collectives += kind == _COLLECTIVE
                if kind in _KERNELS and getattr(node.node, "op_overload", None) not in OPERATORS:
                    counts.kernels += 1
                    counts.moved_bytes += node.get_read_write_buffers_sizes()
    for node in graph.graph.nodes:
        if node.target in OPERATORS:
            _count_within(counts, OPERATORS[node.target], node.args)

    def run(arguments: Any) -> Any:
        return graph(*arguments)

    vars(run)["_boxed_call"] = True
    return run


def _count_within(counts: CompiledCounts, function: Callable[..., Any], arguments: Any) -> None:
    """Of one operator that goes with a collective: what its own code runs."""
    given = tree_map(_alike, arguments)
    counter = OperatorCounter([each for each in given if isinstance(each, Tensor)])
    with V.set_fake_mode(None), without_memory(GPU), counter:
        function(*given)
    within = counter.counts[STAGE]
    counts.kernels += within.kernels
    counts.collectives += within.collectives
    counts.moved_bytes += within.product_bytes + counter.part(STAGE).moved_bytes


def _alike(argument: Any) -> Any:
    """A tensor without memory in the place of a graph's node."""
    if not isinstance(argument, torch.fx.Node):
        return argument
    like = argument.meta["val"]
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=GPU)


def _is_new(node: Any) -> bool:
    """Whether a graph makes this tensor: not one of its inputs, nor a view of it."""
    while node.op == "call_function" and getattr(node.target, "is_view", False):
        node = node.args[0]
    return bool(node.op != "placeholder")
