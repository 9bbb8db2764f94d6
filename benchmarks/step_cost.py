"""What a step is made of, counted without a GPU: operators, kernels, bytes, collectives, waits and host time.

A plain layer, a retrieval layer, the encoder and the head of the published sizes, uncut and on 8 tensor ranks with
sequence parallelism, forward and backward of one sequence in bfloat16, on torch's `meta` device as a plan traces them
(`docs/decisions.md`, "A plan traces the model's code"): eager, operators as they choose themselves where none has
proved itself on a device. Beside the plain layer Hugging Face's Llama layer and megatron-core's GPT layer of the same
widths, counted by the same rules; what is left of our own parts when they are compiled, by `testing.compiled_counts`.
"Least" is every operand of our products read once and every result written once, and one pass over the residual stream
(read and written, forward and backward); products that go in pieces beside collectives read a weight again for each.

Host time is CPU-seconds of one thread for layers so small that nothing but dispatch is left, interleaved, the least of
all rounds: of nine layers less one, forward and backward, divided by eight.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.config.toml_files import preset_path, read_recipe
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.parallel import overlap
from megatron_retro.parallel.collectives import TensorAxis
from megatron_retro.parallel.layer_transforms import compile_layers
from megatron_retro.parallel.mesh import TENSOR, ParallelMesh
from megatron_retro.parallel.tensor_parallel import cut_model
from megatron_retro.planning.fake_device import GPU, fake_rank, without_memory
from megatron_retro.planning.operator_counts import OperatorCounter, OperatorCounts
from megatron_retro.planning.recorder import PartTrace
from megatron_retro.planning.trace import ENCODER, HEAD, LAYER, RETRIEVAL, trace_parts
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, interleave
from megatron_retro.testing.compiled_counts import CompiledCounts, compiled_counts

sys.path.remove(str(Path(__file__).parent))  # whose kernels.py transformers would import
sys.path.insert(0, str(Path(__file__).parent / "peers"))
import peer_packages
from gpt_layers import LayerShape, hugging_face_layer, megatron_core_layer

SIZES = {"823M": "retro-878m", "8.5B": "retro-9.5b", "48B": "retro-48b"}
PARTS = (LAYER, RETRIEVAL, ENCODER, HEAD)
HUGGING_FACE, MEGATRON_CORE = "Hugging Face Llama layer", "megatron-core layer"
SMALL = LayerShape(hidden=64, heads=4, ffn=128, length=32)
DEEP = 8
MOST_KERNELS = 49  # of a compiled layer: 60 % of megatron-core's 83 in its local spec


def run(quick: bool) -> Iterator[Figure]:
    """Counts first, then host time."""
    sizes = dict(list(SIZES.items())[:1]) if quick else SIZES
    for size, preset in sizes.items():
        for tensor_ranks in (1, 8):
            yield from counted(size, settings_of(preset, tensor_ranks))
    yield from host_times(rounds=3 if quick else 15)
    yield from host_times_of_a_cut_layer(rounds=3 if quick else 15)


def settings_of(preset: str, tensor_ranks: int) -> Settings:
    """A preset's model, cut, one sequence at a time."""
    cut = {"tensor_model_parallel_size": tensor_ranks, "sequence_parallel": tensor_ranks > 1, "bf16": True}
    return build_settings(ALL_SECTIONS, {**read_recipe(preset_path(preset), ALL_SECTIONS, ALL_SECTIONS), **cut}, {})


def counted(size: str, settings: Settings) -> Iterator[Figure]:
    """Every part of ours, then the peers' layers."""
    model, tensor_ranks = settings[ModelConfig], settings[ParallelConfig].tensor_model_parallel_size
    made: list[OperatorCounter] = []

    def make(given: Iterable[Tensor], context: ProcessGroup | None) -> OperatorCounter:
        made.append(OperatorCounter(given, context))
        return made[-1]

    with mock.patch.object(overlap, "MOST_PIECES", 1):
        trace_parts(settings, make_recorder=make)
    trace, length = trace_parts(settings, make_recorder=make), settings[DataConfig].seq_length
    whole, counts = made[0].counts, made[1].counts
    compiled = compiled_counts(settings)
    stream, prefix = 4.0 * trace.hidden_bytes, f"{size}, tensor {tensor_ranks}"
    encoders = 4.0 * trace.encoded_bytes / tensor_ranks * settings[RetroConfig].retro_encoder_layers
    for name in PARTS:
        least = whole[name].product_bytes + (encoders if name == ENCODER else stream)
        yield from figures(f"{prefix}: {name}", trace.part(name), counts[name], least, length)
        if name in compiled:
            yield from compiled_figures(f"{prefix}: {name}", compiled[name], least, length)
    shape = LayerShape(model.hidden_size, model.num_attention_heads, model.ffn_width(), length)
    least = whole[LAYER].product_bytes + stream
    for name, (traced, count) in peers(shape, settings).items():
        yield from figures(f"{prefix}: {name}", traced, count, least, length)


