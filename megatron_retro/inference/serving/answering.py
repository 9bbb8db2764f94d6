"""From OpenAI's requests to generation requests, and from generated texts to OpenAI's responses, whole or streamed."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from megatron_retro.data.instructions.conversations import ToolCall
from megatron_retro.inference.chat_format import ChatFormat
from megatron_retro.inference.generation import Generation, GenerationRequest, TextStream, TokenLogprob
from megatron_retro.inference.sampling import Sampling
from megatron_retro.inference.serving import schema
from megatron_retro.inference.serving.engine_thread import EngineThread, RequestHandle, RequestRefused
from megatron_retro.inference.serving.messages import sent_calls
from megatron_retro.inference.text_generator import TextGenerator
from megatron_retro.inference.tool_calls import CallReader

DEFAULT_CHAT_TOKENS = 128


class Connection(Protocol):
    """The connection of a client."""

    async def is_disconnected(self) -> bool:
        """Whether the client has disconnected."""


@dataclass(frozen=True)
class Service:
    """A generator, its engine's thread and its chat format, under one model name."""

    generator: TextGenerator
    engine: EngineThread
    chat_format: ChatFormat
    model_name: str
    created: int
    _compiling: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def retrieval_modes(self) -> list[schema.RetrievalMode]:
        """What `retrieval_mode` may be here; the first is the default."""
        if self.generator.index is not None and self.generator.forward.reads_neighbors:
            return ["live", "none", "random"]
        return ["none"]

    def requests_of(self, body: schema.CompletionRequest | schema.ChatRequest) -> list[GenerationRequest]:
        """The texts to generate, n for each prompt in turn, held to nothing yet."""
        self.require_model(body.model)
        prompts, passages = self._prompts(body)
        if len(prompts) * body.n > schema.MAX_TEXTS:
            raise RequestRefused(f"more than {schema.MAX_TEXTS} texts in one request", 400)
        stops = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
        stops += self.chat_format.stops if isinstance(body, schema.ChatRequest) else ()
        source = self.generator.source(self._mode(body.retrieval_mode), passages)
        seed = secrets.randbits(62) if body.seed is None else body.seed
        return [
            GenerationRequest(
                prompt,
                self._max_tokens(body, len(prompt)),
                _sampling(body, seed + number),
                stops,
                source,
                body.retrieval_step,
                _alternatives(body),
                isinstance(body, schema.CompletionRequest) and body.echo and body.logprobs is not None,
                isinstance(body, schema.CompletionRequest) and body.attention and source is not None,
            )
            for prompt in prompts
            for number in range(body.n)
        ]

    def require_model(self, name: str | None) -> None:
        """Refuse a name that is not the model's."""
        if name is not None and name != self.model_name:
            raise RequestRefused(f"there is no model {name!r} here", 404, f"use {self.model_name!r}, or leave it out")

    async def grammar_of(self, body: schema.CompletionRequest | schema.ChatRequest) -> str | None:
        """What the answers are held to. One schema at a time is compiled, in a thread, for a large one takes long."""
        if not isinstance(body, schema.ChatRequest):
            return None
        wanted, tools, form = body.response_format, body.must_call, self.chat_format.calls if body.must_call else None
        content = wanted.schema_of_answer() if wanted is not None else None
        if content is None and (tools is None or form is None):
            return None

        def compiled() -> str:
            grammars = self.generator.engine.grammars
            if tools is None or form is None:
                return grammars.require(content or {})
            offered = [tool.function.model_dump() for tool in tools]
            return grammars.require_grammar(form.grammar(offered, grammars.token_of), "tools")

        async with self._compiling:
            return await asyncio.to_thread(compiled)

    def call_reader(self, body: schema.ChatRequest) -> CallReader:
        """Reads the calls of one answer; without tools everything is text."""
        return CallReader(self.chat_format.calls if body.offered else None)

    def _mode(self, mode: schema.RetrievalMode | None) -> str:
        modes = self.retrieval_modes
        if mode is not None and mode not in modes:
            raise RequestRefused(f"retrieval_mode {mode!r} needs an index", 400, "start the service with --retro-index")
        return mode or modes[0]

    def _prompts(
        self, body: schema.CompletionRequest | schema.ChatRequest
    ) -> tuple[list[tuple[int, ...]], Sequence[str]]:
        """Prompts as tokens, and the passages that the neighbour encoder reads."""
        passages = body.passages or ()
        if isinstance(body, schema.ChatRequest):
            if body.offered and self.chat_format.calls is None:
                raise RequestRefused(
                    "tools need a chat template that writes calls in a form that is known here",
                    400,
                    "leave tools out, or serve a model that was taught them (docs/generation.md names the forms)",
                )
            tools = [tool.model_dump(exclude_unset=True) for tool in body.offered]
            text, to_encoder = self.chat_format.write([one.turn() for one in body.messages], passages, tools)
            return [self.generator.tokens_of(text)], to_encoder
        return token_lists(body.prompt, self.generator.tokens_of), passages

    def _max_tokens(self, body: schema.CompletionRequest | schema.ChatRequest, prompt_length: int) -> int:
        if isinstance(body, schema.CompletionRequest):
            return body.max_tokens
        asked = body.max_completion_tokens or body.max_tokens
        room = self.generator.limits.max_sequence_length - prompt_length
        return asked or max(1, min(DEFAULT_CHAT_TOKENS, room))

    def prefix(self, body: schema.CompletionRequest | schema.ChatRequest, generation: Generation) -> str:
        """The prompt, if it is to be echoed."""
        echo = isinstance(body, schema.CompletionRequest) and body.echo
        return self.generator.tokenizer.decode(generation.request.prompt) if echo else ""

    def message(self, body: schema.ChatRequest, generation: Generation) -> tuple[schema.ChatMessage, str | None]:
        """The assistant's turn, and why it ends."""
        reader = self.call_reader(body)
        text = reader.feed(generation.text)
        left, calls = reader.finish()
        text = (text + left).strip()
        found = sent_calls(calls if body.parallel_tool_calls else calls[:1])
        message = schema.ChatMessage(content=text or (None if found else ""), tool_calls=found or None)
        return message, ended_by(generation.finish_reason, bool(found))

    def logprobs(self, body: schema.CompletionRequest, generation: Generation) -> schema.Logprobs | None:
        """The log-probabilities of the answer's tokens, the prompt's before them if it is echoed."""
        if body.logprobs is None:
            return None
        decode, prompt = self.generator.tokenizer.decode, generation.request.prompt
        tokens = [*(prompt if body.echo else ()), *generation.new_tokens]
        stream = TextStream(decode, () if body.echo else prompt)
        texts = [stream.feed(token) for token in tokens]
        offsets = [0, *accumulate(map(len, texts))][: len(texts)]
        length = len(self.prefix(body, generation)) + len(generation.text)
        shown = sum(offset < length for offset in offsets)  # a stop string ends the text before its tokens
        known = [None] * (len(tokens) - len(generation.token_logprobs)) + list(generation.token_logprobs)
        return schema.Logprobs(
            tokens=texts[:shown],
            token_logprobs=[None if one is None else one.logprob for one in known[:shown]],
            top_logprobs=[None if one is None else self._named(one) for one in known[:shown]]
            if body.logprobs
            else None,
            text_offset=offsets[:shown],
        )

    def chat_logprobs(self, body: schema.ChatRequest, generation: Generation) -> schema.ChatLogprobs | None:
        """The log-probabilities of the answer's tokens."""
        if not body.logprobs:
            return None
        decode = self.generator.tokenizer.decode

        def told(token: int, logprob: float) -> schema.ChatToken:
            text = decode([token])
            return schema.ChatToken(
                token=text, logprob=logprob, bytes=None if "\ufffd" in text else list(text.encode())
            )

        return schema.ChatLogprobs(
            content=[
                schema.ChatLogprob(
                    **told(one.token, one.logprob).model_dump(),
                    top_logprobs=[told(*other) for other in one.alternatives[: body.top_logprobs or 0]],
                )
                for one in generation.token_logprobs
            ]
        )

    def _named(self, one: TokenLogprob) -> dict[str, float]:
        """Alternatives by their text; those that share one, or are a part of a character, by their number."""
        found: dict[str, float] = {}
        for token, value in one.alternatives:
            text = self.generator.tokenizer.decode([token])
            found[f"token:{token}" if text in found or "\ufffd" in text else text] = value
        return found

    def chunks(self, generation: Generation, first: int = 0) -> list[schema.Chunk]:
        """The neighbours of the chunks from number `first` on."""
        return [
            schema.Chunk(
                query=chunk.query,
                query_start=chunk.query_start,
                query_stop=chunk.query_stop,
                neighbors=[
                    schema.Neighbor(
                        id=one.id,
                        distance=one.distance,
                        text=one.text,
                        attention=list(one.attention) or None,
                        worth=one.worth,
                    )
                    for one in chunk.neighbors
                ],
            )
            for chunk in self.generator.report(generation)[first:]
        ]


