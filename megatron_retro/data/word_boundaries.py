"""Where a text may be cut so that a tokenizer gives the same ids to the parts as to the whole.

The rule is decided from the model itself: its pieces, its normalization, its splitting pattern. Whatever is not
recognized as safe gets no rule, and is tokenized the plain way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from megatron_retro.data.native import extension
from megatron_retro.data.sentencepiece_model import (
    BPE,
    BYTE,
    NORMAL,
    UNIGRAM,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
    parse_sentencepiece_model,
)
from megatron_retro.data.tokenizers import (
    GPT2BPETokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
)

SPACE_MARK = "\u2581"
_WIDE_SPACES = (
    0x85,
    0xA0,
    0x1680,
    0x180E,
    *range(0x2000, 0x2010),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x2060,
    0x3000,
    0xFEFF,
)
_CONTROLS = (*range(0x20), 0x7F)
_KNOWN_RULES = ("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")
# Patterns of published byte-level tokenizers in which nothing that is not white space is followed by a space.
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLIT_PATTERNS = (rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}", rf"{_WORDS}|\p{{N}}|{_REST}")
UNKNOWN_PENALTY = 10.0
GPT2_SPACES = " \n\t\r"
Resolve = Callable[[Sequence[str]], list[list[int]]]


@dataclass(frozen=True)
class Gpt2Words:
    """GPT-2's pattern and merges, so that plain ASCII words need no library: ids of bytes, merges by rank.

    A text that holds an atom (an added token) is left to the library in larger units.
    """

    atoms: tuple[str, ...]
    byte_ids: tuple[int, ...]
    merges: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class UnigramModel:
    """What `csrc/host/unigram.h` needs: pieces, the score and id of the unknown, bytes that stand for it.

    `normalize` gives keys as the model sees them.
    """

    pieces: tuple[tuple[str, float, int, bool], ...]
    unknown_score: float
    unknown_id: int
    byte_ids: tuple[int, ...]
    normalize: Callable[[Sequence[str]], list[str]]


@dataclass(frozen=True)
class UnitRule:
    """How texts are cut into units (`csrc/host/word_cache.h`), and how the ids of units are found."""

    spaces: str
    closed: tuple[int, ...]
    wide_closed: bool
    newline_starts: bool
    strip: str
    resolve: Resolve
    gpt2: Gpt2Words | None = None
    unigram: UnigramModel | None = None


def unit_rule(tokenizer: Tokenizer) -> UnitRule | None:
    """The rule of a tokenizer, or None if none is known to be exact."""
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece_rule(tokenizer)
    if isinstance(tokenizer, (GPT2BPETokenizer, HuggingFaceTokenizer)):
        description = json.loads(tokenizer.backend.to_str())
        spaces = _hugging_face_spaces(description)
        gpt2 = _gpt2_words(description) if spaces == GPT2_SPACES else None
        return _byte_level_rule(tokenizer.backend, spaces, gpt2) if spaces else None
    return None


def _gpt2_words(description: dict[str, Any]) -> Gpt2Words | None:
    """The merges as ids; None where the vocabulary lacks a byte or takes whole words without merging."""
    model = description["model"]
    vocabulary: dict[str, int] = model["vocab"]
    letters = byte_letters()
    if model.get("ignore_merges") or any(letter not in vocabulary for letter in letters):
        return None
    pairs = (pair if isinstance(pair, list) else pair.split(" ") for pair in model["merges"])
    merges = tuple((vocabulary[a], vocabulary[b], vocabulary[a + b]) for a, b in pairs)
    atoms = tuple(token["content"] for token in description.get("added_tokens", []))
    return Gpt2Words(atoms, tuple(vocabulary[letter] for letter in letters), merges)


def byte_letters() -> list[str]:
    """The visible character that stands for each byte in byte-level vocabularies."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(256)]


def _byte_level_rule(backend: Any, spaces: str, gpt2: Gpt2Words | None) -> UnitRule:
    def resolve(keys: Sequence[str]) -> list[list[int]]:
        return [found.ids for found in backend.encode_batch_fast(list(keys), add_special_tokens=False)]

    return UnitRule(spaces, tuple(sorted({*_CONTROLS, *_WIDE_SPACES})), False, False, "none", resolve, gpt2)


def _hugging_face_spaces(description: dict[str, Any]) -> str:
    """The characters that a unit may begin with; none when the tokenizer is not of a known kind."""
    model = description["model"]
    plain_bpe = model.get("type") == "BPE" and not any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    )
    normalizer = description.get("normalizer")
    apart = all(_stands_alone(token) for token in description.get("added_tokens", []))
    if not plain_bpe or not apart or (normalizer is not None and normalizer.get("type") != "NFC"):
        return ""
    return _pre_tokenizer_spaces(description.get("pre_tokenizer") or {})


def _stands_alone(token: dict[str, Any]) -> bool:
    """Whether an added token takes no white space with it and looks at none."""
    return not (token["lstrip"] or token["rstrip"] or token["single_word"] or any(map(str.isspace, token["content"])))


def _pre_tokenizer_spaces(pre_tokenizer: dict[str, Any]) -> str:
    if _is_byte_level(pre_tokenizer, use_regex=True):
        return GPT2_SPACES
    steps = pre_tokenizer.get("pretokenizers", []) if pre_tokenizer.get("type") == "Sequence" else []
    if len(steps) != 2 or not _is_byte_level(steps[1], use_regex=False):
        return ""
    split = steps[0]
    known = split.get("type") == "Split" and split.get("pattern", {}).get("Regex") in SPLIT_PATTERNS
    return " " if known and split["behavior"] == "Isolated" and not split["invert"] else ""


