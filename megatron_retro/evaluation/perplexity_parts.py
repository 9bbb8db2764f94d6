"""Losses that many workers measure, kept in blocks: worker i of N does every N-th block that nobody has done yet.

A block's file is written whole or not at all and its name carries what the losses depend on, so a run that is killed,
or started again with more or fewer workers, goes on; losses of another model, corpus or protocol are never mixed in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import write_file
from megatron_retro.errors import DamagedArtifact, Requeue
from megatron_retro.evaluation.perplexity import Group
from megatron_retro.runtime.console import Progress
from megatron_retro.runtime.strict_json import json_text
from megatron_retro.runtime.workers import Worker

BLOCK = 8  # groups; what a kill loses at most


@dataclass(frozen=True)
class PerplexityParts:
    """The blocks of one measurement. `identity` is everything that losses depend on."""

    directory: Path
    groups: Sequence[Group]
    num_variants: int
    identity: Mapping[str, Any]

    @property
    def num_blocks(self) -> int:
        """Blocks of `BLOCK` groups."""
        return -(-len(self.groups) // BLOCK)

    def open_blocks(self, worker: Worker) -> list[int]:
        """This worker's blocks that are not there yet."""
        return [block for block in range(worker.index, self.num_blocks, worker.count) if not self._path(block).exists()]

    def fill(
        self,
        blocks: Sequence[int],
        measure: Callable[[Group], NDArray[np.float32] | None],
        writes: bool,
        stop: Callable[[], str | None],
    ) -> None:
        """Measure these blocks; the ranks of a replica call it together and one of them writes.

        `stop` is asked between blocks, by all ranks alike.
        """
        with Progress("perplexity", len(blocks), "blocks") as bar:
            for block in blocks:
                found = [measure(group) for group in self._groups(block)]
                if writes:
                    whole = np.concatenate([one for one in found if one is not None], axis=1)
                    write_file(self._path(block), whole.astype("<f4").tobytes())
                bar.advance(1)
                if (reason := stop()) is not None:
                    raise Requeue(f"the measurement stopped early: {reason}", fix="run the same command again to go on")

    def losses(self) -> list[NDArray[np.float32]] | None:
        """[variants, tokens] of each block; None as long as one is missing."""
        if not all(self._path(block).exists() for block in range(self.num_blocks)):
            return None
        return [self._read(block) for block in range(self.num_blocks)]

    def _groups(self, block: int) -> Sequence[Group]:
        return self.groups[block * BLOCK : (block + 1) * BLOCK]

    def _path(self, block: int) -> Path:
        content = json_text({**self.identity, "variants": self.num_variants}, sort_keys=True, default=str)
        fingerprint = hashlib.sha256(content.encode()).hexdigest()[:16]
        return self.directory / f"{fingerprint}.{block}-of-{self.num_blocks}.f32"

    def _read(self, block: int) -> NDArray[np.float32]:
        path, tokens = self._path(block), 0
        for group in self._groups(block):
            tokens += sum(window.stop - window.first_scored for window in group.windows)
        content = path.read_bytes()
        if len(content) != 4 * self.num_variants * tokens:
            raise DamagedArtifact(
                f"{path} holds other losses",
                got=f"{len(content)} bytes",
                expected=f"{4 * self.num_variants * tokens}",
                fix="remove it: it is measured again",
            )
        return np.frombuffer(content, "<f4").reshape(self.num_variants, tokens)
