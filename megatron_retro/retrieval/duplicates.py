"""`find-duplicates`: documents of a database that come back, in it or in held-out sets, before it is made.

Workers share the reading: every document gets a sketch (`document_sketches.py`). One then compares what met by the sets
of their n-grams themselves, so a pair that is reported is as similar as it says; what MinHash may miss is a pair.
Held-out documents are numbered first, so the document that another comes back from always has the lower number.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.manifest import require_same
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import DuplicatesConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.tokenizers import require_tokenizer
from megatron_retro.data.window_hashes import window_hashes
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.document_sketches import Bands, Sketches, buckets, is_whole, sketch, write_sketches
from megatron_retro.retrieval.document_spans import DocumentSpans
from megatron_retro.retrieval.duplicate_report import Copies, open_report, write_report
from megatron_retro.retrieval.project import Project, parsed_range
from megatron_retro.retrieval.work_blocks import claim_blocks, cut_blocks, ignore_failure_if_done
from megatron_retro.runtime.console import Progress, say
from megatron_retro.runtime.environment import require
from megatron_retro.runtime.strict_json import json_text

_COMPARED_WITH = 32  # documents of a bucket, its first ones: a page that stands a million times makes no million pairs
_AT_ONCE = 4096
_PAIR_BYTES = 100


def find_duplicates(settings: Settings) -> None:
    """Write PROJECT/duplicates, or say that it is there."""
    require("rensa", "find-duplicates")
    import rensa

    project, config = Project(settings), settings[DuplicatesConfig]
    database = DocumentSpans.of(
        project.database_corpora, project.document_ranges, project.eod, "--retro-database-documents"
    )
    held_out = _held_out(config, project.eod)
    allowed = settings[TokenizerConfig].allow_tokenizer_mismatch
    require_tokenizer([*held_out.files, *database.files], project.tokenizer, allow_mismatch=allowed)
    spec: dict[str, Any] = {
        "database": database.identity,
        "held_out": held_out.identity,
        "eod": project.eod,
        "jaccard": config.duplicates_jaccard,
        "ngram": config.duplicates_ngram,
        "minhash": rensa.RMinHash.ALGORITHM_VERSION,
    }
    found = project.layout.duplicates
    if not found.exists():
        _search(project, config, Search(held_out.followed_by(database), held_out.num_documents, config, spec))
    report = open_report(found)
    for name, value in report.config.items():
        again = f"remove {found} to search again, or give another --retro-project-dir"
        require_same(found, name, value, spec[name], again)
    counts = report.counts
    say(
        f"of {counts['documents']:,} documents {counts['near_earlier']:,} are near an earlier one, "
        f"{counts['near_held_out']:,} near one of {counts['held_out_documents']:,} held out: {found}/duplicates.html"
    )


def _held_out(config: DuplicatesConfig, eod: int | None) -> DocumentSpans:
    flag, ranges = "--duplicates-held-out-documents", config.duplicates_held_out_documents
    spans = None if ranges is None else [parsed_range(text, flag) for text in ranges]
    return DocumentSpans.of(config.duplicates_held_out or (), spans, eod, flag)


@dataclass(frozen=True)
class Search:
    """What is compared, and how."""

    spans: DocumentSpans
    num_held_out: int
    config: DuplicatesConfig
    spec: Mapping[str, Any]

    def shingles(self, number: int) -> NDArray[np.uint64]:
        """The set of a document's n-grams; a shorter text is one."""
        text = self.spans.text(number)
        return np.unique(window_hashes(text, min(self.config.duplicates_ngram, len(text))))


def _search(project: Project, config: DuplicatesConfig, search: Search) -> None:
    layout = project.layout
    block_size = {"block_size": config.duplicates_block_size}
    digest = hashlib.sha256(json_text({**search.spec, **block_size}, sort_keys=True).encode()).hexdigest()
    name = f"duplicates-{digest[:12]}"
    folder = layout.work(name)
    blocks = {block.name: block for block in cut_blocks(search.spans.num_documents, config.duplicates_block_size)}
    bands = Bands.of(config.duplicates_jaccard)
    paths = {name: folder / f"{name}.keys" for name in blocks}
    found = layout.duplicates

    def is_done(one: str) -> bool:
        return is_whole(paths[one], blocks[one].size, bands) or found.exists()

    with Progress("find-duplicates: reading", search.spans.num_documents, "documents") as progress:
        for one in claim_blocks(layout, f"{name}/blocks", list(blocks), is_done, project.worker):
            keys = sketch(search.spans, blocks[one], config.duplicates_ngram, bands)
            with ignore_failure_if_done(partial(is_done, one)):
                write_sketches(paths[one], keys)
            progress.advance(blocks[one].size)
    for _ in claim_blocks(layout, f"{name}/pairs", ["pairs"], lambda _: found.exists(), project.worker):
        copies = find_copies(search, Sketches(list(paths.values()), bands), project.memory_bytes)
        with ignore_failure_if_done(found.exists):
            write_report(found, search, copies, bands, project.tokenizer.decode)
    shutil.rmtree(folder, ignore_errors=True)