def _is_byte_level(step: dict[str, Any], *, use_regex: bool) -> bool:
    return (
        step.get("type") == "ByteLevel"
        and not step.get("add_prefix_space")
        and bool(step.get("use_regex", True)) == use_regex
    )


def _sentencepiece_rule(tokenizer: SentencePieceTokenizer) -> UnitRule | None:
    """Where no piece reaches across, both sides are segmented on their own.

    BPE merges only into pieces. A unigram's best path goes through every such place; its scores, added in 32 bits over
    the whole text, are followed by `csrc/host/unigram.h`.
    """
    model = parse_sentencepiece_model(tokenizer.model_bytes)
    if not model.escapes_spaces or model.space_is_suffix or not _pieces_allow(model):
        return None
    rule = _space_rule(model, tokenizer.processor) if model.model_type in (BPE, UNIGRAM) else None
    if rule is None or model.model_type == BPE:
        return rule
    if any(piece.kind == USER_DEFINED for piece in model.pieces):
        return None
    return replace(rule, unigram=_unigram_model(model, tokenizer.processor))


def _space_rule(model: SentencePieceModel, processor: Any) -> UnitRule | None:
    if model.removes_extra_spaces:
        spaces = _collapsed_spaces(processor)
        if not model.dummy_prefix or _rules_touch(model, spaces):
            return None
        return UnitRule(spaces, (ord(SPACE_MARK),), False, False, "all", _plain_resolve(processor))
    if _rules_touch(model, " ") or model.rules not in _KNOWN_RULES:
        return None
    identity = not model.charsmap
    closed = (ord(SPACE_MARK),) if identity else (*_CONTROLS, ord(SPACE_MARK))
    if not model.dummy_prefix:
        return UnitRule(" ", closed, not identity, False, "none", _plain_resolve(processor))
    newline = identity and _newline_is_alone(model, processor)
    resolve = _newline_resolve(processor) if newline else _plain_resolve(processor)
    return UnitRule(" ", closed, not identity, newline, "one", resolve)


def _unigram_model(model: SentencePieceModel, processor: Any) -> UnigramModel:
    numbered = list(enumerate(model.pieces))
    scores = [piece.score for piece in model.pieces if piece.kind == NORMAL]
    found = {piece.text: number for number, piece in numbered if piece.kind == BYTE}
    return UnigramModel(
        pieces=tuple((p.text, p.score, n, p.kind == UNUSED) for n, p in numbered if p.kind in (NORMAL, UNUSED)),
        unknown_score=float(np.float32(min(scores)) - np.float32(UNKNOWN_PENALTY)),
        unknown_id=int(processor.unk_id()),
        byte_ids=tuple(found[f"<0x{byte:02X}>"] for byte in range(256)) if len(found) == 256 else (),
        normalize=lambda keys: _normalized(processor, keys),
    )


def _normalized(processor: Any, keys: Sequence[str]) -> list[str]:
    """Keys as they stand in a text; one that begins with a line feed has no space mark before it there."""
    texts: list[str] = processor.normalize(list(keys))
    return [
        SPACE_MARK if not key else text[1:] if key[0] == "\n" and text.startswith(SPACE_MARK + "\n") else text
        for key, text in zip(keys, texts, strict=True)
    ]


def _pieces_allow(model: SentencePieceModel) -> bool:
    """No piece has a space mark behind anything but space marks, and the mark alone is a piece."""
    for piece in model.pieces:
        if SPACE_MARK in piece.text.lstrip(SPACE_MARK):
            return False
        if piece.kind == USER_DEFINED and any(mark in piece.text for mark in (SPACE_MARK, " ", "\n", "\t", "\r")):
            return False
    return any(piece.text == SPACE_MARK for piece in model.pieces)


def _rules_touch(model: SentencePieceModel, spaces: str) -> bool:
    native = extension()
    try:
        return native is None or bool(native.rules_touch_spaces(model.charsmap, spaces.encode()))
    except ValueError:
        return True  # rules that are not understood get no cache


def _collapsed_spaces(processor: Any) -> str:
    """The ASCII characters that normalization treats as it treats a space."""
    as_space = processor.normalize("a b")
    return "".join(mark for mark in " \n\t\r" if processor.normalize(f"a{mark}b") == as_space)


def _newline_is_alone(model: SentencePieceModel, processor: Any) -> bool:
    """Whether a line feed is never part of a larger piece, and stands as one id after the dummy prefix."""
    joined = any("\n" in piece.text and piece.text != "\n" for piece in model.pieces)
    first, second = processor.encode("\n"), processor.encode("\n\n")
    return not joined and processor.unk_id() not in first and second == [*first, first[-1]]


def _plain_resolve(processor: Any) -> Resolve:
    def resolve(keys: Sequence[str]) -> list[list[int]]:
        found: list[list[int]] = processor.encode(list(keys), num_threads=1)
        return found

    return resolve


def _newline_resolve(processor: Any) -> Resolve:
    """A key that begins with a line feed is asked for as it is, and loses the ids of the dummy prefix."""
    prefix: list[int] = processor.encode("\n")[:-1]
    plain = _plain_resolve(processor)

    def resolve(keys: Sequence[str]) -> list[list[int]]:
        found = plain(keys)
        return [
            prefix if not key else ids[len(prefix) :] if key[0] == "\n" else ids
            for key, ids in zip(keys, found, strict=True)
        ]

    return resolve
