"""Small models with loud weights, and a source of neighbours that can be checked."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.inference.neighbor_sources import RetrievedNeighbors
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.testing.retrieval_projects import CHUNK, echoing_documents, project_settings, write_corpus


class HashedNeighbors:
    """Neighbours that are a function of the chunk; some of their tokens are absent."""

    def __init__(self, num_neighbors: int, retrieved_length: int) -> None:
        self.shape = (num_neighbors, retrieved_length)
        self.asked: list[list[int]] = []

    def find(self, chunks: Sequence[Sequence[int]]) -> list[RetrievedNeighbors]:
        return [self._one(list(chunk)) for chunk in chunks]

    def _one(self, chunk: list[int]) -> RetrievedNeighbors:
        self.asked.append(chunk)
        draws = np.random.default_rng(chunk)
        mask = draws.random(self.shape) > 0.2
        tokens = draws.integers(0, 256, self.shape)
        return RetrievedNeighbors(tokens, mask, (7,) * self.shape[0], (0.5,) * self.shape[0])


def build_model(seed: int = 1, **changes: object) -> Retro:
    model = ModelConfig(
        num_layers=3,
        hidden_size=32,
        num_attention_heads=4,
        vocab_size=ByteTokenizer.vocab_size,
        swiglu=True,
        **{name: value for name, value in changes.items() if not name.startswith("retro_")},  # type: ignore[arg-type]
    )
    asked = {name: value for name, value in changes.items() if name.startswith("retro_")}
    settings = {"retro_add_retriever": True, "retro_chunk_length": 8, "retro_layers": (2, 3), **asked}
    retro = RetroConfig(**settings)  # type: ignore[arg-type]
    module = Retro(model, retro)
    initialize(module, model, retro, seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(4.0)  # far from uniform, so that a wrong position or neighbour changes the argmax
    return module.eval()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_model() -> Callable[..., Retro]:
    return build_model


@pytest.fixture
def hashed() -> HashedNeighbors:
    return HashedNeighbors(2, 16)


def write_run(run: Path, module: Retro) -> Path:
    values = {name: value.detach() for name, value in module.named_parameters()}
    shapes = parameter_shapes(module.model, module.retro)
    settings = Settings([module.model, module.retro, TokenizerConfig()])
    write_checkpoint(
        run, settings, shapes, lambda name: values[name][tuple(map(slice, shapes[name]))].contiguous(), inputs={}
    )
    return run


@pytest.fixture(scope="session")
def room(tmp_path_factory: pytest.TempPathFactory, small_model: Callable[..., Retro]) -> Path:
    """`retro` (m = 16), `other` (m = 8) and `project`, an index over chunks of 16 bytes."""
    from megatron_retro.retrieval.stages import build_retrieval

    folder = tmp_path_factory.mktemp("generate")
    write_run(folder / "retro", small_model(retro_chunk_length=CHUNK))
    write_run(folder / "other", small_model())
    write_run(folder / "shut", small_model(retro_chunk_length=CHUNK, retro_attention_gate=0.0))
    corpus = write_corpus(folder / "corpus", echoing_documents(1, 60))
    build_retrieval(project_settings(folder / "project", [corpus]))
    return folder


@pytest.fixture(scope="session")
def squad_file(room: Path) -> Path:
    questions = [
        {"id": str(n), "question": f"what is {n}?", "answers": [{"text": f"w{n}", "answer_start": 0}]} for n in range(5)
    ]
    paragraph = {"context": "w0 w1 w2 w3 w4 are words.", "qas": questions}
    path = room / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": [paragraph]}]}))
    return path
