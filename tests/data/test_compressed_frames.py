"""Compressed files are cut where frames begin; every line is read once, whatever the cuts, by any number of workers."""

from __future__ import annotations

import itertools
import json
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_retro.cli.main import main
from megatron_retro.data.preprocessing import job as jobs
from megatron_retro.data.preprocessing.frames import bgzf_members, cuts_of, zstd_frames
from megatron_retro.data.preprocessing.job import GZIP, ZSTD, InputFile, InputRange, PreprocessingJob, ReadOptions
from megatron_retro.data.preprocessing.records import read_range
from megatron_retro.errors import DataError
from megatron_retro.testing.corpora import write_json_lines
from megatron_retro.testing.preprocessing_runs import files, preprocess, records

zstandard = pytest.importorskip("zstandard")
SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"notes"


def zstd(parts: Sequence[bytes], *, table: bool = False) -> bytes:
    """A frame of each part, with and without checksum and size; notes between them, or a table at the end."""
    kinds = [{}, {"write_checksum": True}, {"write_content_size": False}]
    frames = [zstandard.ZstdCompressor(**kinds[number % 3]).compress(part) for number, part in enumerate(parts)]
    if not table:
        return b"".join(frame + SKIPPABLE * (number % 2) for number, frame in enumerate(frames))
    entries = b"".join(struct.pack("<II", len(frame), len(part)) for frame, part in zip(frames, parts, strict=True))
    footer = struct.pack("<IBI", len(frames), 0, 0x8F92EAB1)
    return b"".join(frames) + struct.pack("<II", 0x184D2A5E, len(entries + footer)) + entries + footer


def bgzf(parts: Sequence[bytes]) -> bytes:
    """Members that say their lengths, as bgzip writes them, an empty one at the end."""
    members = []
    for part in (*parts, b""):
        deflate = zlib.compressobj(wbits=-15)
        body = deflate.compress(part) + deflate.flush()
        head = b"\x1f\x8b\x08\x04" + bytes(6) + struct.pack("<H2sHH", 6, b"BC", 2, len(body) + 25)
        members.append(head + body + struct.pack("<II", zlib.crc32(part), len(part)))
    return b"".join(members)


WRITERS = {"walked.zst": zstd, "table.zst": lambda parts: zstd(parts, table=True), "blocks.gz": bgzf}


def starts_in(content: bytes, name: str) -> list[int]:
    find = zstd_frames if name.endswith("zst") else bgzf_members
    return list(find(np.frombuffer(content, np.uint8)))


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_line_is_read_once(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Cuts within lines, at their ends, around empty frames; lines longer than frames; no newline at the end."""
    text = data.draw(st.lists(st.sampled_from([b"\n", b"ab", b"c" * 40, b"d\n"]), max_size=30).map(b"".join))
    bounds = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    parts = [text[start:stop] for start, stop in zip([0, *bounds], [*bounds, len(text)], strict=True)]
    content = WRITERS[name](parts)
    path = tmp_path / name
    path.write_bytes(content)
    starts = starts_in(content, name)
    assert len(starts) == len(parts) + (name == "blocks.gz")
    cuts = data.draw(st.sets(st.sampled_from(starts)).map(sorted)) if starts else []
    edges = [0, *(cut for cut in cuts if cut > 0), len(content)]
    kind = GZIP if name.endswith("gz") else ZSTD
    file = InputFile(str(path), kind, len(content), "", 0, tuple(cuts))
    job = PreprocessingJob((file,), ReadOptions(("text",), "file", 1 << 20, "stop"), False, "", "uint16")
    spans = [InputRange(0, start, stop) for start, stop in itertools.pairwise(edges)]
    found = [record.content for span in spans for record in read_range(job, span)]
    assert found == text.splitlines(keepends=True)


@pytest.mark.parametrize("name", WRITERS)
def test_workers_share_one_file(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one compressed file give the bytes of the plain one; a damaged frame is named with its file."""
    plain = write_json_lines(tmp_path / "a.jsonl", records(1, 300))
    text = plain.read_bytes()
    assert preprocess(tmp_path / "plain", [plain]) == 0
    source = tmp_path / f"a.jsonl.{name.rpartition('.')[2]}"
    content = WRITERS[name]([text[start : start + 900] for start in range(0, len(text), 900)])
    source.write_bytes(content)
    monkeypatch.setattr(jobs, "SMALLEST_BLOCK", 2000)
    (file,) = jobs.find_inputs([str(source)])
    assert len(file.cuts) > 3 and set(file.cuts) <= set(starts_in(content, name))
    assert preprocess(tmp_path / "cut", [source]) == 0
    assert files(tmp_path / "cut") == files(tmp_path / "plain")
    middle = file.cuts[1] + 60
    source.write_bytes(
        content[:middle] + bytes([content[middle] ^ 1, content[middle + 1] ^ 255]) + content[middle + 2 :]
    )
    assert preprocess(tmp_path / "damaged", [source]) == 2
    assert not list(tmp_path.glob("damaged_text_document.*"))


def test_a_refused_record_names_its_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "SMALLEST_BLOCK", 200)
    lines = [json.dumps({"text": f"{number:03d} " + "ä" * (number % 9)}).encode() + b"\n" for number in range(200)]
    lines[150] = b"{broken\n"
    source = tmp_path / "a.jsonl.zst"
    source.write_bytes(zstd([b"".join(lines[start : start + 20]) for start in range(0, 200, 20)]))
    cuts = jobs.find_inputs([str(source)])[0].cuts
    assert preprocess(tmp_path / "out", [source], "--on-error", "skip") == 0
    (reason,) = Path(f"{tmp_path / 'out'}.refused.txt").read_text().splitlines()
    assert any(f"{source}, compressed byte {cut}, byte " in reason for cut in cuts) and "malformed" in reason
    assert main(["inspect", f"{tmp_path / 'out'}_text_document"]) == 0


def test_what_has_no_lengths_is_read_whole() -> None:
    """Plain gzip members, a lying table, damaged headers: no cut is invented, and cuts keep their distance."""
    import gzip

    assert starts_in(gzip.compress(b"a") * 3, "a.gz") == []
    lying = bytearray(zstd([b"a" * 50, b"b" * 50], table=True))
    true = starts_in(bytes(lying), "a.zst")
    lying[-17] ^= 1
    assert starts_in(bytes(lying), "a.zst") == true
    for place in range(len(lying)):
        flipped = bytes([*lying[:place], lying[place] ^ 255, *lying[place + 1 :]])
        assert all(start < len(flipped) for start in starts_in(flipped, "a.zst"))
    assert cuts_of(iter([0, 5, 10, 11, 30, 98]), 100, 10) == (10, 30)


def test_a_cut_file_that_was_replaced_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.zst"
    path.write_bytes(zstd([b"one\n" * 50]))
    job = PreprocessingJob(
        (InputFile(str(path), ZSTD, path.stat().st_size, ""),),
        ReadOptions(("text",), "file", 1 << 20, "stop"), False, "", "uint16",
    )  # fmt: skip
    with pytest.raises(DataError, match="is cut or damaged"):
        list(read_range(job, InputRange(0, 0, 12)))
