"""Generation from text to text: tokenizer, engine and neighbour sources of a loaded model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

from megatron_retro.artifacts.manifest import require_same
from megatron_retro.assembly.loading import Loaded, LoadedModel
from megatron_retro.config.inference import EngineConfig, LiveRetrievalConfig
from megatron_retro.data.tokenizers import Tokenizer, begin_tokens, name_of, refuse_mismatch
from megatron_retro.errors import ConfigError
from megatron_retro.inference.engine import Engine, EngineLimits, raise_failures
from megatron_retro.inference.forward import Forward, LocalForward
from megatron_retro.inference.generation import Generation, GenerationRequest, TextStream
from megatron_retro.inference.large_pages import store_for_decoding
from megatron_retro.inference.neighbor_sources import (
    ChunkReading,
    ChunkSearch,
    GivenPassages,
    LiveNeighbors,
    NeighborSource,
    RandomNeighbors,
    RetrievedNeighbors,
)
from megatron_retro.inference.sampling import Sampling


@dataclass(frozen=True)
class NeighborText:
    """One neighbour as text."""

    id: int
    distance: float | None
    text: str
    attention: tuple[tuple[str, float], ...] = ()  # of each of its tokens, if that was asked for
    worth: float | None = None  # nats, with it


@dataclass(frozen=True)
class ChunkNeighbors:
    """The neighbours that one chunk retrieved; tokens from query_stop - 1 on read them."""

    query: str
    query_start: int
    query_stop: int
    neighbors: tuple[NeighborText, ...]


class TextGenerator:
    """Generates text from text."""

    def __init__(
        self,
        forward: Forward,
        tokenizer: Tokenizer,
        limits: EngineLimits,
        index: ChunkSearch | None = None,
        engine: Engine | None = None,
        *,
        add_bos: bool = True,
    ) -> None:
        self.forward, self.tokenizer, self.index, self.add_bos = forward, tokenizer, index, add_bos
        self.limits = limits
        self.engine = engine or Engine(forward, tokenizer, limits)

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt, behind what begins a text; where that is nothing, the end-of-document token does."""
        tokens = self.tokenizer.encode(text)
        begins = begin_tokens(self.tokenizer, tokens) if self.add_bos else ()
        return (*begins, *tokens) or (self.tokenizer.eod,)

    def source(self, mode: str, passages: Sequence[str] = ()) -> NeighborSource | None:
        """The source of a mode: `live`, `random` (both need an index) or `none`; given passages replace any of them."""
        shape = self.forward.neighbor_shape
        if passages:
            if not self.forward.reads_neighbors:
                raise ConfigError(
                    "passages were given to a model that reads no neighbours",
                    got="a GPT, or a Retro whose gate is shut",
                    fix="put them into the prompt (--chat does where the model was tuned so), or leave them out",
                )
            return GivenPassages([self.tokenizer.encode(passage) for passage in passages], *shape)
        if mode == "none" or not self.forward.reads_neighbors:
            return None
        if self.index is None:
            raise ConfigError(
                f"retrieval {mode!r} needs an index",
                fix="give --retro-index DIR (made by `megatron-retro build-retrieval`), or --retrieval none",
            )
        return LiveNeighbors(self.index, *shape) if mode == "live" else RandomNeighbors(self.index.database, *shape)

    def report(self, generation: Generation) -> list[ChunkNeighbors]:
        """The chunks of a text with the neighbours that they retrieved, in order."""
        decode, readings = self.tokenizer.decode, generation.readings
        return [
            ChunkNeighbors(
                decode(generation.text_tokens(one.query_start, one.query_stop)),
                one.query_start,
                one.query_stop,
                tuple(self._neighbors(one.found, reading)),
            )
            for one, reading in zip(generation.retrievals, readings or repeat(None), strict=False)
        ]

    def _neighbors(self, found: RetrievedNeighbors, reading: ChunkReading | None) -> Iterator[NeighborText]:
        for number, tokens in enumerate(found.token_lists()):
            if not tokens:
                continue
            distance = found.distances[number]
            attention: tuple[tuple[str, float], ...] = ()
            if reading is not None:
                stream = TextStream(self.tokenizer.decode, ())
                pieces = [stream.feed(token) for token in tokens]
                pieces[-1] += stream.finish()
                attention = tuple(
                    zip(pieces, reading.attention_KR[number][found.mask_KR[number]].tolist(), strict=True)
                )
            yield NeighborText(
                found.chunk_ids[number],
                distance if math.isfinite(distance) else None,
                self.tokenizer.decode(tokens),
                attention,
                None if reading is None else float(reading.worth_K[number]),
            )

    def generate(
        self,
        prompts: Sequence[str | tuple[int, ...]],
        *,
        max_new_tokens: int,
        sampling: Sampling,
        stop_strings: Sequence[str] = (),
        sources: Sequence[NeighborSource | None] = (),
        retrieval_step: int | None = None,
        listener: Callable[[str], None] | None = None,
    ) -> list[Generation]:
        """Generate one text per prompt, a text or tokens. `sources` has one entry per prompt, or none."""
        generations = [
            self.engine.submit(
                GenerationRequest(
                    self.tokens_of(prompt) if isinstance(prompt, str) else prompt,
                    max_new_tokens,
                    sampling,
                    tuple(stop_strings),
                    sources[number] if sources else None,
                    retrieval_step,
                ),
                listener,
            )
            for number, prompt in enumerate(prompts)
        ]
        while self.engine.step():
            pass
        raise_failures(generations)
        return generations


