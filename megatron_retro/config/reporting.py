"""What a report brings together."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_retro.config.fields import option


@dataclass(frozen=True)
class ReportConfig:
    """One page about all runs that are named; the last one that reads neighbours is what it is about"""

    report_output: str | None = option(
        None, "write one page about all runs here, instead of a page into each of them", ours=True
    )
    report_retrieval: str | None = option(
        None, "its index (--retro-project-dir of build-retrieval): quality and neighbours", ours=True
    )
    report_texts: tuple[str, ...] | None = option(
        None, "its texts, as NAME=FILE: what `generate --output` wrote, with and without retrieval say", ours=True
    )
    report_answers: tuple[str, ...] | None = option(
        None, "answers to the same questions, as NAME=FILE: before and after tuning say", ours=True
    )
    report_questions: str | None = option(None, "those questions with their gold answers (JSON lines)", ours=True)
    report_stages: str | None = option(None, "JSON lines of `stage` and `seconds`", ours=True)
