"""Python's face: a model that answers, an index that is asked, and every verb as a function.

The names of this module are those of the package: `import megatron_retro as mr`, then `mr.load`, `mr.Index`, `mr.run`.
Errors are those of the command line, raised: a `megatron_retro.errors.MegatronRetroError` says what to do.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_retro.assembly.loading import LoadedModel, load_model
from megatron_retro.cli.main import run_words
from megatron_retro.config.command_line import UNSET, opposite
from megatron_retro.config.inference import EngineConfig, LiveRetrievalConfig
from megatron_retro.convert.hugging_face import CONFIG, import_hugging_face
from megatron_retro.data.hub import MODEL_PATTERNS, folder_of
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.token_file import TokenFile
from megatron_retro.inference.forward import stack_neighbors
from megatron_retro.inference.neighbor_sources import NeighborSource
from megatron_retro.inference.sampling import Sampling
from megatron_retro.inference.scoring import ScoredContinuation, score_continuations, whole_chunks
from megatron_retro.inference.text_generator import ChunkNeighbors, TextGenerator, build_text_generator
from megatron_retro.retrieval.live_index import LiveIndex

__all__ = ["Answer", "Corpus", "Index", "Model", "NeighborTable", "Passage", "load", "run"]

Corpus = TokenFile


@dataclass(frozen=True)
class Passage:
    """A chunk that was found, and what follows it in its document."""

    id: int
    distance: float
    document: int
    text: str
    continuation: str


class Index:
    """A finished project of `build-retrieval`, open for questions."""

    def __init__(self, live: LiveIndex) -> None:
        self.live = live

    @classmethod
    def open(cls, project: str | Path) -> Index:
        """Open the index in a --retro-project-dir."""
        return cls(LiveIndex(project))

    def search(self, text: str, num_neighbors: int = 2) -> list[Passage]:
        """The chunks nearest to the end of a text, as a chunk that ends there would find them."""
        live, length = self.live, self.live.database.chunk_length
        ids, distances = live.search([live.tokenizer.encode(text)[-length:]], num_neighbors)
        found = ids[0] >= 0
        tokens, present = live.database.gather(ids[0][found], 2 * length)
        documents = live.database.document_of(ids[0][found])
        decode = live.tokenizer.decode
        return [
            Passage(
                int(number),
                float(distance),
                int(document),
                decode(row[:length][there[:length]].tolist()),
                decode(row[length:][there[length:]].tolist()),
            )
            for number, distance, document, row, there in zip(
                ids[0][found], distances[0][found], documents, tokens, present, strict=True
            )
        ]


@dataclass(frozen=True)
class Answer:
    """A generated text, the log-probabilities of its tokens, and the neighbours that each chunk read."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    chunks: tuple[ChunkNeighbors, ...]


class Model:
    """A trained model; `module` is the `torch.nn.Module`, `settings` what it was trained with."""

    def __init__(self, loaded: LoadedModel, generator: TextGenerator) -> None:
        self.loaded, self.generator = loaded, generator
        self.module, self.settings, self.tokenizer = loaded.module, loaded.settings, loaded.tokenizer

    def generate(
        self,
        prompt: str,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
        retrieval: str | None = None,
        passages: Sequence[str] = (),
    ) -> Answer:
        """Go on from a prompt. `retrieval` is `live`, `random` or `none`; live where the model has an index."""
        generation = self.generator.generate(
            [prompt],
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_k, top_p, repetition_penalty, seed),
            stop_strings=stop,
            sources=[self._source(retrieval, passages)],
        )[0]
        return Answer(
            generation.text,
            tuple(generation.new_tokens),
            tuple(generation.logprobs),
            generation.finish_reason or "length",
            tuple(self.generator.report(generation)),
        )

    def score(
        self, context: str, continuation: str, *, retrieval: str | None = None, passages: Sequence[str] = ()
    ) -> ScoredContinuation:
        """The log-probability of a continuation, in nats, and whether it is what the model would write."""
        pair = (self.generator.tokens_of(context), self.tokenizer.encode(continuation))
        source = self._source(retrieval, passages)
        longest = self.generator.limits.max_sequence_length
        return score_continuations(self.generator.forward, [pair], source, max_length=longest)[0]

    @torch.inference_mode()
    def encode_neighbors(
        self, text: str, *, retrieval: str | None = None, passages: Sequence[str] = ()
    ) -> Tensor | None:
        """What the encoder makes of the neighbours of a text, [chunks, neighbours, tokens, width]; None without any."""
        source, tokens = self._source(retrieval, passages), self.tokenizer.encode(text)
        chunks = whole_chunks(tokens, self.generator.forward.chunk_length)
        if source is None or not chunks or self.module.encoder is None:
            return None
        device = next(self.module.parameters()).device
        neighbors = stack_neighbors([source.find(chunks)], self.generator.forward.neighbor_shape, device)
        encoded: list[Tensor] = []
        hook = self.module.encoder.register_forward_hook(lambda module, given, output: encoded.append(output))
        try:
            self.module(torch.tensor([tokens], device=device), neighbors)
        finally:
            hook.remove()
        return encoded[0]

    def _source(self, retrieval: str | None, passages: Sequence[str]) -> NeighborSource | None:
        default = "none" if self.generator.index is None else "live"
        return self.generator.source(retrieval or default, passages)


def load(
    path: str | Path,
    *,
    index: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_sequence_length: int = EngineConfig.max_sequence_length,
) -> Model:
    """Open a run, a checkpoint, or a Hugging Face folder or name; `index` is a project to look its chunks up in."""
    source = folder_of(path, MODEL_PATTERNS)
    engine = EngineConfig(max_sequence_length=max_sequence_length, dtype=dtype, device=device)
    live = LiveRetrievalConfig(retro_index=None if index is None else str(index))
    with tempfile.TemporaryDirectory(prefix="megatron-retro-") as folder:
        run_folder = import_hugging_face(source, Path(folder) / "run") if (source / CONFIG).is_file() else source
        loaded = load_model(run_folder, device=device, dtype=dtype)
    loaded = dataclasses.replace(loaded, path=source)
    return Model(loaded, build_text_generator(loaded, engine, live))


def run(verb: str, *words: str, config: str | Path | None = None, preset: str | None = None, **settings: Any) -> int:
    """A verb of the command line: `run("retrofit", config="recipe.toml", load="gpt", save="run", train_iters=20)`.

    Settings are the flags without dashes. Errors are raised, among them the `Requeue` of a run that was saved before
    its end; what is returned is 0, or the code by which a verb tells what it found.
    """
    given = {"config": config, "preset": preset}
    flags = [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(flag if value else opposite(flag))
        else:
            values = value if isinstance(value, (list, tuple)) else [UNSET if value is None else value]
            flags += [flag, *map(str, values)]
    return run_words([verb, *words, *flags])
