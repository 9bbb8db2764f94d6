"""Arrays of the loader as tensors on a device."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_retro.assembly.trainable import TensorBatch
from megatron_retro.data.batches import Batch


def to_tensors(batch: Batch, device: torch.device) -> TensorBatch:
    """A micro-batch on the device; token ids become int64."""
    return TensorBatch(
        tokens_BS=_ids(batch.tokens_BS, device),
        labels_BS=_ids(batch.labels_BS, device),
        loss_mask_BS=_flags(batch.loss_mask_BS, device),
        position_ids_BS=_optional_ids(batch.position_ids_BS, device),
        document_ids_BS=_optional_ids(batch.document_ids_BS, device),
        neighbor_tokens_BCKR=_optional_ids(batch.neighbor_tokens_BCKR, device),
        neighbor_mask_BCKR=None if batch.neighbor_mask_BCKR is None else _flags(batch.neighbor_mask_BCKR, device),
    )


def _ids(array: NDArray[Any], device: torch.device) -> Tensor:
    return _moved(torch.from_numpy(array.astype(np.int64)), device)


def _optional_ids(array: NDArray[Any] | None, device: torch.device) -> Tensor | None:
    return None if array is None else _ids(array, device)


def _flags(array: NDArray[Any], device: torch.device) -> Tensor:
    return _moved(torch.from_numpy(np.ascontiguousarray(array, dtype=np.bool_)), device)


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    # only from pinned memory does a copy go on while the host does; torch keeps the memory until the copy is done
    held = tensor.pin_memory() if device.type == "cuda" else tensor
    return held.to(device, non_blocking=True)
