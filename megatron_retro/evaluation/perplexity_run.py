"""`evaluate perplexity`: a checkpoint, held-out text, and what comes out: figures, JSON and a page with the curve."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import write_file
from megatron_retro.assembly.loading import Loaded
from megatron_retro.assembly.replica_losses import ReplicaLosses, replica_losses
from megatron_retro.checkpoint.loading import describe_checkpoint
from megatron_retro.config.data import DataConfig, TokenizerConfig, WorkersConfig
from megatron_retro.config.evaluation import EvaluationConfig, PerplexityConfig
from megatron_retro.config.fields import field_specs
from megatron_retro.config.inference import EngineConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings, section_name
from megatron_retro.config.training import CheckpointConfig, PeftConfig, TrainingConfig
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.dataset import Dataset, short_rows
from megatron_retro.data.neighbor_transforms import VARIANTS
from megatron_retro.data.tokenizers import require_tokenizer
from megatron_retro.errors import ConfigError, Requeue
from megatron_retro.evaluation.leakage import leakage_curve, span_bytes
from megatron_retro.evaluation.perplexity import (
    Group,
    Measured,
    PerplexityParts,
    grouped,
    losses_of_group,
    measured,
    sliding_windows,
    spread,
    window_documents,
)
from megatron_retro.evaluation.verbatim import verbatim_share
from megatron_retro.microbatch import label_checksum
from megatron_retro.peft.prompts import configured_virtual_tokens
from megatron_retro.reporting.perplexity_page import (
    PERPLEXITY_RESULT,
    VARIANT_HEADER,
    PerplexityResult,
    VariantFigures,
    perplexity_page,
    variant_rows,
)
from megatron_retro.runtime.console import render_table, say
from megatron_retro.runtime.run_records import HeldOutSamples
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.runtime.statistics import bootstrap_ratio
from megatron_retro.runtime.strict_json import json_text

PAGE = "perplexity.html"
_MOST_SAMPLES = 2000
PARTS = "perplexity.parts"


def run_perplexity(settings: Settings) -> PerplexityResult | None:
    """Measure this worker's share, print, write; the result, from the worker that finds all shares done."""
    load = settings[CheckpointConfig].load
    if load is None:
        raise ConfigError("perplexity is that of a model", fix="give --load, a run's directory or a checkpoint")
    stopped: Requeue | None = None
    with replica_losses(settings, Path(load), settings[WorkersConfig].shard) as replica:
        dataset = held_out(settings, replica.loaded)
        _require_room_for_lead(replica.loaded, dataset)
        parts, protocol = _parts(settings, replica.loaded, dataset)
        try:
            _measure_share(replica, dataset, parts, _variants(settings, replica.loaded, dataset))
        except Requeue as request:
            stopped = request
        found = parts.losses() if replica.writes and stopped is None else None
    if stopped is not None:
        raise stopped
    if found is None:
        if replica.writes:
            say("this worker's share is done; the results come with the last worker")
        return None
    return _results(
        settings,
        replica.loaded,
        dataset,
        measured(dataset, parts.groups, found, _variants(settings, replica.loaded, dataset)),
        protocol,
    )


def _lead(model: Loaded) -> tuple[int, ...]:
    """The virtual tokens that stand before every window, as they stood before every prompt."""
    return configured_virtual_tokens(model.settings[PeftConfig])


