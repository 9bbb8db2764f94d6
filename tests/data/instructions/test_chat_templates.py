"""A model's own chat template writes what transformers writes with it, and a reply ends once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.data.instructions.conversations import Conversation, Passage, Turn
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
from tests.data.instructions.chat_templates import CHAT_TEMPLATES, CHATML, GRANITE

QUESTION, REPLY, MORE = Turn("user", " What's ü? "), Turn("assistant", "A <letter> & more."), Turn("user", "And ä?")
CONVERSATIONS = {
    "question": (QUESTION,),
    "system": (Turn("system", "Say\nlittle."), QUESTION),
    "dialogue": (QUESTION, REPLY, MORE),
    "whole": (QUESTION, REPLY),
}


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


@pytest.mark.parametrize("turns", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_a_template_writes_what_transformers_writes(
    name: str, turns: tuple[Turn, ...], folder: Path, theirs: Any, tmp_path: Path
) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text(CHAT_TEMPLATES[name])
    messages = [{"role": turn.role, "content": turn.text} for turn in turns]
    asks = turns[-1].role == "user"
    try:
        expected = theirs.apply_chat_template(
            messages, chat_template=CHAT_TEMPLATES[name], tokenize=False, add_generation_prompt=asks
        )
    except Exception as refusal:  # Jinja's, whose class transformers passes on
        with pytest.raises(DataError, match="fails on a conversation") as ours:
            prompt_of(turns, build_template(str(path), folder))
        assert str(refusal) in str(ours.value)
        return
    assert prompt_of(turns, build_template(str(path), folder)) == expected


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


@pytest.mark.parametrize(("name", "last"), [(AUTO, "<|im_end|>"), (INSTRUCT_RETRO, "</s>")])
def test_a_reply_is_taught_one_end(name: str, last: str, folder: Path) -> None:
    tokenizer = HuggingFaceTokenizer(folder)
    encoder = ConversationTokenizer(tokenizer, build_template(name, folder))
    found = encoder.encode(Conversation((QUESTION, REPLY)))
    ends = [SPECIAL[token - 256] for token in found.tokens[found.prompt_length :] if token >= 256]
    assert ends == [last]
    assert found.learned[-1]
    assert tokenizer.ends == {257, 259}
