"""How a conversation is written: InstructRetro's System/User/Assistant form, or a Jinja template.

A template gives segments, so that a reply's tokens are known exactly: text is tokenized segment by segment, and the
prompt of a generation is the same segments without the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from megatron_retro.data.instructions.conversations import Passage, Turn
from megatron_retro.errors import DataError
from megatron_retro.runtime.environment import require

INSTRUCT_RETRO_SYSTEM = (
    "This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions based on the context. The assistant should also indicate when the "
    "answer cannot be found in the context."
)


@dataclass(frozen=True)
class Segment:
    """A piece of the written conversation; `is_reply` marks what the assistant says."""

    text: str
    is_reply: bool


class Template(Protocol):
    """Writes conversations."""

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
        from jinja2 import StrictUndefined, TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self._path = path
        self._failure = TemplateError
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            self._template = environment.from_string(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, TemplateError) as error:
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
            return self._template.render(messages=messages, passages=shown, add_generation_prompt=add_generation_prompt)
        except self._failure as error:
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
    """The written form of what was said so far: the prompt of a generation."""
    return "".join(segment.text for segment in template.segments(turns, passages))
