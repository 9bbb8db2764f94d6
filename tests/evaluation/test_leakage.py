"""The leakage curve's shares against brute force, its bytes against the text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_retro.data.builders import build_dataset
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.evaluation.leakage import shared_shares, span_bytes, text_bytes
from megatron_retro.testing.corpora import small_sentencepiece, write_documents
from megatron_retro.testing.tiny_corpus import CHUNK, EOD, write_tiny_corpus


def test_shared_runs_are_those_of_brute_force(tmp_path: Path) -> None:
    settings = write_tiny_corpus(tmp_path).settings()
    source = build_dataset(settings, "valid", eod=EOD).sources[0]
    assert source.neighbors is not None
    chunks = np.arange(*source.samples.chunk_ranges[0])[:6]
    found = shared_shares(source, chunks, 2)
    for chunk, share in zip(chunks, found, strict=True):
        text = bytes(source.samples.file.stream[chunk * CHUNK : (chunk + 1) * CHUNK].astype(np.uint8))
        tokens, mask = source.neighbors.read(np.array([chunk]), 1)
        best = 0
        for row in range(2):
            other = bytes(tokens[0, 0, row][mask[0, 0, row]].astype(np.uint8))
            for start in range(CHUNK):
                for stop in range(start + best + 1, CHUNK + 1):
                    if text[start:stop] in other:
                        best = stop - start
        assert share == pytest.approx(best / CHUNK)


def test_bytes_of_text_survive_characters_cut_at_the_edges() -> None:
    text = "é日本".encode()
    for stop in range(len(text) + 1):
        assert abs(text_bytes(ByteTokenizer(), np.frombuffer(text[:stop], np.uint8)) - stop) <= 2


@pytest.mark.parametrize("kind", ["sentencepiece", "bytes"])
def test_bytes_of_spans_add_up_to_those_of_the_text(tmp_path: Path, kind: str) -> None:
    """Wherever it is cut: at the spaces that sentencepiece begins words with, and inside characters."""
    pieces = small_sentencepiece(tmp_path / "pieces.model", byte_fallback=True)
    tokenizer = pieces if kind == "sentencepiece" else ByteTokenizer()
    text = "the old tree 🌳🌴 stands at 日本 and the sea " * 6
    file = tmp_path / "tokens"
    write_documents(file, [[*tokenizer.encode(text.strip()), tokenizer.eod]])
    tokens = TokenFile(file)
    for length in range(1, 9):
        starts = range(0, tokens.num_tokens, length)
        spans = [span_bytes(tokenizer, tokens, start, min(start + length, tokens.num_tokens)) for start in starts]
        assert sum(spans) == len(text.strip().encode())