def build_text_generator(
    loaded: LoadedModel, engine: EngineConfig, live: LiveRetrievalConfig, *, allow_tokenizer_mismatch: bool = False
) -> TextGenerator:
    """The generator of a loaded model, with an index that fits it."""
    index = index_for(loaded, live, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    loaded.module.keep_encodings(engine.keep_encoded_mb)
    forward = LocalForward(store_for_decoding(loaded.module))
    return TextGenerator(forward, loaded.tokenizer, limits_of(engine), index, add_bos=engine.add_bos)


def limits_of(engine: EngineConfig) -> EngineLimits:
    """The engine's limits from the flags."""
    return EngineLimits(engine.max_batch_size, engine.max_sequence_length, engine.prefill_tokens)


def index_for(
    loaded: Loaded, live: LiveRetrievalConfig, *, allow_tokenizer_mismatch: bool = False
) -> ChunkSearch | None:
    """The index of --retro-index, if one is given; refused for a model that reads no neighbours."""
    if live.retro_index is None:
        return None
    if not loaded.retro.reads_neighbors():
        raise ConfigError(
            f"{loaded.path} reads no neighbours",
            got=f"--retro-index {live.retro_index}",
            expected="a model with a retriever whose gate is open",
            fix="leave --retro-index out, or load a Retro",
        )
    path, length = Path(live.retro_index), loaded.retro.retro_chunk_length
    return open_index(path, length, loaded.tokenizer, allow_tokenizer_mismatch)


def open_index(path: Path, chunk_length: int, tokenizer: Tokenizer, allow_tokenizer_mismatch: bool) -> ChunkSearch:
    """A live index; one whose chunk length or tokenizer is not the model's is refused."""
    from megatron_retro.retrieval.live_index import LiveIndex

    index = LiveIndex(path, allow_tokenizer_mismatch=allow_tokenizer_mismatch)
    rebuild = "build the retrieval project again with the model's settings, or give another --retro-index"
    require_same(path, "the chunk length", index.database.chunk_length, chunk_length, rebuild)
    if index.tokenizer.fingerprint != tokenizer.fingerprint:
        refuse_mismatch(
            f"{path} was built with another tokenizer than the model's",
            name_of(index.tokenizer),
            tokenizer,
            allow_tokenizer_mismatch,
        )
    return index
