"""A corpus on which retrieval helps by construction: every document has a twin, and each chunk's first neighbour is the
same chunk of the twin, whose continuation is the text to predict. Written in milliseconds, through the real formats.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import load_tensors, open_checkpoint
from megatron_retro.checkpoint.shard_files import DTYPES
from megatron_retro.checkpoint.storage import TensorIndex, read_index
from megatron_retro.config.sections import TRAINING_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NONE, TableLayout, finish_table, write_block
from megatron_retro.data.token_file import TokenFile
from megatron_retro.runtime.run_log import read_run_log
from megatron_retro.testing.corpora import write_documents

CHUNK = 16
CHUNKS_PER_DOCUMENT = 8
EOD = 256
SAVED = 4


@dataclass(frozen=True)
class TinyCorpus:
    """Where the token file, the database and the neighbour table are."""

    tokens: Path
    database: Path
    table: Path

    def settings(self, *, retro: bool = True, **changes: Any) -> Settings:
        """Settings of a model that trains in milliseconds per step; `changes` are fields of any section."""
        values: dict[str, Any] = {
            "num_layers": 2,
            "hidden_size": 32,
            "num_attention_heads": 4,
            "seq_length": 4 * CHUNK,
            "retro_chunk_length": CHUNK,
            "data_path": [str(self.tokens)],
            "split": "80,20,0",
            "micro_batch_size": 2,
            "global_batch_size": 4,
            "train_iters": 10,
            "lr": 1e-2,
            "lr_decay_style": "constant",
            "eval_iters": 2,
            "num_workers": 0,
            "log_interval": 1000,
        }
        if retro:
            values |= {
                "retro_add_retriever": True,
                "retro_layers": [1, 2],
                "neighbor_path": [str(self.table)],
                "database_path": str(self.database),
            }
        return build_settings(TRAINING_SECTIONS, values | changes, {})


def write_tiny_corpus(directory: Path, *, pairs: int = 20, seed: int = 0) -> TinyCorpus:
    """Write `pairs` documents and their twins, and everything that retrieval over them needs."""
    directory.mkdir(parents=True, exist_ok=True)
    corpus = TinyCorpus(directory / "tokens", directory / "database", directory / "neighbors")
    random = np.random.default_rng(seed)
    texts = [random.integers(97, 123, CHUNKS_PER_DOCUMENT * CHUNK - 1) for _ in range(pairs)]
    write_documents(corpus.tokens, ([*text.tolist(), EOD] for text in texts for _ in range(2)))
    database = ChunkDatabase.create(corpus.database, [corpus.tokens], CHUNK, eod=EOD)
    _write_table(corpus, database, pairs)
    return corpus


def _write_table(corpus: TinyCorpus, database: ChunkDatabase, pairs: int) -> None:
    rows = 2 * pairs * CHUNKS_PER_DOCUMENT
    layout = TableLayout(SAVED, ((0, rows),))
    documents, chunks = np.divmod(np.arange(rows, dtype=np.int64), CHUNKS_PER_DOCUMENT)
    ids = np.full((rows, SAVED), NONE, np.int64)
    ids[:, 0] = (documents ^ 1) * CHUNKS_PER_DOCUMENT + chunks
    ids[:, 1] = (ids[:, 0] + 2 * CHUNKS_PER_DOCUMENT) % rows
    staging = corpus.table.with_name("neighbors.partial")
    staging.mkdir()
    for block in layout.blocks:
        write_block(staging, layout, block, ids[block.first : block.last])
    finish_table(
        staging,
        corpus.table,
        layout,
        inputs={"corpus": TokenFile(corpus.tokens).fingerprint, "database": database.fingerprint},
        config={"chunk_length": CHUNK},
    )


def stored_tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of the newest checkpoint, whole."""
    checkpoint = open_checkpoint(path)
    tensors = {
        name: torch.empty(size, dtype=DTYPES[checkpoint.index.dtypes[name]])
        for name, size in checkpoint.index.sizes.items()
    }
    load_tensors(checkpoint, tensors)
    return tensors


@contextmanager
def index_reads() -> Iterator[list[Path]]:
    """The checkpoints whose index this process reads meanwhile."""
    found: list[Path] = []

    def reading(directory: Path) -> TensorIndex:
        found.append(directory)
        return read_index(directory)

    with mock.patch("megatron_retro.checkpoint.loading.read_index", reading):
        yield found


def differences(first: Path, second: Path, *, prefix: str = "") -> list[str]:
    """Names of tensors that are not bit-equal in the newest checkpoints of two runs."""
    one, other = stored_tensors(first), stored_tensors(second)
    names = {name for name in one.keys() | other.keys() if name.startswith(prefix)}
    return sorted(
        name for name in names if not torch.equal(one.get(name, torch.empty(0)), other.get(name, torch.empty(0)))
    )


def losses(run: Path) -> list[float]:
    """Training loss of every step."""
    return read_run_log(run).curve("loss")[1]
