"""A tokenizer of Megatron's kinds goes out as a file that transformers reads, with the same ids, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.cli.main import main
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.data.model_text import keep_text_files
from megatron_retro.data.tokenizers import begin_tokens, build_tokenizer
from megatron_retro.testing.corpora import small_sentencepiece
from tests.convert.test_conversion import SMALL
from tests.data.test_megatron_tokenizers import vocabulary

TEXTS = ("Who is it?", " two  spaces ", "a\nb\t\tc", "na\u00efve \u65e5\u672c \ufb01", "", "the thing 111//")
MEGATRONS = "MegatronSentencePieceTokenizer"
LLAMAS = ("Llama2Tokenizer", "llama")
LIKE_LLAMAS = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
MODELS: dict[str, dict[str, Any]] = {
    "bpe": {},
    "unigram": {"model_type": "unigram"},
    "llama": LIKE_LLAMAS,
    "no prefix": {"add_dummy_prefix": False},
}


def exported(config: TokenizerConfig, room: Path) -> Any:
    """What transformers makes of the export of a small model with this tokenizer."""
    from transformers import AutoTokenizer

    model: ModelConfig = replace(SMALL, vocab_size=build_tokenizer(config).vocab_size)
    shapes = parameter_shapes(model, RetroConfig())
    settings = Settings([model, RetroConfig(), keep_text_files(config, room / "run")])
    write_checkpoint(room / "run", settings, shapes, lambda name: torch.zeros(shapes[name]), {})
    assert main(["convert", str(room / "run"), str(room / "out"), "--convert-to", "huggingface"]) == 0
    return AutoTokenizer.from_pretrained(room / "out")


def require_same(config: TokenizerConfig, theirs: Any, texts: tuple[str, ...]) -> None:
    ours: Any = build_tokenizer(config)
    for text in texts:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids
        assert theirs(text)["input_ids"] == [*begin_tokens(ours, ids), *ids]
        if (
            "\u2047" not in ours.decode(ids) and "<" not in text
        ):  # what is unknown, and special tokens, have other signs
            assert theirs.decode(ids) == ours.decode(ids)
    assert (theirs.eos_token_id, len(theirs)) == (ours.eod, ours.vocab_size)


@pytest.mark.parametrize(
    ("kind", "options"),
    [*(("SentencePieceTokenizer", name) for name in MODELS), (MEGATRONS, "unigram"), (MEGATRONS, "llama"), LLAMAS],
)
def test_pieces_read_back(kind: str, options: str, tmp_path: Path) -> None:
    small_sentencepiece(tmp_path / "tokenizer.model", **MODELS[options])
    config = TokenizerConfig(tokenizer_type=kind, tokenizer_model=str(tmp_path / "tokenizer.model"))
    theirs = exported(config, tmp_path)
    require_same(config, theirs, (*TEXTS, "x<EOD>y <MASK>") if kind == MEGATRONS else TEXTS)


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_ranks_read_back(pattern: str, tmp_path: Path) -> None:
    config = TokenizerConfig("TikTokenizer", tokenizer_model=str(vocabulary(tmp_path)), tiktoken_pattern=pattern)
    require_same(config, exported(config, tmp_path), (*TEXTS, "don't ER Er 1234 \u65e5"))


def test_what_would_read_otherwise_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A piece that a user defined cuts a text here; there it would cut it in another way."""
    small_sentencepiece(tmp_path / "tokenizer.model", user_defined_symbols=["ab"])
    config = TokenizerConfig("SentencePieceTokenizer", tokenizer_model=str(tmp_path / "tokenizer.model"))
    exported(config, tmp_path)
    assert "transformers would not read the ids of this SentencePieceTokenizer" in capsys.readouterr().err
    assert not (tmp_path / "out" / "tokenizer.json").exists()
