"""A real service on a free port: a small model, a chunk database on disk, exact search in it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_retro.config.inference import ServeConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.instructions.templates import InstructRetroTemplate
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.inference.chat_format import ChatFormat
from megatron_retro.inference.engine import EngineLimits
from megatron_retro.inference.forward import LocalForward
from megatron_retro.inference.neighbor_sources import RetrievedNeighbors
from megatron_retro.inference.serving.server import Server, build_service, listening_socket
from megatron_retro.inference.text_generator import TextGenerator
from megatron_retro.model.cache import Cache
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.testing.corpora import write_documents
from tests.faults.injection import ROOT, commit

CHUNK = 16
RESULTS = ROOT / "tests/results/server.json"
FORM = ChatFormat(InstructRetroTemplate())
TEXTS = [
    "The quick brown fox jumps over the lazy dog and then goes home to sleep.",
    "A retrieval model reads neighbours of each chunk before it writes the next one.",
    "In the beginning there was a corpus, and the corpus was cut into chunks of tokens.",
]


class OverlapSearch:
    """Exact search by the number of shared byte trigrams: a real index over a real database."""

    def __init__(self, database: ChunkDatabase) -> None:
        self.database = database
        tokens, mask = database.gather(np.arange(database.num_chunks), CHUNK)
        self._grams = [trigrams(row[real].tolist()) for row, real in zip(tokens, mask, strict=True)]

    def search(self, chunks: Sequence[Sequence[int]], num_neighbors: int) -> tuple[Any, Any]:
        shared = np.array([[len(trigrams(chunk) & grams) for grams in self._grams] for chunk in chunks])
        ids = np.argsort(-shared, axis=1, kind="stable")[:, :num_neighbors]
        return ids, 1.0 / (1 + np.take_along_axis(shared, ids, 1))

    def embed(self, chunks: Sequence[Sequence[int]]) -> Any:
        """The number of each byte's occurrences, of length one."""
        counts = np.stack([np.bincount(list(chunk), minlength=257) for chunk in chunks]).astype(np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


def trigrams(tokens: Sequence[int]) -> set[tuple[int, ...]]:
    return set(zip(tokens, tokens[1:], tokens[2:], strict=False))


class LettersForward(LocalForward):
    """A random model that may only write small letters and spaces, so that its answers are readable text."""

    def next_logits(self, tokens_B: Sequence[int], found: Sequence[RetrievedNeighbors | None], cache: Cache) -> Tensor:
        logits_BV = super().next_logits(tokens_B, found, cache)
        allowed = torch.zeros(logits_BV.shape[1], dtype=torch.bool)
        allowed[[32, *range(97, 123)]] = True
        return logits_BV.masked_fill(~allowed, -torch.inf)


@pytest.fixture(scope="session")
def generator(tmp_path_factory: pytest.TempPathFactory) -> TextGenerator:
    torch.set_num_threads(1)
    prefix = tmp_path_factory.mktemp("database") / "corpus"
    tokenizer = ByteTokenizer()
    write_documents(prefix, ([*tokenizer.encode(text), tokenizer.eod] for text in TEXTS))
    database = ChunkDatabase.create(prefix.with_name("chunks"), [prefix], CHUNK, eod=tokenizer.eod)
    return TextGenerator(LettersForward(random_model()), tokenizer, EngineLimits(4, 512, 64), OverlapSearch(database))


def random_model() -> Retro:
    model = ModelConfig(num_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=ByteTokenizer.vocab_size)
    retro = RetroConfig(retro_add_retriever=True, retro_chunk_length=CHUNK, retro_layers=(2,))
    module = Retro(model, retro)
    initialize(module, model, retro, 5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(5.0)
    return module


@dataclass
class Running:
    """A service that answers."""

    url: str
    server: Server


def start(
    generator: TextGenerator, config: ServeConfig, api_keys: Sequence[str] = (), chat_format: ChatFormat = FORM
) -> tuple[Running, threading.Thread]:
    """Serve on a free port in a thread."""
    fresh = TextGenerator(generator.forward, generator.tokenizer, generator.limits, generator.index)
    listener = listening_socket(config)
    server = build_service(fresh, config, "small", chat_format, api_keys, finishing_seconds=0.05)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    return Running(f"http://127.0.0.1:{listener.getsockname()[1]}", server), thread


@pytest.fixture
def service_with(generator: TextGenerator) -> Iterator[Callable[..., Running]]:
    """Services with settings of their own; stopped afterwards."""
    running: list[tuple[Running, threading.Thread]] = []

    def build(api_keys: Sequence[str] = (), **settings: Any) -> Running:
        running.append(start(generator, ServeConfig(port=0, **settings), api_keys))
        return running[-1][0]

    yield build
    for service, thread in running:
        service.server.should_exit = True
        thread.join(timeout=20)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def service(generator: TextGenerator) -> Iterator[Running]:
    running, thread = start(generator, ServeConfig(port=0))
    yield running
    running.server.should_exit = True
    thread.join(timeout=20)
    assert not thread.is_alive()


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[str, dict[str, Any]], None]:
    """Write down what a count came to, under `--full`."""

    def write(name: str, facts: dict[str, Any]) -> None:
        if request.config.getoption("--full"):
            known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
            known[name] = {**facts, "date": time.strftime("%Y-%m-%d"), "commit": commit()}
            RESULTS.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n", encoding="utf-8")

    return write


@pytest.fixture
def room(tmp_path: Path) -> Path:
    return tmp_path
