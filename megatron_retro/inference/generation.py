"""One text being generated: the request, its tokens so far, what each chunk retrieved, and the text as it comes.

Joining single decoded tokens is wrong for most tokenizers (a space before a word, a character of several tokens), so
text is the difference of two decoded windows, and an incomplete character is held back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_retro.errors import MegatronRetroError
from megatron_retro.inference.grammars import Constraint
from megatron_retro.inference.neighbor_sources import ChunkReading, NeighborSource, RetrievedNeighbors
from megatron_retro.inference.sampling import SampledToken, Sampler, Sampling

_ROWS_AT_ONCE = 32
_INCOMPLETE = "�"
_LONGEST_CHARACTER = 4


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. `source` None reads no neighbours; `retrieval_step` None retrieves at each chunk's end.

    `attention` asks, when the text is finished, for what each neighbour's token got of it and each neighbour is worth.
    `num_alternatives` asks for the log-probabilities of each sampled token and of as many others in its place;
    `score_prompt` asks for those of the prompt's tokens too. `grammar` is what the answer is held to.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_strings: tuple[str, ...] = ()
    source: NeighborSource | None = None
    retrieval_step: int | None = None
    num_alternatives: int | None = None
    score_prompt: bool = False
    attention: bool = False
    grammar: str | None = None


@dataclass(frozen=True)
class Retrieval:
    """Neighbours found by tokens [query_start, query_stop); positions from query_stop - 1 on read them."""

    query_start: int
    query_stop: int
    found: RetrievedNeighbors


@dataclass(frozen=True)
class TokenLogprob:
    """The log-probability of a token, and the most likely tokens in its place, best first."""

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]


def compute_logprobs(logits_SV: Tensor, tokens: Sequence[int], num_alternatives: int) -> list[TokenLogprob]:
    """The log-probability of each token under the logits of the position before it."""
    logprobs_SV = logits_SV.float().log_softmax(-1)
    best = logprobs_SV.topk(min(num_alternatives, logprobs_SV.shape[-1]))
    own = logprobs_SV.gather(1, torch.tensor(tokens, device=logprobs_SV.device)[:, None])[:, 0].tolist()
    rows = zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [TokenLogprob(token, logprob, tuple(zip(ids, values, strict=True))) for token, logprob, ids, values in rows]


class Generation:
    """The state of one request. `listener` is called with each new text, and with "" at the end.

    `tokens` is what the model is fed: the virtual tokens in front, the prompt, and the sampled tokens.
    """

    def __init__(
        self,
        request: GenerationRequest,
        decode: Callable[[Sequence[int]], str],
        listener: Callable[[str], None] | None = None,
        virtual_tokens: tuple[int, ...] = (),
        constraint: Constraint | None = None,
    ) -> None:
        self.request = request
        self.tokens = [*virtual_tokens, *request.prompt]
        self.num_virtual, self.num_given = len(virtual_tokens), len(self.tokens)
        self.logprobs: list[float] = []
        self.token_logprobs: list[TokenLogprob] = []
        self.retrievals: list[Retrieval] = []
        self.readings: list[ChunkReading] | None = None  # one of each retrieval
        self.finish_reason: str | None = None
        self.failure: MegatronRetroError | None = None
        self.started = False
        self._sampler = Sampler(request.sampling)
        self._constraint = constraint
        self._stream = TextStream(decode, request.prompt, request.stop_strings)
        self._listener = listener

    @property
    def text(self) -> str:
        """The generated text so far."""
        return self._stream.text

    @property
    def new_tokens(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.num_given :]

    def text_tokens(self, start: int, stop: int) -> list[int]:
        """The tokens of a span without virtual ones."""
        return self.tokens[max(start, self.num_virtual) : stop]

    @property
    def finished(self) -> bool:
        """Whether no token will follow."""
        return self.finish_reason is not None

    def draw(self, logits_V: Tensor) -> Tensor:
        """The next token from the logits of the last position, as `Sampler.draw` gives it."""
        allowed_V = self._constraint.allowed(len(logits_V)) if self._constraint is not None else None
        return self._sampler.draw(logits_V, self.tokens[self.num_virtual :], self.new_tokens, allowed_V)

    def append(self, sampled: SampledToken, logits_V: Tensor, ends: Container[int]) -> None:
        """Append the token that was sampled from these logits, or finish."""
        try:
            sampled.require_finite()
            if self._constraint is not None:
                self._constraint.consume(sampled.token)
        except MegatronRetroError as error:
            self.failure = error
            self.finish("error")
            return
        token = sampled.token
        if token in ends:
            self.finish("stop")
            return
        if self.request.num_alternatives is not None:
            self.token_logprobs += compute_logprobs(logits_V[None], [token], self.request.num_alternatives)
        self.tokens.append(token)
        self.logprobs.append(sampled.logprob)
        self._emit_text(self._stream.feed(token))
        if self._stream.stopped:
            self.finish("stop")
        elif len(self.new_tokens) >= self.request.max_new_tokens:
            self.finish("length")

    def score_prompt_tokens(self, logits_SV: Tensor, start: int) -> None:
        """Record the log-probabilities of the prompt's tokens: row i has the logits after token `start` + i."""
        for row in range(0, len(logits_SV), _ROWS_AT_ONCE):
            first = start + row + 1
            part_SV = logits_SV[row : row + _ROWS_AT_ONCE]
            skipped = max(0, self.num_virtual + 1 - first)  # virtual tokens, and the first token of the text
            wanted = self.tokens[first + skipped : first + len(part_SV)]
            if wanted:
                self.token_logprobs += compute_logprobs(part_SV[skipped:], wanted, self.request.num_alternatives or 0)

    def finish(self, reason: str) -> None:
        """Finish for a reason: stop, length, cancelled or error."""
        if not self.finished:
            self._emit_text(self._stream.finish())
            self.finish_reason = "stop" if self._stream.stopped and reason == "length" else reason
            if self._listener is not None:
                self._listener("")

    def _emit_text(self, text: str) -> None:
        if text and self._listener is not None:
            self._listener(text)


class TextStream:
    """Tokens in, text out. `stopped` says that a stop string was met; the text ends before it.

    Text that may be the beginning of a stop string is held back.
    """

    def __init__(
        self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int], stop_strings: Sequence[str] = ()
    ) -> None:
        self._decode = decode
        self._stop_strings = tuple(text for text in stop_strings if text)
        self._tokens = list(prompt[-8:])
        self._read = len(self._tokens)
        self._window = 0
        self._held = ""
        self.text = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain after one more token."""
        self._tokens.append(token)
        return self._release(self._new_text(final=False), final=False)

    def finish(self) -> str:
        """What was held back."""
        return self._release(self._new_text(final=True), final=True)

    def _new_text(self, final: bool) -> str:
        before = self._decode(self._tokens[self._window : self._read])
        whole = self._decode(self._tokens[self._window :])
        waiting = len(self._tokens) - self._read
        if not final and whole.endswith(_INCOMPLETE) and waiting < _LONGEST_CHARACTER:
            return ""
        self._window, self._read = self._read, len(self._tokens)
        return whole[len(before) :]

    def _release(self, new: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        ends = [place for stop in self._stop_strings if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return self._emit(text[: min(ends)])
        kept = 0 if final else max((shared_end(text, stop) for stop in self._stop_strings), default=0)
        self._held = text[len(text) - kept :]
        return self._emit(text[: len(text) - kept])

    def _emit(self, text: str) -> str:
        self.text += text
        return text


def shared_end(text: str, stop: str) -> int:
    """How many last characters of the text are the beginning of the stop string."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
