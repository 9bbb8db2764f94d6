"""Vectors to measure retrieval with: synthetic ones, and those of text that every machine has."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.standard_library import standard_library_documents
from megatron_retro.data.tokenizers import build_tokenizer
from megatron_retro.retrieval.chunk_encoding import KeptVectors, from_bfloat16
from megatron_retro.retrieval.embedders import build_embedder
from megatron_retro.runtime.strict_json import json_text

Vectors = NDArray[np.float32]
DIMENSION = 384
_INTRINSIC = 24
_CHUNK, _HASHED_WIDTH = 32, 256
_PIECE_BYTES, _TEXTS_AT_ONCE = 256, 256


def synthetic_vectors(count: int, seed: int) -> Vectors:
    """Unit vectors near a plane of few dimensions; the plane is the same for all seeds."""
    plane = np.random.default_rng(0).standard_normal((_INTRINSIC, DIMENSION)).astype(np.float32)
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((count, _INTRINSIC)).astype(np.float32) @ plane
    vectors += 0.05 * random.standard_normal(vectors.shape).astype(np.float32)
    return np.ascontiguousarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def minilm_vectors(most: int, seconds: float) -> Vectors:
    """MiniLM vectors of evenly spread pieces of the standard library, as many as a time allows."""
    settings = EmbedderConfig(retro_embedder="minilm", retro_embedder_precision="bf16")
    embedder: Any = build_embedder(settings, build_tokenizer(TokenizerConfig()))
    texts = list(_pieces())
    texts = [texts[place] for place in np.random.default_rng(0).permutation(len(texts))[:most]]
    parts, started = [], time.process_time()
    for start in range(0, len(texts), _TEXTS_AT_ONCE):
        parts.append(embedder.embed_texts(texts[start : start + _TEXTS_AT_ONCE]))
        if time.process_time() - started > seconds:
            break
    return np.concatenate(parts)


def _pieces() -> Iterator[str]:
    for document in standard_library_documents():
        for start in range(0, len(document.text), _PIECE_BYTES):
            yield document.text[start : start + _PIECE_BYTES]


def build_standard_library(folder: Path, documents: int | None, queried_rows: int) -> tuple[Vectors, float]:
    """The quickstart's corpus by the quickstart's commands: its hashed vectors, recall@2 of its automatic index."""
    text, model = folder / "text.jsonl", folder / "tokenizer"
    with text.open("w", encoding="utf-8") as stream:
        for document in [*standard_library_documents()][:documents]:
            stream.write(json_text({"text": document.text}) + "\n")
    tokenizer = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", f"{model}.model"]
    _run("train-tokenizer", ["--input", str(text), "--tokenizer-output", str(model), "--tokenizer-vocab-size", "2048"])
    _run("preprocess", ["--input", str(text), "--output-prefix", str(folder / "text"), "--append-eod", *tokenizer])
    project, corpus = folder / "project", str(folder / "text_text_document")
    database = ["--retro-database-corpus", corpus, "--retro-keep-embeddings"]
    settings = ["--retro-chunk-length", str(_CHUNK), "--retro-query-rows", f"0:{queried_rows}"]
    _run("build-retrieval", ["--retro-project-dir", str(project), *database, *settings, *tokenizer])
    report = json.loads((project / "report" / "quality.json").read_text(encoding="utf-8"))
    quality = next(iter(report["tables"].values()))
    kept = KeptVectors(project / "index/embeddings/vectors.bf16", report["index"]["chunks"], _HASHED_WIDTH)
    return from_bfloat16(kept.mapped()), float(quality["recall"]["2"]["recall"])


def _run(verb: str, words: Sequence[str]) -> None:
    subprocess.run([sys.executable, "-m", "megatron_retro.cli.main", verb, *words], check=True, capture_output=True)
