"""Neighbours that are read often are encoded once: their states, kept by their tokens within a bound of memory.

Only an encoder that is closed to the chunk that retrieved them (one that started from the decoder and was frozen) gives
the same states for every text.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_retro.microbatch import Neighbors

MEGABYTE = 1 << 20
DEFAULT_MEGABYTES = 256


class KeptEncodings:
    """States of single neighbours; those that were not read for longest go first."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self.num_encoded, self.num_read = 0, 0
        self._states: OrderedDict[bytes, Tensor] = OrderedDict()

    def read(self, neighbors: Neighbors[Tensor], encode: Callable[[Neighbors[Tensor]], Tensor]) -> Tensor:
        """[B, C, K, R, H]: what is kept and, for the others, what `encode` gives for [X, 1, 1, R] of them."""
        shape, length = neighbors.tokens_BCKR.shape[:3], neighbors.tokens_BCKR.shape[-1]
        mask_XR = neighbors.mask_BCKR.reshape(-1, length)
        tokens_XR = neighbors.tokens_BCKR.reshape(-1, length)
        keys = [row.tobytes() for row in tokens_XR.masked_fill(~mask_XR, -1).cpu().numpy()]
        places = {key: place for place, key in enumerate(keys)}
        found = {key: self._states[key] for key in places if key in self._states}
        fresh = {key: place for key, place in places.items() if key not in found}
        if fresh:
            chosen = list(fresh.values())
            some = Neighbors(tokens_XR[chosen][:, None, None], mask_XR[chosen][:, None, None])
            found |= dict(zip(fresh, encode(some)[:, 0, 0], strict=True))
        self.num_encoded, self.num_read = self.num_encoded + len(fresh), self.num_read + len(keys)
        for key in places:
            self._keep(key, found[key])
        return torch.unflatten(torch.stack([found[key] for key in keys]), 0, shape)

    def _keep(self, key: bytes, state_RH: Tensor) -> None:
        if key in self._states:
            self._states.move_to_end(key)
            return
        self._states[key] = state_RH.clone()  # not a part of the batch that it was encoded in
        self.num_bytes += state_RH.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self._states.popitem(last=False)[1].nbytes
