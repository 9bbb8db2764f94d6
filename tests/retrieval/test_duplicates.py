"""`find-duplicates` finds what exact comparison of all pairs finds, and a database is made without it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.cli.main import main
from megatron_retro.config.retrieval import DuplicatesConfig
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.retrieval import duplicates
from megatron_retro.retrieval.document_sketches import Bands, Sketches, buckets, is_whole, sketch, write_sketches
from megatron_retro.retrieval.document_spans import DocumentSpans
from megatron_retro.retrieval.duplicates import Search, find_copies
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.work_blocks import WorkBlock
from megatron_retro.testing.retrieval_projects import CHUNK, EOD, cut_chunks, project_settings, write_corpus

NGRAM, JACCARD = 5, 0.8
Documents = list[list[int]]


def changed(random: np.random.Generator, text: list[int], edits: int) -> list[int]:
    """A copy with some tokens replaced."""
    copy = list(text)
    for place in random.choice(len(copy), edits, replace=False):
        copy[place] = int(random.integers(256))
    return copy


def corpora() -> tuple[Documents, Documents]:
    """Held-out documents and those of a database: families of copies of all degrees, empty and short ones."""
    random = np.random.default_rng(3)
    families = [random.integers(0, 256, random.integers(60, 300)).tolist() for _ in range(24)]
    held_out = [*(list(one) for one in families[:6]), [], [1, 2]]
    database: Documents = [[], [1, 2], [1, 2], [7]]
    for family in families:
        database += [changed(random, family, edits) for edits in (0, 0, 1, 1, 2, 3, 4, 6, 9)]
    order = random.permutation(len(database))
    return held_out, [database[number] for number in order]


def test_sketches_may_go_while_a_worker_looks_at_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever has written the report removes them between two looks."""
    bands, path, look = Bands.of(JACCARD), tmp_path / "a.keys", os.stat
    write_sketches(path, np.zeros((3, 1 + bands.count), np.uint64))

    def late(looked_at: Path, **how: Any) -> os.stat_result:
        found = look(looked_at, **how)
        if looked_at == path:
            path.unlink()
        return found

    monkeypatch.setattr(os, "stat", late)
    assert is_whole(path, 3, bands) and not is_whole(path, 3, bands)


def jaccard(one: list[int], other: list[int]) -> float:
    """By sets of tuples, as the definition has it; a text shorter than an n-gram is one n-gram."""
    first, second = (
        {tuple(text[at : at + NGRAM]) for at in range(max(len(text) - NGRAM + 1, 1))} for text in (one, other)
    )
    return len(first & second) / len(first | second) if one and other else 0.0


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both corpora, the database cut into two files, searched."""
    room = tmp_path_factory.mktemp("duplicates")
    held_out, database = corpora()
    write_corpus(room / "held", held_out)
    write_corpus(room / "one", database[:100])
    write_corpus(room / "two", database[100:])
    assert main(words(room, "project")) == 0
    return room


def words(room: Path, project: str, *more: str) -> list[str]:
    return [
        *("find-duplicates", "--retro-project-dir", str(room / project), "--duplicates-held-out", str(room / "held")),
        *("--retro-database-corpus", str(room / "one"), str(room / "two"), *more),
    ]


def lines(project: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (project / "duplicates" / "documents.jsonl").read_text().splitlines()]


def test_what_is_found_is_what_exact_comparison_finds(room: Path) -> None:
    """Every pair is as similar as it says; of those that are, MinHash may miss one in fifty."""
    held_out, database = corpora()
    texts = {"held": held_out, "one": database[:100], "two": database[100:]}
    found: dict[str, set[int]] = {"held-out": set(), "within": set()}
    for line in lines(room / "project"):
        places = [line["document"], line["comes_back_from"]]
        (file, number), (origin, other) = ((Path(place["file"]).name, place["document"]) for place in places)
        exact = jaccard(texts[file][number], texts[origin][other])
        assert exact >= JACCARD and line["jaccard"] == pytest.approx(exact, abs=1e-4)
        found[str(line["why"])].add(number + (100 if file == "two" else 0))
        assert (origin == "held") == (line["why"] == "held-out")
    near = {n for n, text in enumerate(database) if any(jaccard(text, one) >= JACCARD for one in held_out)}
    kept: list[int] = []
    for number, text in enumerate(database):
        if text and not any(jaccard(text, database[one]) >= JACCARD for one in kept):
            kept.append(number)
    repeated = {n for n, text in enumerate(database) if text} - set(kept)
    assert 20 < len(near) < len(repeated) < len(database)
    for name, exact_set in (("held-out", near), ("within", repeated)):
        assert found[name] <= exact_set and len(found[name]) >= 0.98 * len(exact_set), name


def test_blocks_and_memory_change_nothing(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(room, "again", "--duplicates-block-size", "17", "--retro-memory-gb", "0.1")) == 0
    told, whys = "".join(capsys.readouterr()), [line["why"] for line in lines(room / "again")]
    assert f"{whys.count('within')} are near an earlier one, {whys.count('held-out')} near one of" in told
    assert lines(room / "again") == lines(room / "project")
    assert not list((room / "again" / "work").glob("duplicates-*/*.keys"))
    random = np.random.default_rng(0)
    keys = random.integers(0, 1 << 63, 300).astype(np.uint64)[random.integers(0, 300, 1000)] * np.uint64(2)
    whole = {tuple(bucket) for bucket in buckets(keys, np.arange(1000), 1e9)}
    assert whole == {tuple(bucket) for bucket in buckets(keys, np.arange(1000), 5000)} and len(whole) > 200


def test_a_search_goes_on_where_it_stopped(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that were read stay, one that is cut is read again, and the report is the same."""
    plain, read = duplicates.sketch, list[int]()

    def stopping(spans: DocumentSpans, block: WorkBlock, ngram: int, bands: Bands) -> object:
        if len(read) == 4:
            raise KeyboardInterrupt
        read.append(block.first)
        return plain(spans, block, ngram, bands)

    monkeypatch.setattr(duplicates, "sketch", stopping)
    flags = words(room, "stopped", "--duplicates-block-size", "40")
    assert main(flags) != 0 and len(read) == 4
    first, second = sorted((room / "stopped" / "work").glob("duplicates-*/*.keys"))[:2]
    first.write_bytes(first.read_bytes()[:-8])
    monkeypatch.setattr(duplicates, "sketch", lambda spans, block, *more: read.append(1) or plain(spans, block, *more))
    assert second.exists() and main(flags) == 0
    assert len(read) == 4 + 1 + 2 and lines(room / "stopped") == lines(room / "project")


