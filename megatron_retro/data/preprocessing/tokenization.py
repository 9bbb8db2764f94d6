"""Batches of texts to one array of tokens.

`build_encoder` chooses the word cache of `csrc/host/word_cache.h` where a tokenizer allows it, else the tokenizer's own
`encode`; both give the same tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.native import extension
from megatron_retro.data.tokenizers import ByteTokenizer, SentencePieceTokenizer, Tokenizer, utf8
from megatron_retro.data.word_boundaries import SPACE_MARK, UnigramModel, UnitRule, unit_rule

CACHE_BYTES = 24 << 20


class TextEncoder(Protocol):
    """Encodes batches of texts."""

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The tokens of all texts, one after another, and how many each text has."""


@dataclass(frozen=True)
class PlainEncoder:
    """The tokenizer, text by text."""

    tokenizer: Tokenizer
    dtype: np.dtype[Any]

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """See `TextEncoder`."""
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            found = self.tokenizer.processor.encode(list(texts), num_threads=1)
        else:
            found = [self.tokenizer.encode(text) for text in texts]
        native = extension()
        if native is None:
            return _joined([np.array(ids, self.dtype) for ids in found], self.dtype)
        joined: tuple[NDArray[Any], NDArray[np.int64]]
        joined = native.join16(found) if self.dtype.itemsize == 2 else native.join32(found)
        return joined


@dataclass(frozen=True)
class ByteEncoder:
    """Bytes are tokens already."""

    dtype: np.dtype[Any]

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """See `TextEncoder`."""
        return _joined([np.frombuffer(utf8(text), np.uint8) for text in texts], self.dtype)


def _joined(parts: Sequence[NDArray[Any]], dtype: np.dtype[Any]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    lengths = np.array([len(part) for part in parts], np.int64)
    tokens = np.concatenate(parts) if parts else np.zeros(0, dtype)
    return tokens.astype(dtype, copy=False), lengths


def new_cache(rule: UnitRule, native: ModuleType) -> Any:
    """An empty word cache of a rule."""
    return native.WordCache(
        spaces=rule.spaces,
        closed=sorted(rule.closed),
        wide_closed=rule.wide_closed,
        newline_starts=rule.newline_starts,
        strip=rule.strip,
        gpt2_cuts=rule.gpt2 is not None,
        atoms=rule.gpt2.atoms if rule.gpt2 else (),
        memory_limit=CACHE_BYTES,
    )


class CachedEncoder:
    """Units of text that the tokenizer has seen before are not tokenized again."""

    def __init__(self, rule: UnitRule, native: ModuleType, dtype: np.dtype[Any]) -> None:
        self._cache = new_cache(rule, native)
        if rule.gpt2 is not None:
            self._cache.use_merges(rule.gpt2.byte_ids, list(rule.gpt2.merges))
        self._resolve = rule.resolve
        self._emit = self._cache.emit16 if dtype.itemsize == 2 else self._cache.emit32

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """See `TextEncoder`."""
        missing = self._cache.scan(texts)
        if missing:
            self._cache.fill(self._resolve(missing))
        tokens, lengths = self._emit()
        return tokens, lengths


class UnigramEncoder:
    """A sentencepiece unigram model: words kept with their margins, texts segmented from them."""

    def __init__(self, rule: UnitRule, model: UnigramModel, native: ModuleType, dtype: np.dtype[Any]) -> None:
        self._cache = new_cache(rule, native)
        self._pieces = model.pieces
        self._words = native.UnigramWords(
            list(model.pieces), model.unknown_score, model.unknown_id, list(model.byte_ids)
        )
        self._normalize = model.normalize
        self._segment = self._words.segment16 if dtype.itemsize == 2 else self._words.segment32

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """See `TextEncoder`."""
        missing = self._cache.scan(texts)
        if missing:
            self._cache.fill(self._words.add(self._normalize(missing)))
        numbers, counts = self._cache.emit32()
        tokens, lengths = self._segment(numbers, counts)
        if self._words.memory > CACHE_BYTES or not len(self._cache):
            self._cache.forget()
            self._words.clear()
        return tokens, lengths

    def agrees_with(self, plain: PlainEncoder) -> bool:
        """Whether the installed library adds as this does: asked over words of the model, past every threshold."""
        pieces = [text.replace(SPACE_MARK, "") for text, *_ in self._pieces[:4000]]
        words = [
            "".join(pieces[(7 * number + step * step) % len(pieces)] for step in range(3)) for number in range(9000)
        ]
        trial = [" ".join(words), "xxiii 1,638 777 "]
        return all(np.array_equal(a, b) for a, b in zip(self.encode(trial), plain.encode(trial), strict=True))


def build_encoder(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> TextEncoder:
    """The fastest encoder that gives exactly the tokenizer's ids."""
    if isinstance(tokenizer, ByteTokenizer):
        return ByteEncoder(dtype)
    native, rule = extension(), unit_rule(tokenizer)
    if native is None or rule is None:
        return PlainEncoder(tokenizer, dtype)
    if rule.unigram is not None:
        plain = PlainEncoder(tokenizer, dtype)
        fast = UnigramEncoder(rule, rule.unigram, native, dtype)
        return fast if fast.agrees_with(plain) else plain
    return CachedEncoder(rule, native, dtype)
