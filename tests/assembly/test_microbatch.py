"""A microbatch on its way from the loader to a stage."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.pipelining.microbatch import split_args_kwargs_into_chunks

from megatron_retro.errors import DataError
from megatron_retro.microbatch import Microbatch, Neighbors
from megatron_retro.parallel import stages  # noqa: F401  (it tells torch what a microbatch is made of)

BATCH = Microbatch(
    tokens_BS=np.arange(6, dtype=np.uint16).reshape(2, 3),
    labels_BS=np.full((2, 3), 65535, dtype=np.uint16),
    loss_mask_BS=np.array([[True, False, True]] * 2),
    sample_ids_B=np.arange(2),
    neighbors=Neighbors(np.ones((2, 1, 2, 4), dtype=np.int32), np.ones((2, 1, 2, 4), dtype=np.bool_)),
)


def test_values_and_types_on_the_cpu() -> None:
    found = BATCH.to(torch.device("cpu"))
    assert found.tokens_BS.dtype == torch.int64 and found.tokens_BS.tolist() == BATCH.tokens_BS.tolist()
    assert found.labels_BS.tolist() == [[65535] * 3] * 2
    assert found.loss_mask_BS.dtype == torch.bool and found.position_ids_BS is None


def test_a_gpu_copies_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the two calls are played: what moves is what was pinned."""
    if torch.cuda.is_available():
        found = BATCH.to(torch.device("cuda"))
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
    found = BATCH.to(torch.device("cuda"))
    assert len(pinned) == 5 and found.neighbors is not None


def test_what_is_joined_is_what_torch_cuts_again() -> None:
    """A pipeline gets the microbatches of a step as one, and its schedule cuts them through the tree of tensors."""
    batches = [BATCH.to(torch.device("cpu")), replace(BATCH, tokens_BS=BATCH.tokens_BS + 6).to(torch.device("cpu"))]
    joined = Microbatch.joined(batches, torch.cat, same_size=True)
    _, cut = split_args_kwargs_into_chunks((), {"batch": joined}, 2)
    for given, found in zip(batches, cut, strict=True):
        arrays = found["batch"].arrays()
        assert arrays.keys() == given.arrays().keys()
        assert all(torch.equal(arrays[name], tensor) for name, tensor in given.arrays().items())


@pytest.mark.parametrize("same_size", [True, False])
def test_only_what_is_alike_is_joined(same_size: bool) -> None:
    smaller = Microbatch.of_arrays({name: array[:1] for name, array in BATCH.arrays().items()})
    if same_size:
        with pytest.raises(DataError, match="tokens_BS differ"):
            Microbatch.joined([BATCH, smaller], np.concatenate, same_size=True)
    else:
        assert Microbatch.joined([BATCH, smaller], np.concatenate).num_samples == 3
    with pytest.raises(DataError, match=r"neighbor_tokens_BCKR differ[\s\S]*1 without"):
        Microbatch.joined([BATCH, replace(BATCH, neighbors=None)], np.concatenate, same_size=same_size)
