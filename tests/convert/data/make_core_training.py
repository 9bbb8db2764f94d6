"""Writes core_training.tar.xz: small models that megatron-core 0.15.3 trains two steps and saves, and a third step.

    pip install --no-deps megatron-core==0.15.3 && python make_core_training.py OUTPUT_FOLDER

Each folder is a run with its optimizer's state in one of core's layouts, and the weights alone after a third step.
Cut runs are the first ones, read by ranks of a cut and written by them again. It needs no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import tarfile
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy
import torch
from make_core_checkpoints import LENGTH, MODELS, VOCABULARY, build, iteration_folder
from torch.multiprocessing import start_processes

BATCH, STEPS, RATE, PERIOD = 2, 2, 0.01, 4
ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.98, "adam_eps": 1e-8, "weight_decay": 0.1, "lr": RATE, "min_lr": RATE}
# of each run: model, layout of the distributed optimizer (None: the plain one)
RUNS: dict[str, tuple[str, str | None]] = {
    "gpt": ("gpt", None),
    "gpt_gathered": ("gpt", "dp_zero_gather_scatter"),
    "llama": ("llama", "fully_reshardable"),
    "llama_flat": ("llama", "fully_sharded_model_space"),
    "qwen": ("qwen", None),
}
# runs of a cut: the run that is read, tensor and pipeline ranks
CUT_RUNS: dict[str, tuple[str, int, int]] = {
    "gpt_2_2": ("gpt", 2, 2),
    "llama_flat_2_1": ("llama_flat", 2, 1),
    "qwen_2_1": ("qwen", 2, 1),
}


def optimized(run: str, tensor: int, pipeline: int, stage: int) -> tuple[Any, Any, Any, argparse.Namespace]:
    """This rank's part of a model, its optimizer, that one's schedule, and the arguments of the run."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    name, layout = RUNS[run]
    model, arguments = build(name, tensor, pipeline, stage)
    spread = layout is not None
    wrapped = DistributedDataParallel(
        model.config, DistributedDataParallelConfig(use_distributed_optimizer=spread), model.train()
    )
    names = ("adam_beta1", "adam_beta2", "adam_eps", "weight_decay", "lr", "min_lr")
    half = bool(MODELS[name][1].get("bf16"))
    settings = {each: ADAM[each] for each in names}
    config = OptimizerConfig(
        optimizer="adam", clip_grad=0.0, bf16=half, params_dtype=torch.bfloat16 if half else torch.float32,
        use_distributed_optimizer=spread, **settings,
    )  # fmt: skip
    optimizer = get_megatron_optimizer(config, [wrapped])
    decay = ADAM["weight_decay"]
    schedule = OptimizerParamScheduler(optimizer, RATE, RATE, RATE, 0, 100, "constant", decay, decay, 0, "constant")
    for key, value in {**ADAM, "optimizer": "adam", "clip_grad": 0.0, "lr_decay_style": "constant"}.items():
        setattr(arguments, key, value)
    arguments.use_distributed_optimizer = spread
    arguments.seq_length, arguments.global_batch_size = LENGTH, BATCH
    arguments.iteration, arguments.consumed_train_samples = STEPS, STEPS * BATCH
    return wrapped, optimizer, schedule, arguments


