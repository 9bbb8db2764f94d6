"""Token files of datatrove and NeMo Curator serve as ours do. `others/make_token_files.py` made them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.cli.main import main
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.token_writer import verify_token_file
from megatron_retro.data.tokenizers import HuggingFaceTokenizer
from megatron_retro.testing.corpora import write_json_lines
from megatron_retro.testing.preprocessing_runs import files, preprocess
from tests.data.byte_level import save_byte_level
from tests.data.others.make_token_files import END, FOLDER, TEXTS, WITH_EMPTY
from tests.data.test_one_tokenizer import MODEL, RETRO


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    save_byte_level(tmp_path / "tokenizer", (END,))
    return tmp_path / "tokenizer"


def flags_of(tokenizer: Path) -> list[str]:
    return ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(tokenizer)]


def copied(name: str, folder: Path) -> Path:
    for ending in (".bin", ".idx"):
        shutil.copy(FOLDER / f"{name}{ending}", folder / f"{name}{ending}")
    return folder / name


def test_the_bytes_are_those_of_preprocess(tmp_path: Path, tokenizer: Path) -> None:
    text = write_json_lines(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    assert preprocess(tmp_path / "ours", [text], "--append-eod", *flags_of(tokenizer)) == 0
    for name in ("datatrove", "nemo_curator"):
        theirs = tuple((FOLDER / f"{name}{ending}").read_bytes() for ending in (".bin", ".idx"))
        assert theirs == files(tmp_path / "ours"), name


@pytest.mark.parametrize("name", ["datatrove_with_empty", "datatrove_without_ends"])
def test_empty_texts_are_documents(tokenizer: Path, name: str) -> None:
    """Of one empty sequence, or of the end alone, which `preprocess` and Megatron do not write there."""
    model, file = HuggingFaceTokenizer(tokenizer), TokenFile(FOLDER / name)
    expected = [model.encode(text) + [model.eod] * (name == "datatrove_with_empty") for text in WITH_EMPTY]
    assert [file.document(number).tolist() for number in range(file.num_documents)] == expected
    owners = np.repeat(np.arange(len(expected)), [len(document) for document in expected])
    np.testing.assert_array_equal(file.documents_of(np.arange(file.num_tokens)), owners)
    assert verify_token_file(file.prefix) == []


def test_they_become_a_project_and_train_a_retro(tmp_path: Path, tokenizer: Path) -> None:
    """From two files without manifests to neighbours that a model reads; checksums may be written beside them."""
    name = "datatrove_with_empty"
    prefix = copied(name, tmp_path)
    build = ["build-retrieval", "--retro-project-dir", str(tmp_path / "project"), "--retro-chunk-length", "16"]
    build += ["--retro-embedder-dimension", "64", "--retro-database-corpus", str(prefix), *flags_of(tokenizer)]
    assert main(build) == 0
    database = ChunkDatabase.open(tmp_path / "project" / "database")
    encode = HuggingFaceTokenizer(tokenizer).encode
    assert database.num_chunks == sum(-(-len(encode(text)) // 16) for text in TEXTS)
    assert main(["preprocess", "--checksum-token-files", str(prefix)]) == 0
    train = ["pretrain", *MODEL, *RETRO, "--data-path", str(prefix), "--save", str(tmp_path / "run")]
    train += ["--database-path", str(database.path), "--neighbor-path", str(tmp_path / "project" / "neighbors" / name)]
    assert main([*train, *flags_of(tokenizer)]) == 0


def test_what_is_refused_of_them(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A cut file; documents that end otherwise than the tokenizer says, or do not end where they should."""
    build = ["build-retrieval", "--retro-tasks", "plan", "--retro-embedder-dimension", "64"]
    build += ["--retro-project-dir", str(tmp_path / "project"), "--retro-database-corpus"]
    prefix = str(copied("datatrove", tmp_path))
    save_byte_level(tmp_path / "other", ("<pad>", END))
    assert main([*build, prefix, *flags_of(tmp_path / "other")]) == 2
    assert "end-of-document id 257" in capsys.readouterr().err
    bare = str(FOLDER / "datatrove_without_ends")
    assert main([*build, bare, *flags_of(tokenizer)]) == 2
    assert "--no-retro-database-eod" in capsys.readouterr().err
    with Path(f"{prefix}.bin").open("r+b") as stream:
        stream.truncate(3000)
    assert main([*build, prefix, *flags_of(tokenizer)]) == 2
    assert "datatrove.idx does not belong to" in capsys.readouterr().err
    assert main([*build, bare, *flags_of(tokenizer), "--no-retro-database-eod"]) == 0
