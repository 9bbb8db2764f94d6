"""Windows of a text with a passage before each, as documents of one length, for `real_decoder.sh`.

    python docs/experiments/prompted_text.py CORPUS --database DB --neighbors TABLE --output PREFIX

Windows are spread evenly; the passage is the nearest of the window's third or sixth chunk, in turn, and of every fourth
window that of another one.
"""

from __future__ import annotations

import argparse

import numpy as np

from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.token_writer import TokenFileWriter


def main() -> int:
    """Write the token file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus")
    for name in ("database", "neighbors", "output"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--windows", type=int, default=33)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    file, database = TokenFile(arguments.corpus), ChunkDatabase.open(arguments.database)
    table, length = NeighborTable.open(arguments.neighbors), database.chunk_length
    chunks = arguments.length // length
    starts = np.linspace(0, file.num_tokens // length - chunks - 1, arguments.windows).astype(np.int64)
    asked = starts + np.where(np.arange(len(starts)) % 2, 5, 2)
    asked = np.where(np.arange(len(starts)) % 4 == 3, np.roll(asked, len(asked) // 2), asked)
    nearest = np.array([table.rows(int(row), int(row) + 1)[0, 0] for row in asked])
    passages, mask = database.gather(nearest[:, None], 3 * length)
    with TokenFileWriter(arguments.output, file.dtype) as writer:
        for start, passage, there in zip(starts * length, passages[:, 0], mask[:, 0], strict=True):
            window = file.tokens(int(start), int(start) + arguments.length)
            # A passage that ends early is filled up from the front, so that every document has one length.
            document = np.concatenate([np.resize(passage[there], len(there)), window])
            writer.add_documents(document, np.array([len(document)], np.int32), np.array([1], np.int64))
        writer.add_documents(file.tokens(0, 1), np.array([1], np.int32), np.array([1], np.int64))  # the last label
        writer.finalize()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
