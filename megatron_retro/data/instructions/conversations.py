"""Reading conversations, one to a record, as people have them: messages, prompts with completions, questions with
answers, ShareGPT's and Alpaca's records, tools and their calls; lines, an array or columns, plain or compressed.

All faults of a file are reported together, each with its line number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.data.preprocessing.records import BROKEN, COMPRESSED, opened
from megatron_retro.data.preprocessing.tables import whole_table
from megatron_retro.errors import DataError

ROLES = ("system", "user", "assistant", "tool")
_CALLING = "function_call"
_OTHER_NAMES = {
    "human": "user", "gpt": "assistant", "developer": "system", _CALLING: "assistant",
    "observation": "tool", "function": "tool", "ipython": "tool",
}  # fmt: skip
REPORTED_FAULTS = 20


@dataclass(frozen=True)
class ToolCall:
    """A tool that an assistant calls."""

    name: str
    arguments: Mapping[str, Any]
    id: str | None = None

    def message(self) -> dict[str, Any]:
        """As messages hold it."""
        named = {} if self.id is None else {"id": self.id}
        return {**named, "type": "function", "function": {"name": self.name, "arguments": dict(self.arguments)}}


@dataclass(frozen=True)
class Turn:
    """What one side says. An assistant may call tools; what a tool returns is a turn of its own."""

    role: str
    text: str
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None

    def message(self) -> dict[str, Any]:
        """As chat templates take it."""
        calls = {"tool_calls": [call.message() for call in self.tool_calls]} if self.tool_calls else {}
        answered = {} if self.tool_call_id is None else {"tool_call_id": self.tool_call_id}
        return {"role": self.role, "content": self.text, **calls, **answered}


@dataclass(frozen=True)
class Passage:
    """Retrieved text that belongs to a conversation."""

    title: str
    text: str

    def rendered(self) -> str:
        """As the published prompts show it."""
        return f"title: {self.title}, source: {self.text}" if self.title else self.text


@dataclass(frozen=True)
class Conversation:
    """Turns that end with the assistant's, the passages that were retrieved for them, and the tools on offer."""

    turns: tuple[Turn, ...]
    passages: tuple[Passage, ...] = ()
    origin: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()


