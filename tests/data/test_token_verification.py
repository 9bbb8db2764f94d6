"""Tokens are compared with checksums: small files when opened, large ones beside the run, others on request."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.artifacts import verified
from megatron_retro.artifacts.manifest import manifest_path
from megatron_retro.cli.main import main
from megatron_retro.data.builders import build_loader
from megatron_retro.data.token_file import TokenFile, bin_path
from megatron_retro.data.token_verification import Unverified
from megatron_retro.data.token_writer import verify_token_file
from megatron_retro.errors import DamagedArtifact
from megatron_retro.testing.corpora import write_documents, write_reference_token_file
from megatron_retro.testing.tiny_corpus import TinyCorpus, write_tiny_corpus

BLOCK = 1 << 22


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as stream:
        stream.seek(place)
        byte = stream.read(1)[0]
        stream.seek(place)
        stream.write(bytes([byte ^ 4]))


@pytest.fixture
def small_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "WHOLE_BYTES", 512)


@pytest.fixture
def corpus(tmp_path: Path) -> TinyCorpus:
    return write_tiny_corpus(tmp_path)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four blocks of four documents each."""
    prefix = tmp_path_factory.mktemp("large") / "corpus"
    tokens = np.random.default_rng(0).integers(0, 1000, (16, BLOCK // 2 // 4))
    write_documents(prefix, tokens.tolist())
    return prefix


def test_a_small_file_is_verified_when_it_is_opened(corpus: TinyCorpus) -> None:
    flip(bin_path(corpus.tokens), 100)
    with pytest.raises(DamagedArtifact, match=r"tokens\.bin has changed"):
        TokenFile(corpus.tokens)


def test_damage_is_found_before_the_first_step(corpus: TinyCorpus, small_is_large: None) -> None:
    settings = corpus.settings(retro=False, verify_tokens="before")
    build_loader(settings, eod=256).close()
    flip(Path(f"{corpus.tokens}.idx"), 40)
    with pytest.raises(DamagedArtifact, match=r"tokens\.idx has changed"):
        build_loader(settings, eod=256)
    build_loader(corpus.settings(retro=False, verify_tokens="off"), eod=256).close()


def test_damage_is_found_while_a_run_reads(corpus: TinyCorpus, small_is_large: None) -> None:
    flip(Path(f"{corpus.tokens}.idx"), 40)
    loader = build_loader(corpus.settings(retro=False), eod=256)
    with pytest.raises(DamagedArtifact, match=r"tokens\.idx has changed"):
        for _ in range(500):
            next(loader)
            time.sleep(0.01)
    loader.close()


def test_an_error_names_file_block_and_documents(large: Path, small_is_large: None) -> None:
    place = BLOCK + 3 * BLOCK // 4 + 100  # the last document of the second block
    flip(bin_path(large), place)
    try:
        file = TokenFile(large)  # the first, the middle and the last block are sound
        shares = [list(Unverified([file]).checks(rank, 3)) for rank in range(3)]
        found = []
        for share in shares:
            try:
                for check in share:
                    check()
            except DamagedArtifact as damage:
                found.append(str(damage))
        assert len(found) == 1
        assert f"{large}.bin" in found[0] and "block 1" in found[0] and "documents 4 to 7 lie there" in found[0]
    finally:
        flip(bin_path(large), place)


def test_another_file_of_the_same_size_is_noticed_at_once(large: Path, small_is_large: None) -> None:
    path = bin_path(large)
    kept = path.read_bytes()
    path.write_bytes(bytes(len(kept)))
    try:
        with pytest.raises(DamagedArtifact, match="checksum of block"):
            TokenFile(large)
    finally:
        path.write_bytes(kept)
    TokenFile(large)


def test_files_of_others_get_checksums_on_request(tmp_path: Path) -> None:
    prefix = tmp_path / "theirs"
    write_reference_token_file(prefix, [[[1, 2, 3]], [[4, 5], [6]]], "uint16", modes=True)
    before = {ending: Path(f"{prefix}{ending}").read_bytes() for ending in (".bin", ".idx")}
    assert main(["preprocess", "--checksum-token-files", str(prefix)]) == 0
    assert {ending: Path(f"{prefix}{ending}").read_bytes() for ending in before} == before
    assert manifest_path(prefix).exists() and verify_token_file(prefix) == []
    assert TokenFile(prefix).tokenizer is None
    flip(bin_path(prefix), 3)
    with pytest.raises(DamagedArtifact, match="--checksum-token-files"):
        TokenFile(prefix)
    assert main(["preprocess", "--checksum-token-files", str(prefix)]) == 0  # it was replaced on purpose
    TokenFile(prefix)
