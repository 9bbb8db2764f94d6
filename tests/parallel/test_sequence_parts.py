"""Which part of a sequence each rank has, and what ranks that share sequences hear of one another."""

from __future__ import annotations

from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.microbatch import Microbatch, Neighbors
from megatron_retro.parallel.collectives import all_reduce
from megatron_retro.parallel.mesh import CONTEXT, DATA, TENSOR, build_mesh
from megatron_retro.parallel.sequence_parts import ContextAxis, part_of, spans_of
from megatron_retro.testing.layouts import random_batches, tiny_settings
from megatron_retro.testing.processes import run_ranks


@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_ranks_hold_every_position_once_and_have_equal_work(size: int) -> None:
    chunk, length = 4, 4 * 2 * 3 * size
    spans = [spans_of(length, rank, size) for rank in range(size)]
    assert sorted(chain.from_iterable(chain.from_iterable(spans))) == list(range(length))
    assert all(span.start % chunk == 0 and span.stop % chunk == 0 for own in spans for span in own)
    keys_seen = {sum(position + 1 for span in own for position in span) for own in spans}
    assert len(keys_seen) == 1


def as_arrays(batch: Microbatch[Tensor]) -> Microbatch[Any]:
    return Microbatch.of_arrays({name: tensor.numpy() for name, tensor in batch.arrays().items()}, batch.sample_ids_B)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("on_host", [True, False])
def test_parts_make_up_the_whole(size: int, on_host: bool) -> None:
    length = 16 * size
    settings = tiny_settings(seq_length=length, micro_batch_size=2, global_batch_size=2)
    batch = random_batches(settings, absent=False)[0]
    ids = torch.arange(length).expand(2, -1) // 11
    batch = Microbatch.of_arrays({**batch.arrays(), "position_ids_BS": ids + 100, "document_ids_BS": ids})
    whole = as_arrays(batch) if on_host else batch
    assert whole.neighbors is not None
    for rank in range(size):
        part = part_of(whole, rank, size)
        own = list(chain.from_iterable(spans_of(length, rank, size)))
        for name in ("tokens_BS", "labels_BS", "loss_mask_BS", "position_ids_BS"):
            assert (getattr(part, name) == getattr(whole, name)[:, own]).all(), name
        assert part.document_ids_BS is whole.document_ids_BS
        chunks = [position // 8 for position in own[::8]]
        assert part.neighbors is not None and part.neighbors.mask_before_BPKR is not None
        assert (part.neighbors.tokens_BCKR == whole.neighbors.tokens_BCKR[:, chunks]).all()
        assert (part.neighbors.mask_BCKR == whole.neighbors.mask_BCKR[:, chunks]).all()
        for number, span in enumerate(spans_of(length, rank, size)):
            before = part.neighbors.mask_before_BPKR[:, number]
            assert (before == (whole.neighbors.mask_BCKR[:, span.start // 8 - 1] & bool(span.start))).all()
    assert whole.neighbors.mask_BCKR[:, 0].any(), "nothing was changed in place"


def test_masks_of_spans_are_rows_of_their_own() -> None:
    mask = torch.rand(3, 8, 2, 5, generator=torch.Generator().manual_seed(0)) > 0.5
    neighbors = Neighbors(mask.long(), mask)
    with pytest.raises(ValueError, match="whole sequences"):
        neighbors.mask_of_spans()
    part = part_of(Microbatch(mask[:, :, 0, 0].long(), mask[:, :, 0, 0], mask[:, :, 0, 0], neighbors=neighbors), 1, 2)
    assert part.neighbors is not None
    rows = part.neighbors.mask_of_spans().view(3, 2, 3, 2, 5)
    assert torch.equal(rows[:, 0], mask[:, 1:4]) and torch.equal(rows[:, 1], mask[:, 3:6])


def test_what_ranks_gather_is_in_order_and_gradients_come_home() -> None:
    """Four ranks of two data shares and two of tensor: the context groups are neighbours on the data axis."""
    config = ParallelConfig(tensor_model_parallel_size=2, context_parallel_size=2)
    whole = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def exchanged() -> tuple[bool, ...]:
        mesh = build_mesh(config, torch.device("cpu"))
        assert mesh.rank(CONTEXT) == mesh.rank(DATA) % 2
        axis = ContextAxis(mesh.group(CONTEXT))
        own = list(chain.from_iterable(axis.spans(4)))
        scale = 1.0 + mesh.rank(DATA) // 2 + 10 * mesh.rank(TENSOR)  # groups must not mix
        part = (scale * whole[:, own]).requires_grad_()
        found, chunks = axis.whole(part), axis.behind_chunk_before(part)
        shifted = torch.cat((torch.zeros_like(whole[:, :1]), scale * whole), 1)
        expected = torch.stack([shifted[:, span.start : span.stop + 1] for span in axis.spans(4)], 1).flatten(0, 1)
        weights = torch.rand(found.shape, generator=torch.Generator().manual_seed(mesh.rank(CONTEXT)))
        (found * weights).sum().backward()
        assert part.grad is not None
        total = all_reduce(weights, axis.group)[:, own]
        gathered = part.grad.clone()
        part.grad = None
        chunks.sum().backward()
        reads = torch.tensor([2.0 if position in (1, 3, 5) else 1.0 for position in own])  # the last of a span, twice
        return (
            torch.equal(found, scale * whole),
            torch.equal(chunks, expected),
            torch.allclose(gathered, total.double()),
            torch.equal(part.grad, reads[None, :, None].expand_as(part.grad).double()),
        )

    assert run_ranks(exchanged, 8) == [(True,) * 4] * 8
