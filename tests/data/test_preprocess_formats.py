"""The same records in every format that preprocessing reads make the same tokens."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_retro.data.preprocessing.job import PreprocessingJob, ReadOptions, find_inputs
from megatron_retro.data.tokenizers import ByteTokenizer
from megatron_retro.testing.corpora import write_json_lines
from megatron_retro.testing.preprocessing_runs import compressed, files, preprocess, records
from tests.data.test_preprocess import expected


def parquet(path: Path, found: Sequence[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    storage = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"text": [record["text"] for record in found], "id": [record["id"] for record in found]})
    storage.write_table(table, path, row_group_size=7)
    return path


def arrow(path: Path, found: Sequence[dict[str, Any]], kind: str) -> Path:
    """A stream, as Hugging Face's datasets writes it, or a file with an index at its end."""
    pyarrow = pytest.importorskip("pyarrow")
    schema = pyarrow.schema({"text": pyarrow.string(), "id": pyarrow.int64()})
    with getattr(pyarrow.ipc, f"new_{kind}")(str(path), schema) as writer:
        for start in range(0, len(found), 7):
            writer.write_batch(pyarrow.RecordBatch.from_pylist(found[start : start + 7], schema))
    return path


def separated(path: Path, found: Sequence[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writerow(["id", "text"])
        writer.writerows([record["id"], record["text"]] for record in found)
    return path


def array(path: Path, found: Sequence[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


FORMATS: dict[str, Callable[[Path, Sequence[dict[str, Any]]], Path]] = {
    "b.parquet": parquet,
    "b.arrow": partial(arrow, kind="stream"),
    "c.arrow": partial(arrow, kind="file"),
    "b.csv": separated,
    "b.tsv": separated,
    "b.json": array,
}


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["b.json.gz", "b.jsonl.gz", "b.jsonl.zst", *FORMATS])
def test_every_format_gives_the_same_tokens(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_retro.data.preprocessing.tables._READ_CHARACTERS", 100)
    found = [record for record in records(3, 40) if isinstance(record["text"], str)]
    lines = write_json_lines(tmp_path / "a.jsonl", found).read_bytes()
    path = tmp_path / name
    FORMATS[name](path, found) if name in FORMATS else compressed(path, lines)
    assert preprocess(tmp_path / "o", [path], "--append-eod", "--workers", "2") == 0
    assert files(tmp_path / "o") == expected(tmp_path, found, ByteTokenizer().encode, 256)


@pytest.mark.usefixtures("small_blocks")
def test_parts_of_tables_are_shared_among_blocks(tmp_path: Path) -> None:
    found = [{"id": number, "text": f"{number} " * 400} for number in range(40)]
    for path in (parquet(tmp_path / "a.parquet", found), arrow(tmp_path / "a.arrow", found, "stream")):
        job = PreprocessingJob(
            find_inputs([str(path)]), ReadOptions(("text",), "file", 1 << 20, "stop"), False, "", "uint16"
        )
        assert len(job.blocks) > 1, path


def test_a_folder_of_records_has_no_documents_beside_them(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "dataset"
    folder.mkdir()
    found = [record for record in records(5, 9) if isinstance(record["text"], str)]
    arrow(folder / "data-00000-of-00001.arrow", found, "stream")
    for name in ("README.md", "dataset_info.json", "state.json"):
        (folder / name).write_text("{}")
    assert preprocess(tmp_path / "o", [folder]) == 0
    assert "1 file(s) of text beside records left out" in capfd.readouterr().err
    assert files(tmp_path / "o") == expected(tmp_path, found, ByteTokenizer().encode, None)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "title,body\nx,y\n", "has no column 'text'"),
        ("a.csv", 'text\n"never closed\n', "is no readable CSV file"),
        ("a.arrow", "x", "is no readable Arrow file"),
        ("a.json", '[{"text": "a"}, {"text": "b"}', "is no JSON array"),
        ("a.json", '[{"text": "a"} {"text": "b"}]', "is no JSON array"),
    ],
)
def test_a_table_that_cannot_be_read_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    assert preprocess(tmp_path / "o", [tmp_path / name]) == 2
    assert message in capfd.readouterr().err
    assert not list(tmp_path.glob("o_*"))
