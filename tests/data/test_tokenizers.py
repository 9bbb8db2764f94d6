"""Tokenizers round-trip, end documents by one convention, and fast encoders give exactly their ids."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_retro.artifacts.manifest import manifest_path
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.data.preprocessing.tokenization import GigatokenEncoder, PlainEncoder, build_encoder
from megatron_retro.data.token_file import TokenFile, token_dtype
from megatron_retro.data.token_writer import TokenFileWriter
from megatron_retro.data.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer, require_tokenizer
from megatron_retro.errors import ArtifactError, ConfigError, DataError
from megatron_retro.testing.corpora import (
    SPACES,
    WORDS,
    random_text,
    small_byte_level_files,
    small_gpt2,
    small_hugging_face,
    small_sentencepiece,
)

RAW = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
SENTENCEPIECE: dict[str, dict[str, object]] = {
    "bpe": {},
    "bpe-bytes": {"byte_fallback": True},
    "bpe-llama": {"byte_fallback": True, "allow_whitespace_only_pieces": True, **RAW},
    "bpe-llama-newline-piece": {"user_defined_symbols": ["\n"], "allow_whitespace_only_pieces": True, **RAW},
    "bpe-no-prefix": {"add_dummy_prefix": False, **RAW},
    "bpe-nfkc-raw": {"normalization_rule_name": "nfkc", "remove_extra_whitespaces": False},
    "bpe-symbols": {"user_defined_symbols": ["<sep>", "▁x▁"]},
    "bpe-suffix": {"treat_whitespace_as_suffix": True},
    "bpe-across": {"split_by_whitespace": False},
    "unigram": {"model_type": "unigram"},
    "unigram-bytes": {"model_type": "unigram", "byte_fallback": True},
    "unigram-llama": {"model_type": "unigram", "byte_fallback": True, "allow_whitespace_only_pieces": True, **RAW},
    "unigram-symbols": {"model_type": "unigram", "user_defined_symbols": ["<sep>"]},
}
FAST = {"bpe-llama", "gpt2", "json", "json-0", "json-1", "json-nfc", "json-prefix"}
JSON: dict[str, dict[str, Any]] = {
    "json": {},
    "json-0": {"pattern": 0},
    "json-1": {"pattern": 1},
    "json-nfc": {"nfc": True},
    "json-prefix": {"add_prefix_space": True},
}
NAMES = [*SENTENCEPIECE, "gpt2", *JSON]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    made: dict[str, Tokenizer] = {}

    def get(name: str) -> Tokenizer:
        if name not in made:
            place = folder / name
            place.mkdir()
            if name in SENTENCEPIECE:
                made[name] = small_sentencepiece(place / "a.model", **SENTENCEPIECE[name])
            elif name == "gpt2":
                made[name] = small_gpt2(place)
            else:
                made[name] = small_hugging_face(place, **JSON[name])
        return made[name]

    return get


def encoders(tokenizer: Tokenizer) -> tuple[object, PlainEncoder]:
    dtype = token_dtype(tokenizer.vocab_size)
    return build_encoder(tokenizer, dtype), PlainEncoder(tokenizer, dtype)


def require_equal(tokenizer: Tokenizer, fast: object, texts: list[str]) -> None:
    tokens, lengths = fast.encode(texts)  # type: ignore[attr-defined]
    expected = [tokenizer.encode(text) for text in texts]
    ends = np.cumsum(lengths)
    assert lengths.tolist() == [len(ids) for ids in expected]
    for text, ids, end in zip(texts, expected, ends, strict=True):
        assert tokens[end - len(ids) : end].tolist() == ids, repr(text)


pieces = st.one_of(
    st.sampled_from(WORDS),
    st.sampled_from(SPACES),
    st.sampled_from(
        ["▁", "▁▁", "\u0301", "\u00ad", "\0", "\x1c", "\v", "\u2028", "<sep>", "<|turn|>", "<|endoftext|>", "</s>"]
    ),
    st.text(st.characters(exclude_categories=["Cs"]), max_size=4),
)
texts = st.lists(pieces, max_size=14).map("".join)


@pytest.mark.parametrize("name", NAMES)
def test_the_fast_encoder_gives_the_tokenizers_ids(
    name: str, tokenizers: Callable[[str], Tokenizer], count: Callable[[int, int], int]
) -> None:
    tokenizer = tokenizers(name)
    fast, _ = encoders(tokenizer)
    assert isinstance(fast, GigatokenEncoder) == (name in FAST)

    @settings(max_examples=count(120, 5000), deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(st.lists(texts, max_size=4))
    def equal(batch: list[str]) -> None:
        require_equal(tokenizer, fast, batch)

    equal()


@pytest.mark.parametrize("name", sorted(FAST))
def test_long_texts_and_a_cache_that_forgets_change_nothing(
    name: str, tokenizers: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_retro.data.preprocessing.tokenization.CACHE_BYTES", -1)
    started = []
    anew = GigatokenEncoder._start_anew
    monkeypatch.setattr(GigatokenEncoder, "_start_anew", lambda encoder: (started.append(1), anew(encoder)))
    tokenizer = tokenizers(name)
    fast, _ = encoders(tokenizer)
    generator = random.Random(1)
    for _ in range(6):
        batch = [random_text(generator, 300) for _ in range(3)] + ["", " ", "\n", "word" * 500]
        batch += ["".join(chr(generator.randrange(0x20, 0x2FFF)) for _ in range(500))]
        require_equal(tokenizer, fast, batch)
    assert len(started) > 1


def test_an_engine_that_differs_does_not_serve(
    tokenizers: Callable[[str], Tokenizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One id of one trial text is enough."""
    encode = GigatokenEncoder.encode

    def planted(self: GigatokenEncoder, texts: list[str]) -> Any:
        tokens, lengths = encode(self, texts)
        return np.where(tokens == tokens.max(), 0, tokens) if any(
            "def f(x)" in text for text in texts
        ) else tokens, lengths

    monkeypatch.setattr(GigatokenEncoder, "encode", planted)
    fast, _ = encoders(tokenizers("gpt2"))
    assert isinstance(fast, PlainEncoder)


