"""One tokenizer for one corpus: token files know theirs, and every verb that opens them compares."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.cli.main import main
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.dataset import read_neighbors
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import ByteTokenizer, require_tokenizer
from megatron_retro.errors import ArtifactError, DataError
from megatron_retro.testing.corpora import small_byte_level_files, write_json_lines
from megatron_retro.testing.tiny_corpus import write_tiny_corpus

MODEL = [
    *("--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "2", "--seq-length", "64"),
    *("--retro-chunk-length", "16", "--train-iters", "1", "--micro-batch-size", "1", "--global-batch-size", "1"),
    *("--lr", "0.001", "--eval-iters", "0", "--split", "1,0,0"),
]
RETRO = ["--retro-add-retriever", "--retro-layers", "2"]


class OtherBytes(ByteTokenizer):
    """The same ids under another fingerprint."""

    fingerprint = "f" * 64


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of bytes, one of GPT-2's tokens, and the files of that tokenizer."""
    room = tmp_path_factory.mktemp("room")
    text = write_json_lines(room / "text.jsonl", [{"text": f"document {n} " + "some words " * 30} for n in range(30)])
    vocabulary, merges = small_byte_level_files(room)
    gpt2 = ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(vocabulary), "--merge-file", str(merges)]
    (room / "gpt2.json").write_text(json.dumps(gpt2))
    for name, flags in (("bytes", []), ("gpt2", gpt2)):
        words = ["preprocess", "--input", str(text), "--output-prefix", str(room / name), "--workers", "1"]
        assert main([*words, "--append-eod", *flags]) == 0
    return room


def prefix(room: Path, name: str) -> str:
    return f"{room / name}_text_document"


def test_a_file_knows_its_tokenizer(room: Path) -> None:
    file = TokenFile(prefix(room, "bytes"))
    assert file.tokenizer is not None
    assert dataclasses.astuple(file.tokenizer) == (ByteTokenizer.fingerprint, "ByteTokenizer", 257)
    require_tokenizer([file], ByteTokenizer())
    with pytest.raises(ArtifactError, match=r"another tokenizer\s+got: +ByteTokenizer of 257 ids.*\s+expected: +Other"):
        require_tokenizer([file], OtherBytes())
    require_tokenizer([file], OtherBytes(), allow_mismatch=True)


@pytest.mark.parametrize("verb", ["pretrain", "build-retrieval", "build-retrieval of queries"])
def test_a_verb_refuses_a_corpus_of_another_tokenizer(
    room: Path, tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit 2 with both names; with the flag it goes on."""
    if verb == "pretrain":
        gpt2 = json.loads((room / "gpt2.json").read_text())
        words = ["pretrain", *MODEL, *gpt2, "--data-path", prefix(room, "bytes"), "--save", str(tmp_path / "run")]
    else:
        words = ["build-retrieval", "--retro-project-dir", str(tmp_path / "project"), "--retro-chunk-length", "16"]
        words += ["--retro-embedder-dimension", "64", "--retro-tasks", "plan", "--no-retro-database-eod"]
        of_database = verb == "build-retrieval"
        words += ["--retro-database-corpus", prefix(room, "gpt2" if of_database else "bytes")]
        words += ["--retro-query-corpus", prefix(room, "bytes" if of_database else "gpt2")]
    assert main(words) == 2
    told = capsys.readouterr().err
    assert "another tokenizer" in told and "ByteTokenizer" in told and "GPT2BPETokenizer" in told
    assert "--allow-tokenizer-mismatch" in told
    assert main([*words, "--allow-tokenizer-mismatch"]) == 0
    if verb == "pretrain":
        capsys.readouterr()
        words = ["evaluate", "perplexity", "--load", str(tmp_path / "run"), "--data-path", prefix(room, "bytes")]
        assert main([*words, "--split", "0,1,0", "--eval-output", str(tmp_path / "eval")]) == 2
        told = capsys.readouterr().err
        assert "another tokenizer" in told and "ByteTokenizer" in told and "GPT2BPETokenizer" in told


def test_merged_files_keep_their_tokenizer_or_are_refused(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def merge(*names: str, flags: tuple[str, ...] = ()) -> int:
        words = ["preprocess", "--merge-token-files", *(prefix(room, name) for name in names)]
        return main([*words, "--output-prefix", str(tmp_path / "-".join(names)), *flags])

    assert merge("bytes", "bytes") == 0
    joined = TokenFile(tmp_path / "bytes-bytes").tokenizer
    assert joined is not None and joined.fingerprint == ByteTokenizer.fingerprint
    assert merge("bytes", "gpt2") == 2
    assert "different tokenizers" in capsys.readouterr().err
    assert merge("bytes", "gpt2", flags=("--allow-tokenizer-mismatch",)) == 0
    assert TokenFile(tmp_path / "bytes-gpt2").tokenizer is None


def test_an_id_beyond_the_vocabulary_is_found_in_its_document(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """File, document and position; without the check it is an IndexError of the embedding."""
    source = Path(prefix(room, "bytes"))
    for ending in (".bin", ".idx"):
        (tmp_path / f"corpus{ending}").write_bytes(source.with_name(source.name + ending).read_bytes())
    document, position = 7, 40
    start = TokenFile(tmp_path / "corpus").document_bounds(document)[0]
    with (tmp_path / "corpus.bin").open("r+b") as stream:
        stream.seek(2 * (start + position))
        stream.write(np.uint16(4000).tobytes())
    words = ["pretrain", *MODEL, "--data-path", str(tmp_path / "corpus"), "--save", str(tmp_path / "run")]
    assert main([*words, "--train-iters", "200"]) == 2
    told = capsys.readouterr().err
    assert f"{tmp_path / 'corpus'}: document 7 holds a token beyond the vocabulary, at its position 40" in told
    assert "got:      4000" in told


def test_an_unknown_id_of_a_neighbour_is_found_in_its_document(tmp_path: Path) -> None:
    """The neighbour's own file is named, not that of the sample."""
    corpus = write_tiny_corpus(tmp_path / "tiny")
    dataset = build_dataset(corpus.settings(), "train", eod=None)
    reader = dataset.sources[0].neighbors
    assert reader is not None
    chunks = dataset.sources[0].samples.first_chunks(np.arange(1))
    per_sample = dataset.sources[0].samples.chunks_per_sample
    read_neighbors(reader, chunks, per_sample, None, 1 << 16)
    highest = int(reader.read(chunks, per_sample)[0].max())
    with pytest.raises(DataError, match=r"tokens: document \d+ holds a token beyond the vocabulary") as refusal:
        read_neighbors(reader, chunks, per_sample, None, highest)
    found = re.search(r"document (\d+) .* position (\d+)", str(refusal.value))
    assert found is not None
    assert reader.database.files[0].document(int(found[1]))[int(found[2])] == highest