def figures(name: str, traced: PartTrace, counts: OperatorCounts, least: float, length: int) -> Iterator[Figure]:
    """Of one part, forward and backward."""
    total = traced.moved_bytes + counts.product_bytes
    for what, value, unit in (
        ("operators", counts.operators, ""),
        ("kernels, eager", counts.kernels, ""),
        ("kernels, runs between products fused", counts.groups + counts.collectives, ""),
        ("read and written", total / length / 1e6, "MB/token"),
        ("over the least possible", total / least, "x"),
        ("kept for the backward", traced.saved_bytes / length / 1e3, "kB/token"),
        ("collectives", counts.collectives, ""),
        ("sent", traced.sent_bytes / length / 1e3, "kB/token"),
        ("sent with no product beside it", (traced.sent_bytes - traced.beside_bytes) / length / 1e3, "kB/token"),
        ("waits for the device", traced.host_waits, ""),
    ):
        yield Figure(f"{name}: {what}", float(value), unit, better=LOWER)


def compiled_figures(name: str, counts: CompiledCounts, least: float, length: int) -> Iterator[Figure]:
    """Of one compiled part, forward and backward."""
    is_layer = name.endswith(f": {LAYER}")
    yield Figure(f"{name}: kernels, compiled", counts.kernels, "", MOST_KERNELS if is_layer else None, LOWER)
    for what, value, unit in (
        ("read and written, compiled", counts.moved_bytes / length / 1e6, "MB/token"),
        ("over the least possible, compiled", counts.moved_bytes / least, "x"),
        ("kept for the backward, compiled", counts.kept_bytes / length / 1e3, "kB/token"),
        ("collectives, compiled", counts.collectives, ""),
    ):
        yield Figure(f"{name}: {what}", float(value), unit, better=LOWER)


def peers(shape: LayerShape, settings: Settings) -> dict[str, tuple[PartTrace, OperatorCounts]]:
    """The layers of other libraries on the same device; Hugging Face's is not cut."""
    tensor_ranks, found = settings[ParallelConfig].tensor_model_parallel_size, {}
    with fake_rank(0, tensor_ranks, settings[ParallelConfig]), without_memory(GPU):
        if tensor_ranks == 1:
            with hugging_face_layer(shape, GPU, torch.bfloat16) as (layer, call):
                found[HUGGING_FACE] = trace_layer(layer, call, (1, shape.length, shape.hidden), 1)
        if peer_packages.is_here("megatron-core"):
            with megatron_core_layer(shape, GPU, torch.bfloat16, tensor_ranks) as (layer, call):
                found[MEGATRON_CORE] = trace_layer(layer, call, (shape.length, 1, shape.hidden), tensor_ranks)
    return found


def trace_layer(
    layer: nn.Module, call: Callable[[Tensor], Tensor], shape: tuple[int, ...], tensor_ranks: int
) -> tuple[PartTrace, OperatorCounts]:
    """Forward and backward of a layer whose input gets a gradient, as every layer's but the first one's does."""
    hidden = torch.empty(shape, dtype=torch.bfloat16, device=GPU, requires_grad=True)
    gradient = torch.empty_like(hidden)
    recorder = OperatorCounter([*layer.parameters(), *layer.buffers(), hidden, gradient])
    recorder.turn_to(LAYER)
    with recorder:
        output = call(hidden)
        recorder.end_forward()
        output.backward(gradient)
    return recorder.part(LAYER), recorder.counts[LAYER]


