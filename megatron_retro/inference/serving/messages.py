"""Conversations as OpenAI's clients send them: messages, tools, and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, field_validator, model_validator

from megatron_retro.data.instructions.conversations import ToolCall, Turn
from megatron_retro.inference.serving.fields import StrictModel, Text
from megatron_retro.runtime.strict_json import json_text

_ROLES = {"developer": "system"}
Name = Annotated[str, StringConstraints(pattern=r"^[\w.-]{1,64}$")]


class TextPart(StrictModel):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class CalledFunction(StrictModel):
    """The name of a function, and its arguments as JSON."""

    name: Name
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _an_object(cls, arguments: str) -> str:
        if not isinstance(_parsed(arguments), dict):
            raise ValueError("arguments must be an object in JSON")
        return arguments


class MessageCall(StrictModel):
    """A call in an assistant's message."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(StrictModel):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] = ""
    name: str | None = None
    tool_calls: list[MessageCall] = Field([], max_length=128)
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("content is missing")
        if self.tool_calls and self.role != "assistant":
            raise ValueError("only an assistant has tool_calls")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError("tool_call_id belongs to the role tool")
        return self

    def turn(self) -> Turn:
        """As templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        calls = tuple(
            ToolCall(call.function.name, _parsed(call.function.arguments), call.id) for call in self.tool_calls
        )
        return Turn(_ROLES.get(self.role, self.role), text, calls, self.tool_call_id)


class Function(StrictModel):
    """What a tool is called, is for, and takes."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A function that the client offers."""

    type: Literal["function"]
    function: Function


class NamedFunction(StrictModel):
    """The function that has to be called."""

    name: Name


class NamedTool(StrictModel):
    """A choice of one tool."""

    type: Literal["function"]
    function: NamedFunction


def _parsed(arguments: str) -> Any:
    """The arguments of a call; clients send nothing at all for none."""
    try:
        return json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return None


def sent_calls(calls: Sequence[ToolCall]) -> list[MessageCall]:
    """Calls as clients get them, whatever name a model wrote."""
    written = CalledFunction.model_construct
    functions = [written(name=call.name, arguments=json_text(call.arguments, ensure_ascii=False)) for call in calls]
    return [MessageCall(id=call.id or "", function=one) for call, one in zip(calls, functions, strict=True)]
