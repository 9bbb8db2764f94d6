"""What a study varies and where its runs go."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option

PERPLEXITY = "perplexity"
VERBS = ("pretrain", "retrofit", "finetune", PERPLEXITY)


@dataclass(frozen=True)
class AblationConfig:
    """Ablation: a grid of runs, and their comparison"""

    study_output: str | None = option(None, "directory of the study: one directory per run, and the report", ours=True)
    study_title: str = option("Ablation", "heading of the report", ours=True)
    study_verb: str = option(
        "pretrain", "the verb of every run; perplexity = evaluate perplexity", choices=VERBS, ours=True
    )
    study_grid: tuple[str, ...] = option(
        (), 'fields to vary, each as TOML: "retro_num_neighbors = [0, 2, 4]"; runs are the product', ours=True
    )
    study_cases: tuple[str, ...] = option(
        (),
        'named groups of fields: "frozen = {freeze_decoder = true}"; "size.small = {..}" on an axis "size"',
        ours=True,
    )
    study_launcher: tuple[str, ...] | None = option(
        None, "words before the verb, a launcher of many ranks say; this program when not set", ours=True
    )
