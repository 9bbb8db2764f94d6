"""What a run summary is made from: files that other verbs wrote, read and checked before a page is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_retro.config.evaluation import ReportConfig
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.reporting.quality_page import QualityReport, read_quality
from megatron_retro.runtime.run_log import RunLog, read_run_log
from megatron_retro.runtime.strict_json import from_plain

Record = TypeVar("Record")


@dataclass(frozen=True)
class ReadNeighbor:
    """A neighbour that a generated text read."""

    text: str


@dataclass(frozen=True)
class ReadChunk:
    """A chunk of a generated text, and what it read."""

    query: str
    neighbors: Sequence[ReadNeighbor] = ()


@dataclass(frozen=True)
class GeneratedText:
    """A line of `generate`: what was asked, what came, why it ended."""

    prompt: str
    text: str
    finish_reason: str = ""
    chunks: Sequence[ReadChunk] = ()

    @property
    def ended(self) -> bool:
        """Whether the model ended it by itself."""
        return self.finish_reason == "stop"


@dataclass(frozen=True)
class Question:
    """A question with its gold answers."""

    question: str
    answers: Sequence[str]


@dataclass(frozen=True)
class Stage:
    """A stage of a pipeline, and how long it took this time."""

    stage: str
    seconds: float


@dataclass(frozen=True)
class SummaryInputs:
    """Runs in their order, and what was measured beside them. `texts` and `answers` are by the name of their maker."""

    runs: Sequence[tuple[Path, RunLog]]
    quality: QualityReport | None
    texts: Mapping[str, Sequence[GeneratedText]]
    answers: Mapping[str, Sequence[GeneratedText]]
    questions: Sequence[Question]
    stages: Sequence[Stage]

    @property
    def retro(self) -> tuple[Path, RunLog] | None:
        """The run that the page is about: the last one that was evaluated with other neighbours."""
        measured = [(run, log) for run, log in self.runs if log.health]
        return measured[-1] if measured else None


def read_summary_inputs(runs: Sequence[Path], config: ReportConfig) -> SummaryInputs:
    """All files; what was not asked for is empty."""
    quality = None if config.report_retrieval is None else Path(config.report_retrieval) / "report" / "quality.json"
    answers = _generated(config.report_answers, "--report-answers")
    questions = () if config.report_questions is None else _records(Question, Path(config.report_questions))
    if questions and any(len(texts) != len(questions) for texts in answers.values()):
        raise ConfigError(
            "--report-questions and --report-answers belong to different questions",
            got=f"{len(questions)} questions, {len(next(iter(answers.values())))} answers",
            expected="the questions that were answered, in their order",
        )
    return SummaryInputs(
        [(run, read_run_log(run)) for run in runs],
        None if quality is None else read_quality(quality),
        _generated(config.report_texts, "--report-texts"),
        answers,
        questions,
        () if config.report_stages is None else _records(Stage, Path(config.report_stages)),
    )


def _generated(words: Sequence[str] | None, flag: str) -> dict[str, Sequence[GeneratedText]]:
    found: dict[str, Sequence[GeneratedText]] = {}
    for word in words or ():
        name, equals, path = word.partition("=")
        if not equals:
            raise ConfigError(f"{flag} takes NAME=FILE", got=word, fix=f"write {flag} before={word}, say")
        found[name] = _records(GeneratedText, Path(path))
    if len({len(records) for records in found.values()}) > 1:
        counts = ", ".join(f"{name} {len(records)}" for name, records in found.items())
        raise ConfigError(f"the files of {flag} answer different prompts", got=counts, expected="as many in each")
    return found


def _records(kind: type[Record], path: Path) -> list[Record]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        return [from_plain(kind, json.loads(line)) for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} cannot be read", got=error, expected="a JSON object per line") from None
