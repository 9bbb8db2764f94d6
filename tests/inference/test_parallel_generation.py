"""Generation on tensor and pipeline ranks writes what one process writes, from the same checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_retro.assembly.loaded_model import load_model
from megatron_retro.assembly.loaded_stage import load_stage
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import ConfigError
from megatron_retro.inference.engine import Engine, EngineLimits
from megatron_retro.inference.forward import Forward, LocalForward
from megatron_retro.inference.generation import GenerationRequest
from megatron_retro.inference.sampling import Sampling
from megatron_retro.inference.staged_forward import SharedSource, StagedForward
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.mesh import build_mesh
from megatron_retro.testing.processes import run_ranks

PROMPTS = ((1, 2, 3), tuple(range(40, 70)), (9,) * 8)


class NeverEnds(ByteTokenizer):
    """Texts end by length alone."""

    vocab_size = 256


@pytest.fixture
def checkpoint(small_model: Callable[..., Retro], tmp_path: Path) -> Path:
    module = small_model(untie_embeddings_and_output_weights=True)
    values = {name: value.detach() for name, value in module.named_parameters()}
    shapes = parameter_shapes(module.model, module.retro)
    settings = Settings([module.model, module.retro, TokenizerConfig()])
    write_checkpoint(
        tmp_path, settings, shapes, lambda name: values[name][tuple(map(slice, shapes[name]))].contiguous(), inputs={}
    )
    return tmp_path


def texts(forward: Forward, source: Any) -> list[tuple[list[int], list[float], int]]:
    requests = [GenerationRequest(prompt, 20 + number, source=source) for number, prompt in enumerate(PROMPTS)]
    requests.append(
        GenerationRequest(PROMPTS[1], 12, Sampling(temperature=1.0, seed=4), retrieval_step=3, source=source)
    )
    done = Engine(forward, NeverEnds(), EngineLimits(3, 64, 10)).generate(requests)
    return [(one.tokens, one.log_probabilities, len(one.readings)) for one in done]


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (1, 3), (2, 2)])
def test_layouts_write_the_same(checkpoint: Path, hashed: Any, tensor: int, pipeline: int) -> None:
    alone = texts(LocalForward(load_model(checkpoint, device="cpu").module), hashed)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)

    def rank() -> Any:
        mesh = build_mesh(parallel, torch.device("cpu"))
        stage, settings, _ = load_stage(checkpoint, parallel, mesh)
        forward = StagedForward(stage, settings, mesh)
        own = hashed if dist.get_rank() == 0 else None  # only the first rank can search
        return texts(forward, SharedSource(own, forward.neighbor_shape, torch.device("cpu")))

    for found in run_ranks(rank, tensor * pipeline):
        for (tokens, chances, readings), (expected, expected_chances, expected_readings) in zip(
            found, alone, strict=True
        ):
            assert tokens == expected and readings == expected_readings
            assert chances == pytest.approx(expected_chances, abs=1e-3)


def test_data_ranks_are_refused(checkpoint: Path) -> None:
    def rank() -> None:
        mesh = build_mesh(ParallelConfig(), torch.device("cpu"))
        with pytest.raises(ConfigError, match="tensor and pipeline ranks only"):
            load_stage(checkpoint, ParallelConfig(), mesh)

    run_ranks(rank, 2)
