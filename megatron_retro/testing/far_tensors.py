"""Tensors whose entries lie beyond 2^31 elements of each other, in memory that is hardly filled."""

from __future__ import annotations

import torch
from torch import Tensor

FAR = int(2.2e9)  # elements: more than 32 bits count


def spread(values: Tensor) -> Tensor:
    """The same values, the two entries of the first dimension that is not 1 far apart."""
    dimension = next(dim for dim, size in enumerate(values.shape) if size > 1)
    if values.shape[dimension] != 2:
        raise ValueError(f"two entries can be far apart, not {values.shape[dimension]}")
    strides = [FAR if dim == dimension else stride for dim, stride in enumerate(values.stride())]
    room = torch.empty(FAR + values.numel(), dtype=values.dtype, device=values.device)
    return room.as_strided(values.shape, strides).copy_(values)
