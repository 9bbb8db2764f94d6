"""`megatron-retro report RUN`: one HTML page about a run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.settings import Settings

DESCRIPTION = "Write report.html into a run's directory: curves, retrieval health, leakage, neighbours, settings."
SECTIONS: tuple[type, ...] = ()
POSITIONAL: Positional | None = Positional("run", "+", "what --save named")


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Write the page of each run."""
    from pathlib import Path

    from megatron_retro.runtime.console import say
    from megatron_retro.training.report import write_report

    for name in positional:
        say(f"wrote {write_report(Path(name))}")
