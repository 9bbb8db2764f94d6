"""A finished project answers what its tables say, without being told more than its directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.errors import ArtifactError
from megatron_retro.retrieval.live_index import LiveIndex
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.retrieval_projects import EOD, echoing_documents, project_settings, write_corpus


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("live")
    corpus = write_corpus(folder / "corpus", echoing_documents(1, 60))
    settings = project_settings(folder / "project", [corpus], retro_tasks=["train", "encode", "merge", "query"])
    build_retrieval(settings)
    return folder / "project"


def test_a_stored_chunk_finds_itself(project: Path) -> None:
    index = LiveIndex(project)
    chosen = np.arange(0, index.database.num_chunks, 7)
    tokens, present = index.database.gather(chosen, index.database.chunk_length)
    chunks = [row[mask].tolist() for row, mask in zip(tokens, present, strict=True)]
    ids, distances = index.search(chunks, 3)
    assert ids.shape == distances.shape == (len(chosen), 3)
    assert np.abs(distances[:, 0]).max() < 1e-5
    found, there = index.database.gather(ids[:, 0], index.database.chunk_length)
    assert (np.where(there, found, 0) == np.where(present, tokens, 0)).mean() > 0.999
    ended, _ = index.search([[*chunks[0], EOD]], 3)
    assert (ended == ids[:1]).all(), "the end of a document is no text"


def test_answers_are_remembered_and_forgotten(project: Path) -> None:
    index = LiveIndex(project, cached_chunks=2)
    asked: list[int] = []
    answer = index._answers
    index._answers = lambda chunks, number: (asked.append(len(chunks)), answer(chunks, number))[1]  # type: ignore
    first = index.search([[1, 2, 3], [1, 2, 3], [4, 5]], 2)
    again = index.search([[1, 2, 3], [1, 2, 3], [4, 5]], 2)
    assert asked == [2]
    assert (first[0] == again[0]).all() and (first[1] == again[1]).all()
    index.search([[6]], 2)
    index.search([[1, 2, 3]], 2)
    assert asked == [2, 1, 1]


def test_more_neighbors_than_chunks_are_absent(project: Path) -> None:
    index = LiveIndex(project)
    ids, distances = index.search([[1, 2, 3]], index.database.num_chunks + 5)
    assert (ids[0, -5:] == -1).all() and np.isinf(distances[0, -5:]).all()
    assert sorted(ids[0, :-5].tolist()) == list(range(index.database.num_chunks))


def test_a_directory_without_an_index_is_refused(project: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no index that can be asked"):
        LiveIndex(tmp_path)
    copy = project.with_name("copy")
    shutil.copytree(project, copy)
    lists = copy / "index" / "merged" / "lists.ivfdata"
    lists.write_bytes(lists.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="cut"):
        LiveIndex(copy)
