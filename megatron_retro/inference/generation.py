"""One text being generated: what was asked, the tokens so far, what each chunk read, why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_retro.errors import MegatronRetroError
from megatron_retro.inference.neighbor_sources import Found, NeighborSource
from megatron_retro.inference.sampling import Choice, Sampler, Sampling
from megatron_retro.inference.text_stream import TextStream

_ROWS_AT_ONCE = 32


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate. `source` None reads no neighbours; `retrieval_step` None retrieves at each chunk's end.

    `num_alternatives` asks for the chances of each chosen token and of so many others, `score_prompt` for the prompt's.
    """

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_strings: tuple[str, ...] = ()
    source: NeighborSource | None = None
    retrieval_step: int | None = None
    num_alternatives: int | None = None
    score_prompt: bool = False


@dataclass(frozen=True)
class Reading:
    """Neighbours found by tokens [query_start, query_stop); positions from query_stop - 1 on read them."""

    query_start: int
    query_stop: int
    found: Found


@dataclass(frozen=True)
class Chance:
    """How likely a token was (log-probability), and the most likely ones in its place, best first."""

    token: int
    log_probability: float
    alternatives: tuple[tuple[int, float], ...]


def chances_of(logits_SV: Tensor, tokens: Sequence[int], num_alternatives: int) -> list[Chance]:
    """Of each token under the logits of the position before it."""
    chances_SV = logits_SV.float().log_softmax(-1)
    best = chances_SV.topk(min(num_alternatives, chances_SV.shape[-1]))
    own = chances_SV.gather(1, torch.tensor(tokens, device=chances_SV.device)[:, None])[:, 0].tolist()
    rows = zip(tokens, own, best.indices.tolist(), best.values.tolist(), strict=True)
    return [Chance(token, chance, tuple(zip(ids, values, strict=True))) for token, chance, ids, values in rows]


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
        self.chances: list[Chance] = []
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

    def draw(self, logits_V: Tensor) -> Tensor:
        """The next token from the logits of the last position, as `Sampler.draw` gives it."""
        return self._sampler.draw(logits_V, self.tokens[self.num_leading :])

    def take(self, choice: Choice, logits_V: Tensor, eod: int) -> None:
        """Go on with the token that was drawn from these logits."""
        try:
            choice.require_finite()
        except MegatronRetroError as error:
            self.failure = error
            self.finish("error")
            return
        token = choice.token
        if token == eod:
            self.finish("stop")
            return
        if self.request.num_alternatives is not None:
            self.chances += chances_of(logits_V[None], [token], self.request.num_alternatives)
        self.tokens.append(token)
        self.log_probabilities.append(choice.log_probability)
        self._tell(self._stream.feed(token))
        if self._stream.stopped:
            self.finish("stop")
        elif len(self.new_tokens) >= self.request.max_new_tokens:
            self.finish("length")

    def score_given(self, logits_SV: Tensor, start: int) -> None:
        """Note the chances of given tokens: row i has the logits after token `start` + i."""
        for row in range(0, len(logits_SV), _ROWS_AT_ONCE):
            first = start + row + 1
            part_SV = logits_SV[row : row + _ROWS_AT_ONCE]
            skipped = max(0, self.num_leading + 1 - first)  # virtual tokens, and the word that nothing stands before
            wanted = self.tokens[first + skipped : first + len(part_SV)]
            if wanted:
                self.chances += chances_of(part_SV[skipped:], wanted, self.request.num_alternatives or 0)

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
