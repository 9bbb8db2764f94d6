"""How a conversation is written, by InstructRetro's form or a Jinja template, and tokenized.

A template gives segments, so that a reply's tokens are known exactly: text is tokenized segment by segment, and the
prompt of a generation is the same segments without the last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.instructions.conversations import Conversation, Passage, Turn
from megatron_retro.data.model_text import chat_template, special_tokens
from megatron_retro.data.tokenizers import Tokenizer, begin_tokens, end_tokens
from megatron_retro.errors import DataError
from megatron_retro.runtime.environment import require

INSTRUCT_RETRO, AUTO = "instruct-retro", "auto"
Tools = Sequence[Mapping[str, Any]]

INSTRUCT_RETRO_SYSTEM = (
    "This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions based on the context. The assistant should also indicate when the "
    "answer cannot be found in the context."
)
# `InstructRetroTemplate` as transformers reads it
INSTRUCT_RETRO_JINJA = (
    "{{ 'System: ' }}"
    "{%- if messages and messages[0].role == 'system' %}{{ messages[0].content }}"
    f"{{%- else %}}{{{{ {INSTRUCT_RETRO_SYSTEM!r} }}}}{{%- endif %}}"
    "{%- for one in documents or [] %}"
    "{{ '\n\n' + ('title: ' + one.title + ', source: ' if one.title else '') + one.text }}"
    "{%- endfor %}"
    "{%- for message in messages %}"
    "{%- if message.role == 'user' %}{{ '\n\nUser: ' + message.content }}"
    "{%- elif message.role == 'assistant' %}{{ '\n\nAssistant: ' + message.content | trim }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{ '\n\nAssistant:' }}{%- endif %}"
)


@dataclass(frozen=True)
class Segment:
    """A part of the written conversation; `is_reply` marks the assistant's."""

    text: str
    is_reply: bool


class Template(Protocol):
    """Writes a conversation as text."""

    def prompt(self, turns: Sequence[Turn], passages: Sequence[Passage], tools: Tools = ()) -> str:
        """The written form up to where the assistant goes on; `passages` are those that stand in the prompt, `tools`
        are in OpenAI's form."""
        ...

    def segments(
        self, turns: Sequence[Turn], passages: Sequence[Passage], tools: Tools = (), *, all_replies: bool = True
    ) -> list[Segment]:
        """The written form of a conversation that ends with a reply, cut at all replies or at the last one."""
        ...


class InstructRetroTemplate:
    """`System: ...`, passages, then `User: ...` and `Assistant: ...` by turns, blank lines between."""

    def prompt(self, turns: Sequence[Turn], passages: Sequence[Passage], tools: Tools = ()) -> str:
        """The written form up to where the assistant goes on."""
        return "".join(segment.text for segment in self.segments(turns, passages, tools))

    def segments(
        self, turns: Sequence[Turn], passages: Sequence[Passage], tools: Tools = (), *, all_replies: bool = True
    ) -> list[Segment]:
        """The written form."""
        if tools or any(turn.tool_calls or turn.role == "tool" for turn in turns):
            raise DataError(f"{INSTRUCT_RETRO} has no words for tools", fix="use a model's own chat template")
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
    """A chat template with the variables that transformers gives it, and `passages`.

    `documents` are the passages too; a template that reads neither finds them before the first question. A reply is
    what stands in `{% generation %}`. A template without it is asked for the conversation with and without a reply:
    what it writes before a reply that is learned must not depend on it.
    """

    def __init__(self, text: str, name: str, tokens: Mapping[str, str] | None = None) -> None:
        require("jinja2", "a Jinja template")
        from jinja2 import TemplateError

        from megatron_retro.data.instructions.bounded_jinja import BoundedEnvironment, rendered

        self._name, self._tokens, self._rendered = name, dict(tokens or {}), rendered
        self._reads_passages = "passages" in text or "documents" in text
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
            environment = BoundedEnvironment()
            self._mark, self._template = environment.reply_mark, environment.from_string(text)
        except (TemplateError, RecursionError) as error:
            raise DataError(f"cannot use the template {name}", got=error) from None

    def prompt(self, turns: Sequence[Turn], passages: Sequence[Passage], tools: Tools = ()) -> str:
        """The written form up to where the assistant goes on."""
        self._require_written(turns, tools)
        asks = bool(turns) and turns[-1].role != "assistant"
        return self._render(turns, passages, tools, ask=asks).replace(self._mark, "")

    def segments(
        self, turns: Sequence[Turn], passages: Sequence[Passage], tools: Tools = (), *, all_replies: bool = True
    ) -> list[Segment]:
        """The written form."""
        self._require_written(turns, tools)
        marked = self._render(turns, passages, tools)
        if self._mark in marked:
            return _marked_segments(marked.split(self._mark))
        replies = [number for number, turn in enumerate(turns) if turn.role == "assistant"]
        segments: list[Segment] = []
        written = ""
        for number in replies if all_replies else replies[-1:]:
            prompt = self._render(turns[:number], passages, tools, ask=True)
            whole = self._render(turns[: number + 1], passages, tools)
            segments.append(Segment(self._continuation(written, prompt), False))
            segments.append(Segment(self._continuation(prompt, whole), True))
            written = whole
        return segments

    def _require_written(self, turns: Sequence[Turn], tools: Tools) -> None:
        """Refuse what the template would pass over in silence: what is written without it then is the same."""
        if not tools and not any(turn.tool_calls or turn.role == "tool" for turn in turns):
            return
        renamed = [
            replace(turn, tool_calls=tuple(replace(call, name=call.name + "_") for call in turn.tool_calls))
            for turn in turns
        ]
        returned = [replace(turn, text=turn.text + ".") if turn.role == "tool" else turn for turn in turns]
        other: dict[str, tuple[Sequence[Turn], Tools]] = {"tools": (turns, ())} if tools else {}
        other |= {"calls of tools": (renamed, tools)} if renamed != [*turns] else {}
        other |= {"results of tools": (returned, tools)} if returned != [*turns] else {}
        written = self._render(turns, (), tools)
        for what, changed in other.items():
            if self._render(changed[0], (), changed[1]) == written:
                raise DataError(
                    f"the template {self._name} writes no {what}", fix="leave them out, or use a model that knows tools"
                )

    def _render(
        self, turns: Sequence[Turn], passages: Sequence[Passage], tools: Tools = (), *, ask: bool = False
    ) -> str:
        """The written text, replies between marks where the template says which they are."""
        messages = [turn.message() for turn in turns]
        if passages and not self._reads_passages:
            asked = next((message for message in messages if message["role"] == "user"), messages[0])
            asked["content"] = "\n\n".join([*(passage.rendered() for passage in passages), asked["content"]])
        shown = [{"title": passage.title, "text": passage.text} for passage in passages]
        variables = {
            **self._tokens,
            "messages": messages,
            "tools": list(tools) or None,
            "documents": shown or None,
            "passages": shown,
            "add_generation_prompt": ask,
        }
        try:
            return self._rendered(self._template, variables)
        except self._failures as error:
            raise DataError(f"the template {self._name} fails on a conversation", got=error) from None

    def _continuation(self, beginning: str, whole: str) -> str:
        if not whole.startswith(beginning):
            raise DataError(
                f"the template {self._name} writes a beginning differently when the conversation goes on",
                got=repr(whole[: len(beginning) + 20]),
                expected=f"a text that starts with {beginning[-60:]!r}",
                fix="make what it writes for a turn independent of the turns that follow",
            )
        return whole[len(beginning) :]


