"""What is planned of a rank, from one layer of each kind, is what its whole stages hold, compute and send."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_retro.assembly.stage_building import compute_dtype, stage_on_meta
from megatron_retro.config.data import DataConfig
from megatron_retro.config.hardware import accelerator
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import OptimizerConfig, TrainingConfig
from megatron_retro.microbatch import Microbatch
from megatron_retro.parallel.partition import StagePart, stage_parts
from megatron_retro.planning.fake_device import GPU, fake_rank, without_memory
from megatron_retro.planning.plan import make_plan
from megatron_retro.planning.ranks import in_order
from megatron_retro.planning.recorder import PartTrace, Recorder
from megatron_retro.planning.trace import full_neighbors, hold_plainly, local_shapes, own_length
from tests.planning.recipes import recipe

PIPELINED = {"pipeline_model_parallel_size": 4, "plan_gpus_per_node": 4}
CASES: dict[str, dict[str, Any]] = {
    "one rank": {"plan_gpus_per_node": 1},
    "tensor": {"tensor_model_parallel_size": 2, "plan_gpus_per_node": 2},
    "sequence and pipeline": {
        **PIPELINED,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "plan_gpus_per_node": 8,
    },
    "context": {
        **PIPELINED,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "context_parallel_size": 2,
        "micro_batch_size": 2,
        "plan_gpus_per_node": 16,
    },
    "gpt": {**PIPELINED, "retro_add_retriever": False, "retro_layers": None},
    "tied": {**PIPELINED, "untie_embeddings_and_output_weights": False},
    "frozen decoder": {**PIPELINED, "freeze_decoder": True},
    "frozen decoder, uncut": {"freeze_decoder": True, "plan_gpus_per_node": 1},
    "lora": {**PIPELINED, "peft_method": "lora"},
    "full": {**PIPELINED, "recompute_granularity": "full"},
    "interleaved": {
        "pipeline_model_parallel_size": 2,
        "num_layers_per_virtual_pipeline_stage": 2,
        "pipeline_schedule": "interleaved",
        "plan_gpus_per_node": 2,
    },
    "encoder of its own": {
        **PIPELINED,
        "retro_encoder_hidden_size": 128,
        "retro_encoder_own_embedding": True,
        "retro_encoder_layers": 3,
        "retro_gate_type": "adaptive",
    },
}


def traced_stage(settings: Settings, part: StagePart) -> PartTrace:
    """A whole stage, as the trainer builds it, with what comes over its borders."""
    parallel = settings[ParallelConfig]
    tensor, ranks = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    shared, apart = tensor if parallel.sequence_parallel else 1, tensor * parallel.context_parallel_size
    with fake_rank(part.index % ranks * apart, apart * ranks, parallel) as mesh:
        stage = stage_on_meta(settings, part, mesh)
        shapes = local_shapes(stage.model)
        with without_memory(GPU):
            dtype = compute_dtype(settings[OptimizerConfig])
            hold_plainly(stage.model, shapes, GPU, dtype)
            shape = (settings[TrainingConfig].micro_batch_size, own_length(settings))
            tokens, neighbors = torch.zeros(shape, dtype=torch.long, device=GPU), full_neighbors(settings, GPU)
            batch = Microbatch(tokens, tokens, torch.ones(shape, device=GPU), neighbors=neighbors)
            received = []
            if not part.first:
                width = settings[ModelConfig].hidden_size
                received.append(torch.zeros(shape[0], shape[1] // shared, width, dtype=dtype, device=GPU))
            if neighbors is not None and part.receives_neighbors:
                mask = neighbors.mask_BCKR if mesh.context is None else neighbors.mask_of_spans()
                *leading, length = mask.shape
                width = settings[RetroConfig].encoder_model(settings[ModelConfig]).hidden_size
                received.append(torch.zeros(*leading, length // shared, width, dtype=dtype, device=GPU))
            recorder = Recorder([*stage.parameters(), *received, *batch.arrays().values()], mesh.context)
            with recorder:
                result = stage(*(each.requires_grad_() for each in received), batch=batch)
                results = result if isinstance(result, tuple) else (result,)
                recorder.end_forward()
                torch.autograd.backward(results, [torch.zeros_like(each) for each in results])
    (found,) = recorder.parts.values()
    held = list(stage.model.parameters())
    found.parameters = sum(each.numel() for each in held)
    found.trained_parameters = sum(each.numel() for each in held if each.requires_grad)
    return found


@pytest.mark.parametrize("case", CASES)
def test_a_planned_stage_is_the_whole_stage(case: str) -> None:
    settings = recipe(**CASES[case], compile=False)  # whole stages are traced eagerly
    plan = make_plan(settings, accelerator("H100"))
    stages = in_order(plan.ranks)
    assert [stage.part for stage in stages] == list(stage_parts(settings, settings[DataConfig].seq_length))
    for stage in stages:
        planned, whole = stage.total, traced_stage(settings, stage.part)
        assert (planned.parameters, planned.trained_parameters) == (whole.parameters, whole.trained_parameters)
        tuned_first = case == "lora" and stage.part.first  # only its first layer passes no gradient on
        assert planned.forward_flops == pytest.approx(whole.forward_flops, rel=1e-9)
        assert planned.backward_flops == pytest.approx(whole.backward_flops, rel=0.1 if tuned_first else 1e-9)
        assert planned.sent_bytes == pytest.approx(whole.sent_bytes, rel=0.1 if tuned_first else 1e-9)
        assert planned.context_bytes == pytest.approx(whole.context_bytes, rel=1e-9)
        assert planned.saved_bytes == pytest.approx(whole.saved_bytes, rel=0.2 if tuned_first else 0.02, abs=20_000)
        assert planned.moved_bytes == pytest.approx(whole.moved_bytes, rel=0.1)
