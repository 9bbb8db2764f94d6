"""A run that tuned beside a frozen model is loaded with that model: the function is the tuned one's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from megatron_retro.assembly.loading import load_model, load_stage
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, PeftConfig
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.inference.driver import DriverEngine, run_worker
from megatron_retro.inference.engine import Engine, EngineLimits
from megatron_retro.inference.forward import Forward, LocalForward, StagedForward, stack_neighbors
from megatron_retro.inference.generation import GenerationRequest
from megatron_retro.inference.sampling import Sampling
from megatron_retro.inference.scoring import score_continuations
from megatron_retro.inference.text_generator import TextGenerator
from megatron_retro.model.retro import Retro
from megatron_retro.parallel.mesh import build_mesh
from megatron_retro.parallel.replica_channel import ReplicaChannel
from megatron_retro.peft.attach import added_parameters, attach, connect
from megatron_retro.peft.prompts import virtual_token_ids
from megatron_retro.testing.processes import run_ranks

CHUNK, VIRTUAL = 8, 11
PENALIZED = Sampling(repetition_penalty=1.3)
PROMPTS = ((1, 2, 3), (9,) * 5, tuple(range(40, 70)))


class NeverEnds(ByteTokenizer):
    """Texts end by length alone."""

    vocab_size = 256


def write(run: Path, settings: Settings, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    values = {name: value.detach() for name, value in module.named_parameters()}
    write_checkpoint(
        run, settings, shapes, lambda name: values[name][tuple(map(slice, shapes[name]))].contiguous(), inputs={}
    )


def tuned_run(module: Retro, folder: Path, method: str) -> None:
    """A base, and a run that tuned beside it; `module` becomes the tuned model."""
    common = [module.model, module.retro, TokenizerConfig()]
    write(folder / "base", Settings(common), module, parameter_shapes(module.model, module.retro))
    peft = PeftConfig(
        peft_method=method, lora_rank=4, adapter_size=4, num_virtual_tokens=VIRTUAL, prompt_encoder_hidden_size=16
    )
    attach(module, peft)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in added_parameters(module).values():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    connect(module)
    settings = Settings([*common, peft, CheckpointConfig(load="base")])  # relative: it is found above the run
    shapes = {name: tuple(one.shape) for name, one in added_parameters(module).items()}
    write(folder / "tuned", settings, module, shapes)


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "p-tuning"])
def test_tuned_function(
    small_model: Callable[..., Retro], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    module = small_model()
    tokens = torch.randint(0, 256, (1, 30))
    plain = module(tokens)[:, -20:]
    tuned_run(module, tmp_path, method)
    if method == "p-tuning":
        tokens = torch.cat((torch.tensor([virtual_token_ids(VIRTUAL)]), tokens), 1)
    monkeypatch.chdir("/")
    loaded = load_model(tmp_path / "tuned", device="cpu").module
    with torch.inference_mode():
        expected, found = module(tokens)[:, -20:], loaded(tokens)[:, -20:]
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert bool(added_parameters(loaded)) == (method in ("adapter", "p-tuning"))


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("positions", ["rope", "learned_absolute"])
def test_virtual_tokens_lead_what_is_generated(
    small_model: Callable[..., Retro], hashed: Any, tmp_path: Path, reads: bool, positions: str
) -> None:
    """With a cache as in one forward over virtual tokens, prompt and answer, whatever the chunks."""
    module = small_model(position_embedding_type=positions)
    tuned_run(module, tmp_path, "p-tuning")
    forward = LocalForward(load_model(tmp_path / "tuned", device="cpu").module)
    source = hashed if reads else None
    requests = [GenerationRequest(prompt, 20, source=source) for prompt in PROMPTS]
    lead = virtual_token_ids(VIRTUAL)
    for generation in Engine(forward, NeverEnds(), EngineLimits(2, 64, 5)).generate(requests):
        tokens = [*lead, *generation.request.prompt, *generation.new_tokens]
        assert generation.tokens == tokens and len(generation.new_tokens) == 20
        read = tokens[:-1]
        chunks = [
            [word for word in read[at : at + CHUNK] if word >= 0] for at in range(0, len(read) - CHUNK + 1, CHUNK)
        ]
        neighbors = (
            stack_neighbors([hashed.find(chunks)], forward.neighbor_shape, torch.device("cpu")) if reads else None
        )
        with torch.inference_mode():
            logits = module(torch.tensor([read]), neighbors)[0, -20:, :256].log_softmax(-1)
        picked = logits.gather(1, torch.tensor(generation.new_tokens)[:, None])[:, 0]
        torch.testing.assert_close(picked, logits.max(-1).values, atol=2e-4, rtol=0)
        torch.testing.assert_close(picked, torch.tensor(generation.logprobs), atol=2e-4, rtol=0)
        if reads:
            assert [one.query_stop for one in generation.retrievals] == list(range(CHUNK, len(tokens), CHUNK))
    assert all(word >= 0 for chunk in hashed.asked for word in chunk)


def test_virtual_tokens_lead_what_is_scored_and_are_no_text(
    small_model: Callable[..., Retro], hashed: Any, tmp_path: Path
) -> None:
    module = small_model()
    tuned_run(module, tmp_path, "p-tuning")
    loaded = load_model(tmp_path / "tuned", device="cpu").module
    generator = TextGenerator(LocalForward(loaded), ByteTokenizer(), EngineLimits(1, 64))
    (generation,) = generator.generate(
        ["the prompt of a text"], max_new_tokens=20, sampling=PENALIZED, sources=[hashed]
    )
    assert "".join(chunk.query for chunk in generator.report(generation)).startswith("the prompt of")
    context, answer = list(generation.request.prompt), generation.new_tokens
    (scored,) = score_continuations(LocalForward(loaded), [(context, answer)], hashed, max_length=64)
    assert scored.logprob == pytest.approx(sum(generation.logprobs), abs=1e-3)


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter", "p-tuning"])
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_tuned_runs_write_the_same_on_several_ranks(
    small_model: Callable[..., Retro], hashed: Any, tmp_path: Path, method: str, tensor: int, pipeline: int
) -> None:
    tuned_run(small_model(untie_embeddings_and_output_weights=True), tmp_path, method)
    alone = texts(engine_of(LocalForward(load_model(tmp_path / "tuned", device="cpu").module)), hashed)
    parallel = ParallelConfig(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)

    def rank() -> list[tuple[list[int], list[float]]] | None:
        mesh = build_mesh(parallel, torch.device("cpu"))
        loaded = load_stage(tmp_path / "tuned", parallel, mesh)
        forward, channel = StagedForward(loaded.stage, loaded.settings, mesh), ReplicaChannel(mesh)
        if not channel.is_first:
            return run_worker(engine_of(forward), channel)
        with closing(DriverEngine(forward, NeverEnds(), LIMITS, channel)) as engine:
            return texts(engine, hashed)

    found, _ = run_ranks(rank, 2)
    assert [tokens for tokens, _ in found] == [tokens for tokens, _ in alone]
    for (_, chances), (_, expected) in zip(found, alone, strict=True):
        assert chances == pytest.approx(expected, abs=1e-3)


LIMITS = EngineLimits(3, 64, 10)


def engine_of(forward: Forward) -> Engine:
    return Engine(forward, NeverEnds(), LIMITS)


def texts(engine: Engine, source: Any) -> list[tuple[list[int], list[float]]]:
    requests = [GenerationRequest(prompt, 12, source=source) for prompt in PROMPTS]
    return [(one.tokens, one.logprobs) for one in engine.generate(requests)]
