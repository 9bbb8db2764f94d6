"""`megatron-retro ablate`: a grid of runs from one recipe, and what they say side by side."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.cli import evaluate, finetune, pretrain, retrofit
from megatron_retro.config.command_line import Positional
from megatron_retro.config.data import WorkersConfig
from megatron_retro.config.evaluation import PERPLEXITY, AblationConfig
from megatron_retro.config.settings import Settings

DESCRIPTION = """Run a study: a recipe whose [ablation] table says which fields vary, one run per combination.

Runs are those of pretrain, retrofit, finetune or evaluate perplexity, each in --study-output/cells/NAME and each a
process of its own. The same command goes on where it stopped; --shard i/N or a SLURM array shares the runs among
workers. The table and report.html are rewritten after each run; unfinished runs say so."""
_OF_VERB: dict[str, tuple[type, ...]] = {
    "pretrain": pretrain.SECTIONS,
    "retrofit": retrofit.SECTIONS,
    "finetune": finetune.SECTIONS,
    # The workers are those of the study: a run of it is whole.
    PERPLEXITY: tuple(section for section in evaluate.SECTIONS if section is not WorkersConfig),
}
SECTIONS: tuple[type, ...] = (
    AblationConfig,
    WorkersConfig,
    *dict.fromkeys((*finetune.SECTIONS, *_OF_VERB[PERPLEXITY])),
)
POSITIONAL: Positional | None = None


def sections_of(settings: Settings) -> tuple[type, ...]:
    """What the runs of a study can be told."""
    return _OF_VERB[settings[AblationConfig].study_verb]


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Run the study."""
    from megatron_retro.ablation.program import run_study

    run_study(settings, sections_of(settings))
