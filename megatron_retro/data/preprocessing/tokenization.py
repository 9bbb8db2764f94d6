"""Batches of texts to one array of tokens: by gigatoken where it gives the tokenizer's own ids, else by its `encode`.

Which of the two serves is decided when an encoder is built: gigatoken must read the tokenizer, and agree with it on a
trial text that holds what tokenizers differ in. It remembers the words it has seen; when that memory grows past
CACHE_BYTES it starts anew.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.data import PreprocessConfig
from megatron_retro.data.megatron_tokenizer import Llama2Tokenizer
from megatron_retro.data.tokenizers import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, Tokenizer, utf8
from megatron_retro.errors import ConfigError
from megatron_retro.runtime.console import warn

CACHE_BYTES = 256 << 20

# Spaces of every kind and number, contractions, digits, scripts, marks that combine, controls, special tokens.
_TRIAL = (
    "",
    " ",
    "\n",
    "  two  spaces, then\n\n  lines\r\n\tand tabs \u00a0\u3000\u2003wide \u200b\u2028\u0085 ",
    "don't they'll I'M WE'RE he'd 'tis 'S x'y",
    "1 22 333 4444 55555 1,638.07 3.14159e-10 \u0661\u0662\u0663 \u00bd \u2167 x86_64 0xFF",
    "def f(x):\n    return {'a': [x**2, -x]}  # ==>>!!??...\n\n\n",
    "Encyclop\u00e6dia na\u00efve \u041c\u043e\u0441\u043a\u0432\u0430 \u6771\u4eac\u90fd \ud55c\uad6d\uc5b4 "
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "e\u0301te\u0301 \ufb01ne \uff21\uff22\uff23 \u2460 \u212b o\u0308 \u0345 \U0001f600\U0001f468\u200d\U0001f469 "
    "\U00013000 \U0001d54f",
    "\0a\x01b\x1cc\x7f\x0b\x0c\u00ad\ufeff\u2581\u2581x\u2581",
    "<|endoftext|><s></s><unk><pad><|im_start|> <sep> [INST] <0x0A> <|turn|>word<|endoftext|> <|end_of_text|>",
    "a" * 300 + " " * 40 + "\n" * 20 + "xyz" * 50 + "!" * 60,
)


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
        if isinstance(self.tokenizer, SentencePieceTokenizer):
            found = self.tokenizer.processor.encode(list(texts), num_threads=1)
        else:
            found = [self.tokenizer.encode(text) for text in texts]
        lengths = np.array([len(ids) for ids in found], np.int64)
        return np.fromiter(chain.from_iterable(found), self.dtype, int(lengths.sum())), lengths


@dataclass(frozen=True)
class BeginningEncoder:
    """Another encoder's tokens, each text behind the ids that begin it."""

    encoder: TextEncoder
    begins: tuple[int, ...]

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        tokens, lengths = self.encoder.encode(texts)
        places = np.repeat(np.cumsum(lengths) - lengths, len(self.begins))
        return np.insert(tokens, places, np.tile(self.begins, len(lengths))), lengths + len(self.begins)


@dataclass(frozen=True)
class ByteEncoder:
    """Bytes are tokens already."""

    dtype: np.dtype[Any]

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        parts = [utf8(text) for text in texts]
        tokens = np.frombuffer(b"".join(parts), np.uint8)
        return tokens.astype(self.dtype), np.array([len(part) for part in parts], np.int64)


class GigatokenEncoder:
    """The same ids by gigatoken, in this thread."""

    def __init__(self, plain: PlainEncoder) -> None:
        self._plain = plain
        self._controls = _control_pieces(plain.tokenizer)
        self._start_anew()

    def encode(self, texts: Sequence[str]) -> tuple[NDArray[Any], NDArray[np.int64]]:
        if any(name in text for name in self._controls for text in texts):
            return self._plain.encode(texts)  # to sentencepiece they are text, to gigatoken a token
        if _resident_bytes() > self._limit:
            self._start_anew()
        rows = self._engine.encode_batch([utf8(text) for text in texts], parallel=False).layout
        offsets = np.asarray(rows.offsets).astype(np.int64)
        tokens = np.asarray(rows.content.data)[offsets[0] : offsets[-1]]
        return tokens.astype(self._plain.dtype), np.diff(offsets)

    def is_exact(self) -> bool:
        """Whether it gives the tokenizer's ids of each trial text."""
        return all(np.array_equal(self.encode([text])[0], self._plain.encode([text])[0]) for text in _TRIAL)

    def _start_anew(self) -> None:
        self._engine: Any = None  # its memory is free before the next one is built
        self._engine = _engine(self._plain.tokenizer)
        self._limit = _resident_bytes() + CACHE_BYTES


def beginning_of(tokenizer: Tokenizer, config: PreprocessConfig) -> tuple[int, ...]:
    """If that is asked for, what the rules of a `tokenizer.json` put before every text; none may stand behind it."""
    if not config.tokenizer_hf_include_special_tokens:
        return ()
    flag = "--tokenizer-hf-include-special-tokens"
    if not isinstance(tokenizer, HuggingFaceTokenizer):
        raise ConfigError(f"{flag} is for HuggingFaceTokenizer", got=type(tokenizer).__name__, fix="leave it out")
    if tokenizer.puts_behind:
        raise ConfigError(f"{flag}: this tokenizer puts tokens behind a text, too", fix="use --append-eod alone")
    if not tokenizer.begins:
        warn(f"{flag}: this tokenizer's rules put nothing before a text")
    return tokenizer.begins


def build_encoder(tokenizer: Tokenizer, dtype: np.dtype[Any], begins: tuple[int, ...] = ()) -> TextEncoder:
    """The fastest encoder that gives exactly the tokenizer's ids, behind `begins`."""
    if isinstance(tokenizer, ByteTokenizer):
        return ByteEncoder(dtype)
    encoder = _without_begin(tokenizer, dtype)
    begins = tokenizer.begins if isinstance(tokenizer, Llama2Tokenizer) else begins
    return BeginningEncoder(encoder, begins) if begins else encoder


def _without_begin(tokenizer: Tokenizer, dtype: np.dtype[Any]) -> TextEncoder:
    plain = PlainEncoder(tokenizer, dtype)
    if not isinstance(tokenizer, SentencePieceTokenizer) and not hasattr(tokenizer, "backend"):
        return plain
    try:
        fast = GigatokenEncoder(plain)
        return fast if fast.is_exact() else plain
    except (ValueError, KeyError, TypeError, RuntimeError):  # what gigatoken raises for what it cannot read
        return plain


def _engine(tokenizer: Tokenizer) -> Any:
    import gigatoken

    if isinstance(tokenizer, SentencePieceTokenizer):
        return gigatoken.Tokenizer.from_sentencepiece(tokenizer.model_bytes)
    return gigatoken.Tokenizer.from_json(tokenizer.backend.to_str())  # type: ignore[attr-defined]  # all others have one


def _control_pieces(tokenizer: Tokenizer) -> list[str]:
    if not isinstance(tokenizer, SentencePieceTokenizer):
        return []
    model = tokenizer.processor
    return [model.id_to_piece(token) for token in range(tokenizer.vocab_size) if model.is_control(token)]


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096
