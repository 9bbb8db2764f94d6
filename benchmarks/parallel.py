"""What the parallel form costs: tensor 2 against its ideal, host time per layer, bytes of the real 48B shapes.

CPU-seconds of a rank with one thread are compared, the only figure that holds still on shared cores. The ideal of a
tensor 2 run is half the one-process step plus the same collectives by themselves, measured in the same rounds.
Equality of losses is asserted first.
"""

from __future__ import annotations

import cProfile
import pstats
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.config.data import DataConfig
from megatron_retro.config.hardware import accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.sections import ALL_SECTIONS
from megatron_retro.config.settings import build_settings
from megatron_retro.config.toml_files import preset_path, read_recipe
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.collectives import TensorAxis, begin_all_gather, begin_all_reduce, begin_reduce_scatter
from megatron_retro.parallel.mesh import TENSOR, build_mesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.parallel.tensor_parallel import cut_model
from megatron_retro.planning.plan import make_plan
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main
from megatron_retro.testing.layouts import random_batches, tiny_settings
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.single_process import SingleProcess

MEDIUM = {
    "num_layers": 4,
    "hidden_size": 512,
    "ffn_hidden_size": 2048,
    "num_attention_heads": 8,
    "vocab_size": 4096,
    "init_method_std": 0.02,
    "retro_chunk_length": 64,
    "seq_length": 512,
    "global_batch_size": 1,
}


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The collectives of a step: operator and sizes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        if function.namespace == "c10d":
            first = arguments[0][0] if isinstance(arguments[0], (list, tuple)) else arguments[0]
            self.calls.append((function.__name__.split(".")[0], tuple(first.shape)))
        return function(*arguments, **(keywords or {}))


