"""`megatron-retro collect-text`: a corpus from the text that every machine has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.artifacts.files import new_file
from megatron_retro.config.command_line import Positional
from megatron_retro.config.data import CollectConfig
from megatron_retro.config.settings import Settings
from megatron_retro.data.library_questions import library_questions
from megatron_retro.data.standard_library import standard_library_documents
from megatron_retro.errors import ConfigError
from megatron_retro.runtime.console import readable_bytes, say
from megatron_retro.runtime.strict_json import json_text

DESCRIPTION = """Write the sources and reference of Python's standard library as JSON lines, whole files held out.

train.jsonl and held_out.jsonl are text to pretrain on; train_questions.jsonl and held_out_questions.jsonl are questions
about the same files with answers and passages, made from their docstrings, to tune on."""
SECTIONS: tuple[type, ...] = (CollectConfig,)
POSITIONAL: Positional | None = None


def run(settings: Settings, positional: Sequence[str]) -> None:
    """Write text and questions of the files to train on, and of those held out."""
    config = settings[CollectConfig]
    if config.collect_output is None:
        raise ConfigError("--collect-output is missing", expected="a folder for the files")
    folder = Path(config.collect_output)
    documents = list(standard_library_documents())
    for name, held_out in (("train", False), ("held_out", True)):
        chosen = [document for document in documents if document.is_held_out(config.collect_held_out) == held_out]
        _write(folder / f"{name}.jsonl", ({"id": one.name, "text": one.text} for one in chosen), "documents")
        questions = (question for document in chosen for question in library_questions(document))
        _write(folder / f"{name}_questions.jsonl", questions, "questions")


def _write(path: Path, records: Iterable[Mapping[str, Any]], what: str) -> None:
    count = 0
    with new_file(path) as partial, partial.open("w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json_text(record) + "\n")
            count += 1
    say(f"{path}: {count} {what}, {readable_bytes(path.stat().st_size)}")
