"""How models write calls of tools: reading them in an answer, and holding an answer to one.

A model's form is the one in which its chat template writes a call: it is asked to write one, and each form tries to
read that.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_retro.data.instructions.conversations import ToolCall, Turn
from megatron_retro.data.instructions.templates import Template
from megatron_retro.errors import DataError
from megatron_retro.inference.generation import shared_end
from megatron_retro.runtime.strict_json import json_text

_DECODER = json.JSONDecoder()
_WRITTEN = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_TRIAL = (Turn("user", "?"), Turn("assistant", "", (ToolCall("trial", {"a": 1}, "a1b2c3d4e"),)))


@dataclass(frozen=True)
class CallForm:
    """Between `opens` and `closes` stands the JSON of a call, or of a list of them; `key` names its arguments.

    A form that opens with nothing is an answer that begins with the JSON, perhaps behind `mark`.
    """

    opens: str
    closes: str = ""
    mark: str = ""
    key: str = "arguments"
    listed: bool = False

    @cached_property
    def _before(self) -> re.Pattern[str]:
        opens = re.escape(self.opens.strip()) or f";?\\s*(?:{re.escape(self.mark)})?"
        return re.compile(rf"\s*{opens}\s*")

    @cached_property
    def _after(self) -> re.Pattern[str]:
        return re.compile(rf"\s*{re.escape(self.closes.strip())}")

    def begins(self, text: str) -> int:
        """Where calls may begin; the text's length where they do not."""
        if self.opens:
            mark = self.opens.strip()
            place = text.find(mark)
            return place if place >= 0 else len(text) - shared_end(text, mark)
        start = len(text) - len(text.lstrip())
        answer = text[start:]
        return start if answer.startswith(("{", self.mark)) or self.mark.startswith(answer) else len(text)

    def first(self, text: str) -> tuple[Any, int, int, int] | None:
        """The JSON that a text begins with, where it begins and ends, and where the call ends."""
        before = self._before.match(text)
        try:
            value, end = (None, 0) if before is None else _DECODER.raw_decode(text, before.end())
        except (ValueError, RecursionError):
            return None
        after = self._after.match(text, end)
        return None if before is None or after is None else (value, before.end(), end, after.end())

    def read(self, text: str) -> tuple[list[ToolCall], str]:
        """The calls that a text begins with, and what follows them."""
        calls: list[ToolCall] = []
        while (first := self.first(text)) is not None and (found := _calls_of(first[0])):
            calls, text = calls + found, text[first[-1] :]
        return calls, text

    def grammar(self, tools: Sequence[Mapping[str, Any]], token_of: Callable[[str], int | None]) -> str:
        """What an answer that calls one of these tools is held to, in llguidance's words."""
        calls = [
            {
                "type": "object",
                "properties": {"name": {"const": tool["name"]}, self.key: tool.get("parameters") or {"type": "object"}},
                "required": ["name", self.key],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        content: dict[str, Any] = {"anyOf": calls}
        if self.listed:
            content = {"type": "array", "items": content, "minItems": 1, "maxItems": 1}
        parts = [*_literal(self.opens, token_of), "call", *_literal(self.closes, token_of)]
        return f"start: {' '.join(parts)}\ncall: %json {json_text({'x-guidance': _WRITTEN, **content})}\n"


CALL_FORMS = (
    CallForm("<tool_call>", "</tool_call>"),  # Hermes, Qwen
    CallForm("[TOOL_CALLS]"),  # Mistral
    CallForm("<|tool_call|>"),  # Granite
    CallForm("functools"),  # Phi
    CallForm("", mark="<|python_tag|>"),  # Llama
)


def form_of(template: Template) -> CallForm | None:
    """The form in which a template writes a call; None where it has none, or one that is not known here."""
    try:
        written = template.segments(_TRIAL, ())[-1].text
    except DataError:
        return None
    for form in CALL_FORMS:
        text = written[form.begins(written) :]
        first = form.first(text)
        if first is not None and [(one.name, one.arguments) for one in _calls_of(first[0])] == [("trial", {"a": 1})]:
            value, start, end, after = first
            key = "parameters" if '"parameters"' in text[start:end] else "arguments"
            return replace(form, opens=text[:start], closes=text[end:after], key=key, listed=isinstance(value, list))
    return None


class CallReader:
    """Tells text from calls as an answer comes: text goes on at once, calls are kept until the answer ends."""

    def __init__(self, form: CallForm | None) -> None:
        self._form, self._text, self._sent = form, "", 0

    def feed(self, new: str) -> str:
        """The text that is certain to be no call."""
        self._text += new
        certain = len(self._text) if self._form is None else self._form.begins(self._text)
        text, self._sent = self._text[self._sent : certain], max(self._sent, certain)
        return text

    def finish(self) -> tuple[str, list[ToolCall]]:
        """What text is left, and the calls; an answer that goes on behind calls that open with nothing is text."""
        kept = self._text[self._sent :]
        calls, rest = ([], kept) if self._form is None else self._form.read(kept)
        if self._form is not None and not self._form.opens and rest.strip():
            return kept, []
        return (rest if rest.strip() or not calls else ""), [replace(one, id=secrets.token_hex(5)[:9]) for one in calls]


def _calls_of(value: Any) -> list[ToolCall]:
    """A call or a list of calls; nothing where one of them is none."""
    calls = []
    for one in value if isinstance(value, list) else [value]:
        arguments = one.get("arguments", one.get("parameters")) if isinstance(one, dict) else None
        if not isinstance(arguments, dict) or not isinstance(one.get("name"), str):
            return []
        calls.append(ToolCall(one["name"], arguments))
    return calls


def _literal(text: str, token_of: Callable[[str], int | None]) -> list[str]:
    """A text of a grammar; a mark that is one token is that token."""
    mark = text.strip()
    token = token_of(mark) if mark else None
    if token is None:
        return [json_text(text)] if text else []
    before, after = text.split(mark)
    return [json_text(before)] * bool(before) + [f"<[{token}]>"] + [json_text(after)] * bool(after)
