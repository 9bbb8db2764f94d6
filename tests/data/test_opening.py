"""A corpus of 1.2T tokens opens in milliseconds: sparse files, of which only the ends are written, through the reader.

`pytest --full tests/data/test_opening.py` writes `tests/results/opening.json`.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.artifacts.block_checksums import BLOCK_BYTES, ChecksumList, blocks_digest, checksum_of
from megatron_retro.artifacts.manifest import FileRecord, file_record, write_manifest
from megatron_retro.data.token_file import (
    KIND,
    MANIFEST_VERSION,
    TokenFile,
    bin_path,
    checksums_path,
    idx_path,
)
from megatron_retro.data.token_index import header
from tests.faults.injection import ROOT, commit

TOKENS, DOCUMENTS = 1_200_000_000_000, 1_200_000_000
RESULTS = ROOT / "tests/results/opening.json"


def write_sparse_corpus(prefix: Path) -> None:
    """Documents of 1,000 tokens of two bytes, all zero; of the `.idx`, what lies between its ends is left out."""
    size, length = 2 * TOKENS, TOKENS // DOCUMENTS
    with bin_path(prefix).open("wb") as stream:
        stream.truncate(size)
    with idx_path(prefix).open("wb") as stream:
        begin = header(np.uint16, DOCUMENTS, DOCUMENTS + 1)
        ends = (len(begin) + 4 * DOCUMENTS, len(begin) + 12 * DOCUMENTS, len(begin) + 20 * DOCUMENTS + 8)
        last = (
            np.array(length, "<i4"),
            np.array(size - 2 * length, "<i8"),
            np.array([DOCUMENTS - 1, DOCUMENTS], "<i8"),
        )
        stream.write(begin)
        for end, value in zip(ends, last, strict=True):
            stream.seek(end - value.nbytes)
            stream.write(value.tobytes())
    sums = np.full(-(-size // BLOCK_BYTES), checksum_of(bytes(BLOCK_BYTES)), "<u4")
    sums[-1] = checksum_of(bytes(size - (len(sums) - 1) * BLOCK_BYTES))
    checksums_path(prefix).write_bytes(ChecksumList(BLOCK_BYTES, size, sums).to_bytes())
    files = {
        bin_path(prefix).name: FileRecord(size, blocks_digest(sums.tolist())),
        idx_path(prefix).name: FileRecord(idx_path(prefix).stat().st_size, "not read at once"),
        checksums_path(prefix).name: file_record(checksums_path(prefix)),
    }
    write_manifest(prefix, kind=KIND, version=MANIFEST_VERSION, files=files)


def milliseconds(work: Callable[[], object]) -> float:
    """How long some work takes."""
    start = time.perf_counter()
    work()
    return round(1e3 * (time.perf_counter() - start), 2)


def test_a_corpus_of_a_trillion_tokens_opens_at_once(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    prefix = tmp_path / "corpus"
    try:
        write_sparse_corpus(prefix)
    except OSError as error:
        pytest.skip(f"no sparse files of 2.4 TB here: {error}")
    opened = [milliseconds(lambda: TokenFile(prefix)) for _ in range(5)]
    file = TokenFile(prefix)
    assert file.num_tokens == TOKENS and file.num_documents == DOCUMENTS
    facts = {
        "tokens": TOKENS,
        "documents": DOCUMENTS,
        "bytes": sum(os.stat(path).st_size for path in tmp_path.iterdir()),
        "ms to open, first and best": [opened[0], min(opened)],
        "ms for its fingerprint": milliseconds(lambda: file.fingerprint),
        "ms for the last document": milliseconds(lambda: file.document(DOCUMENTS - 1)),
    }
    print(facts)
    if request.config.getoption("--full"):
        facts |= {"date": time.strftime("%Y-%m-%d"), "commit": commit()}
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    assert min(opened) < 500 and facts["ms for its fingerprint"] < 3000, facts  # read ahead, it is 4 GB
    assert len(file.document(DOCUMENTS - 1)) == TOKENS // DOCUMENTS
