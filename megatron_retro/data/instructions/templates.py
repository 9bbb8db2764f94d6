"""How a conversation is written, by InstructRetro's form or a Jinja template, and tokenized.

A template gives segments, so that a reply's tokens are known exactly: text is tokenized segment by segment, and the
prompt of a generation is the same segments without the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.instructions.conversations import Conversation, Passage, Turn
from megatron_retro.data.tokenizers import Tokenizer
from megatron_retro.errors import DataError
from megatron_retro.runtime.environment import require

INSTRUCT_RETRO_SYSTEM = (
    "This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions based on the context. The assistant should also indicate when the "
    "answer cannot be found in the context."
)


@dataclass(frozen=True)
class Segment:
    """A part of the written conversation; `is_reply` marks the assistant's."""

    text: str
    is_reply: bool


class Template(Protocol):
    """Writes a conversation as text."""

    def segments(self, turns: Sequence[Turn], passages: Sequence[Passage]) -> list[Segment]:
        """The written form; `passages` are those that stand in the prompt."""
        ...


class InstructRetroTemplate:
    """`System: ...`, passages, then `User: ...` and `Assistant: ...` by turns, blank lines between."""

    def segments(self, turns: Sequence[Turn], passages: Sequence[Passage]) -> list[Segment]:
        """The written form."""
        system = turns[0].text if turns and turns[0].role == "system" else INSTRUCT_RETRO_SYSTEM
        head = [f"System: {system}", *(passage.rendered() for passage in passages)]
        prompt = "\n\n".join(head)
        segments: list[Segment] = []
        for turn in turns:
            if turn.role == "user":
                prompt += f"\n\nUser: {turn.text}"
            elif turn.role == "assistant":
                segments += [Segment(prompt + "\n\nAssistant:", False), Segment(" " + turn.text.strip(), True)]
                prompt = ""
        if prompt:
            segments.append(Segment(prompt + "\n\nAssistant:", False))
        return segments


class JinjaTemplate:
    """A chat template with the customary variables `messages` and `add_generation_prompt`, and `passages`.

    A reply is found by writing the conversation with and without it, so the template must write a conversation's
    beginning the same however it goes on.
    """

    def __init__(self, path: Path) -> None:
        require("jinja2", "a Jinja template")
        from jinja2 import TemplateError

        from megatron_retro.data.instructions.bounded_jinja import BoundedEnvironment, rendered

        self._path, self._rendered = path, rendered
        # An error of Python's inside a template (a sum of text and number, a macro without end) is the template's.
        self._failures = (
            TemplateError,
            ArithmeticError,
            LookupError,
            TypeError,
            ValueError,
            RecursionError,
            MemoryError,
        )
        try:
            self._template = BoundedEnvironment().from_string(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, TemplateError, RecursionError) as error:
            raise DataError(f"cannot use the template {path}", got=error) from None

    def segments(self, turns: Sequence[Turn], passages: Sequence[Passage]) -> list[Segment]:
        """The written form."""
        segments: list[Segment] = []
        written = ""
        for number, turn in enumerate(turns):
            if turn.role == "assistant":
                prompt = self._render(turns[:number], passages, add_generation_prompt=True)
                whole = self._render(turns[: number + 1], passages, add_generation_prompt=False)
                segments.append(Segment(self._continuation(written, prompt), False))
                segments.append(Segment(self._continuation(prompt, whole), True))
                written = whole
        if turns and turns[-1].role != "assistant":
            prompt = self._render(turns, passages, add_generation_prompt=True)
            segments.append(Segment(self._continuation(written, prompt), False))
        return segments

    def _render(self, turns: Sequence[Turn], passages: Sequence[Passage], *, add_generation_prompt: bool) -> str:
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        shown = [{"title": passage.title, "text": passage.text} for passage in passages]
        try:
            variables = {"messages": messages, "passages": shown, "add_generation_prompt": add_generation_prompt}
            return self._rendered(self._template, variables)
        except self._failures as error:
            raise DataError(f"the template {self._path} fails on a conversation", got=error) from None

    def _continuation(self, beginning: str, whole: str) -> str:
        if not whole.startswith(beginning):
            raise DataError(
                f"the template {self._path} writes a beginning differently when the conversation goes on",
                got=repr(whole[: len(beginning) + 20]),
                expected=f"a text that starts with {beginning[-60:]!r}",
                fix="make what it writes for a turn independent of the turns that follow",
            )
        return whole[len(beginning) :]


def build_template(name: str) -> Template:
    """`instruct-retro`, or the path of a Jinja template."""
    if name == "instruct-retro":
        return InstructRetroTemplate()
    if name.endswith((".jinja", ".jinja2")):
        return JinjaTemplate(Path(name))
    raise DataError(f"there is no template {name!r}", expected="instruct-retro, or the path of a .jinja file")


def prompt_of(turns: Sequence[Turn], template: Template, passages: Sequence[Passage] = ()) -> str:
    """The written form of the turns so far: the prompt of a generation."""
    return "".join(segment.text for segment in template.segments(turns, passages))


@dataclass(frozen=True, eq=False)
class TokenizedConversation:
    """Tokens of a whole conversation with its end-of-document token.

    `learned` marks tokens of replies that carry loss; `prompt_length` counts the tokens before the last reply.
    """

    tokens: NDArray[np.int32]
    learned: NDArray[np.bool_]
    prompt_length: int
    passages: tuple[NDArray[np.int32], ...]
    origin: str


@dataclass(frozen=True)
class ConversationTokenizer:
    """Tokenizes conversations. Virtual tokens (of P-tuning) precede each of them."""

    tokenizer: Tokenizer
    template: Template
    context_place: str = "prompt"
    num_contexts: int = 5
    loss_on_all_replies: bool = False
    virtual_tokens: tuple[int, ...] = ()

    def encode(self, conversation: Conversation) -> TokenizedConversation:
        """The tokens of a conversation, and which of them are learned."""
        in_prompt, to_encoder = self.place(conversation.passages)
        segments = self.template.segments(conversation.turns, in_prompt)
        parts = [self.tokenizer.encode(segment.text) for segment in segments]
        parts[0] = [*self.virtual_tokens, *parts[0]]
        parts[-1] = [*parts[-1], self.tokenizer.eod]
        last = len(parts) - 1
        learned = [
            np.full(len(part), segment.is_reply and (self.loss_on_all_replies or number == last))
            for number, (part, segment) in enumerate(zip(parts, segments, strict=True))
        ]
        return TokenizedConversation(
            tokens=np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]),
            learned=np.concatenate(learned),
            prompt_length=sum(len(part) for part in parts[:-1]),
            passages=self.encode_passages(to_encoder),
            origin=conversation.origin,
        )

    def place(self, passages: Sequence[Passage]) -> tuple[Sequence[Passage], Sequence[Passage]]:
        """Passages of the prompt, and those of the encoder."""
        return split_passages(passages[: self.num_contexts], self.context_place)

    def encode_passages(self, passages: Sequence[Passage]) -> tuple[NDArray[np.int32], ...]:
        """The tokens of each passage."""
        return tuple(np.asarray(self.tokenizer.encode(passage.rendered()), dtype=np.int32) for passage in passages)


def split_passages(passages: Sequence[Passage], place: str) -> tuple[Sequence[Passage], Sequence[Passage]]:
    """Passages of the prompt, and those of the encoder, by --context-place."""
    cut = {"prompt": len(passages), "encoder": 0, "split": 1, "none": 0}[place]
    return passages[:cut], passages[cut:] if place in ("encoder", "split") else ()