def _replay(calls: list[tuple[str, tuple[int, ...]]], group: dist.ProcessGroup) -> Callable[[], None]:
    """The same collectives on ready buffers."""
    size = dist.get_world_size(group)
    buffers = [(name, torch.zeros(shape)) for name, shape in calls]

    def run() -> None:
        for name, out in buffers:
            if name.startswith("allreduce"):
                begin_all_reduce(out, group).wait()
            elif name.startswith("_allgather"):
                begin_all_gather(out, out.new_empty((out.shape[0] // size, *out.shape[1:])), group).wait()
            elif name.startswith("_reduce_scatter"):
                begin_reduce_scatter(out, out.new_empty((out.shape[0] * size, *out.shape[1:])), group).wait()

    return run


def _seconds(action: Callable[[], object]) -> float:
    dist.barrier()
    start = time.process_time()
    action()
    return time.process_time() - start


def tensor_costs(sequence_parallel: bool, rounds: int) -> list[tuple[float, float, float]]:
    """Each round on rank 0: CPU-seconds of the plain step, of the tensor 2 step, of its collectives alone."""
    settings = tiny_settings(**MEDIUM, tensor_model_parallel_size=2, sequence_parallel=sequence_parallel)
    batches = random_batches(settings)

    def measure() -> list[tuple[float, float, float]]:
        plain_module = Retro(settings[ModelConfig], settings[RetroConfig])
        initialize(plain_module, settings[ModelConfig], settings[RetroConfig], 7)
        plain = SingleProcess(plain_module, torch.device("cpu"))
        mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
        cut = ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))
        with _Recorder() as recorder:
            loss = cut.train_step(batches).loss
        assert abs(loss - plain.train_step(batches).loss) < 1e-4 * loss
        replay = _replay(recorder.calls, mesh.group(TENSOR))
        actions = (lambda: plain.train_step(batches), lambda: cut.train_step(batches), replay)
        found = []
        for _ in range(rounds):
            found.append(tuple(_seconds(action) for action in actions))
            plain.module.zero_grad()
            cut.module.zero_grad()
        return found

    ranks = run_ranks(measure, 2, timeout=600.0)
    return [tuple(statistics.mean(pair) for pair in zip(*both, strict=True)) for both in zip(*ranks, strict=True)]  # type: ignore[misc]


def host_overhead(rounds: int) -> tuple[float, float, list[tuple[str, float]]]:
    """Microseconds per layer and step of the plain and of the parallel form, where the difference is spent.

    A model so small that it computes nothing to speak of, in a group of one: what is left is Python and bookkeeping.
    """
    settings = tiny_settings(retro_add_retriever=False, num_layers=8, seq_length=8, global_batch_size=1)
    batch = random_batches(settings, neighbors=False)[0]

    def measure() -> tuple[float, float, list[tuple[str, float]]]:
        plain, cut = (_filled(settings[ModelConfig], settings[RetroConfig]) for _ in range(2))
        mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
        cut_model(cut, mesh.devices[TENSOR], TensorAxis(mesh.group(TENSOR), True))
        steps = [lambda model=model: _step(model, batch.tokens_BS, batch.labels_BS) for model in (plain, cut)]
        for step in steps:
            step()
        times: list[list[float]] = [[], []]
        for _ in range(rounds):
            for step, found in zip(steps, times, strict=True):
                found.append(_seconds(step))
        medians = [statistics.median(found) * 1e6 / 8 for found in times]
        return medians[0], medians[1], _largest_parts(steps[0], steps[1], rounds)

    result: tuple[float, float, list[tuple[str, float]]] = run_ranks(measure, 1, timeout=300.0)[0]
    return result


def _filled(model: ModelConfig, retro: RetroConfig) -> Retro:
    module = Retro(model, retro)
    initialize(module, model, retro, 7)
    return module


def _step(model: nn.Module, tokens: Tensor, labels: Tensor) -> None:
    neighbors: Neighbors | None = None
    model(tokens, neighbors, labels_BS=labels).sum().backward()


def _largest_parts(plain: Callable[[], None], cut: Callable[[], None], rounds: int) -> list[tuple[str, float]]:
    """Microseconds per layer by what is called, where the parallel form spends more than the plain one."""
    extra = _profile(cut, rounds)
    extra.subtract(_profile(plain, rounds))
    return [(name, seconds * 1e6 / 8 / rounds) for name, seconds in extra.most_common(3)]


def _profile(step: Callable[[], None], rounds: int) -> Counter[str]:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(rounds):
        step()
    profiler.disable()
    own: Counter[str] = Counter()
    for (path, _, name), (_, _, total, _, _) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        own[_room(path, name)] += total
    return own


def _room(path: str, name: str) -> str:
    """What a function belongs to, in words."""
    rooms = {
        "megatron_retro/parallel": "hooks and collectives of the cut",
        "torch/distributed/tensor": "DTensor: local parts and their gradients",
        "torch/distributed": "torch.distributed: checks and logging around collectives",
        "torch/nn/modules": "calls of modules and their hooks",
        "torch/autograd": "autograd",
    }
    for part, words in rooms.items():
        if part in path:
            return words
    if "allreduce" in name or "allgather" in name or "reduce_scatter" in name or "wait" in name:
        return "gloo"
    return "tensor operations" if path == "~" else "the rest of torch and of the model"


def published_bytes() -> tuple[float, float]:
    """What a rank of the published 48B Retro sends for a microbatch if it holds the whole depth; over a border."""
    whole, cut = (
        build_settings(
            ALL_SECTIONS,
            {
                **read_recipe(preset_path("retro-48b"), ALL_SECTIONS, ALL_SECTIONS),
                "bf16": True,
                "tensor_model_parallel_size": 8,
                "sequence_parallel": True,
                "pipeline_model_parallel_size": stages,
                "plan_gpus_per_node": 8 * stages,
                "global_batch_size": stages,
            },
            {},
        )
        for stages in (1, 2)
    )
    (rank,) = make_plan(whole, accelerator("H100")).ranks
    first, _ = make_plan(cut, accelerator("H100")).ranks
    return rank.total.sent_bytes, 2 * first.border_bytes


def run(quick: bool) -> list[Figure]:
    """All figures."""
    torch.set_num_threads(1)
    figures = []
    for sequence_parallel, name in ((False, "tensor 2"), (True, "tensor 2 + sequence")):
        costs = tensor_costs(sequence_parallel, 2 if quick else 7)
        ratio = statistics.median(cut / (plain / 2 + collectives) for plain, cut, collectives in costs)
        plain, cut, collectives = (statistics.median(column) for column in zip(*costs, strict=True))
        figures += [
            Figure(f"{name}: cost over ideal", ratio, "x", 1.25, LOWER),
            Figure(f"{name}: one process", plain, "CPU s/step"),
            Figure(f"{name}: a rank", cut, "CPU s/step"),
            Figure(f"{name}: its collectives alone", collectives, "CPU s/step"),
        ]
    before, after, parts = host_overhead(5 if quick else 40)
    figures += [
        Figure("host time of a plain layer, forward and backward", before, "us"),
        Figure("host time of a parallel layer", after, "us"),
        *(Figure(f"of the difference: {name}", value, "us, profiled") for name, value in parts),
    ]
    depth, border = published_bytes()
    figures += [
        Figure("48B, tensor 8 + sequence: sent per rank and microbatch", depth / 1e9, "GB"),
        Figure("48B, tensor 8 + sequence: over a border of the pipeline, both ways", border / 1e6, "MB"),
    ]
    return figures


if __name__ == "__main__":
    benchmark_main(__doc__, run)
