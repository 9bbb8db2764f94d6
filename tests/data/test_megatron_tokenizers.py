"""Tokenizers by Megatron's names: Llama2Tokenizer begins documents, TikTokenizer puts special tokens first."""

from __future__ import annotations

import base64
import dataclasses
import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.cli.main import main
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.preprocessing.tokenization import build_encoder
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import Tokenizer, begin_tokens, build_tokenizer
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.testing.corpora import random_text, small_sentencepiece
from tests.data.byte_level import save_byte_level
from tests.peer_core import require_core, run_beside_core

MERGES = ("th", "he", "the", " the", "aa", "aaa", " a", "in", "ing", "  ", "\n\n", "é", "ER", "Er", "er", "111", "//")
TEXTS = ("", "the thing", "aaaaa aaaa  aa", "THE the 111 1\n\n\n//x", "été </s> <s>", "don't Er ER erER \u6771\u4eac  ")


def test_llama2_begins_every_document_as_megatron_lm_does(tmp_path: Path) -> None:
    model = tmp_path / "m.model"
    plain = small_sentencepiece(model)
    llama = build_tokenizer(TokenizerConfig("Llama2Tokenizer", tokenizer_model=str(model)))
    begin = plain.processor.bos_id()
    assert (llama.eod, llama.vocab_size) == (plain.processor.eos_id(), plain.vocab_size)
    assert llama.encode("the cat") == plain.encode("the cat") and begin_tokens(llama, [5]) == (begin,)
    assert llama.fingerprint != plain.fingerprint
    (tmp_path / "text.jsonl").write_text('{"text": "the cat"}\n{"text": ""}\n{"text": "sat on"}\n')
    words = ["--input", str(tmp_path / "text.jsonl"), "--output-prefix", str(tmp_path / "corpus"), "--append-eod"]
    words += ["--tokenizer-type", "Llama2Tokenizer", "--tokenizer-model", str(model), "--workers", "1"]
    assert main(["preprocess", *words]) == 0
    file = TokenFile(tmp_path / "corpus_text_document")
    documents = [file.document(number).tolist() for number in range(file.num_documents)]
    assert documents == [[begin, *plain.encode(text), plain.eod] for text in ("the cat", "", "sat on")]


@pytest.mark.parametrize("flag", [True, False])
def test_documents_begin_as_the_rules_of_a_tokenizer_say(flag: bool, tmp_path: Path) -> None:
    processors = pytest.importorskip("tokenizers.processors")
    transformers = pytest.importorskip("transformers")
    backend = save_byte_level(tmp_path)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    backend.save(str(tmp_path / "tokenizer.json"))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    texts = ("the cat", "<s> sat\u00fc", "on")
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    words = ["--input", str(tmp_path / "text.jsonl"), "--output-prefix", str(tmp_path / "corpus"), "--append-eod"]
    words += ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path), "--workers", "1"]
    assert main(["preprocess", *words, *["--tokenizer-hf-include-special-tokens"] * flag]) == 0
    file = TokenFile(tmp_path / "corpus_text_document")
    documents = [file.document(number).tolist() for number in range(file.num_documents)]
    assert documents == [[*theirs(text, add_special_tokens=flag).input_ids, 257] for text in texts]
    tokenizer = build_tokenizer(TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path)))
    assert tokenizer.decode(documents[0]) == "the cat"
    assert begin_tokens(tokenizer, documents[2]) == (() if flag else (256,))
    database = ChunkDatabase.create(tmp_path / "chunks", [tmp_path / "corpus_text_document"], 4, eod=257)
    tokens, _ = database.gather(np.arange(database.num_chunks), 4)
    assert int((tokens == 256).sum()) == (4 if flag else 1)  # of three documents, and the one that is written


def test_rules_that_end_a_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    processors = pytest.importorskip("tokenizers.processors")
    backend = save_byte_level(tmp_path)
    ends = [("<s>", 256), ("</s>", 257)]
    backend.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.jsonl").write_text('{"text": "the cat"}\n')
    words = ["--input", str(tmp_path / "text.jsonl"), "--output-prefix", str(tmp_path / "corpus")]
    flag = ["--tokenizer-hf-include-special-tokens"]
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tmp_path)]
    assert main(["preprocess", *words, *named, *flag]) == 2
    assert "behind a text" in capsys.readouterr().err
    assert main(["preprocess", *words, *flag]) == 2
    assert "is for HuggingFaceTokenizer" in capsys.readouterr().err


def test_llama2_needs_what_begins_a_document(tmp_path: Path) -> None:
    small_sentencepiece(tmp_path / "m.model", bos_id=-1)
    with pytest.raises(ArtifactError, match="no begin-of-sentence"):
        build_tokenizer(TokenizerConfig("Llama2Tokenizer", tokenizer_model=str(tmp_path / "m.model")))


def vocabulary(folder: Path) -> Path:
    """The bytes, and some merges in the order of their ranks, each of two that come before it."""
    pytest.importorskip("tiktoken")
    rows = [bytes([one]) for one in range(256)] + [merge.encode() for merge in MERGES]
    path = folder / "small.vocab.json"
    content = [
        {"rank": rank, "token_bytes": base64.b64encode(row).decode(), "token_str": row.decode(errors="replace")}
        for rank, row in enumerate(rows)
    ]
    path.write_text(json.dumps(content))
    return path


