"""`ablate` from settings to exit code: check everything, run what is left, write the report, say what failed."""

from __future__ import annotations

import math
import shlex
import statistics
from collections.abc import Sequence
from pathlib import Path

from megatron_retro.ablation.grid import SEED, Cell, study_axes, study_cells
from megatron_retro.ablation.results import Configuration, Result, configurations, difference, read_result
from megatron_retro.ablation.runs import Study, cell_settings, own_launcher, prepare_cells, run_cells
from megatron_retro.artifacts.files import write_file
from megatron_retro.config.data import WorkersConfig
from megatron_retro.config.evaluation import PERPLEXITY, AblationConfig
from megatron_retro.config.sections import STUDIED_SECTIONS
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, TrainingConfig
from megatron_retro.errors import ConfigError, MegatronRetroError
from megatron_retro.reporting.study_page import (
    ConfigurationFigures,
    RunFigures,
    StudyFigures,
    study_page,
    summary_rows,
)
from megatron_retro.runtime.console import render_table, say
from megatron_retro.runtime.launch import this_worker
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.runtime.strict_json import json_text

RESULTS, PAGE = "study.json", "report.html"
_CURVE_POINTS = 120


class FailedRuns(MegatronRetroError):
    """Runs of a study that ended with an error; the others are finished and reported."""


def run_study(settings: Settings) -> None:
    """Run a study."""
    study = build_study(settings)
    worker = this_worker(settings[WorkersConfig].shard)
    prepare_cells(study)
    try:
        with StopRequests().listening() as stops:
            run_cells(study, worker, stops, lambda: write_study(study))
    finally:
        say(f"{write_study(study)}\nwrote {study.output / PAGE}")
    _refuse_failures(study)


def build_study(settings: Settings) -> Study:
    """The study that the settings describe, all of it checked."""
    config = settings[AblationConfig]
    if config.study_output is None:
        raise ConfigError("a study needs a directory", fix="give --study-output")
    if settings[CheckpointConfig].save is not None:
        raise ConfigError(
            "each run of a study has a directory of its own",
            got=f"--save {settings[CheckpointConfig].save}",
            fix="drop --save; runs are under --study-output",
        )
    sections = STUDIED_SECTIONS[config.study_verb]
    axes = study_axes(config, sections)
    cells = study_cells(axes)
    launcher = config.study_launcher or own_launcher()
    output, verb = Path(config.study_output), config.study_verb
    study = Study(config.study_title, axes, output, verb, launcher, settings, sections, cells)
    if verb != PERPLEXITY:
        _refuse_without_evaluation(study)
    return study


def read_results(study: Study) -> list[Result]:
    """All runs as they stand."""
    return [read_result(cell, study.directory(cell)) for cell in study.cells]


def write_study(study: Study) -> str:
    """Write raw results and the page; returns the table of configurations."""
    results = read_results(study)
    raw = {"title": study.title, "verb": study.verb, "runs": [result.raw() for result in results]}
    write_file(study.output / RESULTS, json_text(raw, indent=1) + "\n")
    figures = _figures(study, results)
    write_file(study.output / PAGE, study_page(figures))
    return render_table(*summary_rows(figures))


def _figures(study: Study, results: Sequence[Result]) -> StudyFigures:
    groups = configurations(results)
    axes = [axis.name for axis in study.axes]
    return StudyFigures(
        title=study.title,
        verb=study.verb,
        axes=axes,
        varied=[name for name in axes if name != SEED],
        configurations=[_configuration_figures(group, groups[0]) for group in groups],
        runs=[_run_figures(result) for result in results],
        commands=[shlex.join(study.command(cell)) for cell in study.cells],
    )


def _configuration_figures(group: Configuration, baseline: Configuration) -> ConfigurationFigures:
    known = group.finished[0].facts if group.finished else None
    seconds = [result.outcome.seconds for result in group.finished if result.outcome is not None]
    curve = group.results[0].evaluations[-_CURVE_POINTS:]
    return ConfigurationFigures(
        labels=group.labels,
        state=group.state,
        loss=group.loss(),
        against=difference(group, baseline),
        excess={variant: group.excess(variant) for variant in ("none", "random")},
        gate_rate=group.gate_rate(),
        shortage=group.shortage(),
        parameters=None if known is None else known.parameters,
        operations=group.operations(),
        seconds=statistics.fmean(seconds) if seconds else None,
        curve=([record.step for record in curve], [record.loss for record in curve]),
    )


def _run_figures(result: Result) -> RunFigures:
    outcome = result.outcome
    return RunFigures(
        name=result.cell.name,
        state=result.state,
        finished=result.finished,
        step=result.step,
        loss=result.loss if result.evaluations and math.isfinite(result.loss) else None,
        seconds=None if outcome is None else outcome.seconds,
        training_seconds=result.training_seconds,
        message="" if outcome is None else outcome.message,
    )


def _refuse_without_evaluation(study: Study) -> None:
    blind = [cell for cell in study.cells if not _of(study, cell)[TrainingConfig].eval_iters]
    if blind:
        raise ConfigError(
            "a study compares held-out losses, and these runs measure none",
            got=", ".join(cell.name for cell in blind[:3]) + " with eval_iters = 0",
            fix="set --eval-iters",
        )


def _of(study: Study, cell: Cell) -> Settings:
    return cell_settings(study.settings, cell, study.sections)


def _refuse_failures(study: Study) -> None:
    failed = [result for result in read_results(study) if result.outcome is not None and result.outcome.exit_code]
    if failed:
        raise FailedRuns(
            f"{len(failed)} of {len(study.cells)} runs failed",
            got="; ".join(result.cell.name for result in failed),
            fix=f"read output.log under {study.output / 'cells'}; the same command tries them again",
        )
