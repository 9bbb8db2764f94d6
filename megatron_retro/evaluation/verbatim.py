"""How much of held-out text the database holds already: chunks whose next tokens stand verbatim in another document.

One pass over the database compares a hash of each run of tokens with those of the chunks; what agrees is compared
token by token. A gain on such chunks may be copying, whatever the leakage rule of documents keeps out.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.dataset import Dataset, Source
from megatron_retro.data.window_hashes import window_hashes
from megatron_retro.evaluation.leakage import whole_chunks
from megatron_retro.evaluation.perplexity import Measured
from megatron_retro.reporting.perplexity_page import VerbatimShare
from megatron_retro.runtime.console import Progress

LENGTH = 32  # tokens, or a chunk if that is shorter
_MOST_CHUNKS = 4096  # of a source, evenly
_SPAN = 1 << 20
_FILTER_BITS = 20


def verbatim_share(dataset: Dataset, measured: Measured, most: int) -> VerbatimShare:
    """Of all sources with neighbours, over the chunks whose every token was scored; `most` tokens are searched."""
    found = chunks = read = tokens = 0
    length = min(LENGTH, *(source.samples.chunk_length for source in dataset.sources))
    for number, source in enumerate(dataset.sources):
        if source.neighbors is None:
            continue
        scored = whole_chunks(measured, number, source.samples.chunk_length)
        some = scored[np.arange(min(_MOST_CHUNKS, len(scored))) * len(scored) // max(min(_MOST_CHUNKS, len(scored)), 1)]
        starts = _within_a_document(source, some * source.samples.chunk_length, length)
        chunks += len(starts)
        found += int(stands_elsewhere(source, source.neighbors.database, starts, length, most).sum())
        read += _looked_at(source.neighbors.database, most)
        tokens += _num_tokens(source.neighbors.database)
    return VerbatimShare(length, chunks, found, read, tokens)


def stands_elsewhere(
    source: Source, database: ChunkDatabase, starts: NDArray[np.int64], length: int, most: int
) -> NDArray[np.bool_]:
    """Whether the tokens from each place of a source on stand in another document of the database's `most` tokens."""
    result = np.zeros(len(starts), np.bool_)
    if not len(starts):
        return result
    file = source.samples.file
    texts = file.rows(starts, length)
    documents = file.documents_of(starts)
    first, last = database.map_documents(file.fingerprint, documents, documents + 1)
    hashes = np.concatenate([window_hashes(text, length) for text in texts])
    order = np.argsort(hashes, kind="stable")
    known = hashes[order]
    may_be = np.zeros(1 << _FILTER_BITS, np.bool_)
    may_be[known >> np.uint64(64 - _FILTER_BITS)] = True
    with Progress("verbatim elsewhere", _looked_at(database, most), "tokens") as progress:
        for number, start, stop in _spans(database, most):
            other = database.files[number]
            stream = other.tokens(start, min(stop + length - 1, other.num_tokens))
            windows = window_hashes(stream, length)
            places = np.flatnonzero(may_be[windows >> np.uint64(64 - _FILTER_BITS)])
            low, high = (np.searchsorted(known, windows[places], side=side) for side in ("left", "right"))
            for place, begin, end in zip(places[low < high], low[low < high], high[low < high], strict=True):
                if result[order[begin:end]].all():
                    continue
                local = other.document_of(int(start + place))
                owner = local - database.corpora[number].first_document + int(database.documents_before[number])
                if int(start + place) + length > other.document_bounds(local)[1]:
                    continue
                for one in order[begin:end]:
                    own = first[one] <= owner < last[one]
                    result[one] |= not own and bool((stream[place : place + length] == texts[one]).all())
            progress.advance(stop - start)
    return result


def _within_a_document(source: Source, starts: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    file = source.samples.file
    inside = file.documents_of(starts) == file.documents_of(starts + length - 1)
    return np.asarray(starts[inside])


def _num_tokens(database: ChunkDatabase) -> int:
    return sum(stop - start for _, start, stop in _ranges(database))


def _ranges(database: ChunkDatabase) -> Iterator[tuple[int, int, int]]:
    """File, first token and end of the documents of each corpus."""
    for number, (file, corpus) in enumerate(zip(database.files, database.corpora, strict=True)):
        bounds = file.document_starts(np.array([corpus.first_document, corpus.last_document]))
        yield number, int(bounds[0]), int(bounds[1])


def _spans(database: ChunkDatabase, most: int) -> Iterator[tuple[int, int, int]]:
    """Stretches of the database that are looked at: all of it, or `most` tokens, evenly; none is held in memory."""
    ranges = list(_ranges(database))
    before = np.cumsum([0, *(-(-(stop - start) // _SPAN) for _, start, stop in ranges)])
    every = int(before[-1])
    count = min(every, -(-most // _SPAN))
    for one in range(count):
        place = one * every // count
        which = int(np.searchsorted(before, place, side="right")) - 1
        number, start, stop = ranges[which]
        at = start + (place - int(before[which])) * _SPAN
        yield number, at, min(at + _SPAN, stop)


def _looked_at(database: ChunkDatabase, most: int) -> int:
    return sum(stop - start for _, start, stop in _spans(database, most))
