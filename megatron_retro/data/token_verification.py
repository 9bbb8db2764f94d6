"""Verifying what is too large to be verified when it is opened: tokens and indexes of 64 MB and more.

`--verify-tokens background` reads them beside the run, one thread that works a small share of the time and leaves its
finding for the loader; `before` reads them before the first step. Data-parallel ranks share the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_retro.artifacts.verified import Verification, unread, whole_file_check
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.native import REMEDY
from megatron_retro.data.token_file import TokenFile, bin_path
from megatron_retro.errors import DamagedArtifact


@dataclass(frozen=True)
class Unverified:
    """What was opened without being read: token files, and other files of an artifact by its manifest."""

    files: Sequence[TokenFile]
    databases: Sequence[ChunkDatabase] = ()

    def checks(self, rank: int, size: int) -> Iterator[Callable[[], object]]:
        """Pieces of work for one of `size` ranks, each a call that raises if something is damaged."""
        place = 0
        for file in {file.prefix: file for file in self.files}.values():
            if file.manifest is None or not file.is_mapped:  # blocks from a store are verified as they come
                continue
            for name in unread(file.manifest):
                if name == bin_path(file.prefix).name and file.checked is not None:
                    blocks = range((rank - place) % size, file.checked.num_blocks, size)
                    yield from (lambda number=number, file=file: require_block(file, number) for number in blocks)
                    place += file.checked.num_blocks
                    continue
                if place % size == rank:
                    yield whole_file_check(Path(file.prefix), file.manifest, name, REMEDY)
                place += 1
        for database in {str(database.path): database for database in self.databases}.values():
            for name in unread(database.manifest):
                if place % size == rank:
                    yield whole_file_check(database.path, database.manifest, name, REMEDY)
                place += 1


def require_block(file: TokenFile, number: int) -> None:
    """Verify one block of a token file; an error says which documents lie in it."""
    checked = file.checked
    if checked is None:
        return
    try:
        checked.require_block(number)
    except DamagedArtifact as damage:
        itemsize = file.dtype.itemsize
        first = number * checked.block_bytes // itemsize
        last = min(first + checked.block_bytes // itemsize, file.num_tokens) - 1
        documents = file.documents_of(np.array([first, last]))
        raise DamagedArtifact(
            f"{damage.what}; documents {documents[0]} to {documents[1]} lie there", got=damage.got, fix=damage.fix
        ) from None


def start_verification(mode: str, unverified: Unverified, rank: int, size: int) -> Verification | None:
    """As `--verify-tokens` says; None for `off` and after `before`, when nothing is left to do."""
    if mode == "off":
        return None
    verification = Verification(unverified.checks(rank, size))
    verification.start()
    if mode == "background":
        return verification
    verification.finish()
    return None
