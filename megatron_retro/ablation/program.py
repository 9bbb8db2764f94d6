"""`ablate` from settings to exit code: check everything, run what is left, write the report, say what failed."""

from __future__ import annotations

from pathlib import Path

from megatron_retro.ablation.directories import cell_settings
from megatron_retro.ablation.grid import Axis, Cell, study_axes, study_cells
from megatron_retro.ablation.report import PAGE, read_results, write_study
from megatron_retro.ablation.running import Study, own_launcher, prepare_cells, run_cells
from megatron_retro.config.data import WorkersConfig
from megatron_retro.config.evaluation import PERPLEXITY, AblationConfig
from megatron_retro.config.sections import STUDIED_SECTIONS
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, TrainingConfig
from megatron_retro.errors import ConfigError, MegatronRetroError
from megatron_retro.runtime.console import say
from megatron_retro.runtime.signals import StopRequests
from megatron_retro.runtime.workers import this_worker


class FailedRuns(MegatronRetroError):
    """Runs of a study that ended with an error; the others are finished and reported."""


def run_study(settings: Settings) -> None:
    """Run a study."""
    study, axes = build_study(settings)
    worker = this_worker(settings[WorkersConfig].shard)
    title = settings[AblationConfig].study_title
    prepare_cells(study)
    try:
        with StopRequests().listening() as stops:
            run_cells(study, worker, stops, lambda: write_study(study, title, axes))
    finally:
        say(f"{write_study(study, title, axes)}\nwrote {study.output / PAGE}")
    _refuse_failures(study)


def build_study(settings: Settings) -> tuple[Study, tuple[Axis, ...]]:
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
    study = Study(Path(config.study_output), config.study_verb, launcher, settings, sections, cells)
    if config.study_verb != PERPLEXITY:
        _refuse_without_evaluation(study)
    return study, axes


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