def host_times(rounds: int) -> Iterator[Figure]:
    """CPU time that one layer costs the host, whatever its size."""
    with ExitStack() as opened:
        candidates = {"GPT layer": ours(layers=1), "GPT layers": ours(layers=1 + DEEP)}
        candidates["compiled GPT layer"] = ours(layers=1, compiled=True)
        candidates["compiled GPT layers"] = ours(layers=1 + DEEP, compiled=True)
        device, dtype = torch.device("cpu"), torch.float32
        for name in (HUGGING_FACE, f"compiled {HUGGING_FACE}"):
            layer, call = opened.enter_context(hugging_face_layer(SMALL, device, dtype))
            if name != HUGGING_FACE:
                layer.compile(fullgraph=True, dynamic=False)
            candidates |= one_and_many(name, layer, call, (1, SMALL.length, SMALL.hidden))
        if peer_packages.is_here("megatron-core"):
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
            opened.callback(dist.destroy_process_group)
            layer, call = opened.enter_context(megatron_core_layer(SMALL, device, dtype, 1))
            candidates |= one_and_many(MEGATRON_CORE, layer, call, (SMALL.length, 1, SMALL.hidden))
        costs = costs_of_a_layer(candidates, rounds)
    for name, cost in costs.items():
        yield Figure(f"host: {name}", cost * 1e6, "CPU us", better=LOWER)


def host_times_of_a_cut_layer(rounds: int) -> Iterator[Figure]:
    """Of a layer on one of 8 tensor ranks, whose products go in pieces, over the uncut one; collectives do nothing."""
    parallel = ParallelConfig(tensor_model_parallel_size=8, sequence_parallel=True)
    with fake_rank(0, 8, parallel) as mesh, mock.patch.multiple(overlap, LEAST_BYTES=1, LEAST_RESULTS=1):
        for compiled, name in ((False, "GPT layer"), (True, "compiled GPT layer")):
            candidates = {
                f"{which} layer{several}": ours(layers, compiled=compiled, mesh=cut)
                for which, cut in (("uncut", None), ("cut", mesh))
                for several, layers in (("", 1), ("s", 1 + DEEP))
            }
            uncut, cut_over_8 = costs_of_a_layer(candidates, rounds).values()
            yield Figure(f"host: {name}, tensor 8 over uncut", cut_over_8 / uncut, "x", better=LOWER)


def costs_of_a_layer(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """CPU-seconds of one layer for each name that is there once more in the plural."""
    times = interleave(candidates, rounds, warm_up=2)
    names = [name for name in candidates if f"{name}s" in candidates]
    return {name: (min(times[f"{name}s"].cpu) - min(times[name].cpu)) / DEEP for name in names}


def ours(layers: int, *, compiled: bool = False, mesh: ParallelMesh | None = None) -> Callable[[], object]:
    """A GPT of so many layers, by the references, as on a GPU on which nothing has proved itself."""
    model = ModelConfig(
        num_layers=layers,
        hidden_size=SMALL.hidden,
        num_attention_heads=SMALL.heads if mesh is None else mesh.size(TENSOR),
        ffn_hidden_size=SMALL.ffn,
        vocab_size=16,
        swiglu=True,
        disable_bias_linear=True,
    )
    gpt = Retro(model, RetroConfig())
    initialize(gpt, model, RetroConfig(), seed=0)
    if mesh is not None:
        cut_model(gpt, mesh.devices[TENSOR], TensorAxis(mesh.group(TENSOR), True))
    if compiled:
        compile_layers(gpt)
    tokens = torch.zeros(1, SMALL.length, dtype=torch.long)

    def step() -> None:
        gpt(tokens, None, labels_BS=tokens).sum().backward()

    return step


def one_and_many(
    name: str, layer: nn.Module, call: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> dict[str, Callable[[], object]]:
    """The same layer once and nine times."""
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.02)
    hidden = torch.randn(shape)

    def step(times: int) -> None:
        output = hidden.clone().requires_grad_()
        for _ in range(times):
            output = call(output)
        output.sum().backward()

    return {name: lambda: step(1), f"{name}s": lambda: step(1 + DEEP)}


if __name__ == "__main__":
    import os

    os.environ.setdefault("MEGATRON_RETRO_KERNELS", "reference")
    torch.set_num_threads(1)
    benchmark_main(__doc__, run)
