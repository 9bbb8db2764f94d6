"""Jinja templates write conversations, and wrong ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_retro.data.instructions.conversations import Turn
from megatron_retro.data.instructions.dataset import open_instructions
from megatron_retro.data.instructions.rows import RowShape
from megatron_retro.data.instructions.templates import (
    ConversationTokenizer,
    JinjaTemplate,
    build_template,
)
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.errors import DataError

TOKENIZER = ByteTokenizer()
JINJA = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_jinja_template_gives_the_same_segments_as_its_text(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(JINJA)
    template = build_template(str(path))
    turns = (Turn("user", "q1"), Turn("assistant", "a1"), Turn("user", "q2"), Turn("assistant", "a2"))
    segments = template.segments(turns, ())
    assert [segment.is_reply for segment in segments] == [False, True, False, True]
    assert [segment.text for segment in segments] == [
        "<user>q1</user><assistant>", "a1</assistant>", "<user>q2</user><assistant>", "a2</assistant>",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for %}", "cannot use the template"),
        ("{{ absent.thing }}", "fails on a conversation"),
        ("{{ messages|length }}{% if add_generation_prompt %}<a>{% endif %}", "writes a beginning differently"),
        ("{{ ''.__class__.__mro__ }}", "fails on a conversation"),
    ],
)
def test_wrong_templates_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "wrong.jinja"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        JinjaTemplate(text, path.name).segments((Turn("user", "q"), Turn("assistant", "a")), ())


def test_a_template_that_cannot_write_a_conversation_is_named_with_its_line(tmp_path: Path) -> None:
    template, data = tmp_path / "picky.jinja", tmp_path / "data.jsonl"
    template.write_text("{% if messages[0].content == 'bad' %}{{ absent.thing }}{% endif %}" + JINJA)
    data.write_text("".join(json.dumps({"prompt": word, "completion": "a"}) + "\n" for word in ("good", "bad")))
    encoder = ConversationTokenizer(TOKENIZER, build_template(str(template)))
    with pytest.raises(DataError, match=r"data\.jsonl:2: the template .* fails on a conversation"):
        open_instructions([str(data)], encoder, RowShape(64, 0), seed=1, packed=False, skip_long=False)


def test_unknown_template_is_named() -> None:
    with pytest.raises(DataError, match="there is no template 'chatml'"):
        build_template("chatml")
