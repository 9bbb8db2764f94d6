"""Small corpora with a database and neighbour tables over them, and the settings of runs that read them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import (
    NeighborTable,
    TableLayout,
    finish_table,
    write_block,
)
from megatron_retro.data.token_file import TokenFile
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.testing.corpora import random_documents, write_reference_token_file

EOD = 256


LENGTH = 8


def corpus(prefix: Path, seed: int = 0, count: int = 120, longest: int = 60) -> TokenFile:
    """A token file of random documents."""
    documents = random_documents(seed, count, longest)
    write_reference_token_file(prefix, [[[*d, EOD]] if d else [] for d in documents], "uint16")
    return TokenFile(prefix)


def table(path: Path, file: TokenFile, database: ChunkDatabase, rows: Any = None, seed: int = 0) -> NeighborTable:
    """A neighbour table of random ids over a corpus, some of them absent."""
    total = file.num_tokens // LENGTH
    ranges = rows or ((0, total),)
    layout = TableLayout(6, ranges, 37)
    generator = np.random.default_rng(seed)
    work = path.with_name(path.name + ".work")
    for block in layout.blocks:
        ids = generator.integers(-1, database.num_chunks, (block.last - block.first, 6))
        write_block(work, layout, block, np.sort(ids, axis=1)[:, ::-1] if block.first % 2 else ids)
    inputs = {"corpus": file.fingerprint, "database": database.fingerprint}
    finish_table(work, path, layout, inputs=inputs, config={})
    return NeighborTable.open(path)


def config(paths: Sequence[Any], retro: dict[str, Any] | None = None, training: Any = None, **data: Any) -> Settings:
    """The settings of a run over these corpora."""
    retro = {"retro_chunk_length": LENGTH, **(retro or {})}
    training = {"micro_batch_size": 2, "global_batch_size": 8, "seed": 3, **(training or {})}
    words = tuple(map(str, paths))
    fields = {"seq_length": 4 * LENGTH, "split": "1", "num_workers": 0, **data}
    return Settings([DataConfig(data_path=words, **fields), RetroConfig(**retro), TrainingConfig(**training)])


def retro_config(folder: Path, file: TokenFile, **more: Any) -> Settings:
    """The same with a database and a neighbour table, made in a folder when it has none."""
    if not (folder / "db").exists():
        database = ChunkDatabase.create(folder / "db", [file.prefix], LENGTH, eod=EOD)
        table(folder / "table", file, database)
    retro = {"retro_add_retriever": True, **more.pop("retro", {})}
    data = {"neighbor_path": (str(folder / "table"),), "database_path": str(folder / "db"), **more}
    return config([file.prefix], retro, **data)


def same(a: Microbatch[Array], b: Microbatch[Array]) -> bool:
    """Whether two microbatches hold the same samples."""
    ours, theirs = ({**each.arrays(), "ids": each.sample_ids_B} for each in (a, b))
    return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