@pytest.mark.parametrize("name", ["bpe-bytes", "bpe-llama", "gpt2", "json"])
def test_texts_come_back(name: str, tokenizers: Callable[[str], Tokenizer]) -> None:
    tokenizer = tokenizers(name)
    for text in ("the retrieval of chunks", "don't, 3.14159"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode([*ids, tokenizer.eod]) == text
        assert max(ids) < tokenizer.vocab_size and tokenizer.eod < tokenizer.vocab_size and tokenizer.eod not in ids


def test_bytes_need_no_file() -> None:
    tokenizer = ByteTokenizer()
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    assert tokenizer.encode("aé\0") == [97, 0xC3, 0xA9, 0]
    assert tokenizer.decode([97, 0xC3, 0xA9, 256, 300, -1]) == "aé"
    fast = build_encoder(tokenizer, np.dtype("uint16"))
    require_equal(tokenizer, fast, ["", "aé\0 b", "東京"])


@pytest.mark.parametrize("name", ["bpe", "unigram", "gpt2", "json"])
def test_half_a_surrogate_pair_is_refused(name: str, tokenizers: Callable[[str], Tokenizer]) -> None:
    with pytest.raises(DataError, match="surrogate"):
        tokenizers(name).encode("a\ud800b")


def test_fingerprints_tell_tokenizers_apart(tokenizers: Callable[[str], Tokenizer]) -> None:
    names = [*NAMES]
    assert len({tokenizers(name).fingerprint for name in names} | {ByteTokenizer().fingerprint}) == len(names) + 1


def test_settings_name_the_tokenizer(tmp_path: Path) -> None:
    vocabulary, merges = small_byte_level_files(tmp_path)
    built = build_tokenizer(TokenizerConfig("GPT2BPETokenizer", vocab_file=str(vocabulary), merge_file=str(merges)))
    assert built.encode("<|endoftext|>") != [built.eod]
    small_hugging_face(tmp_path)
    by_folder = build_tokenizer(TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(tmp_path)))
    assert by_folder.encode("a<|endoftext|>")[-1] == by_folder.eod
    with pytest.raises(ConfigError, match="needs --tokenizer-model"):
        build_tokenizer(TokenizerConfig("SentencePieceTokenizer"))
    with pytest.raises(ConfigError, match="needs --merge-file"):
        build_tokenizer(TokenizerConfig("GPT2BPETokenizer", vocab_file="x"))


@pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "HuggingFaceTokenizer"])
def test_a_file_that_is_no_model_is_named(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model"
    with pytest.raises(ArtifactError, match="cannot read"):
        build_tokenizer(TokenizerConfig(kind, tokenizer_model=str(path)))
    path.write_bytes(b"\x00garbage")
    with pytest.raises(ArtifactError, match="is no"):
        build_tokenizer(TokenizerConfig(kind, tokenizer_model=str(path)))


def test_both_meanings_of_megatrons_sentencepiece_names(tmp_path: Path) -> None:
    """Megatron's `SentencePieceTokenizer` has four ids and more beyond the model; its GPT one is the model alone."""
    path = tmp_path / "m.model"
    alone = small_sentencepiece(path)
    kinds = ("GPTSentencePieceTokenizer", "MegatronSentencePieceTokenizer")
    same, extended = (build_tokenizer(TokenizerConfig(kind, tokenizer_model=str(path))) for kind in kinds)
    assert (same.fingerprint, same.eod) == (alone.fingerprint, alone.eod)
    size = alone.vocab_size  # <CLS> <SEP> <EOD> <MASK>, and <PAD>, which this model lacks
    assert (extended.eod, extended.vocab_size) == (size + 2, size + 5)
    text = "the cat <SEP>sat</s> on"
    parts = [*alone.encode("the cat "), size + 1, *alone.encode("sat"), alone.eod, *alone.encode(" on")]
    assert extended.encode(text) == parts
    assert extended.decode([*alone.encode("the cat"), extended.eod]) == "the cat"
    tokens, lengths = build_encoder(extended, np.dtype(np.uint16)).encode([text, ""])
    assert tokens.tolist() == parts and lengths.tolist() == [len(parts), 0]


def test_documents_that_end_otherwise_are_refused_with_both_ids(tmp_path: Path) -> None:
    """Token files of other programs do not say what made them; the ends of their documents do."""
    tokenizer = ByteTokenizer()

    def file(name: str, ends: list[int]) -> TokenFile:
        with TokenFileWriter(tmp_path / name, np.dtype(np.int32)) as writer:
            tokens = np.array([token for end in ends for token in (65, end)])
            writer.add_documents(tokens, np.full(len(ends), 2, np.int32), np.ones(len(ends), np.int64))
            writer.finalize()
        manifest_path(tmp_path / name).unlink(missing_ok=True)
        return TokenFile(tmp_path / name)

    foreign = file("foreign", [258] * 5)
    with pytest.raises(ArtifactError, match="258, the last of all 5 documents") as raised:
        require_tokenizer([foreign], tokenizer)
    assert "256 of ByteTokenizer" in str(raised.value) and "MegatronSentencePieceTokenizer" in str(raised.value)
    require_tokenizer([foreign], tokenizer, allow_mismatch=True)
    for name, ends in {"own": [256] * 5, "none": [66, 67, 66], "lines": [10] * 5, "two": [258] * 2}.items():
        require_tokenizer([file(name, ends)], tokenizer)
