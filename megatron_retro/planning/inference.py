"""What answering takes: each replica holds the model, whole or cut, and the caches of its batch of prompts."""

from __future__ import annotations

import math

from megatron_retro.config.evaluation import EvaluationConfig, PlanningConfig
from megatron_retro.config.hardware import machine_of
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.errors import ConfigError
from megatron_retro.planning.workload import Workload, workload_of
from megatron_retro.runtime.console import readable_bytes, readable_count


def cache_bytes(work: Workload) -> float:
    """Keys and values of a prompt in every layer, and of one chunk's neighbours in every retrieval layer."""
    model, retro = work.model, work.retro
    one = 2 * model.num_key_value_heads() * model.head_size() * work.value_bytes
    retrieval = len(retro.retrieval_layers(model.num_layers)) if retro.reads_neighbors() else 0
    neighbors = retrieval * retro.retro_num_neighbors * retro.retrieved_length()
    return float(one * (model.num_layers * work.seq_length + neighbors))


def inference_report(settings: Settings) -> str:
    """Sizes of an evaluation as text."""
    planning, evaluation, work = settings[PlanningConfig], settings[EvaluationConfig], workload_of(settings)
    machine, parallel = machine_of(planning), settings[ParallelConfig]
    tensor, stages = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    replicas, left = divmod(planning.world_size(), tensor * stages)
    if left or not replicas:
        raise ConfigError(
            "the number of accelerators does not fit the model",
            got=f"{planning.world_size()} of them",
            expected=f"a multiple of tensor {tensor} x pipeline {stages}",
            fix="change --plan-nodes, or the parallel sizes",
        )
    # stages are whole layers: the largest has this share of them
    share = math.ceil(work.model.num_layers / stages) / work.model.num_layers / tensor
    weights = work.parameters * work.value_bytes * share
    cache = cache_bytes(work) * evaluation.eval_batch_size * share
    usable = machine.memory_bytes * (1 - planning.plan_memory_margin)
    cut = "" if tensor * stages == 1 else f" of {tensor * stages} each (tensor {tensor} x pipeline {stages})"
    lines = [
        f"evaluate on {planning.world_size()} {machine.name}: {replicas} replicas{cut}, which share the questions",
        f"  weights      {readable_bytes(weights)} each, {readable_count(work.parameters)} parameters in all",
        f"  caches       {readable_bytes(cache)} for {evaluation.eval_batch_size} prompts of {work.seq_length} tokens",
    ]
    if weights + cache > usable:
        raise ConfigError(
            "\n".join([*lines, "", "this does not fit"]),
            got=readable_bytes(weights + cache),
            expected=f"at most {readable_bytes(usable)}",
            fix="raise --tensor-model-parallel-size, take an accelerator with more memory, or lower --eval-batch-size",
        )
    return "\n".join([*lines, "", f"fits: {readable_bytes(weights + cache)} of {readable_bytes(usable)}"])