def tiktoken(folder: Path, **settings: Any) -> Tokenizer:
    config = TokenizerConfig("TikTokenizer", tokenizer_model=str(vocabulary(folder)))
    return build_tokenizer(dataclasses.replace(config, **settings))


def slow_ids(words: list[str], shift: int) -> list[int]:
    """Of each word, the first pair of neighbours with the lowest rank is merged until there is none."""
    ranks = {merge.encode(): 256 + number for number, merge in enumerate(MERGES)}
    ids = []
    for word in words:
        parts = [bytes([one]) for one in word.encode()]
        while pairs := [(ranks[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]:
            _, at = min(pairs)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [shift + (part[0] if len(part) == 1 else ranks[part]) for part in parts]
    return ids


@pytest.mark.parametrize(
    ("pattern", "text", "words"),
    [
        ("v2", "the thing", ["the", " thing"]),
        ("v2", "aaaaa aaaa", ["aaaaa", " aaaa"]),
        ("v2", "ErER 1112 x//\n\n", ["Er", "ER", " ", "1", "1", "1", "2", " x", "//\n\n"]),
        ("v1", "ErER 12 x//\n\n", ["ErER", " ", "1", "2", " x", "//\n\n"]),
        ("v2", "a  </s>", ["a", " ", " </", "s", ">"]),
    ],
)
def test_tiktoken_merges_by_rank_behind_the_special_tokens(
    pattern: str, text: str, words: list[str], tmp_path: Path
) -> None:
    tokenizer = tiktoken(tmp_path, tiktoken_pattern=pattern)
    assert tokenizer.encode(text) == slow_ids(words, 1000)
    assert (tokenizer.eod, tokenizer.vocab_size) == (2, 1000 + 256 + len(MERGES))
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eod]) == text
    tokens, lengths = build_encoder(tokenizer, np.dtype(np.uint16)).encode([text, ""])
    assert tokens.tolist() == tokenizer.encode(text) and lengths.tolist() == [len(tokens), 0]


def test_special_tokens_of_tiktoken(tmp_path: Path) -> None:
    names = ("<pad>", "<unk>", "<s>", "</s>", "<mask>", "<cls>", "<sep>", "<user>")
    tokenizer = tiktoken(tmp_path, tiktoken_num_special_tokens=10, tiktoken_special_tokens=names)
    assert tokenizer.eod == 3 and tokenizer.encode("a") == [10 + ord("a")]
    assert tokenizer.decode([7, 8, 3]) == "<user><SPECIAL_8>"
    assert tokenizer.fingerprint != tiktoken(tmp_path).fingerprint
    with pytest.raises(ConfigError, match="absent: <s> </s>"):
        tiktoken(tmp_path, tiktoken_special_tokens=("<unk>", "<mask>", "<pad>", "<cls>", "<sep>"))


def test_tiktokens_own_files_hold_the_same(tmp_path: Path) -> None:
    """There the bytes are in another order, printable ones first."""
    in_json = tiktoken(tmp_path)
    rows = [bytes([one]) for one in [*range(33, 127), *range(33), *range(127, 256)]]
    rows += [merge.encode() for merge in MERGES]
    path = tmp_path / "small.tiktoken"
    path.write_text("".join(f"{base64.b64encode(row).decode()} {rank}\n" for rank, row in enumerate(rows)))
    tokenizer = build_tokenizer(TokenizerConfig("TikTokenizer", tokenizer_model=str(path)))
    assert tokenizer.vocab_size == in_json.vocab_size and tokenizer.encode("!") == [1000]
    pieces = [[one.decode([token]) for token in one.encode("the thing aaaaa")] for one in (tokenizer, in_json)]
    assert pieces[0] == pieces[1] and len(pieces[0]) < 15


@pytest.mark.parametrize(
    "content", ["{", "{}", "[1]", '[{"rank": 1, "token_bytes": "AA=="}]', "AA== 1", "AA==", "x y z", "AA== 0"]
)
def test_what_is_no_tiktoken_vocabulary_is_named(content: str, tmp_path: Path) -> None:
    path = vocabulary(tmp_path)
    path.write_text(content)
    with pytest.raises(ArtifactError, match="is no tiktoken vocabulary"):
        build_tokenizer(TokenizerConfig("TikTokenizer", tokenizer_model=str(path)))


@pytest.mark.parametrize("pattern", ["v1", "v2"])
def test_tiktoken_gives_the_ids_of_core(pattern: str, tmp_path: Path) -> None:
    """A special token's name is a special token in core's new tokenizer; in Megatron-LM's own and here it is text."""
    path = vocabulary(tmp_path)
    require_core()
    tokenizer = tiktoken(tmp_path, tiktoken_pattern=pattern)
    generator = random.Random(0)
    texts = [text.replace("<", "") for text in (*TEXTS, *(random_text(generator, 30) for _ in range(200)))]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    sizes = ("1000", str(tokenizer.vocab_size))
    files = (str(tmp_path / "texts.json"), str(tmp_path / "ids.json"))
    run_beside_core(Path(__file__).with_name("core_tiktoken.py"), str(path), pattern, *sizes, *files)
    assert json.loads((tmp_path / "ids.json").read_text()) == [*map(tokenizer.encode, texts), [tokenizer.eod]]
