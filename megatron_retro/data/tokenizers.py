"""Text to token ids and back: sentencepiece models, Hugging Face `tokenizer.json`, GPT-2 files, plain bytes.

All keep one convention: `encode` adds nothing, `eod` is the id that ends a document in a token file.
How corpora are encoded fast is `preprocessing/tokenization.py`; both give the same ids.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.data.hub import TEXT_PATTERNS, folder_of
from megatron_retro.data.model_text import TOKENIZER_JSON, end_ids, read_text_file, special_tokens
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import ArtifactError, ConfigError, DataError
from megatron_retro.runtime.console import warn

_SAMPLED_ENDS, _FEWEST_ENDS = 64, 3
_LARGEST_ID = 1 << 24
END_OF_DOCUMENT_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<EOD>", "[EOS]")


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eod(self) -> int:
        """The id that ends a document."""

    @property
    def fingerprint(self) -> str:
        """Identity of the vocabulary and the rules."""

    def encode(self, text: str) -> list[int]:
        """The ids of a text, nothing added."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; `eod` and ids that stand for no text vanish."""


class ByteTokenizer:
    """A token is a byte of UTF-8; 256 ends a document. Needs no file."""

    vocab_size = 257
    eod = 256
    fingerprint = hashlib.sha256(b"ByteTokenizer 257").hexdigest()

    def encode(self, text: str) -> list[int]:
        """The bytes of the text."""
        return list(utf8(text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the bytes; a character cut in two shows as U+FFFD."""
        return bytes(int(token) for token in ids if 0 <= token < 256).decode("utf-8", errors="replace")


class SentencePieceTokenizer:
    """A sentencepiece model; its end-of-sentence piece ends a document."""

    def __init__(self, model: Path, *, needs_end: bool = True) -> None:
        from sentencepiece import SentencePieceProcessor

        content = read_text_file(model)
        self.model_bytes = content
        self.processor: Any = SentencePieceProcessor()
        try:
            self.processor.LoadFromSerializedProto(content)
        except RuntimeError as error:
            raise ArtifactError(f"{model} is no sentencepiece model", got=error) from None
        self.vocab_size: int = self.processor.vocab_size()
        self.eod: int = self._end_of_document(model) if needs_end else -1
        self.ends = frozenset({self.eod, *end_ids(model.parent)})
        self.fingerprint = hashlib.sha256(b"SentencePiece" + content).hexdigest()

    def _end_of_document(self, model: Path) -> int:
        if self.processor.eos_id() >= 0:
            return int(self.processor.eos_id())
        for name in END_OF_DOCUMENT_NAMES:
            token = self.processor.piece_to_id(name)
            if token != self.processor.unk_id():
                return int(token)
        raise ArtifactError(f"{model} has no end-of-sentence piece", fix="train it with an eos id")

    def encode(self, text: str) -> list[int]:
        utf8(text)
        ids: list[int] = self.processor.encode(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.processor.decode([int(token) for token in ids if 0 <= token < self.vocab_size])
        return text


class HuggingFaceTokenizer:
    """A `tokenizer.json` (the file, or the folder of a model that holds it)."""

    def __init__(self, model: Path) -> None:
        from tokenizers import Tokenizer as Backend

        path = model / TOKENIZER_JSON if model.is_dir() else model
        content = read_text_file(path)
        _require_dense_ids(path, content)
        try:
            self.backend: Any = Backend.from_str(content.decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{path} is no tokenizer.json", got=error) from None
        _forget_lengths(self.backend)
        self.vocab_size: int = _highest_id(self.backend) + 1
        self.eod: int = _hugging_face_eod(self.backend, path)
        self.ends = frozenset({self.eod, *end_ids(path.parent)})
        self.begins, self.puts_behind = _put_around(self.backend)
        self.beginning = self._id_of(special_tokens(path.parent).get("bos_token"))
        self.fingerprint = hashlib.sha256(b"HuggingFace" + content).hexdigest()

    def _id_of(self, token: str | None) -> int | None:
        found: int | None = None if token is None else self.backend.token_to_id(token)
        return found

    def encode(self, text: str) -> list[int]:
        """The ids of the text; no begin or end token is added."""
        utf8(text)
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        hidden = {self.eod, *self.begins}
        text: str = self.backend.decode([int(token) for token in ids if token not in hidden], skip_special_tokens=False)
        return text


class GPT2BPETokenizer:
    """GPT-2's byte-level BPE from its two files; `<|endoftext|>` in a text is text."""

    def __init__(self, vocab_file: Path, merge_file: Path) -> None:
        from tokenizers import Tokenizer as Backend
        from tokenizers import decoders, models, pre_tokenizers

        vocabulary, merges = read_text_file(vocab_file), read_text_file(merge_file)
        try:
            ids: dict[str, int] = json.loads(vocabulary)
            backend = Backend(models.BPE(vocab=ids, merges=_merge_pairs(merges.decode("utf-8"))))
            self.vocab_size: int = max(ids.values()) + 1
        except Exception as error:  # the library raises bare Exception
            raise ArtifactError(f"{vocab_file} and {merge_file} are no GPT-2 vocabulary", got=error) from None
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        backend.decoder = decoders.ByteLevel()
        self.backend: Any = backend
        if END_OF_DOCUMENT_NAMES[0] not in ids:
            raise ArtifactError(f"{vocab_file} has no {END_OF_DOCUMENT_NAMES[0]}")
        self.eod: int = ids[END_OF_DOCUMENT_NAMES[0]]
        self.ends = frozenset({self.eod, *end_ids(vocab_file.parent)})
        self.fingerprint = hashlib.sha256(b"GPT2BPE" + vocabulary + merges).hexdigest()

    def encode(self, text: str) -> list[int]:
        utf8(text)
        ids: list[int] = self.backend.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self.backend.decode([int(token) for token in ids if token != self.eod])
        return text


def end_tokens(tokenizer: Tokenizer) -> frozenset[int]:
    """The ids that end an answer: the end of a document, and what a model names besides."""
    return getattr(tokenizer, "ends", frozenset({tokenizer.eod}))


def begin_tokens(tokenizer: Tokenizer, tokens: Sequence[int]) -> tuple[int, ...]:
    """What the tokenizer's own rules put before a text of these tokens; nothing where it is there already."""
    begins: tuple[int, ...] = getattr(tokenizer, "begins", ())
    return () if tuple(tokens[: len(begins)]) == begins else begins


def tokenizer_name(kind: str, vocab_size: int | None, fingerprint: str) -> str:
    """A tokenizer in an error: its kind, its size, the beginning of its fingerprint."""
    size = "" if vocab_size is None else f" of {vocab_size} ids"
    return f"{kind}{size}, fingerprint {fingerprint[:12]}"


def name_of(tokenizer: Tokenizer) -> str:
    """The same of a tokenizer that is open."""
    return tokenizer_name(type(tokenizer).__name__, tokenizer.vocab_size, tokenizer.fingerprint)


def require_tokenizer(
    files: Iterable[TokenFile], tokenizer: Tokenizer, *, allow_mismatch: bool = False, ends: bool = True
) -> None:
    """Refuse token files that another tokenizer made, as they say or their documents' ends show; or warn of them.

    Without `ends` documents are known to have none.
    """
    for file in {file.prefix: file for file in files}.values():
        stored = file.tokenizer
        if stored is None:
            if ends:
                _require_ends(file, tokenizer, allow_mismatch)
        elif stored.fingerprint != tokenizer.fingerprint:
            made_with = tokenizer_name(stored.kind, stored.vocab_size, stored.fingerprint)
            refuse_mismatch(f"{file.prefix} was made with another tokenizer", made_with, tokenizer, allow_mismatch)


def _require_ends(file: TokenFile, tokenizer: Tokenizer, allowed: bool) -> None:
    """Refuse a file whose documents all end with one id that is not the tokenizer's end of a document.

    Only some documents are looked at. Where they end with various ids, the file was made without such an id.
    """
    if file.num_documents < _FEWEST_ENDS:
        return
    chosen = np.unique(np.linspace(0, file.num_documents - 1, _SAMPLED_ENDS).astype(np.int64))
    starts, stops = file.document_starts(chosen), file.document_starts(chosen + 1)
    ends = {int(token) for token in file.at(stops[stops > starts] - 1)}
    if len(ends) != 1 or ends == {tokenizer.eod} or tokenizer.encode("\n") == [*ends]:
        return
    what = f"the documents of {file.prefix} end with another id than this tokenizer's end of a document"
    if allowed:
        warn(f"{what}: {ends.pop()} instead of {tokenizer.eod} (--allow-tokenizer-mismatch)")
        return
    raise ArtifactError(
        what,
        got=f"{ends.pop()}, the last of all {len(chosen)} documents that were looked at",
        expected=f"{tokenizer.eod} of {name_of(tokenizer)}",
        fix="give the tokenizer that made the file (Megatron-LM's SentencePieceTokenizer, whose documents end with an "
        "id beyond the model's, is MegatronSentencePieceTokenizer here), or --allow-tokenizer-mismatch",
    )


def refuse_mismatch(what: str, made_with: str, tokenizer: Tokenizer, allowed: bool) -> None:
    """Raise for a tokenizer that is not the one that something was made with, or warn where that is allowed."""
    if allowed:
        warn(f"{what}: {made_with}; used with {name_of(tokenizer)} (--allow-tokenizer-mismatch)")
        return
    raise ArtifactError(
        what,
        got=made_with,
        expected=name_of(tokenizer),
        fix="give the tokenizer that it was made with (--tokenizer-type, --tokenizer-model) or make it again; "
        "--allow-tokenizer-mismatch goes on where ids mean the same",
    )


def utf8(text: str) -> bytes:
    """The text in UTF-8; half a surrogate pair is refused."""
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"the text holds half a surrogate pair at character {error.start}", got=repr(text[error.start])
        ) from None


def build_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that the settings name."""
    kind = config.tokenizer_type
    if kind == "ByteTokenizer":
        return ByteTokenizer()
    if kind == "GPT2BPETokenizer":
        return GPT2BPETokenizer(
            _required(config.vocab_file, kind, "vocab_file"), _required(config.merge_file, kind, "merge_file")
        )
    model = _required(config.tokenizer_model, kind, "tokenizer_model")
    if kind in ("SentencePieceTokenizer", "GPTSentencePieceTokenizer"):
        return SentencePieceTokenizer(model)
    if kind in ("MegatronSentencePieceTokenizer", "Llama2Tokenizer"):
        from megatron_retro.data.megatron_tokenizer import Llama2Tokenizer, MegatronSentencePieceTokenizer

        return Llama2Tokenizer(model) if kind == "Llama2Tokenizer" else MegatronSentencePieceTokenizer(model)
    if kind == "TikTokenizer":
        from megatron_retro.data.tiktoken_tokenizer import TikTokenizer

        return TikTokenizer(model, config)
    return HuggingFaceTokenizer(folder_of(model, TEXT_PATTERNS))


def _required(value: str | None, kind: str, field: str) -> Path:
    if value is None:
        flag = "--" + field.replace("_", "-")
        raise ConfigError(f"--tokenizer-type {kind} needs {flag}", fix=f"add {flag} FILE")
    return Path(value)


def _merge_pairs(text: str) -> list[tuple[str, str]]:
    pairs = (line.split() for line in text.split("\n") if line.strip() and not line.startswith("#version"))
    return [(first, second) for first, second in pairs]


def _highest_id(backend: Any) -> int:
    return int(max(backend.get_vocab(with_added_tokens=True).values()))


def _require_dense_ids(path: Path, content: bytes) -> None:
    """Refuse ids that only a damaged or hostile file has: the library makes room for all up to the largest, or aborts.

    A file without a number that long is not parsed twice.
    """
    if re.search(rb"\d{8}", content) is None:
        return
    try:
        parsed = json.loads(content)
        ids = [token["id"] for token in parsed.get("added_tokens", ())]
        vocabulary = parsed["model"].get("vocab", {})
        ids += vocabulary.values() if isinstance(vocabulary, dict) else ()
        largest = max(ids, default=0)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ArtifactError(f"{path} is no tokenizer.json", got=error) from None
    if largest > _LARGEST_ID:
        raise ArtifactError(f"{path} has a token of an impossible id", got=largest, expected=f"at most {_LARGEST_ID}")


def _put_around(backend: Any) -> tuple[tuple[int, ...], bool]:
    """The special tokens that the post-processor puts before every text, and whether it puts any behind it."""
    plain = backend.encode("a", add_special_tokens=False).ids
    whole = backend.encode("a", add_special_tokens=True).ids
    places = (start for start in range(len(whole)) if whole[start : start + len(plain)] == plain)
    start = next(places, 0)
    return tuple(whole[:start]), len(whole) > start + len(plain)


def _forget_lengths(backend: Any) -> None:
    """A tokenizer.json may carry the padding and truncation of the run that saved it."""
    backend.no_padding()
    backend.no_truncation()


def _hugging_face_eod(backend: Any, path: Path) -> int:
    declared = special_tokens(path.parent).get("eos_token")
    names = [*([declared] if declared else ()), *END_OF_DOCUMENT_NAMES]
    for name in names:
        token = backend.token_to_id(name)
        if token is not None:
            return int(token)
    raise ArtifactError(
        f"{path} names no end-of-document token",
        expected="one of " + ", ".join(names),
        fix="put a tokenizer_config.json with eos_token beside it",
    )
