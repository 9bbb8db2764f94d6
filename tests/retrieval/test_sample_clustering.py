"""Lists of a sample in parts are those of faiss in one piece, and the same wherever a worker was stopped."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest

from megatron_retro.errors import ArtifactError
from megatron_retro.retrieval import index_choice, sample_clustering
from megatron_retro.retrieval.chunk_encoding import verify_arrays
from megatron_retro.retrieval.index_building import open_merged
from megatron_retro.retrieval.sample_clustering import ROUNDS, SampleClustering
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.retrieval.work_blocks import cut_blocks
from megatron_retro.testing.retrieval_projects import echoing_documents, project_settings, write_corpus


def clustering_of(vectors: np.ndarray, folder: Path, part: int, lists: int) -> SampleClustering:
    parts = cut_blocks(len(vectors), part)
    made = SampleClustering(
        folder, {"of": "a test"}, parts, lists, "gpu", lambda blocks, done: (one for one in blocks if not done(one))
    )
    made.write_vectors(lambda block, _: vectors[block.first : block.last])
    return made


def centroids_of(vectors: np.ndarray, folder: Path, part: int, lists: int) -> np.ndarray:
    clustering = clustering_of(vectors, folder, part, lists)
    clustering.run()
    return clustering.centroids()


@pytest.fixture
def blobs() -> np.ndarray:
    """8,000 vectors around 16 far corners, their order mixed."""
    random = np.random.default_rng(3)
    corners = 8 * random.choice([-1, 1], (16, 12))
    return (corners[random.integers(16, size=8000)] + random.normal(size=(8000, 12))).astype(np.float32)


def in_one_piece(vectors: np.ndarray, start: np.ndarray) -> np.ndarray:
    """faiss's own k-means from the same start."""
    kmeans = faiss.Kmeans(vectors.shape[1], len(start), niter=ROUNDS, max_points_per_centroid=len(vectors))
    kmeans.train(vectors, init_centroids=start)
    return kmeans.centroids


@pytest.mark.parametrize("part", [8000, 1000, 777])
def test_the_lists_are_those_of_faiss_from_the_same_start(tmp_path: Path, blobs: np.ndarray, part: int) -> None:
    centroids = centroids_of(blobs, tmp_path, part, lists=24)
    start = verify_arrays(tmp_path / "centroids-00.safetensors", {})["centroids"]
    expected = in_one_piece(blobs, start.copy())
    assert np.allclose(centroids, expected, atol=1e-4)
    assert (faiss.knn(blobs, centroids, 1)[1] == faiss.knn(blobs, expected, 1)[1]).all()


def test_gpus_find_the_same_lists(tmp_path: Path, blobs: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """With faiss's CPU index where a GPU's would stand."""
    without = centroids_of(blobs, tmp_path / "cpu", 3000, lists=24)
    monkeypatch.setattr(sample_clustering, "num_gpus", lambda: 1)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: index, raising=False)
    assert np.allclose(centroids_of(blobs, tmp_path / "gpu", 3000, lists=24), without, atol=1e-4)


def test_an_empty_list_takes_half_of_another(tmp_path: Path) -> None:
    """Twelve vectors many times over cannot fill 20 lists; each list gets a place all the same."""
    vectors = np.repeat(np.random.default_rng(0).normal(size=(12, 4)), 100, axis=0).astype(np.float32)
    centroids = centroids_of(vectors, tmp_path, 500, lists=20)
    assert np.isfinite(centroids).all() and len(np.unique(centroids, axis=0)) == 20
    assert faiss.knn(vectors, centroids, 1)[0].max() < 1e-3


def test_a_damaged_part_is_named(tmp_path: Path, blobs: np.ndarray) -> None:
    clustering = clustering_of(blobs, tmp_path, 3000, lists=24)
    path = sorted(tmp_path.glob("vectors-*"))[1]
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{path.name} is damaged"):
        clustering.run()


class StoppedError(BaseException):
    """A worker that is gone."""


@pytest.mark.parametrize("index_str", ["IVF8,Flat", "PCA32,IVF8_HNSW8,PQ8x4"])
def test_stopped_anywhere_and_started_again_the_index_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index_str: str
) -> None:
    corpus = write_corpus(tmp_path / "corpus", echoing_documents(8, 200))
    monkeypatch.setattr(index_choice, "_PART_CHUNKS", 200)
    write, dice = sample_clustering.write_arrays, random.Random(1)

    def built(name: str) -> bytes:
        settings = project_settings(
            tmp_path / name, [corpus], retro_index_str=index_str, retro_index_ntrain=700, retro_tasks=["train"]
        )
        build_retrieval(settings)
        assert not list((tmp_path / name / "work").glob("train-*"))
        return (tmp_path / name / "index/trained/trained.faiss").read_bytes()

    def stopped_at(place: int) -> Iterator[None]:
        yield from [None] * place
        raise StoppedError

    undisturbed, stops = built("undisturbed"), 0
    while True:
        countdown = stopped_at(dice.randrange(1, 12))

        def write_or_stop(*arguments: object, countdown: Iterator[None] = countdown) -> None:
            if dice.random() < 0.5:
                write(*arguments)  # type: ignore[arg-type]
                next(countdown)
            else:
                next(countdown)
                write(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(sample_clustering, "write_arrays", write_or_stop)
        try:
            assert built("disturbed") == undisturbed
            break
        except StoppedError:
            stops += 1
    assert stops > 4


def test_an_index_of_parts_searches_as_one_of_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list finder, transforms, codes: all that faiss trains is there, and finds as much."""
    corpus = write_corpus(tmp_path / "corpus", echoing_documents(5, 250))
    found = []
    for part in (10**6, 150):
        monkeypatch.setattr(index_choice, "_PART_CHUNKS", part)
        root = tmp_path / str(part)
        settings = project_settings(root, [corpus], retro_index_str="PCA32,IVF4_HNSW8,PQ8x4", retro_index_ntrain=10_000)
        build_retrieval(settings.replace(retro_tasks=["train", "encode", "merge"]))
        index = open_merged(root / "index" / "merged")
        inner = faiss.extract_index_ivf(index)
        inner.nprobe = 2
        vectors = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
        found.append(float(index.search(vectors, 1)[0].mean()))
    assert abs(found[1] / found[0] - 1) < 0.02
