"""Reading conversations: `{"messages"}`, `{"prompt", "completion"}` or `{"question", "answers", "contexts"}` per line.

All faults of a file are reported together, each with its line number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.errors import DataError

ROLES = ("system", "user", "assistant")
REPORTED_FAULTS = 20


@dataclass(frozen=True)
class Turn:
    """What one side says."""

    role: str
    text: str


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
    """Turns that end with the assistant's, and the passages that were retrieved for them."""

    turns: tuple[Turn, ...]
    passages: tuple[Passage, ...] = ()
    origin: str = ""


class _Fault(ValueError):
    """Why a record is no conversation."""


def read_conversations(path: Path) -> list[Conversation]:
    """All conversations of a JSON lines file."""
    return [conversation for _, conversation in read_records(path)]


def read_records(path: Path) -> list[tuple[dict[str, Any], Conversation]]:
    """The same, each with the record that it stands in."""
    found: list[tuple[dict[str, Any], Conversation]] = []
    faults: list[str] = []
    for number, line in _numbered_lines(path):
        try:
            found.append(parse_record(line, f"{path}:{number}"))
        except _Fault as fault:
            faults.append(f"line {number}: {fault}")
    if faults:
        shown = "\n  ".join(faults[:REPORTED_FAULTS])
        more = f"\n  and {len(faults) - REPORTED_FAULTS} more" if len(faults) > REPORTED_FAULTS else ""
        raise DataError(
            f"{path} has {len(faults)} bad record(s):\n  {shown}{more}", fix="correct or remove these lines"
        )
    if not found:
        raise DataError(f"{path} holds no conversation", expected="one JSON object per line")
    return found


def _numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield number, line
    except FileNotFoundError:
        raise DataError(f"there is no file {path}", fix="give the path of a JSON lines file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8", got=error) from None


def parse_record(line: str, origin: str) -> tuple[dict[str, Any], Conversation]:
    """One record; raises `ValueError` with the reason."""
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise _Fault(f"not JSON (column {error.colno}: {error.msg})") from None
    except (RecursionError, ValueError) as error:
        raise _Fault(f"no JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise _Fault(f"expected an object, got {type(record).__name__}")
    turns = _turns(record)
    _check(turns)
    return record, Conversation(turns, _passages(record), origin)


def _turns(record: Mapping[str, Any]) -> tuple[Turn, ...]:
    if "messages" in record:
        return _messages(record["messages"])
    if "prompt" in record and "completion" in record:
        return Turn("user", _text(record, "prompt")), Turn("assistant", _text(record, "completion"))
    if "question" in record and "answers" in record:
        answers = record["answers"]
        if not isinstance(answers, list) or not answers or not isinstance(answers[0], str):
            raise _Fault("answers must be a list of texts with at least one")
        return Turn("user", _text(record, "question")), Turn("assistant", answers[0])
    raise _Fault(
        f"expected messages, or prompt and completion, or question and answers; got {', '.join(record) or '{}'}"
    )


def _messages(messages: object) -> tuple[Turn, ...]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise _Fault("messages must be a list of objects with role and content")
    turns = tuple(Turn(_text(message, "role"), _text(message, "content")) for message in messages)
    for turn in turns:
        if turn.role not in ROLES:
            raise _Fault(f"unknown role {turn.role!r}, expected one of {', '.join(ROLES)}")
    return turns


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
    if not turns[-1].text.strip():
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