def build_template(name: str, folder: Path | None = None) -> Template:
    """`instruct-retro`, the path of a Jinja template, or `auto`: what the model whose text files `folder` holds was
    taught, and `instruct-retro` where it was taught none."""
    if name == AUTO:
        text = None if folder is None else chat_template(folder)
        if text is None or folder is None:
            return InstructRetroTemplate()
        return JinjaTemplate(text, f"of {folder}", special_tokens(folder))
    if name == INSTRUCT_RETRO:
        return InstructRetroTemplate()
    if not name.endswith((".jinja", ".jinja2")):
        raise DataError(f"there is no template {name!r}", expected=f"{AUTO}, {INSTRUCT_RETRO} or a .jinja file")
    try:
        text = Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot use the template {name}", got=error) from None
    return JinjaTemplate(text, name, {} if folder is None else special_tokens(folder))


def _marked_segments(parts: Sequence[str]) -> list[Segment]:
    """Every other part is a reply; a line's end behind the last one is layout."""
    found = [Segment(text, bool(place % 2)) for place, text in enumerate(parts) if text]
    return found if found[-1].text.strip() else found[:-1]


def prompt_of(turns: Sequence[Turn], template: Template, passages: Sequence[Passage] = (), tools: Tools = ()) -> str:
    """The written form of the turns so far: the prompt of a generation."""
    return template.prompt(turns, passages, tools)


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
    add_bos: bool = True

    def encode(self, conversation: Conversation) -> TokenizedConversation:
        """The tokens of a conversation, and which of them are learned."""
        in_prompt, to_encoder = self.place(conversation.passages)
        segments = self.template.segments(
            conversation.turns, in_prompt, conversation.tools, all_replies=self.loss_on_all_replies
        )
        parts = [self.tokenizer.encode(segment.text) for segment in segments]
        begins = begin_tokens(self.tokenizer, parts[0]) if self.add_bos else ()
        parts[0] = [*self.virtual_tokens, *begins, *parts[0]]
        parts[-1] = self._ended(parts[-1])
        last = max(number for number, segment in enumerate(segments) if segment.is_reply)
        learned = [
            np.full(len(part), segment.is_reply and (self.loss_on_all_replies or number == last))
            for number, (part, segment) in enumerate(zip(parts, segments, strict=True))
        ]
        return TokenizedConversation(
            tokens=np.concatenate([np.asarray(part, dtype=np.int32) for part in parts]),
            learned=np.concatenate(learned),
            prompt_length=sum(len(part) for part in parts[:last]),
            passages=self.encode_passages(to_encoder),
            origin=conversation.origin,
        )

    def _ended(self, tokens: list[int]) -> list[int]:
        """With one end, also where the template wrote it: what it wrote after that is layout."""
        ends = end_tokens(self.tokenizer)
        last = max((place for place, token in enumerate(tokens) if token in ends), default=None)
        if last is not None and not self.tokenizer.decode(tokens[last + 1 :]).strip():
            return tokens[: last + 1]
        return [*tokens, self.tokenizer.eod]

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
