"""The one place where a parameter becomes the plain tensor that an operator sees.

A model that is cut holds DTensors; operators, hand-written kernels among them, compute on this rank's part.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor


def local(parameter: Tensor) -> Tensor:
    """This rank's part of a parameter, gradients flowing back; a plain tensor is its own part."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
