"""What was retrieved for a batch: tokens and which of them exist."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """`tokens_BCKR` and `mask_BCKR` (True = exists). An absent neighbour is all False; its tokens are never read."""

    tokens_BCKR: Tensor
    mask_BCKR: Tensor

    def __post_init__(self) -> None:
        if self.tokens_BCKR.shape != self.mask_BCKR.shape or self.mask_BCKR.dtype != torch.bool:
            raise ValueError(
                f"neighbour tokens {tuple(self.tokens_BCKR.shape)} need a bool mask of their shape, "
                f"got {self.mask_BCKR.dtype} {tuple(self.mask_BCKR.shape)}"
            )

    @property
    def num_chunks(self) -> int:
        """Chunks that have an entry."""
        return self.tokens_BCKR.shape[1]

    @property
    def has_room(self) -> bool:
        """False when there is no chunk, no neighbour or no token at all to speak of."""
        return self.tokens_BCKR.numel() > 0

    def first_chunks(self, count: int) -> Neighbors:
        """The entries of the first `count` chunks."""
        if self.num_chunks < count:
            raise ValueError(f"{count} chunks are complete, but neighbours are given for {self.num_chunks}")
        return Neighbors(self.tokens_BCKR[:, :count], self.mask_BCKR[:, :count])

    def without_masks(self) -> Neighbors:
        """Everything exists, as the published checkpoints were trained: in place of the absent, what stands there."""
        return Neighbors(self.tokens_BCKR.clamp(min=0), torch.ones_like(self.mask_BCKR))

    def safe_tokens(self) -> Tensor:
        """The tokens with 0 in place of those that do not exist, so that any table can be asked for them."""
        return self.tokens_BCKR.masked_fill(~self.mask_BCKR, 0).long()