def test_a_database_is_made_without_them(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, database = corpora()
    files = [str(room / "one"), str(room / "two")]

    def settings(project: str, kind: str | None) -> Project:
        return Project(project_settings(room / project, files, retro_drop_duplicates=kind))

    dropped = {place["document"] + 100 * (Path(place["file"]).name == "two") for place in
               (line["document"] for line in lines(room / "project"))}  # fmt: skip
    found = settings("project", "all").database
    expected = [chunk for number, chunk in cut_chunks(database) if number not in dropped]
    tokens, mask = found.gather(np.arange(found.num_chunks), CHUNK)
    assert [row[there].tolist() for row, there in zip(tokens, mask, strict=True)] == expected
    assert found.document_of(np.arange(found.num_chunks)).tolist() == [
        number for number, _ in cut_chunks(database) if number not in dropped
    ]
    whole = ChunkDatabase.create(room / "whole", files, CHUNK, eod=EOD)
    assert whole.num_chunks > found.num_chunks and whole.fingerprint != found.fingerprint
    assert ChunkDatabase.create(room / "none", files, CHUNK, eod=EOD, left_out=np.array([], np.int64)).num_chunks == (
        whole.num_chunks
    )
    with pytest.raises(ArtifactError, match="--retro-drop-duplicates does not match"):
        _ = settings("project", "within").database
    with pytest.raises(ConfigError, match="run `megatron-retro find-duplicates`"):
        _ = settings("elsewhere", "within").database


def test_a_report_belongs_to_its_corpora(room: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(room, "project")) == 0
    assert main(words(room, "project", "--duplicates-jaccard", "0.7")) == 2
    assert "jaccard does not match" in capsys.readouterr().err
    alone = [
        "find-duplicates",
        "--retro-project-dir",
        str(room / "alone"),
        "--retro-database-corpus",
        str(room / "one"),
    ]
    assert main(alone) == 0
    project = Project(project_settings(room / "alone", [str(room / "one")], retro_drop_duplicates="held-out"))
    with pytest.raises(ConfigError, match="without held-out sets"):
        _ = project.database
    project = Project(project_settings(room / "alone", [str(room / "two")], retro_drop_duplicates="within"))
    with pytest.raises(ArtifactError, match="the documents of the database does not match"):
        _ = project.database
    page = (room / "project" / "duplicates" / "duplicates.html").read_text()
    assert "comes back from" in page and "<mark>" in page


def test_a_page_that_stands_often_makes_few_pairs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the first come back from it, whatever is passed over."""
    random = np.random.default_rng(1)
    page = random.integers(0, 256, 400).tolist()
    write_corpus(tmp_path / "many", [changed(random, page, 1) for _ in range(100)])
    spans = DocumentSpans.of([str(tmp_path / "many")], None, EOD, "")
    bands = Bands.of(JACCARD)
    write_sketches(tmp_path / "keys", sketch(spans, WorkBlock(0, 100), NGRAM, bands))
    compared: list[int] = []
    plain = duplicates.similarity
    monkeypatch.setattr(duplicates, "similarity", lambda *sets: compared.append(1) or plain(*sets))
    search = Search(spans, 0, DuplicatesConfig(), {})
    copies = find_copies(search, Sketches([tmp_path / "keys"], bands), 1e9)
    assert copies.within.documents.tolist() == list(range(1, 100)) and copies.passed_over > 0
    assert len(compared) < 3500 < 100 * 99 / 2
    with pytest.raises(ConfigError, match="do not fit into memory"):
        find_copies(search, Sketches([tmp_path / "keys"], bands), 1e4)