def _require_room_for_lead(model: Loaded, dataset: Dataset) -> None:
    """Virtual tokens may move windows by whole chunks only: a chunk's neighbours come from a table, found for it."""
    count, room = len(_lead(model)), model.settings[ModelConfig].position_limit()
    if count and (dataset.boundaries.reset_attention_mask or dataset.boundaries.reset_position_ids):
        raise ConfigError(
            f"the virtual tokens of {model.path} stand in front of a window, not of each document in it",
            got="--reset-attention-mask or --reset-position-ids",
            fix="give --no-reset-attention-mask --no-reset-position-ids",
        )
    reads = model.retro.reads_neighbors() and any(source.neighbors for source in dataset.sources)
    if reads and count % model.retro.retro_chunk_length:
        raise ConfigError(
            f"the virtual tokens of {model.path} move windows off the grid of chunks that neighbours were found for",
            got=f"{count} virtual tokens",
            expected=f"a multiple of the chunk length {model.retro.retro_chunk_length}, where neighbours are read",
            fix="tune with such a number of virtual tokens, or evaluate its answers",
        )
    if room is not None and count + dataset.seq_length > room:
        raise ConfigError(
            "windows behind virtual tokens are longer than the model's positions",
            got=f"{count} + {dataset.seq_length} tokens",
            expected=f"at most {room}",
            fix="give a shorter --seq-length",
        )


def _variants(settings: Settings, model: Loaded, dataset: Dataset) -> tuple[str, ...]:
    if not settings[TrainingConfig].retrieval_health:
        return ("real",)
    reads = model.retro.reads_neighbors() and all(source.neighbors for source in dataset.sources)
    return VARIANTS if reads else ("real",)


def _parts(settings: Settings, model: Loaded, dataset: Dataset) -> tuple[PerplexityParts, dict[str, Any]]:
    """The blocks of work, and what the result says of the protocol."""
    config = settings[PerplexityConfig]
    stride = config.perplexity_stride or _half(dataset)
    every = sliding_windows(dataset, stride)
    windows = spread(every, config.perplexity_windows)
    protocol = {
        "checkpoint": str(model.path),
        "model": model.fingerprint,
        "data": dataset.fingerprint,
        "split": config.perplexity_split,
        "stride": stride,
        "windows": len(windows),
        "windows_of": len(every),
    }
    size, dtype = config.perplexity_batch_size, settings[EngineConfig].dtype
    identity = {**protocol, "checkpoint": None, "batch_size": size, "dtype": dtype}
    directory = Path(settings[EvaluationConfig].eval_output) / PARTS
    return PerplexityParts(
        directory, grouped(windows, size), len(_variants(settings, model, dataset)), identity
    ), protocol


def _measure_share(replica: ReplicaLosses, dataset: Dataset, parts: PerplexityParts, variants: Sequence[str]) -> None:
    def measure(group: Group) -> NDArray[np.float32] | None:
        lead = _lead(replica.loaded)
        return losses_of_group(replica.losses, dataset, group, variants, replica.device, lead=lead)

    with StopRequests().listening() as requests:

        def stop() -> str | None:
            asked = replica.agree([int(requests.reason() is not None)])
            return "a signal arrived" if asked[0] else None

        parts.fill(replica.agree(parts.open_blocks(replica.worker)), measure, replica.writes, stop)


def _results(
    settings: Settings,
    model: Loaded,
    dataset: Dataset,
    found: Mapping[str, Measured],
    protocol: Mapping[str, Any],
) -> PerplexityResult:
    result = replace(summary(dataset, model, found), **protocol)
    count = settings[PerplexityConfig].leakage_neighbors
    if count and all(source.neighbors for source in dataset.sources):
        curve = leakage_curve(dataset, found, model.tokenizer, count)
        result = replace(result, leakage=curve)
        if most := settings[PerplexityConfig].verbatim_tokens:
            result = replace(result, verbatim=verbatim_share(dataset, found["real"], most))
    _write(Path(settings[EvaluationConfig].eval_output), result)
    return result


