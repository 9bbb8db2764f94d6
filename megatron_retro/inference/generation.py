"""One text being generated: what was asked, the tokens so far, what each chunk read, why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from megatron_retro.errors import MegatronRetroError
from megatron_retro.inference.neighbor_sources import Found, NeighborSource
from megatron_retro.inference.sampling import Sampler, Sampling
from megatron_retro.inference.text_stream import TextStream


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. `source` None reads no neighbours; `retrieval_step` None retrieves at each chunk's end."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_strings: tuple[str, ...] = ()
    source: NeighborSource | None = None
    retrieval_step: int | None = None


@dataclass(frozen=True)
class Reading:
    """Neighbours found by tokens [query_start, query_stop); positions from query_stop - 1 on read them."""

    query_start: int
    query_stop: int
    found: Found


class Generation:
    """State of one request. `listener` hears each piece of text, and "" at the end.

    `tokens` is what the model is fed: the virtual tokens that `lead`, the prompt, and what was chosen.
    """

    def __init__(
        self,
        request: GenerationRequest,
        decode: Callable[[Sequence[int]], str],
        listener: Callable[[str], None] | None = None,
        lead: tuple[int, ...] = (),
    ) -> None:
        self.request = request
        self.tokens = [*lead, *request.prompt]
        self.num_leading, self.num_given = len(lead), len(self.tokens)
        self.log_probabilities: list[float] = []
        self.readings: list[Reading] = []
        self.finish_reason: str | None = None
        self.failure: MegatronRetroError | None = None
        self.started = False
        self._sampler = Sampler(request.sampling)
        self._stream = TextStream(decode, request.prompt, request.stop_strings)
        self._listener = listener

    @property
    def text(self) -> str:
        """The answer so far."""
        return self._stream.text

    @property
    def new_tokens(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.num_given :]

    def words(self, start: int, stop: int) -> list[int]:
        """The tokens of a span that stand for words."""
        return self.tokens[max(start, self.num_leading) : stop]

    @property
    def finished(self) -> bool:
        """No token will follow."""
        return self.finish_reason is not None

    def choose(self, logits_V: Tensor, eod: int) -> None:
        """Take the next token from the logits of the last position."""
        try:
            token, log_probability = self._sampler.choose(logits_V, self.tokens[self.num_leading :])
        except MegatronRetroError as error:
            self.failure = error
            self.finish("error")
            return
        if token == eod:
            self.finish("stop")
            return
        self.tokens.append(token)
        self.log_probabilities.append(log_probability)
        self._tell(self._stream.feed(token))
        if self._stream.stopped:
            self.finish("stop")
        elif len(self.new_tokens) >= self.request.max_new_tokens:
            self.finish("length")

    def finish(self, reason: str) -> None:
        """End with a reason: stop, length, cancelled or error."""
        if not self.finished:
            self._tell(self._stream.finish())
            self.finish_reason = "stop" if self._stream.stopped and reason == "length" else reason
            if self._listener is not None:
                self._listener("")

    def _tell(self, text: str) -> None:
        if text and self._listener is not None:
            self._listener(text)
