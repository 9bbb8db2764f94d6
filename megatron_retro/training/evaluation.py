"""Losses of held-out tokens: the same batches every time, under every variant of neighbours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_retro.assembly.parallel_model import ParallelModel
from megatron_retro.data.loader import Loader
from megatron_retro.data.neighbor_transforms import with_variant
from megatron_retro.microbatch import Array, Microbatch, label_checksum
from megatron_retro.runtime.run_records import HeldOutSamples


@dataclass(frozen=True)
class TokenLosses:
    """Loss and mask of every token of an evaluation, samples in the global order: [N, S]."""

    losses: NDArray[np.float32]
    mask: NDArray[np.bool_]
    texts: NDArray[np.int64] | None = None  # a checksum per sample of what was predicted

    @property
    def mean(self) -> float:
        return float(self.losses.sum(where=self.mask, dtype=np.float64) / max(self.mask.sum(), 1))


def evaluation_batches(loader: Loader, steps: int) -> list[Microbatch[Array]]:
    """This rank's share of the first `steps` batches of the validation order, always the same."""
    return loader.first(steps)


def variant_batches(
    loader: Loader, batches: Sequence[Microbatch[Array]], variant: str, seed: int
) -> list[Microbatch[Array]]:
    """This rank's share under a variant; random neighbours come from any sample of the evaluation."""
    everyone = sum(batch.num_samples for batch in batches) * loader.data_size
    return with_variant(batches, variant, seed, num_samples=everyone, read=loader.dataset.read)


def token_losses(
    trainable: ParallelModel, batches: Sequence[Microbatch[Array]], group: dist.ProcessGroup | None
) -> TokenLosses:
    """Losses gathered from all data ranks, the same on every rank. Every rank calls it."""
    losses = trainable.evaluate([batch.to(trainable.device) for batch in batches])
    mine: list[tuple[NDArray[Any], ...]] | None = None
    if losses is not None:
        mine = [
            (batch.sample_ids_B, loss.numpy(), batch.loss_mask_BS, _checksums(batch))
            for batch, loss in zip(batches, losses, strict=True)
        ]
    return _joined(_gathered(mine, group))


def sample_sums(measured: TokenLosses, documents: NDArray[np.int64] | None = None) -> HeldOutSamples:
    """The losses summed over each sample."""
    losses = measured.losses.sum(1, where=measured.mask, dtype=np.float64)
    return HeldOutSamples(
        [round(float(loss), 4) for loss in losses],
        measured.mask.sum(1).tolist(),
        () if measured.texts is None else measured.texts.tolist(),
        () if documents is None else documents.tolist(),
    )


def _checksums(batch: Microbatch[Array]) -> NDArray[np.int64]:
    """Of the labels that count: what was read beside them (passages, padding) may differ between two runs."""
    rows = zip(batch.labels_BS, batch.loss_mask_BS, strict=True)
    return np.array([label_checksum(labels[counts]) for labels, counts in rows], np.int64)


def _gathered(mine: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None or dist.get_world_size(group) == 1:
        return [mine]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, mine, group=group)
    return everyone


def _joined(everyone: Sequence[Any]) -> TokenLosses:
    """Samples in order; ranks of one replica report the same samples, of which one copy is kept."""
    parts = [part for of_rank in everyone if of_rank is not None for part in of_rank]
    ids = np.concatenate([part[0] for part in parts])
    _, first = np.unique(ids, return_index=True)
    losses = np.concatenate([part[1] for part in parts])[first]
    mask = np.concatenate([part[2] for part in parts])[first]
    texts = np.concatenate([part[3] for part in parts])[first]
    return TokenLosses(losses.astype(np.float32), mask.astype(np.bool_), texts)
