"""The README.md of an export: what a hub shows of a model, filled from the files of its run.

Every line is a fact of the checkpoint, of its run's log or of what was measured of this very checkpoint; what they do
not hold (a licence, say) is left out. Data goes by the names of its files, never by where they lay.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.checkpoint.loading import Described, describe_checkpoint, stored_settings
from megatron_retro.config.data import DataConfig, InstructionConfig, TokenizerConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.config.settings import section_name
from megatron_retro.config.training import OptimizerConfig, PeftConfig, TrainingConfig
from megatron_retro.convert.origin import origin_of
from megatron_retro.data.blends import parse_data_path
from megatron_retro.data.hub import name_and_revision
from megatron_retro.errors import ArtifactError
from megatron_retro.reporting.perplexity_page import (
    PERPLEXITY_RESULT,
    VARIANT_HEADER,
    LeakageCurve,
    PerplexityResult,
    read_perplexity,
    variant_rows,
)
from megatron_retro.runtime.console import readable_seconds, warn
from megatron_retro.runtime.run_log import EVENTS, RunLog, read_run_log
from megatron_retro.runtime.run_records import RetrievalHealth

CARD = "README.md"
_USE = {
    "huggingface": """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}")""",
    "remote-code": """from transformers import AutoModelForCausalLM  # pip install megatron-retro

model = AutoModelForCausalLM.from_pretrained("{name}", trust_remote_code=True)""",
    "peft": """from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("{name}")""",
}
_WHAT = {
    "huggingface": "A decoder that reads no neighbours, in the form of transformers.",
    "remote-code": "A model with the code that runs it, for transformers.",
    "peft": "What was tuned beside a model, in the form of peft.",
}


@dataclass(frozen=True)
class _Told:
    """What is known of a checkpoint: its manifest, its run's log up to its step, and the perplexity of it alone.

    `whole`: the export computes what was measured, neighbours and all.
    """

    checkpoint: Described
    whole: bool
    log: RunLog
    perplexity: PerplexityResult | None

    def setting(self, section: type, name: str) -> Any:
        """A setting of the run that wrote it; None where it has none."""
        return self.checkpoint.manifest.config.get(section_name(section), {}).get(name)


def model_card(checkpoint: Path, name: str, form: str) -> str:
    """The text; `form` is what `--convert-to` said."""
    described = describe_checkpoint(checkpoint)
    reads = stored_settings(described)[RetroConfig].reads_neighbors()
    told = _told(described, whole=form == "remote-code" or not reads)
    parts = [
        f"---\n{_metadata(told, form, reads and told.whole)}\n---",
        f"# {name}",
        _WHAT[form] + " Exported by megatron_retro; every figure below is from its run.",
        f"```python\n{_USE[form].format(name=name)}\n```",
        *_section("Training", _table(("", ""), _training(told))),
        *_section("Layout", _table(("", ""), _layout(told))),
        *_section("Data", _table(("what", "files", "fingerprint"), _data(told))),
        *_held_out(told),
    ]
    return "\n\n".join(parts) + "\n"


def _told(checkpoint: Described, *, whole: bool) -> _Told:
    run, log, perplexity = checkpoint.path.parent, RunLog(), None
    try:
        if (run / EVENTS).is_file():
            log = read_run_log(run)
        if (path := run / "evaluation" / PERPLEXITY_RESULT).is_file():
            perplexity = read_perplexity(path)
    except ArtifactError as error:
        warn(f"not in the model card: {error.what}")
    log.steps = [one for one in log.steps if one.step <= checkpoint.step]
    log.evaluations = [one for one in log.evaluations if one.step <= checkpoint.step]
    if perplexity is not None and perplexity.model != checkpoint.manifest.fingerprint:
        perplexity = None
    return _Told(checkpoint, whole, log, perplexity)


def _metadata(told: _Told, form: str, reads: bool) -> str:
    from huggingface_hub import ModelCardData

    name, revision = name_and_revision(origin_of(told.checkpoint) or "")
    return ModelCardData(
        base_model=name if revision is not None else None,
        library_name="peft" if form == "peft" else "transformers",
        pipeline_tag="text-generation",
        tags=["megatron-retro", *(["retro", "retrieval-augmented"] if reads else [])],
    ).to_yaml()


def _training(told: _Told) -> Iterator[tuple[object, ...]]:
    origin = origin_of(told.checkpoint)
    if origin is not None:
        name, revision = name_and_revision(origin)
        yield "started from", Path(name).name if revision is None else origin
    counts, optimizer = told.checkpoint.manifest.counts, OptimizerConfig
    if told.checkpoint.step:
        yield "steps", f"{told.checkpoint.step:,}"
        yield from ((name, f"{counts[name]:,}") for name in ("samples", "tokens") if name in counts)
        for label, section, setting in (
            ("tokens of a sample", DataConfig, "seq_length"),
            ("samples of a step", TrainingConfig, "global_batch_size"),
            ("optimizer", optimizer, "optimizer"),
            ("peak learning rate", optimizer, "lr"),
            ("its decay", optimizer, "lr_decay_style"),
            ("weight decay", optimizer, "weight_decay"),
            ("seed", TrainingConfig, "seed"),
            ("tuned beside the model", PeftConfig, "peft_method"),
        ):
            value = told.setting(section, setting)
            if value is not None and value != "none":
                yield label, value
        yield "computed in", next((one for one in ("bf16", "fp16") if told.setting(optimizer, one)), "float32")
        frozen = [part for part in ("decoder", "encoder") if told.setting(TrainingConfig, f"freeze_{part}")]
        if frozen:
            yield "left as it was", " and ".join(frozen)
    if told.log.facts.parameters:
        yield "parameters", f"{told.log.facts.parameters:,}"
    if told.log.steps:
        yield "time", readable_seconds(told.log.training_seconds)
        if told.whole and math.isfinite(told.log.steps[-1].loss):
            yield "last loss", f"{told.log.steps[-1].loss:.4f}"


