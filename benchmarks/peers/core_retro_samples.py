"""Samples of megatron-core's Retro dataset over token files and neighbours that exist (see `peer_packages.py`).

The stages of core that write its project need a GPU; what they would write is made here, the same chunks and neighbours
that our dataset reads: a table of (corpus, document, first token, end, 0) and HDF5 blocks of neighbour ids.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 100_000  # rows of a file of neighbours, as core's preprocessing has it


def document_chunks(lengths: NDArray[np.int64], chunk_length: int) -> NDArray[np.int64]:
    """Core's chunk table: each document without its last token, cut from its start."""
    chunks = -(-(lengths - 1) // chunk_length)
    document = np.repeat(np.arange(len(lengths)), chunks)
    first = (np.arange(chunks.sum()) - np.repeat(np.cumsum(chunks) - chunks, chunks)) * chunk_length
    end = np.minimum(first + chunk_length, lengths[document] - 1)
    nothing = np.zeros_like(document)
    return np.stack([nothing, document, first, end, nothing], 1)


def write_neighbors(folder: Path, ids: NDArray[np.int64]) -> None:
    """Rows of neighbour ids in core's blocks."""
    import h5py

    folder.mkdir()
    for first in range(0, len(ids), BLOCK):
        last = min(first + BLOCK, len(ids))
        with h5py.File(folder / f"{first:010}-{last:010}.hdf5", "w") as file:
            file.create_dataset("neighbors", data=ids[first:last])


def core_dataset(
    prefix: Path, chunks: NDArray[np.int64], neighbors: Path, *, samples: int, length: int, chunk: int, eod: int
) -> Any:
    """Core's dataset: samples of `length` + 1 tokens, with two neighbours and their continuations."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.retro.db.dataset import DBDataset
    from megatron.core.datasets.retro.query.gpt_chunk_dataset import GPTChunkDataset
    from megatron.core.datasets.retro.query.multi_split_gpt_dataset import (
        MultiSplitGPTDataset,
        MultiSplitGPTDatasetConfig,
    )
    from megatron.core.datasets.retro.query.retro_dataset import RetroDataset
    from megatron.core.datasets.retro.utils import BlockPathMap
    from megatron.core.datasets.utils import Split

    tokenizer = SimpleNamespace(eod=eod, pad=0, unique_identifiers={})
    flags = {"reset_position_ids": False, "reset_attention_mask": False, "eod_mask_loss": False}
    config = MultiSplitGPTDatasetConfig(
        random_seed=1,
        sequence_length=length,
        blend=([str(prefix)], None),
        split="1",
        split_preprocessing="1",
        return_document_ids=False,
        path_to_cache=str(neighbors.with_name("cache")),
        tokenizer=tokenizer,
        **flags,
    )
    file = IndexedDataset(str(prefix))
    documents = np.arange(len(file.sequence_lengths), dtype=np.int32)
    text = MultiSplitGPTDataset(file, str(prefix), documents, samples, Split.train, config)
    return RetroDataset(
        num_queried_samples=samples,
        num_neighbors=2,
        num_retrieved_chunks=2,
        block_size=BLOCK,
        db_dataset=DBDataset("", [file], chunks, chunk, eod),
        chunk_dataset=GPTChunkDataset(text, length, chunk),
        neighbor_path_map=BlockPathMap.from_dir(str(neighbors), BLOCK),
    )
