"""What the loader hands to training: plain arrays, tokens in their stored 16 or 32 bits."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


def label_checksum(labels: NDArray[Any]) -> int:
    """Of what a sample predicts: two measurements can be paired where theirs agree."""
    return zlib.crc32(labels.astype("<i4").tobytes())


@dataclass(frozen=True)
class Batch:
    """One micro-batch. Letters: B samples, S tokens of a sample, C chunks, K neighbours, R retrieved length.

    `neighbor_mask_BCKR` is False where a neighbour is absent or has ended; what lies there under it is zero.
    `document_ids_BS` counts the documents of a sample from 0. `sample_ids_B` are numbers of the global order.
    """

    tokens_BS: NDArray[Any]
    labels_BS: NDArray[Any]
    loss_mask_BS: NDArray[np.bool_]
    sample_ids_B: NDArray[np.int64]
    position_ids_BS: NDArray[np.int32] | None = None
    document_ids_BS: NDArray[np.int32] | None = None
    neighbor_tokens_BCKR: NDArray[Any] | None = None
    neighbor_mask_BCKR: NDArray[np.bool_] | None = None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.sample_ids_B)