def find_copies(search: Search, sketches: Sketches, memory_bytes: float) -> Copies:
    """Of each document of the database, what it comes back from."""
    everything = np.arange(search.spans.num_documents)
    keys = sketches.column(0)
    there = everything[keys != 0]
    same = [group for crowd in buckets(keys[there], there, memory_bytes) for group in _equal_texts(search, crowd)]
    repeats = np.zeros(len(everything), np.bool_)
    for group in same:
        repeats[group[1:]] = True
    pairs = _Pairs(search, sketches, memory_bytes)
    pairs.collect(there[~repeats[there]])
    return _chosen(search, same, pairs)


def _equal_texts(search: Search, crowd: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
    """Documents of one key, in groups of equal texts: 64 bits may agree by chance."""
    while len(crowd) > 1:
        text = search.spans.text(int(crowd[0]))
        equal = np.array([np.array_equal(search.spans.text(int(one)), text) for one in crowd])
        if equal.sum() > 1:
            yield crowd[equal]
        crowd = crowd[~equal]


@dataclass
class _Pairs:
    """Different texts that are as similar as asked: (lower number, higher number, similarity)."""

    search: Search
    sketches: Sketches
    memory_bytes: float
    found: list[tuple[int, int, float]] = field(default_factory=list)
    passed_over: int = 0

    def collect(self, documents: NDArray[np.int64]) -> None:
        """Compare all that agree in a band; a pair that agreed in an earlier one was compared there."""
        with Progress("find-duplicates: comparing", self.sketches.bands.count, "bands") as progress:
            for band in range(1, self.sketches.bands.count + 1):
                keys = self.sketches.column(band)[documents]
                for crowd in buckets(keys, documents, self.memory_bytes):
                    self._compare(crowd, band)
                progress.advance(1)

    def _compare(self, crowd: NDArray[np.int64], band: int) -> None:
        firsts = crowd[:_COMPARED_WITH]
        first_keys = self.sketches.rows(firsts)[:, 1:band]
        sets: dict[int, NDArray[np.uint64]] = {}
        for start in range(0, len(crowd), _AT_ONCE):
            some = crowd[start : start + _AT_ONCE]
            met = (self.sketches.rows(some)[:, None, 1:band] == first_keys[None]).any(axis=-1)
            wanted = (some[:, None] > firsts) & ~met & (some[:, None] >= self.search.num_held_out)
            for row in np.flatnonzero(wanted.any(axis=1)).tolist():
                later = self.search.shingles(int(some[row]))
                for column in np.flatnonzero(wanted[row]).tolist():
                    if column not in sets:
                        sets[column] = self.search.shingles(int(firsts[column]))
                    self._add(int(firsts[column]), int(some[row]), similarity(sets[column], later))
        beyond = max(len(crowd) - _COMPARED_WITH, 0)
        self.passed_over += beyond * (beyond - 1) // 2

    def _add(self, lower: int, higher: int, jaccard: float) -> None:
        if jaccard < self.search.config.duplicates_jaccard:
            return
        self.found.append((lower, higher, jaccard))
        if len(self.found) * _PAIR_BYTES > self.memory_bytes:
            raise ConfigError(
                "near duplicates do not fit into memory",
                got=f"{len(self.found):,} pairs with --retro-memory-gb {self.memory_bytes / 1e9:g}",
                fix="raise --retro-memory-gb or --duplicates-jaccard",
            )


def similarity(one: NDArray[np.uint64], other: NDArray[np.uint64]) -> float:
    """The Jaccard similarity of two sets."""
    common = len(np.intersect1d(one, other, assume_unique=True))
    return common / (len(one) + len(other) - common)


def _chosen(search: Search, same: Sequence[NDArray[np.int64]], pairs: _Pairs) -> Copies:
    """What each document comes back from: the first equal text, else the most similar one.

    Within the database a document comes back from an earlier one that does not come back itself.
    """
    first = search.num_held_out
    copies = Copies.none(first, search.spans.num_documents - first, pairs.passed_over)
    held_out, within = copies.held_out, copies.within
    groups = {int(group[0]): group for group in same}
    for group in same:
        inside = group[group >= first]
        within.set(inside[1:], int(inside[0]) if len(inside) else -1, 1.0)
        if group[0] < first:
            held_out.set(inside, int(group[0]), 1.0)
    between: list[tuple[int, int, float]] = []
    for lower, higher, jaccard in pairs.found:
        low, high = groups.get(lower, np.array([lower])), groups.get(higher, np.array([higher]))
        if lower < first:
            held_out.set(high[high >= first], lower, jaccard)
        low, high = low[low >= first], high[high >= first]
        if len(low) and len(high):
            between.append((max(int(low[0]), int(high[0])), min(int(low[0]), int(high[0])), jaccard))
    for later, earlier, jaccard in sorted(between, key=lambda pair: (pair[0], -pair[2], pair[1])):
        if within.origin[earlier - first] < 0:
            within.set(np.array([later]), earlier, jaccard)
    return copies
