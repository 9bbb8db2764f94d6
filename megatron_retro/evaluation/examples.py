"""One question of an evaluation set, whatever file it came from, and reading the files of sets without surprises."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_retro.data.instructions.conversations import Passage
from megatron_retro.errors import DataError


@dataclass(frozen=True)
class Example:
    """A question with its gold answers; no gold answer at all means that it cannot be answered."""

    id: str
    question: str
    answers: tuple[str, ...]
    contexts: tuple[Passage, ...] = ()
    options: tuple[str, ...] = ()
    history: tuple[tuple[str, str], ...] = field(default=())


def read_json(path: Path) -> Any:
    """A JSON document."""
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise DataError(f"{path} is not JSON", got=f"line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (RecursionError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON", got=error) from None


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """One object per line."""
    for number, line in enumerate(_text(path).split("\n"), 1):  # splitlines would cut at U+2028 too
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}, line {number}: not JSON", got=error.msg) from None
        except (RecursionError, ValueError) as error:
            raise DataError(f"{path}, line {number} cannot be read as JSON", got=error) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}", got=type(record).__name__, expected="a JSON object")
        yield record


def read_records(path: Path) -> list[dict[str, Any]]:
    """Objects of a `.jsonl` file, or of a JSON list."""
    if path.suffix == ".jsonl":
        return list(read_json_lines(path))
    document = read_json(path)
    if not isinstance(document, list):
        raise DataError(f"{path} holds no list of records", got=type(document).__name__, expected="a JSON list")
    return document


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows by column name."""
    csv.field_size_limit(sys.maxsize)
    return list(csv.DictReader(io.StringIO(_text(path), newline="")))


def need(record: Mapping[str, Any], key: str, where: object) -> Any:
    """The value of a key; its absence is reported with what is there."""
    if not isinstance(record, Mapping):
        raise DataError(f"{where}: expected an object with {key!r}", got=type(record).__name__)
    if key not in record:
        raise DataError(f"{where}: a record has no {key!r}", got=", ".join(sorted(map(str, record))) or "nothing")
    return record[key]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}", got=error, fix="give the file of the set as it was published") from None
