"""Ranks that share sequences: documents, leaks across their borders, what they draw, and what a loader hands them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.config.data import DataConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import Settings
from megatron_retro.microbatch import Microbatch, Neighbors
from megatron_retro.ops import compilation
from megatron_retro.parallel.mesh import build_mesh
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.testing.layout_grid import TOLERANCE
from megatron_retro.testing.layouts import (
    LIKE_GEMMA3,
    random_batches,
    reference_outcome,
    run_layout,
    tiny_settings,
    worst_differences,
)
from megatron_retro.testing.processes import run_ranks

SHARED = {"context_parallel_size": 2}


def built(settings: Settings) -> ParallelModel:
    mesh = build_mesh(settings[ParallelConfig], torch.device("cpu"))
    return ParallelModel(settings, mesh, stage_parts(settings, settings[DataConfig].seq_length))


def in_documents(batch: Microbatch[Tensor], number: int) -> Microbatch[Tensor]:
    """Documents that begin at the borders of spans, inside of them, and one that ends where it begins."""
    starts = torch.zeros(batch.tokens_BS.shape[1], dtype=torch.long)
    starts[[8, 9, 16 + number, 30]] = 1
    first = torch.cummax(starts * torch.arange(len(starts)), 0).values
    ids, positions = starts.cumsum(0)[None], (torch.arange(len(starts)) - first)[None]
    return replace(batch, document_ids_BS=ids, position_ids_BS=positions)


@pytest.mark.parametrize(
    "model",
    [
        pytest.param({}, marks=pytest.mark.full, id="all earlier tokens"),
        pytest.param(LIKE_GEMMA3, id="windows"),
        pytest.param({**LIKE_GEMMA3, "compile": True}, marks=pytest.mark.full, id="compiled"),
    ],
)
def test_documents_stay_apart(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    settings = tiny_settings(**SHARED, **model, global_batch_size=2)
    batches = [in_documents(batch, number) for number, batch in enumerate(random_batches(settings))]
    reference = reference_outcome(settings, batches)
    worst = worst_differences(reference, run_layout(settings, 2, batches))
    assert {name: error for name, error in worst.items() if not error < TOLERANCE} == {}
    plain = [replace(batch, document_ids_BS=None, position_ids_BS=None) for batch in batches]
    assert abs(reference_outcome(settings, plain).loss - reference.loss) > 1e-4 * reference.loss


def test_neighbors_of_a_chunk_change_no_earlier_bit_on_any_rank() -> None:
    """Losses of tokens show their logits: [0, (u+1)m-1) stay, the next one does not, whoever holds which chunk."""
    settings = tiny_settings(context_parallel_size=4, seq_length=64, global_batch_size=1)
    (batch,) = random_batches(settings, absent=False)
    assert batch.neighbors is not None

    def changed(chunk: int) -> Microbatch[Tensor]:
        assert batch.neighbors is not None
        tokens = batch.neighbors.tokens_BCKR.clone()
        tokens[:, chunk] = (tokens[:, chunk] + 7) % 61
        return replace(batch, neighbors=Neighbors(tokens, batch.neighbors.mask_BCKR))

    def losses() -> list[Tensor]:
        model = built(settings)
        found = model.evaluate([model.own_part(each) for each in (batch, *map(changed, range(8)))])
        assert found is not None
        return found

    ranks = run_ranks(losses, 4)
    for before, *after in ranks:
        for chunk, loss in enumerate(after):
            first = (chunk + 1) * 8 - 1
            assert torch.equal(loss[:, :first], before[:, :first])
            assert (loss[:, first:] != before[:, first:]).all()
    assert all(torch.equal(loss, first) for rank in ranks for loss, first in zip(rank, ranks[0], strict=True))


def test_ranks_drop_other_elements_and_the_same_ones_again() -> None:
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "retro_encoder_hidden_dropout": 0.2}
    settings = tiny_settings(**SHARED, **dropout, global_batch_size=1)
    (batch,) = random_batches(settings)
    same = replace(batch, tokens_BS=torch.full_like(batch.tokens_BS, 3))

    def steps(recompute: str) -> tuple[list[float], Tensor]:
        model = built(settings.replace(recompute_granularity=recompute))
        seen: list[Tensor] = []
        assert model.stages[0].model.embedding is not None
        model.stages[0].model.embedding.register_forward_hook(lambda *found: seen.append(found[-1].detach()))
        return [model.train_step([model.own_part(same)], step=step).loss for step in (0, 0, 1)], seen[0]

    found = run_ranks(lambda: [steps("none"), steps("full")], 2)
    ((first, embedded), (again, _)), ((second, other), _) = found
    assert first == second and first[0] == first[1] != first[2]
    assert ((embedded == 0) != (other == 0)).float().mean() > 0.1, "one embedding, two masks"
    assert again == first
