"""Documents of several token files under one numbering, as texts without their ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import document_text
from megatron_retro.data.token_file import TokenFile
from megatron_retro.errors import ConfigError, DataError

_MOST_TOKENS = 1 << 20  # of documents that are read at once; one document may be longer


@dataclass(frozen=True)
class DocumentSpans:
    """The documents [first, last) of each file, file after file."""

    files: tuple[TokenFile, ...]
    ranges: tuple[tuple[int, int], ...]
    eod: int | None

    @classmethod
    def of(
        cls, prefixes: Sequence[str], ranges: Sequence[tuple[int, int]] | None, eod: int | None, flag: str
    ) -> DocumentSpans:
        """Open the files; `flag` names the ranges in errors."""
        files = tuple(TokenFile(prefix) for prefix in prefixes)
        spans = tuple(ranges) if ranges is not None else tuple((0, file.num_documents) for file in files)
        if len(spans) != len(files):
            raise ConfigError(f"{flag} needs one range per file", got=f"{len(spans)} for {len(files)} files")
        for file, (first, last) in zip(files, spans, strict=True):
            if not 0 <= first <= last <= file.num_documents:
                expected = f"within 0 to {file.num_documents}"
                raise DataError(f"{file.prefix} has no documents {first} to {last}", expected=expected)
        return cls(files, spans, eod)

    def followed_by(self, others: DocumentSpans) -> DocumentSpans:
        """These documents, then the others."""
        return DocumentSpans(self.files + others.files, self.ranges + others.ranges, self.eod)

    @cached_property
    def before(self) -> NDArray[np.int64]:
        """Documents before each file, and all."""
        return np.cumsum([0, *(last - first for first, last in self.ranges)], dtype=np.int64)

    @property
    def num_documents(self) -> int:
        """Documents of all files."""
        return int(self.before[-1])

    @property
    def identity(self) -> list[dict[str, Any]]:
        """What is written down of them."""
        return [
            {"fingerprint": file.fingerprint, "first_document": first, "last_document": last}
            for file, (first, last) in zip(self.files, self.ranges, strict=True)
        ]

    def place(self, number: int) -> tuple[TokenFile, int]:
        """The file of a document, and its number there."""
        which = int(np.searchsorted(self.before, number, side="right")) - 1
        return self.files[which], int(number - self.before[which]) + self.ranges[which][0]

    def text(self, number: int) -> NDArray[Any]:
        """The tokens of a document."""
        file, local = self.place(number)
        start, stop = document_text(file, np.array([local]), self.eod)
        return file.tokens(int(start[0]), int(stop[0]))

    def pieces(self, first: int, last: int) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], NDArray[np.int64]]]:
        """The documents [first, last), some at a time: a stretch of tokens, and where each document lies in it."""
        for number, file in enumerate(self.files):
            low, high = np.clip([first, last], *self.before[number : number + 2])
            locals_ = np.arange(low, high) - self.before[number] + self.ranges[number][0]
            starts, stops = document_text(file, locals_, self.eod)
            at = 0
            while at < len(locals_):
                upto = max(int(np.searchsorted(stops, starts[at] + _MOST_TOKENS, side="right")), at + 1)
                base = int(starts[at])
                yield file.tokens(base, int(stops[upto - 1])), starts[at:upto] - base, stops[at:upto] - base
                at = upto
