"""One evaluation of a run: validation loss, and the health of its retrieval."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from torch import Tensor

from megatron_retro.assembly.run_parts import RunParts
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.neighbor_transforms import VARIANTS
from megatron_retro.microbatch import Array, Microbatch
from megatron_retro.parallel.gathering import gather_to_first
from megatron_retro.runtime.run_records import EvaluationRecord
from megatron_retro.training.evaluation import (
    REAL,
    SampleSums,
    evaluation_batches,
    joined,
    packed,
    packed_length,
    sums_of,
    variant_batches,
)
from megatron_retro.training.retrieval_health import alarms, retrieval_health, watched_layers


class Evaluator:
    """Evaluates the same batches every time; draws nothing from the generators of training."""

    def __init__(self, parts: RunParts) -> None:
        self._parts = parts
        self._training = parts.settings[TrainingConfig]
        self._retro = parts.settings[RetroConfig]

    def evaluate(self, step: int) -> EvaluationRecord | None:
        """Every rank calls it; the first one gets the record, and it alone draws intervals."""
        parts, seed = self._parts, self._training.seed
        if parts.validation is None:
            raise ValueError("an evaluation needs a validation split")
        start = time.perf_counter()
        batches = evaluation_batches(parts.validation, self._training.eval_iters)
        losses = {}
        with watched_layers(parts.model.module, self._num_layers) as watch:
            losses[REAL] = self._losses(batches)
        watches = self._retro.reads_neighbors() and self._training.retrieval_health
        layers = watch.measured(parts.model.device) if watches else None
        for variant in VARIANTS if watches else ():
            if variant != REAL:
                losses[variant] = self._losses(variant_batches(parts.validation, batches, variant, seed))
        sums = self._gathered(batches, losses)
        if sums is None:
            return None
        documents = parts.validation.dataset.documents(range(len(sums.ids_N)))
        health = None if layers is None else retrieval_health(sums, layers, seed, documents)
        return EvaluationRecord(
            step=step,
            seconds=time.perf_counter() - start,
            loss=sums.mean,
            tokens=int(sums.tokens_N.sum()),
            samples=sums.samples(documents),
            retrieval=health,
            alarms=() if health is None else alarms(health),
        )

    @property
    def _num_layers(self) -> int:
        return self._parts.settings[ModelConfig].num_layers

    def _losses(self, batches: Sequence[Microbatch[Array]]) -> list[Tensor] | None:
        model = self._parts.model
        return model.evaluate([model.own_part(batch).to(model.device) for batch in batches])

    def _gathered(
        self, batches: Sequence[Microbatch[Array]], losses: Mapping[str, Sequence[Tensor] | None]
    ) -> SampleSums | None:
        """All samples' sums on the first rank."""
        chunk_length = self._retro.retro_chunk_length if len(losses) > 1 else 1
        own = {variant: found for variant, found in losses.items() if found is not None}
        row = packed(sums_of(batches, own, chunk_length)) if own else None
        num_samples = sum(batch.num_samples for batch in batches)
        length = packed_length(num_samples, tuple(losses), chunk_length)
        rows = gather_to_first(row, length, self._parts.model.mesh)
        return None if rows is None else joined(rows, num_samples, tuple(losses), chunk_length)