def trained(run: str, output: Path) -> None:
    """Two steps, the checkpoint, a third step, the weights."""
    from megatron.core import dist_checkpointing

    wrapped, optimizer, schedule, arguments = optimized(run, 1, 1, 0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in wrapped.module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    optimizer.reload_model_params()
    for _ in range(STEPS):
        step(wrapped, optimizer, schedule, torch.randint(0, VOCABULARY, (BATCH, LENGTH + 1), generator=generator))
    saved(wrapped.module, optimizer, schedule, arguments, RUNS[run][1], output / run)
    periodic = torch.arange(LENGTH + 1).remainder(PERIOD).add(3).expand(BATCH, -1)
    step(wrapped, optimizer, schedule, periodic)
    after = {"args": arguments, "iteration": STEPS + 1, "model": wrapped.module.sharded_state_dict()}
    dist_checkpointing.save(after, str(iteration_folder(output / run, STEPS + 1)))


def step(wrapped: Any, optimizer: Any, schedule: Any, tokens: torch.Tensor) -> None:
    """One update on the mean loss."""
    wrapped.zero_grad_buffer()
    optimizer.zero_grad()
    length = tokens.shape[1] - 1
    mask = torch.ones(1, 1, length, length).triu(1).bool()
    wrapped(tokens[:, :-1], torch.arange(length)[None], mask, labels=tokens[:, 1:].contiguous()).mean().backward()
    wrapped.finish_grad_sync()
    optimizer.step()
    schedule.step(BATCH)


def saved(
    model: Any, optimizer: Any, schedule: Any, arguments: argparse.Namespace, layout: str | None, folder: Path
) -> None:
    """As Megatron-LM writes `torch_dist`."""
    from megatron.core import dist_checkpointing

    content = state(model, optimizer, schedule, arguments, layout)
    dist_checkpointing.save(content, str(iteration_folder(folder, STEPS)))


def state(
    model: Any, optimizer: Any, schedule: Any, arguments: argparse.Namespace, layout: str | None, **more: Any
) -> dict[str, Any]:
    """What Megatron-LM puts into a checkpoint."""
    metadata = {"distrib_optim_sharding_type": layout} if layout else {}
    sharded = model.sharded_state_dict()
    return {
        "args": arguments, "checkpoint_version": 3.0, "iteration": STEPS, "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, metadata=metadata, **more),
        "opt_param_scheduler": schedule.state_dict(),
    }  # fmt: skip


def cut(run: str, tensor: int, pipeline: int, output: Path) -> None:
    """A run, read by the ranks of a cut, and written by them in both formats."""
    from megatron.core import dist_checkpointing, parallel_state

    source = CUT_RUNS[run][0]
    layout = RUNS[source][1]
    stage, rank = parallel_state.get_pipeline_model_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
    wrapped, optimizer, schedule, arguments = optimized(source, tensor, pipeline, stage)
    optimizer.step()  # core knows no state to be filled before the first
    asked = state(wrapped.module, optimizer, schedule, arguments, layout, is_loading=True)
    loaded = dist_checkpointing.load(asked, str(output / source / f"iter_{STEPS:07}"))
    wrapped.module.load_state_dict(loaded["model"], strict=False)
    optimizer.load_state_dict(loaded["optimizer"])
    folder = iteration_folder(output / run, STEPS)
    torch.distributed.barrier()
    saved(wrapped.module, optimizer, schedule, arguments, layout, output / run)
    if layout is not None:
        return
    place = folder.parent.parent / f"{run}_torch" / folder.name
    place /= f"mp_rank_{rank:02}_{stage:03}" if pipeline > 1 else f"mp_rank_{rank:02}"
    place.mkdir(parents=True)
    kept = {"args": arguments, "checkpoint_version": 3.0, "iteration": STEPS, "optimizer": optimizer.state_dict()}
    kept["opt_param_scheduler"] = schedule.state_dict()
    content = {**kept, "model": wrapped.module.state_dict_for_save_checkpoint()}
    torch.save(content, place / "model_optim_rng.pt")


def work(rank: int, names: Sequence[str], tensor: int, pipeline: int, output: Path) -> None:
    """One process of a cut (1, 1: the runs themselves)."""
    size = tensor * pipeline
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost", MASTER_PORT="29549")
    torch.distributed.init_process_group("gloo")
    without_a_gpu()
    from megatron.core import parallel_state
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    fill = DistributedOptimizer._set_main_param_and_optimizer_states

    def fill_with_step(self: Any, parameter: Any, tensors: dict[str, Any]) -> None:
        fill(self, parameter, {"step": torch.tensor(float(STEPS)), **tensors})  # torch's Adam has one by parameter

    DistributedOptimizer._set_main_param_and_optimizer_states = fill_with_step  # type: ignore[method-assign]
    CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()  # type: ignore[method-assign]  # nothing is dropped
    parallel_state.initialize_model_parallel(tensor, pipeline)
    for name in names:
        if size == 1:
            trained(name, output)
        else:
            cut(name, tensor, pipeline, output)
    torch.distributed.destroy_process_group()


def without_a_gpu() -> None:
    """What core asks a GPU for is given by the CPU, and its tensors are called as it expects them."""
    numpy.product = numpy.prod  # type: ignore[attr-defined]  # core asks for a name of an older numpy
    torch.cuda.synchronize = lambda *_, **__: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    kind = torch.Tensor.type
    torch.Tensor.type = lambda self, *to: kind(self, *to) if to else kind(self).replace("torch.", "torch.cuda.")  # type: ignore[assignment,method-assign,union-attr,return-value]
    for name in ("tensor", "zeros"):
        setattr(torch, name, on_the_cpu(getattr(torch, name)))


def on_the_cpu(made: Any) -> Any:
    """A function of torch that makes a tensor, wherever it is asked to."""

    def make(*words: Any, **more: Any) -> torch.Tensor:
        tensor: torch.Tensor = made(*words, **{**more, "device": "cpu" if more.get("device") == "cuda" else None})
        return tensor

    return make


def main(output: Path) -> None:
    """All runs, whole and cut, packed."""
    start_processes(work, (list(RUNS), 1, 1, output), nprocs=1)
    for tensor, pipeline in sorted({each[1:] for each in CUT_RUNS.values()}):
        names = [name for name, each in CUT_RUNS.items() if each[1:] == (tensor, pipeline)]
        start_processes(work, (names, tensor, pipeline, output), nprocs=tensor * pipeline)
    with tarfile.open(output / "core_training.tar.xz", "w:xz") as archive:
        for folder in sorted(path for path in output.iterdir() if path.is_dir()):
            archive.add(folder, folder.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
