"""Conversations are read in every form that people have them in, and what is cut is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_retro.data.instructions.conversations import ToolCall, Turn, read_conversations
from megatron_retro.errors import DataError

ASKED, ANSWERED = Turn("user", "Q ü"), Turn("assistant", "A")
FORMS = {
    "messages": {"messages": [{"role": "user", "content": "Q ü"}, {"role": "assistant", "content": "A"}]},
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Q"}, {"type": "text", "text": " ü"}]},
            {"role": "assistant", "content": "A"},
        ]
    },
    "ShareGPT": {"conversations": [{"from": "human", "value": "Q ü"}, {"from": "gpt", "value": "A"}]},
    "Alpaca": {"instruction": "Q ü", "input": "", "output": "A"},
    "TRL": {
        "prompt": [{"role": "user", "content": "Q ü"}],
        "completion": [{"role": "assistant", "content": "A"}],
    },
    "completion": {"prompt": "Q ü", "completion": "A"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_conversation_is_the_same(form: str, tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet
    import zstandard

    lines = (json.dumps(FORMS[form]) + "\n") * 2
    files = {
        "a.jsonl": lines.encode(),
        "a.json": json.dumps([FORMS[form]] * 2).encode(),
        "lines.json": lines.encode(),
        "a.jsonl.gz": gzip.compress(lines.encode()),
        "a.json.zst": zstandard.compress(json.dumps([FORMS[form]] * 2).encode()),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert [one.turns for one in read_conversations(tmp_path / name)] == [(ASKED, ANSWERED)] * 2, name
    if form != "parts":  # a column has one type
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([FORMS[form]] * 2), tmp_path / "a.parquet")
        assert [one.turns for one in read_conversations(tmp_path / "a.parquet")] == [(ASKED, ANSWERED)] * 2
    for name in ("a.jsonl.gz", "a.json.zst", *(["a.parquet"] if form != "parts" else [])):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
        with pytest.raises(DataError, match="cut or damaged"):
            read_conversations(tmp_path / name)


def test_a_system_prompt_and_an_input_stand_where_they_belong(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    chat = {"system": "S", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    path.write_text(json.dumps(chat) + "\n" + json.dumps({"instruction": "Q", "input": "I", "output": "A"}) + "\n")
    first, second = read_conversations(path)
    assert first.turns == (Turn("system", "S"), Turn("user", "Q"), Turn("assistant", "A"))
    assert second.turns[0].text == "Q\n\nI"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image"}]}]}) + "\n")
    with pytest.raises(DataError, match="line 1: a part of content is of type 'image'"):
        read_conversations(path)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CALL = {"name": "f", "arguments": {"x": 1}}
WITH_TOOLS = {
    "OpenAI": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "A"},
    ],
    "arguments as JSON": [
        {"role": "user", "content": "Q"},
        {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}]},
        {"role": "function", "content": [{"type": "text", "text": "2"}]},
        {"role": "assistant", "content": "A"},
    ],
    "ShareGPT": [
        {"from": "human", "value": "Q"},
        {"from": "function_call", "value": json.dumps(CALL)},
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "A"},
    ],
}


@pytest.mark.parametrize("form", WITH_TOOLS)
@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL])], ids=["tools", "tools as JSON"])
def test_tools_their_calls_and_results_are_read(form: str, tools: object, tmp_path: Path) -> None:
    path, key = tmp_path / "a.jsonl", "conversations" if form == "ShareGPT" else "messages"
    path.write_text(json.dumps({key: WITH_TOOLS[form], "tools": tools}) + "\n")
    (found,) = read_conversations(path)
    called = Turn("assistant", "", (ToolCall("f", {"x": 1}),))
    assert found.turns == (Turn("user", "Q"), called, Turn("tool", "2"), Turn("assistant", "A"))
    assert found.tools == (TOOL,)


@pytest.mark.parametrize(
    ("message", "tools", "words"),
    [
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "x"}}]},
            [],
            "name and arguments",
        ),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}, [], "name and arguments"),
        ({"role": "assistant", "content": "A"}, "f", "tools must be a list"),
        ({"role": "user", "content": "Q", "tool_calls": [{"function": CALL}]}, [], "only an assistant"),
    ],
)
def test_calls_that_are_none_are_refused(message: object, tools: object, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Q"}, message, {"role": "assistant", "content": "A"}]
    path.write_text(json.dumps({"messages": messages, "tools": tools}) + "\n")
    with pytest.raises(DataError, match=words):
        read_conversations(path)