def _layout(told: _Told) -> Iterator[tuple[object, ...]]:
    if not told.checkpoint.step:
        return
    if "processes" in told.checkpoint.manifest.counts:
        yield "processes", told.checkpoint.manifest.counts["processes"]
    for label, setting in (
        ("tensor parallel", "tensor_model_parallel_size"),
        ("pipeline parallel", "pipeline_model_parallel_size"),
        ("pipeline schedule", "pipeline_schedule"),
        ("sequence parallel", "sequence_parallel"),
        ("sharded among data ranks", "data_parallel_sharding"),
    ):
        value = told.setting(ParallelConfig, setting)
        pipeline = told.setting(ParallelConfig, "pipeline_model_parallel_size") or 1
        if value not in (None, False, 1, "none") and (setting != "pipeline_schedule" or pipeline > 1):
            yield label, "yes" if value is True else value


def _data(told: _Told) -> Iterator[tuple[object, ...]]:
    inputs = told.checkpoint.manifest.inputs
    for label, section, setting, key in (
        ("text", DataConfig, "data_path", "corpus"),
        ("conversations", InstructionConfig, "instruction_data", "conversations"),
    ):
        paths = told.setting(section, setting)
        for number, source in enumerate(parse_data_path(paths) if paths else ()):
            share = f", weight {float(source.weight):g}" if len(paths) > 1 else ""
            found = inputs.get(f"{key} {number}", inputs.get(key, "") if key == "conversations" else "")
            yield label, Path(source.path).name + share, _short(found)
    if told.setting(DataConfig, "data_path"):
        yield "split (training, validation, test)", told.setting(DataConfig, "split"), ""
    for number, path in enumerate(told.setting(DataConfig, "neighbor_path") or ()):
        yield "neighbours", Path(path).name, _short(inputs.get(f"neighbours {number}", ""))
    if path := told.setting(DataConfig, "database_path"):
        yield "database of neighbours", Path(path).name, _short(inputs.get("database", ""))
    if kind := told.setting(TokenizerConfig, "tokenizer_type"):
        yield "tokenizer", kind, _short(inputs.get("tokenizer", ""))


def _short(fingerprint: str) -> str:
    return f"`{fingerprint[:12]}`" if fingerprint else ""


def _held_out(told: _Told) -> Iterator[str]:
    """What was measured on text that was not trained on."""
    if not told.whole:
        return
    if told.log.evaluations:
        evaluation = told.log.evaluations[-1]
        yield "## Held-out text"
        yield f"Loss after step {evaluation.step:,}: {evaluation.loss:.4f} nats per token."
        yield from _health(evaluation.retrieval) if evaluation.retrieval is not None else ()
        if evaluation.alarms:
            yield "Alarms of this evaluation:\n\n" + "\n".join(f"- {one}" for one in evaluation.alarms)
    if (result := told.perplexity) is not None:
        yield "## Perplexity"
        windows = f"{result.windows:,} of {result.windows_of:,} windows" if result.windows_of else ""
        counted = [f"{result.tokens:,} tokens", f"split {result.split}" if result.split else "", windows]
        yield ", ".join(filter(None, counted)) + "."
        yield _table(VARIANT_HEADER, variant_rows(result))
        if result.verbatim is not None:
            yield f"Verbatim in another document of the database: {result.verbatim}."
        if result.leakage is not None:
            yield from _section("Leakage", *_leakage(result.leakage))


def _health(health: RetrievalHealth) -> Iterator[str]:
    rows = [
        (name, f"{loss.mean:.4f}", health.excess.get(name, "")) for name, loss in health.losses.items()
    ]  # fmt: skip
    yield (
        "Retrieval health: what the same model loses on the same text without its neighbours (none), with those of "
        "other text (random) or of another chunk (shuffled), with 95 % intervals."
    )
    yield _table(("neighbours", "loss", "costs more than real"), rows)


def _leakage(curve: LeakageCurve) -> Iterator[str]:
    costs: Mapping[str, Sequence[object]] = curve.excess or curve.bits_per_byte
    what = "What other neighbours cost more than the real ones, in" if curve.excess else "Loss in"
    yield (
        f"{what} bits per byte, over the chunks whose longest run of tokens in common with a neighbour is at most so "
        "much of the chunk. A gain in the first rows is more than copying."
    )
    shown = ([f"{one:.4f}" if isinstance(one, float) else one for one in values] for values in costs.values())
    rows = zip(curve.alphas, curve.chunks, *shown, strict=True)
    yield _table(("share at most", "chunks", *costs), (row for row in rows if row[1]))


def _section(title: str, *parts: str) -> list[str]:
    found = [part for part in parts if part]
    return [f"## {title}", *found] if found else []


def _table(header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Markdown; nothing without rows."""
    lines = ["| " + " | ".join(_cell(value) for value in row) + " |" for row in rows]
    head = ["| " + " | ".join(map(str, header)) + " |", "|" + " --- |" * len(header)]
    return "\n".join([*head, *lines]) if lines else ""


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
