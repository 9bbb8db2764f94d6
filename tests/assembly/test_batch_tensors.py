"""Batches on their way to a device."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_retro.assembly.batch_tensors import to_tensors
from megatron_retro.data.batches import Batch

BATCH = Batch(
    tokens_BS=np.arange(6, dtype=np.uint16).reshape(2, 3),
    labels_BS=np.full((2, 3), 65535, dtype=np.uint16),
    loss_mask_BS=np.array([[True, False, True]] * 2),
    sample_ids_B=np.arange(2),
    neighbor_tokens_BCKR=np.ones((2, 1, 2, 4), dtype=np.int32),
    neighbor_mask_BCKR=np.ones((2, 1, 2, 4), dtype=np.bool_),
)


def test_values_and_types_on_the_cpu() -> None:
    found = to_tensors(BATCH, torch.device("cpu"))
    assert found.tokens_BS.dtype == torch.int64 and found.tokens_BS.tolist() == BATCH.tokens_BS.tolist()
    assert found.labels_BS.tolist() == [[65535] * 3] * 2
    assert found.loss_mask_BS.dtype == torch.bool and found.position_ids_BS is None


def test_a_gpu_copies_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the two calls are played: what moves is what was pinned."""
    if torch.cuda.is_available():
        found = to_tensors(BATCH, torch.device("cuda"))
        torch.cuda.synchronize()
        assert found.tokens_BS.tolist() == BATCH.tokens_BS.tolist()
        return
    pinned: list[int] = []

    def pin(self: Tensor) -> Tensor:
        copy = self.clone()
        pinned.append(copy.data_ptr())
        return copy

    def move(self: Tensor, device: torch.device, non_blocking: bool) -> Tensor:
        assert non_blocking and self.data_ptr() == pinned[-1]
        return self

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", move)
    found = to_tensors(BATCH, torch.device("cuda"))
    assert len(pinned) == 5 and found.neighbor_tokens_BCKR is not None
