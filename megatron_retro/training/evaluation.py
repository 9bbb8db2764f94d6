"""Losses of held-out tokens, summed where they are: the same batches every time, under every variant of neighbours.

No rank ever holds the losses of another's tokens. Each sums its own over samples, on the device; the sums travel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_retro.data.loader import Loader
from megatron_retro.data.neighbor_transforms import with_variant
from megatron_retro.microbatch import Array, Microbatch, label_checksum
from megatron_retro.runtime.run_records import HeldOutSamples

REAL = "real"


@dataclass(frozen=True)
class SampleSums:
    """Sums over the tokens of N held-out samples; `reached` are those that may see a neighbour.

    Of each variant of V: losses [N] of reached tokens, what they exceed those of real neighbours by, and the same
    excess summed over samples at each of the M places of the chunk that attends.
    """

    ids_N: Tensor
    texts_N: Tensor  # a checksum of what was predicted
    tokens_N: Tensor
    losses_N: Tensor
    reached_N: Tensor
    reached_losses: Mapping[str, Tensor]
    excess: Mapping[str, Tensor]
    places_M: Tensor  # how many reached tokens stand there
    excess_by_place: Mapping[str, Tensor]

    @property
    def mean(self) -> float:
        return float(self.losses_N.sum()) / max(int(self.tokens_N.sum()), 1)

    def samples(self, documents: NDArray[np.int64] | None = None) -> HeldOutSamples:
        """What the event log keeps of each sample."""
        return HeldOutSamples(
            [round(loss, 4) for loss in self.losses_N.tolist()],
            self.tokens_N.tolist(),
            self.texts_N.tolist(),
            () if documents is None else documents.tolist(),
        )


def evaluation_batches(loader: Loader, steps: int) -> list[Microbatch[Array]]:
    """This rank's share of the first `steps` batches of the validation order, always the same."""
    return loader.first(steps)


def variant_batches(
    loader: Loader, batches: Sequence[Microbatch[Array]], variant: str, seed: int
) -> list[Microbatch[Array]]:
    """This rank's share under a variant; random neighbours come from any sample of the evaluation."""
    everyone = sum(batch.num_samples for batch in batches) * loader.data_size
    return with_variant(batches, variant, seed, num_samples=everyone, read=loader.dataset.read)


def sums_of(
    batches: Sequence[Microbatch[Array]], losses: Mapping[str, Sequence[Tensor]], chunk_length: int
) -> SampleSums:
    """Of this rank's samples, on the device where the losses [B, S] of each batch under each variant are."""
    device = losses[REAL][0].device
    ids = torch.from_numpy(np.concatenate([batch.sample_ids_B for batch in batches]).astype(np.int64))
    texts = torch.from_numpy(np.concatenate([_checksums(batch) for batch in batches]))
    mask = torch.from_numpy(np.concatenate([batch.loss_mask_BS for batch in batches])).to(device).bool()
    return token_sums(
        {variant: torch.cat(list(parts)) for variant, parts in losses.items()},
        mask,
        chunk_length,
        ids_N=ids.to(device),
        texts_N=texts.to(device),
    )


def token_sums(
    losses: Mapping[str, Tensor], mask_NS: Tensor, chunk_length: int, *, ids_N: Tensor, texts_N: Tensor
) -> SampleSums:
    """The sums of [N, S] losses under each variant; a first chunk's tokens but the last see no neighbour."""
    reached_NS = mask_NS.clone()
    reached_NS[:, : chunk_length - 1] = False
    real = losses[REAL].double()
    excess = {
        variant: torch.where(reached_NS, found.double() - real, 0.0)
        for variant, found in losses.items()
        if variant != REAL
    }
    return SampleSums(
        ids_N,
        texts_N,
        mask_NS.sum(1),
        torch.where(mask_NS, real, 0.0).sum(1),
        reached_NS.sum(1),
        {variant: torch.where(reached_NS, found.double(), 0.0).sum(1) for variant, found in losses.items()},
        {variant: difference.sum(1) for variant, difference in excess.items()},
        _by_place(reached_NS.double(), chunk_length),
        {variant: _by_place(difference, chunk_length) for variant, difference in excess.items()},
    )


def _by_place(values_NS: Tensor, chunk_length: int) -> Tensor:
    """[M], summed at each place of the attending chunk: its first place is the last token of a chunk."""
    total_S = values_NS.sum(0)
    behind = -(len(total_S) + 1) % chunk_length
    return torch.nn.functional.pad(total_S, (1, behind)).view(-1, chunk_length).sum(0)


def _checksums(batch: Microbatch[Array]) -> NDArray[np.int64]:
    """Of the labels that count: what was read beside them (passages, padding) may differ between two runs."""
    rows = zip(batch.labels_BS, batch.loss_mask_BS, strict=True)
    return np.array([label_checksum(labels[counts]) for labels, counts in rows], np.int64)


def packed(sums: SampleSums) -> Tensor:
    """All of it as one row of int64: what ranks send. Floats keep their bits."""
    whole = (sums.ids_N, sums.texts_N, sums.tokens_N, sums.reached_N)
    floats = (
        sums.losses_N,
        *sums.reached_losses.values(),
        *sums.excess.values(),
        sums.places_M,
        *sums.excess_by_place.values(),
    )
    return torch.cat([*whole, torch.cat(floats).view(torch.int64)])


def packed_length(num_samples: int, variants: Sequence[str], chunk_length: int) -> int:
    """How many numbers a rank sends for its samples, whatever their length."""
    return num_samples * (4 + 2 * len(variants)) + chunk_length * len(variants)


def joined(rows: Tensor, num_samples: int, variants: Sequence[str], chunk_length: int) -> SampleSums:
    """What ranks packed, [ranks, length], as one; samples by their number."""
    others = [variant for variant in variants if variant != REAL]
    sizes = [num_samples] * (4 + 2 * len(variants)) + [chunk_length] * len(variants)
    parts = [part.contiguous() for part in torch.split(rows.cpu(), sizes, 1)]
    order = parts[0].flatten().argsort()
    ids, texts, tokens, reached = (part.flatten()[order] for part in parts[:4])
    floats = [part.view(torch.float64) for part in parts[4:]]
    of_samples = iter([part.flatten()[order] for part in floats[: -len(variants)]])
    of_places = iter([part.sum(0) for part in floats[-len(variants) :]])
    return SampleSums(
        ids,
        texts,
        tokens,
        next(of_samples),
        reached,
        {variant: next(of_samples) for variant in variants},
        {variant: next(of_samples) for variant in others},
        next(of_places),
        {variant: next(of_places) for variant in others},
    )
