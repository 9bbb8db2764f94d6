"""Continuous batching: texts join and leave a running batch, and each step feeds one token of every text.

A prompt's tokens but the last are prefilled into a cache of their own, some at a time between the decoding steps, and
short prompts together; then its row moves into the batch's cache, whose number of rows doubles and halves with the
need. The newest token of a text
is fed in the same way whether it is of the prompt or sampled: if it ends a chunk, the neighbours of that chunk are
retrieved first, because this token is the first that may read them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_retro.data.tokenizers import Tokenizer, end_tokens
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.inference.forward import Forward
from megatron_retro.inference.generation import Generation, GenerationRequest, Retrieval
from megatron_retro.inference.grammars import Grammars
from megatron_retro.inference.neighbor_sources import NeighborSource, RetrievedNeighbors
from megatron_retro.inference.sampling import fetch_samples
from megatron_retro.model.cache import Cache


@dataclass(frozen=True)
class EngineLimits:
    """Sizes of the engine. Virtual tokens (of P-tuning) do not count in a sequence's length."""

    max_batch_size: int = 8
    max_sequence_length: int = 2048
    prefill_tokens: int = 512


@dataclass
class _Prefill:
    """Prompts of which equally many tokens are in a cache, row by row, and the neighbours of their chunks."""

    generations: list[Generation]
    cache: Cache
    found: list[list[RetrievedNeighbors]]

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Let go of all other rows."""
        if len(rows) < len(self.generations):
            self.generations = [self.generations[row] for row in rows]
            self.found = [self.found[row] for row in rows]
            self.cache.select_rows(torch.tensor(rows, dtype=torch.long, device=device))


class Engine:
    """Generates texts. Not thread-safe: one thread submits, cancels and steps."""

    def __init__(self, forward: Forward, tokenizer: Tokenizer, limits: EngineLimits | None = None) -> None:
        self.forward, self.tokenizer, self._ends = forward, tokenizer, end_tokens(tokenizer)
        self.limits = limits or EngineLimits()
        self._waiting: deque[Generation] = deque()
        self._prefill: _Prefill | None = None
        self._rows: list[Generation | None] = []
        self._cache: Cache | None = None

    @cached_property
    def grammars(self) -> Grammars:
        """What makes answers JSON; refused without the library that it needs."""
        return Grammars(self.tokenizer)

    @property
    def num_active(self) -> int:
        """Texts in the batch or being prefilled."""
        return sum(row is not None for row in self._rows) + len(self._prefilled)

    @property
    def _prefilled(self) -> list[Generation]:
        return [] if self._prefill is None else self._prefill.generations

    @property
    def num_waiting(self) -> int:
        """Texts that no work was done for yet."""
        return len(self._waiting)

    def submit(self, request: GenerationRequest, listener: Callable[[str], None] | None = None) -> Generation:
        """Queue a request; refused if it can never fit."""
        check_request(request, self.limits, self.forward)
        constraint = None if request.grammar is None else self.grammars.begin(request.grammar)
        generation = Generation(request, self.tokenizer.decode, listener, self.forward.virtual_tokens, constraint)
        self._waiting.append(generation)
        return generation

    def attend(self, generation: Generation) -> None:
        """Note what a finished text's neighbours got of its attention and are worth, if that was asked for."""
        if generation.request.attention and generation.finish_reason in ("stop", "length"):
            size = self.forward.chunk_length
            found = {one.query_stop // size - 1: one.found for one in generation.retrievals}
            generation.readings = self.forward.reading(generation.tokens, found)

    def cancel(self, generation: Generation) -> None:
        """Stop a text; its place is free at the next step."""
        generation.finish("cancelled")

    def reset(self) -> None:
        """Cancel every text and drop the caches, after a step that failed."""
        for generation in (*self._waiting, *self._rows, *self._prefilled):
            if generation is not None:
                generation.finish("cancelled")
        self._waiting, self._rows = deque(), []
        self._prefill, self._cache = None, None

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Generation]:
        """Submit requests, run until all are finished, and return them in order."""
        generations = [self.submit(request) for request in requests]
        while self.step():
            pass
        raise_failures(generations)
        return generations

    @torch.inference_mode()
    def step(self) -> bool:
        """Prefill part of a prompt, or short ones, and decode one token of every text; False with nothing to do."""
        self._waiting = deque(one for one in self._waiting if not one.finished)
        self._drop_finished()
        if self._prefill is None and self._waiting and self.num_active < self.limits.max_batch_size:
            self._start_prefill()
        if self._prefill is not None:
            self._advance_prefill(self._prefill)
        if any(row is not None for row in self._rows):
            self._decode()
        return bool(self.num_active or self._waiting)

    def _start_prefill(self) -> None:
        """Take the first prompt, and with it as many as are read together within `prefill_tokens`."""
        together = max(1, self.limits.prefill_tokens // max(1, self._waiting[0].num_given - 1))
        together = min(together, self.limits.max_batch_size - self.num_active, len(self._waiting))
        generations = [self._waiting.popleft() for _ in range(together)]
        for generation in generations:
            generation.started = True
        length = max(one.num_given + one.request.max_new_tokens for one in generations)
        self._prefill = _Prefill(generations, self.forward.new_cache(together, length), [])
        self._prefill.found = [self._retrieve(one, self._whole_chunks(one)) for one in generations]

    def _whole_chunks(self, generation: Generation) -> list[tuple[int, int]]:
        """Spans of the chunks that are prefilled."""
        size = self.forward.chunk_length
        return [(number * size, (number + 1) * size) for number in range((generation.num_given - 1) // size)]

    def _retrieve(self, generation: Generation, spans: Sequence[tuple[int, int]]) -> list[RetrievedNeighbors]:
        """Neighbours of these spans of a text, recorded in it; empty for a text that reads none."""
        source = generation.request.source
        if source is None or not spans or not self.forward.reads_neighbors:
            return []
        found = source.find([generation.text_tokens(start, stop) for start, stop in spans])
        for (start, stop), one in zip(spans, found, strict=True):
            generation.retrievals.append(Retrieval(start, stop, one))
        return found

    def _advance_prefill(self, prefill: _Prefill) -> None:
        device = self.forward.device
        prefill.keep([row for row, one in enumerate(prefill.generations) if not one.finished], device)
        rows = prefill.generations
        if rows:
            start = prefill.cache.lengths[0]
            end = min(one.num_given for one in rows) - 1
            self._feed(prefill, start, min(end, start + max(1, self.limits.prefill_tokens // len(rows))))
        left = []
        for row, generation in enumerate(rows):
            if prefill.cache.lengths[row] == generation.num_given - 1:
                self._join(generation, prefill.cache, row)
            else:
                left.append(row)
        prefill.keep(left, device)
        if not left:
            self._prefill = None

    def _feed(self, prefill: _Prefill, start: int, stop: int) -> None:
        if start == stop:
            return
        size = self.forward.chunk_length
        given = [one.tokens[start:stop] for one in prefill.generations]
        found = [one[start // size : stop // size] for one in prefill.found]
        if any(one.request.score_prompt for one in prefill.generations):
            limit = min(self.forward.vocab_size, self.tokenizer.vocab_size)
            logits_BSV = self.forward.all_logits(given, found, prefill.cache)[..., :limit]
            for generation, logits_SV in zip(prefill.generations, logits_BSV, strict=True):
                if generation.request.score_prompt:
                    generation.score_prompt_tokens(logits_SV, start)
        else:
            self.forward.prefill(given, found, prefill.cache)

    def _join(self, generation: Generation, cache: Cache, filled: int) -> None:
        """Move a filled row into the batch."""
        need = generation.num_given + generation.request.max_new_tokens
        if self._cache is None:
            self._rows, self._cache = [None], self.forward.new_cache(1, need)
        size = len(self._rows) if None in self._rows else 2 * len(self._rows)
        if size > len(self._rows) or need > self._cache.capacity:
            self._resize(min(size, self.limits.max_batch_size), max(need, self._cache.capacity))
        row = self._rows.index(None)
        self._rows[row] = generation
        self._cache.insert(row, cache, filled)

    def _resize(self, size: int, capacity: int) -> None:
        if self._cache is None:
            return
        kept: list[int | None] = [row for row, one in enumerate(self._rows) if one is not None]
        sources = kept + [None] * (size - len(kept))
        self._cache.resize(sources, capacity)
        self._rows = [None if source is None else self._rows[source] for source in sources]

    def _drop_finished(self) -> None:
        self._rows = [None if row is not None and row.finished else row for row in self._rows]
        active = sum(row is not None for row in self._rows)
        if active == 0:
            self._rows, self._cache = [], None
        elif active <= len(self._rows) // 2 and not self._waiting and self._prefill is None and self._cache is not None:
            self._resize(max(active, len(self._rows) // 2), self._cache.capacity)

    def _decode(self) -> None:
        cache = self._cache
        if cache is None:
            return
        for row, generation in enumerate(self._rows):
            if generation is None:
                cache.lengths[row] = cache.offsets[row] = 0
        found = self._retrieve_for_rows(cache)
        tokens = [0 if one is None else one.tokens[cache.lengths[row]] for row, one in enumerate(self._rows)]
        logits_BV = self.forward.next_logits(tokens, found, cache)
        limit = min(self.forward.vocab_size, self.tokenizer.vocab_size)
        rows = [(one, logits_BV[row, :limit]) for row, one in enumerate(self._rows) if one is not None]
        samples = fetch_samples([generation.draw(logits_V) for generation, logits_V in rows])
        for (generation, logits_V), sampled in zip(rows, samples, strict=True):
            generation.append(sampled, logits_V, self._ends)

    def _retrieve_for_rows(self, cache: Cache) -> list[RetrievedNeighbors | None]:
        """Neighbours for the rows whose next token ends a chunk, with one search per source."""
        found: list[RetrievedNeighbors | None] = [None] * len(self._rows)
        by_source: dict[int, tuple[NeighborSource, list[int]]] = {}
        for row, generation in enumerate(self._rows):
            if generation is not None and generation.request.source is not None and self._ends_chunk(row, cache):
                source = generation.request.source
                by_source.setdefault(id(source), (source, []))[1].append(row)
        if not self.forward.reads_neighbors:
            return found
        for source, rows in by_source.values():
            spans = [(cache.lengths[row] + 1 - cache.chunk_length, cache.lengths[row] + 1) for row in rows]
            owners = [generation for row in rows if (generation := self._rows[row]) is not None]
            queries = [one.text_tokens(start, stop) for one, (start, stop) in zip(owners, spans, strict=True)]
            for row, one, span, answer in zip(rows, owners, spans, source.find(queries), strict=True):
                one.retrievals.append(Retrieval(*span, answer))
                found[row] = answer
        return found

    def _ends_chunk(self, row: int, cache: Cache) -> bool:
        """Whether the next token of a row ends a chunk: on its grid, or because a retrieval step ends."""
        generation = self._rows[row]
        slot = cache.lengths[row]
        if generation is None:
            return False
        step = generation.request.retrieval_step
        since_prompt = slot + 1 - generation.num_given
        if step is not None and since_prompt % step == 0 and slot + 1 >= cache.chunk_length:
            cache.end_chunk_at(row, slot)
        return (slot + 1 + cache.offsets[row]) % cache.chunk_length == 0


def raise_failures(generations: Sequence[Generation]) -> None:
    """Raise the first failure, if any text failed."""
    for generation in generations:
        if generation.failure is not None:
            raise generation.failure


def check_request(request: GenerationRequest, limits: EngineLimits, forward: Forward) -> None:
    """Refuse a request that can never be generated."""
    total = len(request.prompt) + request.max_new_tokens
    if not request.prompt:
        raise DataError("the prompt is empty", fix="give at least one token")
    if request.max_new_tokens < 1:
        raise ConfigError("no token to generate", got=request.max_new_tokens, expected="at least 1")
    if total > limits.max_sequence_length:
        raise DataError(
            "prompt and answer are too long",
            got=f"{len(request.prompt)} + {request.max_new_tokens} = {total} tokens",
            expected=f"at most {limits.max_sequence_length} together",
            fix="shorten the prompt, ask for fewer tokens, or raise --max-sequence-length",
        )
    room = forward.position_limit
    if room is not None and total + len(forward.virtual_tokens) > room:
        raise DataError(
            "prompt and answer are longer than the model's positions",
            got=f"{len(forward.virtual_tokens)} virtual + {total} tokens"
            if forward.virtual_tokens
            else f"{total} tokens",
            expected=f"at most {room} together",
            fix="shorten the prompt or ask for fewer tokens",
        )
    highest = max(request.prompt)
    if highest >= forward.vocab_size or min(request.prompt) < 0:
        raise DataError(
            "the prompt holds a token that the model does not know",
            got=highest,
            expected=f"0 to {forward.vocab_size - 1}",
            fix="use the tokenizer that the model was trained with",
        )
    step = request.retrieval_step
    if request.attention and (step is not None or not forward.can_show_reading):
        raise ConfigError(
            "attention is shown where a whole model retrieves at each chunk's end",
            got="a model that is cut" if step is None else f"a retrieval step of {step}",
            fix="leave attention out, or the step",
        )
    if step is not None and not 1 <= step <= forward.chunk_length:
        raise ConfigError("no such retrieval step", got=step, expected=f"1 to the chunk length {forward.chunk_length}")