class _Fault(ValueError):
    """Why a record is no conversation."""


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a JSON lines file."""
    return [conversation for _, conversation in read_records(path)]


def read_records(path: Path) -> list[tuple[dict[str, Any], Conversation]]:
    """The same, each with the record that it stands in."""
    found: list[tuple[dict[str, Any], Conversation]] = []
    faults: list[str] = []
    for place, record in _placed_records(path):
        try:
            if isinstance(record, _Fault):
                raise record
            found.append((record, parse_record(record, f"{path}:{place}")))
        except _Fault as fault:
            faults.append(f"line {place}: {fault}")
    if faults:
        shown = "\n  ".join(faults[:REPORTED_FAULTS])
        more = f"\n  and {len(faults) - REPORTED_FAULTS} more" if len(faults) > REPORTED_FAULTS else ""
        raise DataError(
            f"{path} has {len(faults)} bad record(s):\n  {shown}{more}", fix="correct or remove these lines"
        )
    if not found:
        raise DataError(f"{path} holds no conversation", expected="one JSON object per line")
    return found


def _placed_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Records with their line (of an array or a table, their number); a `_Fault` in place of a line that is no JSON."""
    try:
        if path.suffix in (".parquet", ".arrow"):
            yield from enumerate(whole_table(str(path)), 1)
            return
        with opened(path) as stream:
            if path.name.removesuffix(path.suffix if path.suffix in COMPRESSED else "").endswith(".json"):
                yield from _whole(stream.read().decode("utf-8"))
                return
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, _parsed(line.decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", fix="give the path of a JSON lines file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", got=error) from None
    except (*BROKEN, ValueError) as error:  # the last of a table
        raise DataError(f"{path} is cut or damaged", got=error, fix="fetch it again") from None


def _whole(text: str) -> Iterator[tuple[int, Any]]:
    """The records of an array; a file of that name that holds lines is read as lines."""
    parsed = _parsed(text)
    if isinstance(parsed, list):
        yield from enumerate(parsed, 1)
    else:
        yield from ((number, _parsed(line)) for number, line in enumerate(text.splitlines(), 1) if line.strip())


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return _Fault(f"not JSON (column {error.colno}: {error.msg})")
    except (RecursionError, ValueError) as error:
        return _Fault(f"no JSON that can be read: {error}")


def parse_record(record: object, origin: str) -> Conversation:
    """One record; raises `ValueError` with the reason."""
    if not isinstance(record, dict):
        raise _Fault(f"expected an object, got {type(record).__name__}")
    turns = _turns(record)
    _check(turns)
    return Conversation(turns, _passages(record), origin, _tools(record))


def _turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    if "messages" in record:
        return _messages(record["messages"], "role", "content")
    if "conversations" in record:
        told = (Turn("system", _text(record, "system")),) if record.get("system") else ()
        return *told, *_messages(record["conversations"], "from", "value")
    if "prompt" in record and "completion" in record:
        return *_side(record, "prompt", "user"), *_side(record, "completion", "assistant")
    if "instruction" in record and "output" in record:
        asked = [_text(record, key) for key in ("instruction", "input") if record.get(key)]
        return Turn("user", "\n\n".join(asked)), Turn("assistant", _text(record, "output"))
    if "question" in record and "answers" in record:
        answers = record["answers"]
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
            raise _Fault("answers must be a list of texts with at least one")
        return Turn("user", _text(record, "question")), Turn("assistant", answers[0])
    raise _Fault(
        "expected messages, conversations, prompt and completion, instruction and output, or question and answers; "
        f"got {', '.join(record) or '{}'}"
    )


def _side(record: Mapping[str, Any], key: str, role: str) -> tuple[Turn, ...]:
    """A prompt or a completion: text, or the messages that it consists of."""
    if isinstance(record[key], list):
        return _messages(record[key], "role", "content")
    return (Turn(role, _text(record, key)),)


def _messages(messages: object, role: str, content: str) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Fault(f"messages must be a list of objects with {role} and {content}")
    turns = []
    for message in messages:
        name = _text(message, role)
        if name not in ROLES and name not in _OTHER_NAMES:
            raise _Fault(f"unknown role {name!r}, expected one of {', '.join(ROLES)}")
        speaker, calls = _OTHER_NAMES.get(name, name), message.get("tool_calls") or ()
        if name == _CALLING:
            turns.append(Turn(speaker, "", _calls(_from_json(_text(message, content)))))
            continue
        text = "" if calls and message.get(content) is None else _content(message, content)
        turns.append(Turn(speaker, text, _calls(calls), message.get("tool_call_id")))
    return tuple(turns)


def _calls(calls: object) -> tuple[ToolCall, ...]:
    """Calls in OpenAI's form, in that of ShareGPT's files (name and arguments), or one alone."""
    found = []
    for call in calls if isinstance(calls, list | tuple) else [calls]:
        outer = call if isinstance(call, dict) else {}
        function = outer.get("function", outer)
        inner = function if isinstance(function, dict) else {}
        name, arguments = inner.get("name"), _from_json(inner.get("arguments") or {})
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise _Fault(f"a call of a tool must have a name and arguments (an object, or its JSON), got {call!r:.80}")
        found.append(ToolCall(name, arguments, outer.get("id")))
    return tuple(found)


def _tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    """The tools of a record: a list of objects, or its JSON."""
    tools = _from_json(record.get("tools") or [])
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise _Fault("tools must be a list of objects, or its JSON")
    return tuple(tools)


def _from_json(value: object) -> Any:
    """A value that may be given as its JSON, as in the columns of a table."""
    return _parsed(value) if isinstance(value, str) else value


def _content(message: Mapping[str, Any], key: str) -> str:
    """A text, or the text of the parts that it is given in."""
    parts = message.get(key)
    if not isinstance(parts, list):
        return _text(message, key)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise _Fault(f"a part of {key} is of type {kind!r}, expected text")
    return "".join(_text(part, "text") for part in parts)


def _text(record: Mapping[str, Any], key: str) -> str:
    value = record.get(key)
    if not isinstance(value, str):
        raise _Fault(f"{key} must be text, got {type(value).__name__}")
    return value


def _check(turns: tuple[Turn, ...]) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        raise _Fault("no assistant turn: there is nothing to learn")
    if roles[-1] != "assistant":
        raise _Fault(f"the last turn is the {roles[-1]}'s, expected the assistant's")
    if "system" in roles[1:]:
        raise _Fault("a system turn may only come first")
    if any(turn.tool_calls for turn in turns if turn.role != "assistant"):
        raise _Fault("only an assistant has tool_calls")
    if not turns[-1].text.strip() and not turns[-1].tool_calls:
        raise _Fault("the last assistant turn is empty")


def _passages(record: Mapping[str, Any]) -> tuple[Passage, ...]:
    if "contexts" not in record:
        return ()
    contexts = record["contexts"]
    if not isinstance(contexts, list) or not contexts:
        raise _Fault("contexts must be a list with at least one passage; leave the key out when there is none")
    return tuple(_passage(context) for context in contexts)


def _passage(context: object) -> Passage:
    if isinstance(context, str):
        context = {"text": context}
    if not isinstance(context, dict):
        raise _Fault("a context must be text, or an object with title and text")
    text = _text(context, "text")
    if not text.strip():
        raise _Fault("a context is empty")
    return Passage(_text(context, "title") if "title" in context else "", text)
