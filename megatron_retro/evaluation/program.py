"""`evaluate TASK...`: perplexity, question sets and summary sets of one model."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.evaluation import PERPLEXITY, QUESTION_SETS
from megatron_retro.config.settings import Settings
from megatron_retro.config.toml_files import nearest
from megatron_retro.errors import ConfigError
from megatron_retro.evaluation.perplexity_run import run_perplexity
from megatron_retro.evaluation.question_sets import run_sets


def evaluate(settings: Settings, tasks: Sequence[str]) -> None:
    """Measure each task."""
    known = (PERPLEXITY, *QUESTION_SETS)
    for name in tasks:
        if name not in known:
            raise ConfigError(f"there is no task {name!r}{nearest(name, known)}", expected=", ".join(known))
    if PERPLEXITY in tasks:
        run_perplexity(settings)
    if sets := [name for name in tasks if name in QUESTION_SETS]:
        run_sets(settings, sets)
