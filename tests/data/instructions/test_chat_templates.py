"""A model's own chat template writes what transformers writes with it, and a reply ends once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.data.instructions.conversations import Conversation, Passage, ToolCall, Turn
from megatron_retro.data.instructions.templates import (
    AUTO,
    INSTRUCT_RETRO,
    INSTRUCT_RETRO_JINJA,
    ConversationTokenizer,
    build_template,
    prompt_of,
)
from megatron_retro.data.tokenizers import HuggingFaceTokenizer
from megatron_retro.errors import DataError
from tests.data.byte_level import SPECIAL, save_byte_level
from tests.data.instructions.chat_templates import CHAT_TEMPLATES, CHATML, GRANITE, LLAMA_2, PUBLISHED

QUESTION, REPLY, MORE = Turn("user", " What's ü? "), Turn("assistant", "A <letter> & more."), Turn("user", "And ä?")
CONVERSATIONS = {
    "question": (QUESTION,),
    "system": (Turn("system", "Say\nlittle."), QUESTION),
    "dialogue": (QUESTION, REPLY, MORE),
    "whole": (QUESTION, REPLY),
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Says the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}},
    },
}
CALLING = (
    Turn("user", "Does it rain?"),
    Turn("assistant", "", (ToolCall("get_weather", {"city": "Köln"}, "a1b2c3d4e"),)),
    Turn("tool", "It pours.", (), "a1b2c3d4e"),
)
SIGNS = {"tools": "Says the weather", "calls of tools": "Köln", "results of tools": "It pours."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_byte_level(folder)
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>", "lstrip": False}, "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [257, 259]}))
    return folder


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>"
    )


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_writes_what_transformers_writes(name: str, folder: Path, theirs: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT_TEMPLATES[name])
    template = build_template(str(path), folder)
    for turns, tools in [*((turns, None) for turns in CONVERSATIONS.values()), (CALLING, [TOOL])]:
        messages = [turn.message() for turn in turns]
        asks = turns[-1].role != "assistant"
        try:
            expected = theirs.apply_chat_template(
                messages, tools, chat_template=CHAT_TEMPLATES[name], tokenize=False, add_generation_prompt=asks
            )
        except Exception as refusal:  # Jinja's, whose class transformers passes on
            with pytest.raises(DataError, match="fails on a conversation") as ours:
                prompt_of(turns, template, tools=tools or ())
            assert str(refusal) in str(ours.value)
            continue
        passed_over = [what for what, sign in SIGNS.items() if tools and sign not in expected]
        if passed_over:
            with pytest.raises(DataError, match=f"writes no {passed_over[0]}"):
                prompt_of(turns, template, tools=tools or ())
        else:
            assert prompt_of(turns, template, tools=tools or ()) == expected


def test_twenty_published_families_are_among_them() -> None:
    assert len([name for name in PUBLISHED if not name.endswith("_training")]) > 20


@pytest.mark.parametrize("name", [name for name, text in CHAT_TEMPLATES.items() if "generation %}" in text])
def test_replies_are_what_transformers_masks(name: str, folder: Path, theirs: Any, tmp_path: Path) -> None:
    (tmp_path / "chat.jinja").write_text(CHAT_TEMPLATES[name])
    template = build_template(str(tmp_path / "chat.jinja"), folder)
    encoder = ConversationTokenizer(HuggingFaceTokenizer(folder), template, loss_on_all_replies=True)
    turns = (QUESTION, REPLY, MORE, REPLY)
    found = encoder.encode(Conversation(turns))
    expected = theirs.apply_chat_template(
        [turn.message() for turn in turns],
        chat_template=CHAT_TEMPLATES[name],
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    length = len(found.tokens) - (found.tokens[-1] == encoder.tokenizer.eod)  # an end that the template leaves out
    assert length > len(expected["input_ids"]) - 3  # and layout behind the last end
    assert found.tokens[:length].tolist() == expected["input_ids"][:length]
    assert found.learned[:length].tolist() == [bool(one) for one in expected["assistant_masks"]][:length]


def test_a_model_s_own_template_is_found_wherever_it_is_kept(folder: Path, tmp_path: Path) -> None:
    def written(where: Path) -> str:
        return prompt_of((QUESTION,), build_template(AUTO, where))

    inside = written(folder)
    assert inside.startswith("<|im_start|>system")
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": [{"name": "rag", "template": "x"}, {"name": "default", "template": CHATML}]})
    )
    assert written(tmp_path) == inside
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "one {{ messages[0].content }}"}))
    assert written(tmp_path) == "one  What's ü? "
    (tmp_path / "chat_template.jinja").write_text("two")
    assert written(tmp_path) == "two"


def test_without_one_a_conversation_is_written_as_instruct_retro(tmp_path: Path) -> None:
    assert prompt_of((QUESTION,), build_template(AUTO, tmp_path)) == prompt_of(
        (QUESTION,), build_template(INSTRUCT_RETRO)
    )


def test_the_exported_form_of_instruct_retro_is_the_same(theirs: Any) -> None:
    passages = [Passage("Title", "First."), Passage("", "Second.")]
    for turns in CONVERSATIONS.values():
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        written = theirs.apply_chat_template(
            messages,
            chat_template=INSTRUCT_RETRO_JINJA,
            documents=[{"title": one.title, "text": one.text} for one in passages],
            tokenize=False,
            add_generation_prompt=turns[-1].role == "user",
        )
        assert written == prompt_of(turns, build_template(INSTRUCT_RETRO), passages)


def test_passages_reach_every_template(folder: Path, tmp_path: Path) -> None:
    passages = (Passage("Title", "First."), Passage("", "Second."))
    text = prompt_of((QUESTION, REPLY, MORE), build_template(AUTO, folder), passages)
    assert "<|im_start|>user\ntitle: Title, source: First.\n\nSecond.\n\n What's ü? <|im_end|>" in text
    (tmp_path / "chat_template.jinja").write_text(GRANITE)
    text = prompt_of((QUESTION,), build_template(AUTO, tmp_path), passages)
    assert "document 2<|end_of_role|>Second." in text
    assert text.count("Second.") == 1


def test_a_conversation_begins_as_the_tokenizer_says_unless_told_otherwise(tmp_path: Path) -> None:
    processors = pytest.importorskip("tokenizers.processors")
    backend = save_byte_level(tmp_path)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(tmp_path / "tokenizer.json"))
    for text, written in ((CHATML, False), (LLAMA_2, True)):
        (tmp_path / "a.jinja").write_text(text)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        template, tokenizer = build_template(str(tmp_path / "a.jinja"), tmp_path), HuggingFaceTokenizer(tmp_path)
        begun, bare = (
            ConversationTokenizer(tokenizer, template, add_bos=add_bos).encode(Conversation((QUESTION, REPLY))).tokens
            for add_bos in (True, False)
        )
        assert (begun == 256).sum() == 1 and begun[0] == 256 and (bare == 256).sum() == written


@pytest.mark.parametrize(("name", "last"), [(AUTO, "<|im_end|>"), (INSTRUCT_RETRO, "</s>")])
def test_a_reply_is_taught_one_end(name: str, last: str, folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder)
    encoder = ConversationTokenizer(tokenizer, build_template(name, folder))
    found = encoder.encode(Conversation((QUESTION, REPLY)))
    ends = [SPECIAL[token - 256] for token in found.tokens[found.prompt_length :] if token >= 256]
    assert ends == [last]
    assert found.learned[-1]
    assert tokenizer.ends == {257, 259}
