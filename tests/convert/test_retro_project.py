"""Old Retro projects of Megatron core: what serves here, with the commands for the rest; nothing is written there."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.cli.main import main
from megatron_retro.testing.corpora import write_documents

CHUNK, EOD = 4, 256
LENGTHS = (9, 8, 3, 17)
SETTINGS = {
    "retro_gpt_chunk_length": CHUNK,
    "retro_gpt_data_path": ["1.0", "wiki_text_document"],
    "retro_gpt_seq_length": 8,
    "retro_gpt_global_batch_size": 2,
    "retro_gpt_split": "100,0,0",
    "retro_gpt_tokenizer_type": "ByteTokenizer",
    "retro_query_num_neighbors_save": 3,
}


def their_chunks() -> Iterator[tuple[int, int, int, int, int]]:
    """Number of the data set, document, first and last token, length in the embedder's tokens."""
    for document, length in enumerate(LENGTHS):
        for start in range(0, length - 1, CHUNK):
            yield 0, document, start, min(length - 1, start + CHUNK), 3


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import h5py

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "OLD"
    for name in ("data", "db/merged", "query/train_abc", "index"):
        (folder / name).mkdir(parents=True)
    write_documents(folder / "data" / "wiki_text_document", ([*range(97, 96 + size), EOD] for size in LENGTHS))
    (folder / "config.json").write_text(json.dumps(SETTINGS))
    with h5py.File(folder / "db" / "merged" / "train.hdf5", "w") as file:
        file["chunks"] = np.array(list(their_chunks()), np.uint32)
    with h5py.File(folder / "query" / "train_abc" / "0-7.hdf5", "w") as file:
        file["neighbors"] = np.zeros((7, 3), np.int64)
    return folder


def said_of(old: Path, capsys: pytest.CaptureFixture[str]) -> tuple[str, str]:
    """What is said, and the commands."""
    assert main(["convert-project", str(old)]) == 0
    captured = capsys.readouterr()
    return captured.err, captured.out


def test_says_what_serves_and_its_commands_run(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    said, commands = said_of(old, capsys)
    assert "4 documents, 37 tokens: read as they are" in said
    assert "9 of 9 chunks are cut here alike" in said and "not needed" in said
    assert "7 rows of one run's shuffled samples" in said and "its vectors are of an embedder" in said
    lines = [shlex.split(line) for line in commands.splitlines()]
    small = {"build-retrieval": "--retro-tasks train encode merge query", "pretrain": "--train-iters 1 --eval-iters 0"}
    for _, verb, *words in lines:
        assert main([verb, *words, *small[verb].split()]) == 0
    assert [verb for _, verb, *_ in lines] == ["build-retrieval", "pretrain"]
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def test_another_grid_is_told(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (old / "config.json").write_text(json.dumps({**SETTINGS, "retro_gpt_chunk_length": 8}))
    said, _ = said_of(old, capsys)
    assert "of 9 chunks are cut here alike" in said and "not needed" not in said


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda old: (old / "config.json").unlink(), "no Retro project"),
        (lambda old: (old / "config.json").write_text("{}"), "names no token files"),
        (lambda old: (old / "data" / "wiki_text_document.bin").unlink(), "are not there"),
        (lambda old: (old / "db" / "merged" / "train.hdf5").write_bytes(b"no"), "no chunk database"),
    ],
)
def test_damage_is_named(
    damage: Callable[[Path], Any], named: str, old: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(old)
    assert main(["convert-project", str(old)]) == 2
    assert named in capsys.readouterr().err
