"""A published datastore: the chunks of a passage have its vector, and whatever is not that vector is refused."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_retro.config.settings import Settings
from megatron_retro.data.neighbor_table import NeighborTable
from megatron_retro.errors import ArtifactError, DataError
from megatron_retro.retrieval.embedders import HashedEmbedder
from megatron_retro.retrieval.live_index import LiveIndex
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.retrieval_projects import CHUNK, EOD, echoing_documents, project_settings, write_corpus

Documents = list[list[int]]
LEFT_OUT = 3


def vectors_of(documents: Documents) -> np.ndarray:
    """One vector for each document, also for one without text."""
    tokens = np.zeros((len(documents), max(map(len, documents))), np.int32)
    present = np.zeros(tokens.shape, bool)
    for row, document in enumerate(documents):
        tokens[row, : len(document)] = document
        present[row, : len(document)] = True
    return HashedEmbedder(64).embed(tokens, present).astype(np.float16)


@pytest.fixture
def store() -> tuple[Documents, Documents]:
    return echoing_documents(0, 40), echoing_documents(1, 30)


@pytest.fixture
def settings(store: tuple[Documents, Documents], tmp_path: Path) -> Settings:
    """Passages in two token files, of which the first ones of the second are left out; vectors in three others."""
    corpora = [write_corpus(tmp_path / name, part) for name, part in zip("ab", store, strict=True)]
    paths = [tmp_path / f"passages_{number:02}.npy" for number in range(3)]
    for path, part in zip(paths, np.split(vectors_of([*store[0], *store[1]]), [11, 50]), strict=True):
        np.save(path, part)
    return project_settings(
        tmp_path / "project",
        corpora,
        retro_database_documents=[f"0:{len(store[0])}", f"{LEFT_OUT}:{len(store[1])}"],
        retro_passage_vectors=[str(path) for path in paths],
        retro_query_corpus=[f"queries={write_corpus(tmp_path / 'queries', echoing_documents(2, 20))}"],
        retro_tasks=["train", "encode", "merge", "query"],
    )


def test_neighbors_are_chunks_of_the_nearest_passages_and_none_is_embedded(
    settings: Settings, store: tuple[Documents, Documents], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, chunks_embedded = HashedEmbedder.embed, []

    def counted(self: HashedEmbedder, tokens: np.ndarray, *arguments: Any) -> np.ndarray:
        chunks_embedded.append(len(tokens) if tokens.shape[1] == CHUNK else 0)
        return embed(self, tokens, *arguments)

    monkeypatch.setattr(HashedEmbedder, "embed", counted)
    build_retrieval(settings.replace(retro_tasks=["train", "encode", "merge"]))
    assert sum(chunks_embedded) == 0
    monkeypatch.undo()
    build_retrieval(settings)
    passages = [*store[0], *store[1][LEFT_OUT:]]
    of_passage = vectors_of(passages).astype(np.float32)
    of_chunk = np.repeat(of_passage, [-(-len(passage) // CHUNK) for passage in passages], axis=0)
    stream = np.concatenate([[*document, EOD] for document in echoing_documents(2, 20)])
    queries = stream[: len(stream) // CHUNK * CHUNK].reshape(-1, CHUNK)
    distances = np.square(HashedEmbedder(64).embed(queries, queries != EOD)[:, None] - of_chunk).sum(axis=2)
    table = NeighborTable.open(tmp_path / "project/neighbors/queries")
    ids = np.concatenate([table.rows(first, last) for first, last in table.row_ranges])
    found = np.take_along_axis(distances, ids.astype(np.int64), axis=1)
    assert len(ids) == len(queries) and np.allclose(found, np.sort(distances, axis=1)[:, : ids.shape[1]], atol=1e-5)
    live = LiveIndex(tmp_path / "project").search([queries[0].tolist()], 2)
    assert np.allclose(live[1][0], found[0, :2], atol=1e-5), "queries are embedded by what made the passages' vectors"


def test_other_vectors_are_refused_before_anything_is_built(settings: Settings, tmp_path: Path) -> None:
    path = tmp_path / "passages_01.npy"
    rows = np.load(path)
    unlike, unfit = "not what the embedder makes of their passages", "does not hold vectors of the embedder"
    for changed, message in (
        (rows[::-1], unlike),
        (2 * rows, unlike),
        (rows[:-1], "one vector for each document"),
        (rows[:, :32], unfit),
        (rows.astype(np.int32), unfit),
        (np.where(np.arange(len(rows))[:, None] == 2, np.inf, rows), "passage 13 is not finite"),
    ):
        np.save(path, changed)
        with pytest.raises((ArtifactError, DataError), match=message):
            build_retrieval(settings)
        assert not (tmp_path / "project/index").exists()
    np.save(path, rows)
    build_retrieval(settings.replace(retro_tasks=["train"]))
    np.save(path, rows * np.float16(1.01))
    with pytest.raises(ArtifactError, match="embedder"):
        build_retrieval(settings)


class Harm:
    """What a pickle of strangers may do."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("harm"),)


def test_a_pickle_is_refused_and_nothing_of_it_runs(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("passages.pkl").write_bytes(pickle.dumps(([0], Harm())))
    np.save("objects.npy", np.array([Harm()], object), allow_pickle=True)
    for path in ("passages.pkl", "objects.npy"):
        with pytest.raises(ArtifactError, match="is no array"):
            build_retrieval(settings.replace(retro_passage_vectors=[path]))
    assert not Path("harm").exists()
