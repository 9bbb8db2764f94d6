"""The leakage curve: how much of a model's gain is copying (RETRO, section 2.6).

For each evaluation chunk, r = the longest run of tokens that it shares with any of its nearest neighbours, over the
chunk's length. The curve is bits per byte over the chunks with r at most alpha, and what other neighbours cost there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.dataset import Dataset, Source
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import Tokenizer
from megatron_retro.evaluation.perplexity import Measured
from megatron_retro.reporting.perplexity_page import LeakageCurve
from megatron_retro.retrieval.native import longest_common_runs
from megatron_retro.runtime.statistics import Interval, bootstrap_ratio

ALPHAS = tuple(number / 8 for number in range(1, 9))
_BLOCK = 4096
_BEFORE = 8  # tokens: a character may have four, and ends of documents may stand among them


def shared_shares(source: Source, chunks: NDArray[np.int64], num_neighbors: int) -> NDArray[np.float64]:
    """r of each query chunk of a source."""
    if source.neighbors is None:
        raise ValueError("a leakage curve needs a neighbour table")
    saved = source.neighbors.table.num_saved
    reader = replace(source.neighbors, num_neighbors=min(num_neighbors, saved))
    length = source.samples.chunk_length
    shares = []
    for start in range(0, len(chunks), _BLOCK):
        some = chunks[start : start + _BLOCK]
        candidates, there = reader.read(some, 1)
        texts = source.samples.file.rows(some * length, length)
        runs = longest_common_runs(texts, np.ones(texts.shape, np.bool_), candidates[:, 0], there[:, 0])
        shares.append(runs.max(axis=1, initial=0) / length)
    return np.concatenate(shares) if shares else np.zeros(0)


def leakage_curve(
    dataset: Dataset, measured: Mapping[str, Measured], tokenizer: Tokenizer, num_neighbors: int
) -> LeakageCurve:
    """The curve over all chunks whose every token was scored."""
    real = measured[next(iter(measured))]
    shares, sizes, documents = [], [], []
    nats: dict[str, list[NDArray[np.float64]]] = {name: [] for name in measured}
    for number, source in enumerate(dataset.sources):
        chunks = whole_chunks(real, number, source.samples.chunk_length)
        shares.append(shared_shares(source, chunks, num_neighbors))
        sizes.append(_chunk_bytes(source, chunks, tokenizer))
        middles = chunks * source.samples.chunk_length + source.samples.chunk_length // 2
        documents.append(dataset.documents_at(number, middles))
        for name, one in measured.items():
            nats[name].append(_chunk_nats(one, number, chunks, source.samples.chunk_length))
    share, size, document = np.concatenate(shares), np.concatenate(sizes), np.concatenate(documents)
    below = [share <= alpha + 1e-9 for alpha in ALPHAS]
    bits = {name: np.concatenate(some) / np.log(2) for name, some in nats.items()}
    return LeakageCurve(
        ALPHAS,
        tuple(int(chosen.sum()) for chosen in below),
        {name: _bits(some, size, below) for name, some in bits.items()},
        {name: _excess(some - bits["real"], size, document, below) for name, some in bits.items() if name != "real"},
    )


def _bits(bits: NDArray[np.float64], size: NDArray[np.int64], below: Sequence[NDArray[np.bool_]]) -> tuple[float, ...]:
    return tuple(
        float(bits[chosen].sum() / size[chosen].sum()) if size[chosen].sum() else float("nan") for chosen in below
    )


def _excess(
    bits: NDArray[np.float64], size: NDArray[np.int64], document: NDArray[np.int64], below: Sequence[NDArray[np.bool_]]
) -> tuple[Interval, ...]:
    """Chunks of one document are no independent observations: documents are drawn with replacement."""
    return tuple(bootstrap_ratio(bits[chosen], size[chosen], seed=0, units=document[chosen]) for chosen in below)


def whole_chunks(measured: Measured, source: int, length: int) -> NDArray[np.int64]:
    """Query chunks of a source whose every token was scored."""
    offsets = measured.offsets[measured.sources == source]
    chunks, counts = np.unique(offsets // length, return_counts=True)
    return np.asarray(chunks[counts == length], np.int64)


def _chunk_nats(measured: Measured, source: int, chunks: NDArray[np.int64], length: int) -> NDArray[np.float64]:
    mine = measured.sources == source
    place = np.searchsorted(chunks, measured.offsets[mine] // length)
    inside = place < len(chunks)
    inside[inside] = chunks[place[inside]] == (measured.offsets[mine] // length)[inside]
    sums = np.bincount(place[inside], weights=measured.losses[mine][inside], minlength=len(chunks))
    return np.asarray(sums, np.float64)


def _chunk_bytes(source: Source, chunks: NDArray[np.int64], tokenizer: Tokenizer) -> NDArray[np.int64]:
    length, file = source.samples.chunk_length, source.samples.file
    spans = [(int(chunk) * length, (int(chunk) + 1) * length) for chunk in chunks]
    return np.array([span_bytes(tokenizer, file, *span) for span in spans], np.int64)


def span_bytes(tokenizer: Tokenizer, file: TokenFile, start: int, stop: int) -> int:
    """Bytes that a span adds to the text before it: alone, sentencepiece would drop the space that it begins with."""
    before = min(start, _BEFORE)
    tokens = file.tokens(start - before, stop)
    return text_bytes(tokenizer, tokens) - text_bytes(tokenizer, tokens[:before])


def text_bytes(tokenizer: Tokenizer, tokens: NDArray[Any]) -> int:
    """Bytes of the text of some tokens; a character that is cut at an edge counts as one."""
    text = tokenizer.decode([int(token) for token in tokens])
    cut = text.count("\ufffd")
    return len(text.encode()) - 2 * cut
