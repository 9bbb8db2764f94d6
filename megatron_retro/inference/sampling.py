"""From logits to the next token: biases, penalties, temperature, top-k, top-p, greedy.

Biases and the penalties of what was written are OpenAI's. The order after them is transformers': repetition penalty,
temperature, top-k, top-p, draw. Each sequence draws from a generator of its own,
so its text does not depend on what else is in the batch. Draws stay where the logits are until those of a whole batch
are fetched at once: a device is waited for once per step, whatever the number of texts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_retro.config.inference import SamplingConfig
from megatron_retro.errors import DataError
from megatron_retro.runtime.seeds import generator


@dataclass(frozen=True)
class Sampling:
    """How to choose tokens. Temperature 0 is greedy; top-k 0 and top-p 1 keep everything."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    @classmethod
    def from_config(cls, config: SamplingConfig) -> Sampling:
        """The settings of the flags."""
        return cls(config.temperature, config.top_k, config.top_p, config.repetition_penalty, config.sampling_seed)


class SampledToken(NamedTuple):
    """A sampled token and its log-probability under the model (before penalty, temperature, top-k and top-p)."""

    token: int
    logprob: float
    highest_logit: float

    def require_finite(self) -> None:
        """Refuse a token that was sampled from logits that are not finite."""
        if not math.isfinite(self.highest_logit):
            raise DataError(
                "the model's logits are not finite",
                got=self.highest_logit,
                fix="use --dtype fp32, or another checkpoint: its weights have diverged",
            )


class Sampler:
    """Samples the tokens of one sequence."""

    def __init__(self, settings: Sampling) -> None:
        self.settings = settings
        self._generator = generator(settings.seed, "sampling")

    def draw(
        self,
        logits_V: Tensor,
        seen: Collection[int],
        written: Sequence[int] = (),
        allowed_V: Tensor | None = None,
    ) -> Tensor:
        """[3], on the logits' device: the fields of a `SampledToken`, for `fetch_samples`.

        `seen` are the tokens of prompt and answer, `written` those of the answer; where there is `allowed_V`, no other
        token is drawn.
        """
        logits_V = logits_V.double()
        biased_V = self._biased(logits_V, written)
        if allowed_V is not None:
            biased_V = biased_V.masked_fill(~allowed_V.to(biased_V.device, non_blocking=True), -torch.inf)
        token_1 = self._token(biased_V, seen)
        log_probability_1 = logits_V.gather(0, token_1) - torch.logsumexp(logits_V, -1)
        return torch.cat((token_1.double(), log_probability_1, logits_V.amax(-1, keepdim=True)))

    def _biased(self, logits_V: Tensor, written: Sequence[int]) -> Tensor:
        """Biases added, and penalties subtracted: one for each time that a token was written, one for the first."""
        changes = {token: bias for token, bias in self.settings.logit_bias if token < len(logits_V)}
        if self.settings.frequency_penalty or self.settings.presence_penalty:
            for token, times in Counter(written).items():
                penalty = times * self.settings.frequency_penalty + self.settings.presence_penalty
                changes[token] = changes.get(token, 0.0) - penalty
        if not changes:
            return logits_V
        ids, amounts = torch.tensor([*changes]), torch.tensor([*changes.values()], dtype=logits_V.dtype)
        device = logits_V.device
        return logits_V.index_add(0, ids.to(device, non_blocking=True), amounts.to(device, non_blocking=True))

    def _token(self, logits_V: Tensor, seen: Collection[int]) -> Tensor:
        settings = self.settings
        logits_V = penalize(logits_V, seen, settings.repetition_penalty)
        if settings.temperature == 0.0:
            return logits_V.argmax(-1, keepdim=True)
        logits_V = (logits_V - logits_V.max()) / settings.temperature  # the shift keeps tiny temperatures finite
        logits_V = keep_top_k(logits_V, settings.top_k)
        chances_V = keep_top_p(logits_V, settings.top_p).softmax(-1)
        # torch.multinomial's own race for one draw; its noise comes from the host, so that every device draws alike
        noise_V = torch.empty(chances_V.shape, dtype=chances_V.dtype).exponential_(generator=self._generator)
        return (chances_V / noise_V.to(chances_V.device, non_blocking=True)).argmax(-1, keepdim=True)


def fetch_samples(drawn: Sequence[Tensor]) -> list[SampledToken]:
    """The sampled tokens of a batch, in one transfer from the device."""
    return [SampledToken(int(token), *rest) for token, *rest in torch.stack(list(drawn)).tolist()]


def penalize(logits_V: Tensor, seen: Collection[int], penalty: float) -> Tensor:
    """Divide positive logits of seen tokens by the penalty and multiply negative ones (CTRL's rule)."""
    if penalty == 1.0 or not seen:
        return logits_V
    ids = torch.tensor(sorted(set(seen))).to(logits_V.device, non_blocking=True)
    picked = logits_V[ids]
    return logits_V.index_copy(0, ids, torch.where(picked > 0, picked / penalty, picked * penalty))


def keep_top_k(logits_V: Tensor, count: int) -> Tensor:
    """All but the `count` highest become impossible; ties with the last kept one stay."""
    if count <= 0 or count >= logits_V.shape[-1]:
        return logits_V
    lowest = logits_V.topk(count).values[-1]
    return logits_V.masked_fill(logits_V < lowest, -torch.inf)


def keep_top_p(logits_V: Tensor, mass: float) -> Tensor:
    """The fewest most likely tokens whose probability reaches `mass`; at least one."""
    if mass >= 1.0:
        return logits_V
    ordered, order = logits_V.sort(descending=True)
    chances = ordered.softmax(-1)
    dropped = chances.cumsum(-1) - chances >= mass
    dropped[0] = False
    return logits_V.masked_fill(torch.zeros_like(dropped).scatter(0, order, dropped), -torch.inf)
