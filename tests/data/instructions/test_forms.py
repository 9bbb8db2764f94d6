"""Conversations are read in every form that people have them in, and what is cut is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_retro.data.instructions.conversations import Turn, read_conversations
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
