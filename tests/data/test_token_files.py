"""Token files are Megatron's, byte for byte, and one that lies is refused."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_retro.artifacts.manifest import manifest_path
from megatron_retro.data.token_file import TokenFile, token_dtype
from megatron_retro.data.token_writer import TokenFileWriter, merge_token_files, verify_token_file
from megatron_retro.errors import ArtifactError, DamagedArtifact, DataError
from megatron_retro.testing.corpora import random_documents, write_reference_token_file


def flat(lists: list[list[Any]]) -> list[Any]:
    return list(itertools.chain.from_iterable(lists))


corpora = st.lists(st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), max_size=3), max_size=12)


def write(prefix: Path, documents: list[list[list[int]]], dtype: str) -> None:
    with TokenFileWriter(prefix, dtype) as writer:
        for document in documents:
            lengths = np.array([len(sequence) for sequence in document], np.int32)
            writer.add_documents(np.array(flat(document), np.int64), lengths, np.array([len(document)]))
        writer.finalize()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(corpora, st.sampled_from(["uint16", "int32"]))
def test_written_files_are_megatrons_byte_for_byte(
    tmp_path: Path, documents: list[list[list[int]]], dtype: str
) -> None:
    write(tmp_path / "ours", documents, dtype)
    write_reference_token_file(tmp_path / "theirs", documents, dtype)
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"ours{ending}").read_bytes() == (tmp_path / f"theirs{ending}").read_bytes()
    file = TokenFile(tmp_path / "theirs")
    assert [file.document(n).tolist() for n in range(file.num_documents)] == [flat(d) for d in documents]
    assert file.fingerprint == TokenFile(tmp_path / "ours").fingerprint
    assert verify_token_file(tmp_path / "ours") == [] == verify_token_file(tmp_path / "theirs")
    offsets = np.arange(file.num_tokens)
    owners = [n for n, document in enumerate(documents) for _ in flat(document)]
    assert file.documents_of(offsets).tolist() == owners


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "int64"])
def test_foreign_files_with_modes_and_other_types_are_read(tmp_path: Path, dtype: str) -> None:
    documents = [[[1, 2, 3]], [], [[4], [5, 6]]]
    write_reference_token_file(tmp_path / "a", documents, dtype, modes=True)
    file = TokenFile(tmp_path / "a")
    assert file.dtype == dtype and file.index.modes is not None and file.index.modes.tolist() == [0, 0, 0]
    assert file.tokens(2, 5).tolist() == [3, 4, 5]
    assert file.documents_of(np.arange(6)).tolist() == [0, 0, 0, 2, 2, 2]
    assert np.shares_memory(file.document(0), file.stream)


def test_merging_is_writing_all_at_once(tmp_path: Path) -> None:
    parts = [[[d] if d else [] for d in random_documents(seed, 20)] for seed in range(3)]
    for number, part in enumerate(parts):
        write(tmp_path / str(number), part, "uint16")
    merge_token_files([tmp_path / str(number) for number in range(3)], tmp_path / "merged")
    write(tmp_path / "whole", flat(parts), "uint16")
    for ending in (".bin", ".idx"):
        assert (tmp_path / f"merged{ending}").read_bytes() == (tmp_path / f"whole{ending}").read_bytes()


def test_the_stored_type_is_megatrons_choice() -> None:
    assert token_dtype(65499) == np.uint16 and token_dtype(65500) == np.int32


@pytest.mark.parametrize(("dtype", "token"), [("uint16", 65536), ("uint16", -1), ("int32", 1 << 31)])
def test_a_token_beyond_the_type_is_refused_and_nothing_is_left(tmp_path: Path, dtype: str, token: int) -> None:
    with pytest.raises(DataError, match="does not fit"), TokenFileWriter(tmp_path / "a", dtype) as writer:
        for tokens in ([1, 2], [token]):
            writer.add_documents(np.array(tokens), np.array([len(tokens)], np.int32), np.array([1]))
    assert list(tmp_path.iterdir()) == []


def corrupt(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset, 0 if offset >= 0 else 2)
        stream.write(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: corrupt(p / "a.idx", 0, b"X"), "no token file index"),
        (lambda p: corrupt(p / "a.idx", 9, b"\x02"), "another format"),
        (lambda p: corrupt(p / "a.idx", 17, b"\x09"), "another format"),
        (lambda p: corrupt(p / "a.idx", 18, struct.pack("<Q", 10)), "size that its header says"),
        (lambda p: (p / "a.idx").write_bytes((p / "a.idx").read_bytes()[:-3]), "size that its header says"),
        (lambda p: (p / "a.idx").write_bytes(b"MMIDIDX"), "no token file index"),
        (lambda p: (p / "a.bin").write_bytes((p / "a.bin").read_bytes()[:-2]), "does not belong"),
        (lambda p: (p / "a.bin").write_bytes((p / "a.bin").read_bytes() + b"\0\0"), "does not belong"),
        (lambda p: (p / "a.bin").write_bytes(b""), "does not belong"),
        (lambda p: corrupt(p / "a.idx", -8, struct.pack("<q", 2)), "do not cover"),
        (lambda p: (p / "a.bin").unlink(), "there is no file"),
        (lambda p: (p / "a.idx").unlink(), "there is no file"),
    ],
)
def test_an_index_that_lies_is_refused(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write(tmp_path / "a", [[[1, 2, 3]], [[4, 5]], [[6]]], "uint16")
    damage(tmp_path)
    with pytest.raises(DamagedArtifact, match=r"checksum is wrong|cut or replaced|is missing"):
        TokenFile(tmp_path / "a")
    manifest_path(tmp_path / "a").unlink()  # as beside a file of another program
    with pytest.raises(ArtifactError, match=message):
        TokenFile(tmp_path / "a")
    assert verify_token_file(tmp_path / "a")


def test_verify_finds_what_opening_does_not_look_at(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2, 3]], [[4, 5]], [[6]]], "uint16")
    corrupt(tmp_path / "a.idx", 34, struct.pack("<i", 2))
    manifest_path(tmp_path / "a").unlink()
    assert any("do not follow" in problem for problem in verify_token_file(tmp_path / "a"))
    write(tmp_path / "b", [[[1, 2, 3]]], "uint16")
    corrupt(tmp_path / "b.bin", 2, b"\x09")
    assert any("checksum" in problem for problem in verify_token_file(tmp_path / "b"))
    manifest_path(tmp_path / "b").unlink()
    assert any("beyond the vocabulary" in problem for problem in verify_token_file(tmp_path / "b", vocab_size=9))


def test_the_fingerprint_tells_files_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", [[[1, 2, 3]]], "uint16")
    write(tmp_path / "b", [[[1, 2, 4]]], "uint16")
    write(tmp_path / "c", [[[1, 2], [3]]], "uint16")
    prints = {TokenFile(tmp_path / name).fingerprint for name in "abc"}
    assert len(prints) == 3


def test_opening_does_not_depend_on_the_number_of_documents(tmp_path: Path, count: Callable[[int, int], int]) -> None:
    documents = count(1_000_000, 10_000_000)
    with TokenFileWriter(tmp_path / "many", "uint16") as writer:
        ones = np.ones(documents, np.int32)
        writer.add_documents(np.zeros(documents, np.uint16), ones, ones.astype(np.int64))
        writer.finalize()
    tracemalloc.start()
    file = TokenFile(tmp_path / "many")
    assert file.document_of(documents // 2) == documents // 2
    largest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert largest < max(documents / 10, 12 << 20)  # the blocks in which a small index is verified
    assert len(file.fingerprint) == 64
