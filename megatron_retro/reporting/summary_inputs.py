"""What a story is told from: files that other verbs wrote, read and checked before a page is made of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_retro.config.evaluation import ReportConfig
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.reporting.quality_page import QualityReport, read_quality
from megatron_retro.runtime.run_log import RunLog, read_run_log

Records = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Story:
    """Runs in their order, and what is told about the last one that was evaluated with other neighbours."""

    runs: tuple[tuple[Path, RunLog], ...]
    quality: QualityReport | None
    texts: tuple[tuple[str, Records], ...]
    answers: tuple[tuple[str, Records], ...]
    questions: Records
    stages: Records

    @property
    def retro(self) -> tuple[Path, RunLog] | None:
        """The run that the page is about."""
        measured = [(run, log) for run, log in self.runs if log.health]
        return measured[-1] if measured else None


def read_story(runs: Sequence[Path], config: ReportConfig) -> Story:
    """All files; what was not asked for is empty."""
    quality = None if config.report_retrieval is None else Path(config.report_retrieval) / "report" / "quality.json"
    return Story(
        tuple((run, read_run_log(run)) for run in runs),
        None if quality is None else read_quality(quality),
        _named(config.report_texts, "--report-texts"),
        _named(config.report_answers, "--report-answers"),
        () if config.report_questions is None else _records(Path(config.report_questions)),
        () if config.report_stages is None else _records(Path(config.report_stages)),
    )


def _named(words: Sequence[str] | None, flag: str) -> tuple[tuple[str, Records], ...]:
    found = []
    for word in words or ():
        name, equals, path = word.partition("=")
        if not equals:
            raise ConfigError(f"{flag} takes NAME=FILE", got=word, fix=f"write {flag} before={word}, say")
        found.append((name, _records(Path(path))))
    if len({len(records) for _, records in found}) > 1:
        counts = ", ".join(f"{name} {len(records)}" for name, records in found)
        raise ConfigError(f"the files of {flag} answer different prompts", got=counts, expected="as many in each")
    return tuple(found)


def _records(path: Path) -> Records:
    try:
        found = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read", got=error, expected="JSON lines") from None
    if not all(isinstance(one, dict) for one in found):
        raise ArtifactError(f"{path} is no file of records", expected="one JSON object per line")
    return tuple(found)