def token_lists(
    given: str | list[str] | list[int] | list[list[int]], tokens_of: Callable[[str], Sequence[int]]
) -> list[tuple[int, ...]]:
    """The tokens of a text or of several, which a client may send as tokens, too."""
    if isinstance(given, str):
        return [tuple(tokens_of(given))]
    found: list[tuple[int, ...]] = []
    numbers: list[int] = []
    for one in given:
        if isinstance(one, int):
            numbers.append(one)
        else:
            found.append(tuple(tokens_of(one) if isinstance(one, str) else one))
    return found or [tuple(numbers)]


def _sampling(body: schema.SharedRequest, seed: int) -> Sampling:
    biases = tuple((int(token), bias) for token, bias in body.logit_bias.items())
    penalties = body.frequency_penalty, body.presence_penalty
    return Sampling(body.temperature, body.top_k, body.top_p, body.repetition_penalty, seed, *penalties, biases)


def _alternatives(body: schema.CompletionRequest | schema.ChatRequest) -> int | None:
    """How many alternatives are wanted for each token; None without log-probabilities."""
    if isinstance(body, schema.CompletionRequest):
        return body.logprobs
    return body.top_logprobs or 0 if body.logprobs else None


def call_deltas(calls: Sequence[ToolCall]) -> list[schema.CallDelta]:
    """Calls as events of a stream hold them."""
    numbered = enumerate(sent_calls(calls))
    return [schema.CallDelta(index=number, id=call.id, function=call.function) for number, call in numbered]