def held_out(settings: Settings, model: Loaded) -> Dataset:
    """The split to measure on; data settings that are not given are those of the training run."""
    stored = describe_checkpoint(model.path).manifest.config
    changes: dict[str, Any] = {}
    for kind in (DataConfig, TrainingConfig):
        known = stored.get(section_name(kind), {})
        for spec in field_specs(kind):
            if spec.name in known and settings.origin(spec.name) == DEFAULT_ORIGIN:
                changes[spec.name] = spec.converted(known[spec.name])
    kinds = (ModelConfig, RetroConfig)
    combined = Settings([*(model.settings[kind] for kind in kinds), settings[DataConfig], settings[TrainingConfig]], {})
    split = settings[PerplexityConfig].perplexity_split
    dataset = build_dataset(combined.replace(**changes), split, eod=model.tokenizer.eod)
    allowed = settings[TokenizerConfig].allow_tokenizer_mismatch
    require_tokenizer(dataset.token_files, model.tokenizer, allow_mismatch=allowed)
    return dataset


def _half(dataset: Dataset) -> int:
    samples = dataset.sources[0].samples
    return max(1, samples.chunks_per_sample // 2) * samples.chunk_length


def summary(dataset: Dataset, model: Loaded, measured: Mapping[str, Measured]) -> PerplexityResult:
    """Loss, perplexity and bits per byte per variant, with intervals over documents."""
    real = measured["real"]
    documents = window_documents(dataset, real)
    size = _scored_bytes(dataset, model, real)
    counts = np.bincount(real.windows)
    variants = {}
    for name, one in measured.items():
        loss = bootstrap_ratio(np.bincount(one.windows, weights=one.losses), counts, seed=0, units=documents)
        difference = np.bincount(one.windows, weights=one.losses.astype(np.float64) - real.losses)
        variants[name] = VariantFigures(
            loss,
            perplexity=float(np.exp(loss.mean)),
            bits_per_byte=float(one.losses.sum(dtype=np.float64) / math.log(2) / max(size, 1)),
            excess=None if name == "real" else bootstrap_ratio(difference, counts, seed=0, units=documents),
        )
    samples = _window_sums(dataset, real, documents)
    return PerplexityResult(len(real.losses), size, variants, samples, _shortage(dataset))


def _shortage(dataset: Dataset) -> float | None:
    """Share of the rows that have fewer than k neighbours."""
    short, looked = np.sum([short_rows(source, _MOST_SAMPLES) for source in dataset.sources], axis=0)
    return float(short / looked) if looked else None


def _window_sums(dataset: Dataset, real: Measured, documents: NDArray[np.int64]) -> HeldOutSamples:
    """Loss, tokens and checksum of the text of each window, so that two measurements can be paired."""
    numbers, firsts, counts = np.unique(real.windows, return_index=True, return_counts=True)
    sums = np.bincount(real.windows, weights=real.losses)[numbers]
    texts = []
    for first, count in zip(firsts, counts, strict=True):
        file = dataset.sources[real.sources[first]].samples.file
        texts.append(label_checksum(file.at(real.offsets[first : first + count])))
    return HeldOutSamples([round(float(one), 4) for one in sums], counts.tolist(), texts, documents.tolist())


def _scored_bytes(dataset: Dataset, model: Loaded, measured: Measured) -> int:
    """Bytes of the text of all scored tokens, stretch by stretch."""
    size = 0
    for number, source in enumerate(dataset.sources):
        offsets = np.sort(measured.offsets[measured.sources == number])
        breaks = np.flatnonzero(np.diff(offsets) != 1) + 1
        for stretch in np.split(offsets, breaks):
            if len(stretch):
                size += span_bytes(model.tokenizer, source.samples.file, int(stretch[0]), int(stretch[-1]) + 1)
    return size


def _write(directory: Path, result: PerplexityResult) -> None:
    write_file(directory / PERPLEXITY_RESULT, json_text(result.to_json(), indent=1) + "\n")
    write_file(directory / PAGE, perplexity_page(result))
    say(render_table(VARIANT_HEADER, variant_rows(result)))
    if result.verbatim is not None:
        say(f"verbatim in another document: {result.verbatim}")
    written = f"written to {directory / PERPLEXITY_RESULT} and {directory / PAGE}"
    say(f"{result.tokens} tokens, {result.bytes} bytes; {written}")
