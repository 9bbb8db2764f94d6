"""Files of any size as arrays that the system reads page by page, when they are touched."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.errors import ArtifactError


def map_file(path: Path) -> NDArray[np.uint8]:
    """Map a file into memory as bytes."""
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            if size == 0:
                return np.zeros(0, np.uint8)
            return np.frombuffer(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise ArtifactError(
            f"there is no file {path}",
            fix="give the prefix without .bin and .idx, or make the file with `megatron-retro preprocess`",
        ) from None


def expect_random_reads(content: NDArray[Any]) -> None:
    """Tell the system that a mapped file is read at random: a fault then reads its pages, not those behind them."""
    base: object = content
    while base is not None and not isinstance(base, mmap.mmap):
        base = base.obj if isinstance(base, memoryview) else getattr(base, "base", None)
    if isinstance(base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
        base.madvise(mmap.MADV_RANDOM)
