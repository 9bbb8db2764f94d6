"""`megatron-retro report RUN`: one HTML page about a run."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_retro.config.command_line import Positional
from megatron_retro.config.evaluation import ReportConfig
from megatron_retro.config.settings import Settings

DESCRIPTION = """Write report.html into each run's directory: curves, retrieval health, leakage, neighbours, settings.

With --report-output, one page about all runs named, for someone who has never seen them, and a line for each thing
that should be seen on it: what was measured, and whether it was seen."""
SECTIONS: tuple[type, ...] = (ReportConfig,)
POSITIONAL: Positional | None = Positional("run", "+", "what --save named")


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Write the page of each run, or the one page of all."""
    from pathlib import Path

    from megatron_retro.runtime.console import say

    output = settings[ReportConfig].report_output
    if output is not None:
        from megatron_retro.reporting.run_summary import write_story

        for one in write_story([Path(name) for name in positional], settings[ReportConfig], Path(output)):
            say(one.line)
        say(f"wrote {output}")
        return
    from megatron_retro.reporting.run_page import write_report

    for name in positional:
        say(f"wrote {write_report(Path(name))}")