def ended_by(reason: str | None, calls: bool) -> str | None:
    """OpenAI's reason: an answer that calls tools and was not cut ends by that."""
    return "tool_calls" if calls and reason == "stop" else reason


async def whole_answers(service: Service, handles: Sequence[RequestHandle], client: Connection) -> list[Generation]:
    """Wait for all texts; they are cancelled when the client disconnects."""

    async def drain(handle: RequestHandle) -> None:
        async for _ in handle.read():
            pass

    work = asyncio.gather(*(drain(handle) for handle in handles))
    try:
        while not work.done():
            await asyncio.wait([work], timeout=0.25)
            if not work.done() and await client.is_disconnected():
                raise RequestRefused("the client left", 499)
        await work
    finally:
        work.cancel()
        for handle in handles:
            service.engine.cancel(handle)
        await asyncio.gather(work, return_exceptions=True)  # or its end is logged as one that nobody heard of
    return [handle.generation for handle in handles if handle.generation is not None]


@dataclass(frozen=True)
class TextDelta:
    """New text of one response, and the chunks that retrieved neighbours since the last delta; at the end all of them,
    if they show attention."""

    index: int
    text: str
    chunks: list[schema.Chunk]
    finish_reason: str | None


async def text_deltas(service: Service, handles: Sequence[RequestHandle]) -> AsyncIterator[TextDelta]:
    """The deltas of all texts as they come; texts are cancelled when the caller stops reading."""
    mixed: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
    failures: list[Exception] = []

    async def forward(index: int, handle: RequestHandle) -> None:
        try:
            async for text in handle.read():
                mixed.put_nowait((index, text))
        except Exception as error:  # raised below, by the reader of this stream
            failures.append(error)
        mixed.put_nowait((index, None))

    tasks = [asyncio.create_task(forward(index, handle)) for index, handle in enumerate(handles)]
    num_sent = [0] * len(handles)
    open_texts = len(handles)
    try:
        while open_texts:
            index, text = await mixed.get()
            generation = handles[index].generation
            if failures:
                raise failures[0]
            again = text is None and generation is not None and generation.readings is not None
            chunks = [] if generation is None else service.chunks(generation, 0 if again else num_sent[index])
            num_sent[index] = len(chunks) if again else num_sent[index] + len(chunks)
            finish_reason = generation.finish_reason if text is None and generation is not None else None
            open_texts -= text is None
            yield TextDelta(index, text or "", chunks, finish_reason)
    finally:
        for task in tasks:
            task.cancel()
        for handle in handles:
            service.engine.cancel(handle)


def usage_of(generations: Sequence[Generation], n: int) -> schema.Usage:
    """Prompt tokens (each prompt once) and generated tokens."""
    read = sum(len(one.request.prompt) for one in generations[::n])
    written = sum(len(one.new_tokens) for one in generations)
    return schema.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)


def new_id(kind: str) -> str:
    """A response id in OpenAI's form."""
    return f"{kind}-{secrets.token_hex(12)}"


def now() -> int:
    """Seconds since 1970."""
    return int(time.time())
