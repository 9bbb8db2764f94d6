"""One evaluation of a run: validation loss, and the health of its retrieval."""

from __future__ import annotations

import time

import torch.distributed as dist

from megatron_retro.assembly.run_parts import RunParts
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.neighbor_transforms import VARIANTS
from megatron_retro.runtime.run_records import EvaluationRecord
from megatron_retro.training.evaluation import evaluation_batches, sample_sums, token_losses, variant_batches
from megatron_retro.training.retrieval_health import alarms, retrieval_health, watched_layers


class Evaluator:
    """Evaluates the same batches every time; draws nothing from the generators of training."""

    def __init__(self, parts: RunParts, group: dist.ProcessGroup) -> None:
        self._parts, self._group = parts, group
        self._training = parts.settings[TrainingConfig]
        self._retro = parts.settings[RetroConfig]

    def evaluate(self, step: int) -> EvaluationRecord:
        """Every rank calls it and gets the same record."""
        if self._parts.validation is None:
            raise ValueError("an evaluation needs a validation split")
        start = time.perf_counter()
        seed = self._training.seed
        batches = evaluation_batches(self._parts.validation, self._training.eval_iters)
        with watched_layers(self._parts.model.module) as watch:
            real = token_losses(self._parts.model, batches, self._group)
        documents = self._parts.validation.dataset.documents(range(len(real.losses)))
        health = None
        if self._retro.reads_neighbors() and self._training.retrieval_health:
            layers = watch.measured(self._group)
            by_variant = {"real": real}
            for variant in (variant for variant in VARIANTS if variant != "real"):
                changed = variant_batches(self._parts.validation, batches, variant, seed)
                by_variant[variant] = token_losses(self._parts.model, changed, self._group)
            health = retrieval_health(by_variant, self._retro.retro_chunk_length, layers, seed, documents)
        return EvaluationRecord(
            step=step,
            seconds=time.perf_counter() - start,
            loss=real.mean,
            tokens=int(real.mask.sum()),
            samples=sample_sums(real, documents),
            retrieval=health,
            alarms=() if health is None else alarms(health),
        )
