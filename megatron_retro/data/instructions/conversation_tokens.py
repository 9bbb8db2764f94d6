"""A conversation as token ids: what is learned, and which passages go to the encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.instructions.conversations import Conversation, Passage
from megatron_retro.data.instructions.templates import Template
from megatron_retro.data.tokenizers import Tokenizer


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """Tokens of a whole conversation with its end-of-document.

    `learned` marks tokens of replies that carry loss; `prompt_length` counts the tokens before the last reply.
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    prompt_length: int
    passages: tuple[NDArray[np.int32], ...]
    origin: str


@dataclass(frozen=True)
class ConversationEncoder:
    """Turns conversations into examples, all in one way. Virtual tokens (of P-tuning) lead each of them."""

    tokenizer: Tokenizer
    template: Template
    context_place: str = "prompt"
    num_contexts: int = 5
    loss_on_all_replies: bool = False
    virtual_tokens: tuple[int, ...] = ()

    def encode(self, conversation: Conversation) -> EncodedExample:
        """The example of a conversation."""
        in_prompt, to_encoder = self.place(conversation.passages)
        segments = self.template.segments(conversation.turns, in_prompt)
        pieces = [self.tokenizer.encode(segment.text) for segment in segments]
        pieces[0] = [*self.virtual_tokens, *pieces[0]]
        pieces[-1] = [*pieces[-1], self.tokenizer.eod]
        last = len(pieces) - 1
        learned = [
            np.full(len(piece), segment.is_reply and (self.loss_on_all_replies or number == last))
            for number, (piece, segment) in enumerate(zip(pieces, segments, strict=True))
        ]
        return EncodedExample(
            tokens=np.concatenate([np.asarray(piece, dtype=np.int32) for piece in pieces]),
            learned=np.concatenate(learned),
            prompt_length=sum(len(piece) for piece in pieces[:-1]),
            passages=self.encode_passages(to_encoder),
            origin=conversation.origin,
        )

    def place(self, passages: Sequence[Passage]) -> tuple[Sequence[Passage], Sequence[Passage]]:
        """Passages of the prompt, and those of the encoder."""
        return placed(passages[: self.num_contexts], self.context_place)

    def encode_passages(self, passages: Sequence[Passage]) -> tuple[NDArray[np.int32], ...]:
        """Each passage by itself."""
        return tuple(np.asarray(self.tokenizer.encode(passage.rendered()), dtype=np.int32) for passage in passages)


def placed(passages: Sequence[Passage], place: str) -> tuple[Sequence[Passage], Sequence[Passage]]:
    """Passages of the prompt, and those of the encoder, by --context-place."""
    cut = {"prompt": len(passages), "encoder": 0, "split": 1, "none": 0}[place]
    return passages[:cut], passages[cut:] if place in ("encoder", "split") else ()
