"""The report of `find-duplicates`: which documents come back, from where, and how similar they are.

PROJECT/duplicates/documents.jsonl           a line for each document and what it comes back from
PROJECT/duplicates/duplicates.json, .html    counts, and pairs to look at
PROJECT/duplicates/held-out.i64, within.i64  numbers of documents in the database, for `build-retrieval`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import new_directory
from megatron_retro.artifacts.manifest import Manifest, require_same, write_manifest
from megatron_retro.artifacts.mapped_files import map_file
from megatron_retro.artifacts.verified import open_artifact
from megatron_retro.errors import ConfigError
from megatron_retro.reporting.duplicates_page import duplicates_page
from megatron_retro.reporting.neighbors import QueryText, RetrievedText
from megatron_retro.retrieval.document_sketches import Bands
from megatron_retro.retrieval.document_spans import DocumentSpans
from megatron_retro.runtime.strict_json import json_text

if TYPE_CHECKING:
    from megatron_retro.retrieval.duplicates import Search

_KIND, _VERSION = "duplicates", 1
_SHOWN_TOKENS = 200  # of each document on the page
_AGAIN = "remove it and run `megatron-retro find-duplicates` again"


@dataclass(frozen=True)
class Origins:
    """What each document of the database comes back from, by its number among all; -1 where nothing is."""

    num_before: int
    origin: NDArray[np.int64]
    similarity: NDArray[np.float32]

    def set(self, documents: NDArray[np.int64], origin: int, similarity: float) -> None:
        """Say it of documents where nothing as similar was said."""
        rows = documents - self.num_before
        rows = rows[self.similarity[rows] < similarity]
        self.origin[rows], self.similarity[rows] = origin, similarity

    @property
    def documents(self) -> NDArray[np.int64]:
        """Numbers in the database of those that come back."""
        return np.flatnonzero(self.origin >= 0)


@dataclass(frozen=True)
class Copies:
    """Documents that come back from held-out sets, and from earlier documents of the database."""

    held_out: Origins
    within: Origins
    passed_over: int

    @classmethod
    def none(cls, num_before: int, count: int, passed_over: int) -> Copies:
        """Nothing comes back yet."""
        one, other = (Origins(num_before, np.full(count, -1, np.int64), np.zeros(count, np.float32)) for _ in range(2))
        return cls(one, other, passed_over)


def write_report(
    path: Path, search: Search, copies: Copies, bands: Bands, decode: Callable[[Sequence[int]], str]
) -> None:
    """Write the directory."""
    counts = {
        "documents": len(copies.within.origin),
        "held_out_documents": search.num_held_out,
        "near_held_out": len(copies.held_out.documents),
        "near_earlier": len(copies.within.documents),
    }
    recall = bands.recall(search.config.duplicates_jaccard)
    with new_directory(path) as directory:
        for name, origins in _named(copies):
            (directory / f"{name}.i64").write_bytes(origins.documents.astype("<i8").tobytes())
        with (directory / "documents.jsonl").open("w", encoding="utf-8") as stream:
            stream.writelines(json_text(line) + "\n" for line in _lines(search.spans, copies))
        facts = {**counts, "expected_recall": recall, "pairs_passed_over": copies.passed_over}
        summary = {**search.spec, **facts, "files": [file.prefix for file in search.spans.files]}
        (directory / "duplicates.json").write_text(json_text(summary, indent=2) + "\n", encoding="utf-8")
        shown = [_shown(search.spans, *pair) for pair in _some_pairs(copies, search.config.duplicates_shown)]
        page = duplicates_page(facts, shown, decode, search.config.duplicates_ngram)
        (directory / "duplicates.html").write_text(page, encoding="utf-8")
        write_manifest(directory, kind=_KIND, version=_VERSION, inputs={}, config=dict(search.spec), counts=counts)


def _named(copies: Copies) -> tuple[tuple[str, Origins], ...]:
    return ("held-out", copies.held_out), ("within", copies.within)


def _lines(spans: DocumentSpans, copies: Copies) -> Iterator[dict[str, Any]]:
    for name, origins in _named(copies):
        for row in origins.documents.tolist():
            yield {
                "why": name,
                "document": _place(spans, row + origins.num_before),
                "comes_back_from": _place(spans, int(origins.origin[row])),
                "jaccard": round(float(origins.similarity[row]), 4),
            }


def _place(spans: DocumentSpans, number: int) -> dict[str, Any]:
    file, document = spans.place(number)
    return {"file": file.prefix, "document": document}


def _some_pairs(copies: Copies, most: int) -> Iterator[tuple[int, int, float, str]]:
    """Pairs of both kinds, evenly spread."""
    for name, origins in _named(copies):
        rows = origins.documents
        some = min(len(rows), most // 2)
        for row in rows[np.arange(some) * len(rows) // max(some, 1)].tolist():
            yield row + origins.num_before, int(origins.origin[row]), float(origins.similarity[row]), name


def _shown(spans: DocumentSpans, number: int, origin: int, similarity: float, why: str) -> QueryText:
    def told(one: int) -> str:
        file, document = spans.place(one)
        return f"document {document} of {Path(file.prefix).name}"

    def beginning(one: int) -> list[int]:
        return list(map(int, spans.text(one)[:_SHOWN_TOKENS]))

    other = RetrievedText(f"comes back from {told(origin)}, {why}, Jaccard {similarity:.3f}", beginning(origin))
    return QueryText(told(number).capitalize(), beginning(number), [other])


def open_report(path: Path) -> Manifest:
    """The manifest of a finished report."""
    return open_artifact(path, kind=_KIND, version=_VERSION, fix=_AGAIN)


def documents_to_drop(path: Path, kind: str, database: DocumentSpans) -> NDArray[np.int64]:
    """The documents that `--retro-drop-duplicates` leaves out, by their numbers in the database."""
    if not path.exists():
        raise ConfigError(
            f"--retro-drop-duplicates {kind} needs {path}, which is not there",
            fix="run `megatron-retro find-duplicates` with the same project, corpora and tokenizer first",
        )
    config = open_report(path).config
    require_same(path, "the documents of the database", config["database"], database.identity, _AGAIN)
    require_same(path, "the end-of-document id", config["eod"], database.eod, _AGAIN)
    if kind != "within" and not config["held_out"]:
        raise ConfigError(
            f"--retro-drop-duplicates {kind}: {path} was made without held-out sets",
            fix="remove it and run `megatron-retro find-duplicates --duplicates-held-out PREFIX ..`, or say within",
        )
    names = ("held-out", "within") if kind == "all" else (kind,)
    return np.unique(np.concatenate([map_file(path / f"{name}.i64").view("<i8") for name in names]))
