"""What `--retro-drop-overlap` keeps out of a table of near-copies, and what it costs.

    python docs/experiments/overlap_guard.py --text PREFIX --database DB --neighbors TABLE

For each value: the rows whose first neighbours carry the next half chunk word for word, the rows that keep their
first neighbour, those that have enough left, and the share of all saved neighbours that stays.
"""

from __future__ import annotations

import argparse

import numpy as np
from numpy.typing import NDArray

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.token_file import TokenFile
from megatron_retro.retrieval.index_search import SearchResult
from megatron_retro.retrieval.reranking import MaskedTokens, drop_leaks
from megatron_retro.runtime.console import render_table

VALUES = (None, 0.75, 0.5, 0.49, 0.375, 0.25, 0.125)


def carrying(
    database: ChunkDatabase, ids_QK: NDArray[np.int64], next_QM: NDArray[np.int64], length: int
) -> NDArray[np.bool_]:
    """Whether a neighbour holds a run of tokens as it stands."""
    tokens, there = database.gather(ids_QK, length)
    found = np.zeros(ids_QK.shape, np.bool_)
    for row, (texts, mask, wanted) in enumerate(zip(tokens, there, next_QM, strict=True)):
        runs, whole = (np.lib.stride_tricks.sliding_window_view(one, len(wanted), axis=-1) for one in (texts, mask))
        found[row] = ((runs == wanted).all(-1) & whole.all(-1)).any(-1)
    return found


def main() -> int:
    """Measure the values, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("text", "database", "neighbors"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--read", type=int, default=2, help="neighbours that a model reads")
    arguments = parser.parse_args()
    file, database = TokenFile(arguments.text), ChunkDatabase.open(arguments.database)
    size, table = database.chunk_length, NeighborTable.open(arguments.neighbors)
    rows = file.num_tokens // size - 2
    ids = table.rows(0, rows)
    chunks = file.tokens(0, (rows + 1) * size).astype(np.int64).reshape(-1, size)
    successors = MaskedTokens(chunks[1:], np.ones((rows, size), np.bool_))
    order = np.tile(np.arange(ids.shape[1], dtype=np.float32), (rows, 1))
    lines = []
    for value in VALUES:
        kept = ids
        if value is not None:
            kept = drop_leaks(SearchResult(order, ids), successors, database, 2 * size, value).ids_QK
        copied = carrying(database, kept[:, : arguments.read], chunks[1:, : size // 2], 2 * size).any(1)
        shares = (copied, kept[:, 0] == ids[:, 0], kept[:, arguments.read - 1] >= 0, kept >= 0)
        lines.append(("none" if value is None else value, *(f"{share.mean():.1%}" for share in shares)))
    print(render_table(("value", "carry the next half", "first stays", "enough left", "all that stay"), lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
