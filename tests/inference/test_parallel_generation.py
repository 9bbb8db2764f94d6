"""Generation on tensor and pipeline ranks writes what one process writes, from the same checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_retro.assembly.loading import load_model, load_stage
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import ConfigError, DataError, DistributedError
from megatron_retro.inference.driver import DriverEngine, run_worker
from megatron_retro.inference.engine import Engine, EngineLimits
from megatron_retro.inference.forward import LocalForward, StagedForward
from megatron_retro.inference.generation import GenerationRequest
from megatron_retro.inference.neighbor_sources import NeighborSource, RetrievedNeighbors
from megatron_retro.inference.sampling import Sampling
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.mesh import build_mesh
from megatron_retro.parallel.replica_channel import ReplicaChannel
from megatron_retro.testing.processes import run_ranks
from megatron_retro.testing.tiny_corpus import index_reads

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


def texts(engine: Engine, source: Any) -> list[tuple[list[int], list[float], int]]:
    requests = [GenerationRequest(prompt, 20 + number, source=source) for number, prompt in enumerate(PROMPTS)]
    requests.append(
        GenerationRequest(PROMPTS[1], 12, Sampling(temperature=1.0, seed=4), retrieval_step=3, source=source)
    )
    done = engine.generate(requests)
    return [(one.tokens, one.logprobs, len(one.retrievals)) for one in done]


def parts(checkpoint: Path, tensor: int, pipeline: int) -> tuple[StagedForward, ReplicaChannel]:
    """This rank's part of a replica; data ranks are what is left of the processes."""
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    mesh = build_mesh(parallel, torch.device("cpu"))
    with index_reads() as read:
        loaded = load_stage(checkpoint, parallel, mesh)
    assert len(read) == (dist.get_rank() == 0), "one rank reads the index"
    return StagedForward(loaded.stage, loaded.settings, mesh), ReplicaChannel(mesh)


LIMITS = EngineLimits(3, 64, 10)


@pytest.mark.parametrize(("tensor", "pipeline", "data"), [(2, 1, 1), (1, 2, 2), (1, 3, 1), (2, 2, 1)])
def test_layouts_write_the_same(checkpoint: Path, hashed: Any, tensor: int, pipeline: int, data: int) -> None:
    """Only the first rank of each replica knows the requests and can search."""
    alone = texts(Engine(LocalForward(load_model(checkpoint, device="cpu").module), NeverEnds(), LIMITS), hashed)

    def rank() -> Any:
        forward, channel = parts(checkpoint, tensor, pipeline)
        if not channel.is_first:
            return run_worker(Engine(forward, NeverEnds(), LIMITS), channel)
        with closing(DriverEngine(forward, NeverEnds(), LIMITS, channel)) as engine:
            return texts(engine, hashed)

    found = [one for one in run_ranks(rank, tensor * pipeline * data) if one is not None]
    assert len(found) == data
    for replica in found:
        for (tokens, chances, retrievals), (expected, expected_chances, expected_retrievals) in zip(
            replica, alone, strict=True
        ):
            assert tokens == expected and retrievals == expected_retrievals
            assert chances == pytest.approx(expected_chances, abs=1e-3)


class FailsOnce:
    """A source that fails at its second question, as a search may."""

    def __init__(self, source: NeighborSource) -> None:
        self.source, self.asked = source, 0

    def find(self, chunks: Sequence[Sequence[int]]) -> list[RetrievedNeighbors]:
        self.asked += 1
        if self.asked == 2:
            raise OSError("the index is gone")
        return self.source.find(chunks)


def test_followers_keep_up_with_texts_that_come_and_go(checkpoint: Path, hashed: Any) -> None:
    """Cancelled texts, refused requests, a search that fails and is forgotten: what comes after is as ever."""
    requests = [GenerationRequest(prompt, 20, source=hashed) for prompt in PROMPTS]

    def story(engine: Engine) -> list[list[int]]:
        first, second = engine.submit(requests[0]), engine.submit(requests[1])
        for _ in range(6):
            engine.step()
        engine.cancel(first)
        with pytest.raises(DataError, match="too long"):
            engine.submit(GenerationRequest(PROMPTS[1], 1000))
        third = engine.submit(requests[2])
        while engine.step():
            pass
        engine.submit(GenerationRequest(PROMPTS[1], 20, source=FailsOnce(hashed)))
        with pytest.raises(OSError, match="the index is gone"):
            while engine.step():
                pass
        engine.reset()
        engine.step()  # an idle service steps too
        return [one.tokens for one in (first, second, third, *engine.generate(requests))]

    alone = story(Engine(LocalForward(load_model(checkpoint, device="cpu").module), NeverEnds(), LIMITS))

    def rank() -> Any:
        forward, channel = parts(checkpoint, 1, 2)
        if not channel.is_first:
            return run_worker(Engine(forward, NeverEnds(), LIMITS), channel)
        with closing(DriverEngine(forward, NeverEnds(), LIMITS, channel)) as engine:
            return story(engine)

    assert run_ranks(rank, 2)[0] == alone


def test_a_driver_that_fails_alone_says_so(checkpoint: Path) -> None:
    def rank() -> Any:
        forward, channel = parts(checkpoint, 1, 2)
        if not channel.is_first:
            with pytest.raises((DistributedError, RuntimeError)):
                run_worker(Engine(forward, NeverEnds(), LIMITS), channel)
            return None
        with closing(DriverEngine(forward, NeverEnds(), LIMITS, channel)) as engine:
            engine.submit(GenerationRequest(PROMPTS[0], 20))
            engine.forward = None  # type: ignore[assignment]
            with pytest.raises(DistributedError, match="out of step"):
                engine.step()
        dist.destroy_process_group()
        os._exit(0)

    with pytest.raises(AssertionError, match="died without a word"):  # that was the driver's end
        run_ranks(rank, 2, timeout=20)


def test_layouts_of_training_alone_are_refused(checkpoint: Path) -> None:
    layouts = (
        ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True),
        ParallelConfig(context_parallel_size=2),
    )

    def rank() -> None:
        for parallel in layouts:
            mesh = build_mesh(parallel, torch.device("cpu"))
            with pytest.raises(ConfigError, match="only used is cut over tensor and pipeline ranks"):
                load_stage(checkpoint, parallel, mesh)

    run_ranks(rank, 2)
