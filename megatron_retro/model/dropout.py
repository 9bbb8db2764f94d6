"""Dropout of what a layer beside the model reads, as a module of its own: a cut can give it another draw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Dropout(nn.Module):
    """`kept` says where an element stays; an instance may be given another one."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance
        self.kept: Callable[[Tensor], Tensor] = self._drawn

    def _drawn(self, hidden: Tensor) -> Tensor:
        """True where an element stays."""
        return torch.rand_like(hidden, dtype=torch.float32) >= self.chance

    def forward(self, hidden: Tensor) -> Tensor:
        """Same shape; in evaluation the same tensor."""
        if not self.training or self.chance == 0.0:
            return hidden
        return hidden * self.kept(hidden) / (1.0 - self.chance) if self.chance < 1.0 else torch.zeros_like(hidden)
