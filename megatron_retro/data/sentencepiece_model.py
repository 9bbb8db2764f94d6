"""What a sentencepiece model file says of itself: pieces and normalization, read from its protocol buffer."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

_FLOAT = struct.Struct("<f")
UNIGRAM, BPE = 1, 2
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """The parts of a model that decide where a text may be cut."""

    pieces: tuple[Piece, ...]
    model_type: int
    space_is_suffix: bool
    rules: str
    charsmap: bytes
    dummy_prefix: bool
    removes_extra_spaces: bool
    escapes_spaces: bool


def parse_sentencepiece_model(content: bytes) -> SentencePieceModel:
    """Read the fields that matter; the defaults are those of `sentencepiece_model.proto`."""
    pieces, trainer, normalizer = [], b"", b""
    for number, value in _fields(content):
        if number == 1 and isinstance(value, bytes):
            pieces.append(_piece(value))
        elif number == 2 and isinstance(value, bytes):
            trainer = value
        elif number == 3 and isinstance(value, bytes):
            normalizer = value
    training, normalization = dict(_fields(trainer)), dict(_fields(normalizer))
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_number(training.get(3, UNIGRAM)),
        space_is_suffix=bool(training.get(24, 0)),
        rules=_bytes(normalization.get(1, b"")).decode("utf-8"),
        charsmap=_bytes(normalization.get(2, b"")),
        dummy_prefix=bool(normalization.get(3, 1)),
        removes_extra_spaces=bool(normalization.get(4, 1)),
        escapes_spaces=bool(normalization.get(5, 1)),
    )


def _piece(content: bytes) -> Piece:
    """A piece in the layout that every writer uses (text, score, kind if not normal), or field by field."""
    end = 2 + content[1]
    if content[0] == 0x0A and content[1] < 0x80 and content[end : end + 1] == b"\x15" and len(content) - end in (5, 7):
        (score,) = _FLOAT.unpack_from(content, end + 1)
        if len(content) == end + 5 or content[end + 5] == 0x18:
            return Piece(content[2:end].decode("utf-8"), score, content[-1] if len(content) == end + 7 else NORMAL)
    fields = dict(_fields(content))
    (score,) = _FLOAT.unpack(_bytes(fields.get(2, b"\0\0\0\0")))
    return Piece(_bytes(fields.get(1, b"")).decode("utf-8"), score, _number(fields.get(3, NORMAL)))


def _number(value: int | bytes) -> int:
    return value if isinstance(value, int) else int.from_bytes(value, "little")


def _bytes(value: int | bytes) -> bytes:
    return value if isinstance(value, bytes) else b""


def _fields(content: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: whole numbers, or bytes for texts, messages and fixed-size numbers."""
    place = 0
    while place < len(content):
        tag, place = _varint(content, place)
        kind = tag & 7
        if kind == 0:
            value, place = _varint(content, place)
            yield tag >> 3, value
            continue
        if kind == 2:
            size, place = _varint(content, place)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"field kind {kind} in a sentencepiece model")
        yield tag >> 3, content[place : place + size]
        place += size


def _varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 0x7F) << shift
        place, shift = place + 1, shift + 7
        if byte < 0x80:
            return value, place
