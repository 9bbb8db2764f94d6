"""Input that was made to hang, to fill the memory or to take over a terminal ends in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_retro.convert.hugging_face_config import model_from_hugging_face
from megatron_retro.data.instructions import bounded_jinja
from megatron_retro.data.instructions.conversations import Turn, read_conversations
from megatron_retro.data.instructions.templates import build_template
from megatron_retro.data.tokenizers import HuggingFaceTokenizer
from megatron_retro.errors import ArtifactError, ConfigError, DataError
from megatron_retro.evaluation.examples import read_records
from megatron_retro.runtime.console import say, shown
from megatron_retro.testing.corpora import small_hugging_face

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% set c = b %}{% endfor %}{% endfor %}"
DOUBLING = "{% set n = namespace(t='ab') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LOOP, "runs for more than"),
        ("{% for a in range(999) %}{{ 'x' * 99999 }}{% endfor %}", "more than 16,777,216"),
        (DOUBLING, "more than 16,777,216"),
        ("{{ 'x' * 99999999999 }}", "more than 16,777,216"),
        ("{{ 9 ** 999999999 }}", "a power beyond"),
        ("{% macro m() %}{{ m() }}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{{ messages + 1 }}", "fails on a conversation"),
    ],
)
def test_a_template_is_bounded(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_jinja, "SECONDS", 0.3 if text == LOOP else 60)
    path = tmp_path / "a.jinja"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        build_template(str(path)).prompt([Turn("user", "hello")], [])


def test_a_bounded_template_writes_what_jinja_writes(tmp_path: Path) -> None:
    path = tmp_path / "a.jinja"
    path.write_text("{% for m in messages %}{{ '<' ~ m.role ~ '>' + m.content * 2 ~ 7 }}\n{% endfor %}")
    written = build_template(str(path)).prompt([Turn("user", "hi")], [])
    assert written == "<user>hihi7\n"


def test_json_of_any_depth(tmp_path: Path) -> None:
    deep = '{"messages": ' + "[" * 100_000 + "]" * 100_000 + "}"
    path = tmp_path / "a.jsonl"
    path.write_text(deep + "\n")
    with pytest.raises(DataError, match="line 1: no JSON that can be read"):
        read_conversations(path)
    with pytest.raises(DataError, match="line 1 cannot be read"):
        read_records(path)
    whole = tmp_path / "a.json"
    whole.write_text(deep)
    with pytest.raises(DataError, match="cannot be read"):
        read_records(whole)


def test_impossible_ids_of_a_tokenizer(tmp_path: Path) -> None:
    small_hugging_face(tmp_path)
    path = tmp_path / "tokenizer.json"
    parsed = json.loads(path.read_text())
    for place in ("vocab", "added"):
        changed = json.loads(path.read_text())
        if place == "vocab":
            changed["model"]["vocab"][next(iter(parsed["model"]["vocab"]))] = 4_000_000_000
        else:
            changed["added_tokens"][0]["id"] = 4_000_000_000
        other = tmp_path / place
        other.mkdir()
        (other / "tokenizer.json").write_text(json.dumps(changed))
        with pytest.raises(ArtifactError, match="impossible id"):
            HuggingFaceTokenizer(other)


def test_a_model_of_billions_of_layers() -> None:
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 256}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **size, "num_hidden_layers": 2_000_000_000}
    with pytest.raises(ConfigError, match="num_hidden_layers = 2000000000: expected at most 10,000"):
        model_from_hugging_face(config)


def test_what_a_terminal_would_obey_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown("a\x1b[2J\r\n\tb\x9b \u202e") == "a\\x1b[2J\\x0d\n\tb\\x9b \\u202e"
    say("title: \x1b]0;owned\x07")
    assert "\x1b" not in capsys.readouterr().err
