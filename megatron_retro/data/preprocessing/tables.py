"""Rows of tables (Parquet by row group, Arrow by batch, CSV whole) and of a JSON array, in bounded memory."""

from __future__ import annotations

import csv
import importlib
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from megatron_retro.errors import DataError, EnvironmentProblem

Row = dict[str, Any]
_BATCH_ROWS = 64
_READ_CHARACTERS = 1 << 20
_BLANKS, _SIGNS = re.compile(r"\s*"), (",", "]")
_ARROW_FILE = b"ARROW1"


def num_row_groups(path: str) -> int:
    """Of a Parquet file."""
    with _readable(path, "Parquet"):
        return int(arrow_module("parquet").ParquetFile(path).metadata.num_row_groups)


def num_batches(path: str) -> int:
    """Of an Arrow file."""
    with _readable(path, "Arrow"):
        return sum(1 for _ in _batches(path))


def parquet_rows(path: str, group: int, keys: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Numbered rows of a row group, some columns of them."""
    source = arrow_module("parquet").ParquetFile(path)
    _require_columns(path, source.schema_arrow.names, keys)
    first = sum(source.metadata.row_group(number).num_rows for number in range(group))
    batches = source.iter_batches(batch_size=_BATCH_ROWS, row_groups=[group], columns=list(keys), use_threads=False)
    return enumerate(itertools.chain.from_iterable(_rows(batch, keys) for batch in batches), first)


def arrow_rows(path: str, number: int, keys: tuple[str, ...]) -> Iterator[tuple[int, Row]]:
    """Numbered rows of a batch of the file, some columns of them."""
    first = 0
    for place, batch in enumerate(_batches(path)):
        if place == number:
            _require_columns(path, batch.schema.names, keys)
            parts = (batch.slice(start, _BATCH_ROWS) for start in range(0, batch.num_rows, _BATCH_ROWS))
            yield from enumerate(itertools.chain.from_iterable(_rows(part, keys) for part in parts), first)
            return
        first += batch.num_rows


def whole_table(path: str) -> Iterator[Row]:
    """All rows and columns of a Parquet or Arrow file."""
    if path.endswith(".arrow"):
        return itertools.chain.from_iterable(batch.to_pylist() for batch in _batches(path))
    return iter(arrow_module("parquet").read_table(path).to_pylist())


def csv_rows(path: str, keys: tuple[str, ...], limit: int) -> Iterator[tuple[int, Row]]:
    """Numbered rows under a line of names; a `.tsv` has tabs between its fields."""
    csv.field_size_limit(limit)
    with open(path, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter="\t" if path.endswith(".tsv") else ",", strict=True)
        with _readable(path, "CSV"):
            names = next(reader, [])
            _require_columns(path, names, keys)
            places = {key: names.index(key) for key in keys}
            for number, fields in enumerate(reader):
                if fields:
                    yield number, {key: fields[place] if place < len(fields) else None for key, place in places.items()}


def array_items(path: str, limit: int) -> Iterator[tuple[int, str]]:
    """The numbered elements of a JSON array, as JSON."""
    with open(path, encoding="utf-8-sig") as stream, _readable(path, "JSON"):
        yield from enumerate(_elements(stream, path, limit))


def _elements(stream: TextIO, path: str, limit: int) -> Iterator[str]:
    decode, text, more = json.JSONDecoder().raw_decode, stream.read(_READ_CHARACTERS), True
    place = text.index("[") + 1
    while not text.startswith("]", place := _behind_blanks(text, place)):
        got: object = "its end"
        try:
            _, stop = decode(text, place)
            after = _behind_blanks(text, stop)
            sign = text[after : after + 1]
        except ValueError as error:
            sign, got = "", error
        if sign in _SIGNS:
            yield text[place:stop]
            place = after + (sign == ",")
        elif sign or not more or len(text) - place > limit + _READ_CHARACTERS:
            raise DataError(f"{path} is no JSON array", got=sign or got, expected="objects with commas between them, ]")
        else:  # the element may go on behind what was read: as much again, so that work grows with the text
            found = stream.read(max(_READ_CHARACTERS, len(text) - place))
            more, text, place = bool(found), text[place:] + found, 0


def _behind_blanks(text: str, place: int) -> int:
    found = _BLANKS.match(text, place)
    assert found is not None
    return found.end()


def _batches(path: str) -> Iterator[Any]:
    """Of Arrow's stream, which Hugging Face's datasets writes, or of its file with an index at the end."""
    ipc, memory_map = arrow_module("ipc"), arrow_module("lib").memory_map
    with open(path, "rb") as stream:
        is_file = stream.read(len(_ARROW_FILE)) == _ARROW_FILE
    with memory_map(path) as source:
        if is_file:
            reader = ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            yield from ipc.open_stream(source)


def _rows(batch: Any, keys: tuple[str, ...]) -> Iterator[Row]:
    columns = {name: batch.column(name) for name in keys}
    for place in range(batch.num_rows):
        yield {name: column[place].as_py() for name, column in columns.items()}


def _require_columns(path: str, names: list[str], keys: tuple[str, ...]) -> None:
    absent = [key for key in keys if key not in names]
    if absent:
        raise DataError(
            f"{path} has no column {absent[0]!r}", expected=", ".join(names), fix="name the text's: --json-keys COLUMN"
        )


@contextmanager
def _readable(path: str, kind: str) -> Iterator[None]:
    try:
        yield
    except (DataError, EnvironmentProblem):
        raise
    except Exception as error:  # pyarrow and csv raise many kinds
        raise DataError(f"{path} is no readable {kind} file", got=error) from None


def arrow_module(part: str) -> Any:
    """A part of pyarrow, or an error that names the extra."""
    try:
        return importlib.import_module(f"pyarrow.{part}")
    except ImportError:
        raise EnvironmentProblem(
            "reading Parquet and Arrow needs pyarrow", fix="pip install 'megatron-retro[formats]'"
        ) from None
