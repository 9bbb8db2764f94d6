"""The train stage: one worker trains the empty index on a uniform sample of chunks."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import new_directory
from megatron_retro.artifacts.manifest import damage, read_manifest, require_same, write_manifest
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.errors import ArtifactError, ConfigError
from megatron_retro.retrieval.embedders import Embedder
from megatron_retro.retrieval.encoding import BATCH_CHUNKS
from megatron_retro.retrieval.faiss_index import faiss_module, new_index, read_index
from megatron_retro.retrieval.layout import claimed
from megatron_retro.retrieval.project import Project
from megatron_retro.runtime.console import Progress

KIND = "trained-index"
VERSION = 1
TRAINED_FILE = "trained.faiss"
_SEED = 1234


def train(project: Project) -> None:
    """Train the index unless that is done; other workers wait."""
    where = project.layout.trained
    for _ in claimed(project.layout, "train", ["train"], lambda _: where.exists(), project.worker):
        sample = uniform_sample(project.database.num_chunks, int(project.decided["train_chunks"]))
        vectors = sampled_vectors(project.database, project.embedder, sample)
        index = new_index(project.choice.index_str, project.embedder.dimension)
        _train_on_gpus(index)
        _train(index, vectors, project.choice.index_str)
        with new_directory(where) as directory:
            faiss_module().write_index(index, str(directory / TRAINED_FILE))
            write_manifest(
                directory, kind=KIND, version=VERSION, inputs=_inputs(project), counts={"sample": len(sample)}
            )


def open_trained(project: Project) -> Any:
    """The trained index, every byte checked."""
    where = project.layout.trained
    manifest = read_manifest(where, kind=KIND, version=VERSION)
    for name, value in _inputs(project).items():
        require_same(where, name, manifest.inputs.get(name), value, f"remove {where.parent} and build again")
    problems = damage(where, manifest)
    if problems:
        raise ArtifactError(
            f"{where} is damaged", got="; ".join(problems), fix=f"remove {where.parent} and build again"
        )
    return read_index(where / TRAINED_FILE)


def trained_fingerprint(project: Project) -> str:
    """Identity of the trained index."""
    return read_manifest(project.layout.trained, kind=KIND, version=VERSION).fingerprint


def uniform_sample(total: int, size: int) -> NDArray[np.int64]:
    """`size` of `total` numbers: one from each of `size` equal parts, the same ones every time."""
    within = np.random.default_rng(_SEED).random(size)
    return np.minimum(((np.arange(size) + within) * (total / size)).astype(np.int64), total - 1)


def sampled_vectors(database: ChunkDatabase, embedder: Embedder, sample: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors of chosen chunks."""
    vectors = np.empty((len(sample), embedder.dimension), np.float32)
    with Progress("train: vectors of the sample", len(sample), "chunks") as progress:
        for first in range(0, len(sample), BATCH_CHUNKS):
            ids = sample[first : first + BATCH_CHUNKS]
            vectors[first : first + len(ids)] = embedder.embed(*database.gather(ids, database.chunk_length))
            progress.advance(len(ids))
    return vectors


def _inputs(project: Project) -> dict[str, str]:
    names = ("database", "embedder", "index_str")
    return {name: project.decided[name] for name in names}


def _train(index: Any, vectors: NDArray[np.float32], index_str: str) -> None:
    try:
        index.train(vectors)
    except RuntimeError as error:
        raise ConfigError(
            f"faiss cannot train {index_str} on {len(vectors)} vectors {vectors.shape[1]} wide",
            got=str(error).split("Error: ")[-1].split("\n")[0],
            fix="give --retro-index-str auto",
        ) from None


def _train_on_gpus(index: Any) -> None:
    """Let the k-means of an inverted file run on the GPUs, where faiss has any."""
    faiss = faiss_module()
    if faiss.get_num_gpus() == 0:
        return
    inverted = faiss.try_extract_index_ivf(index)
    if inverted is not None:
        inverted.clustering_index = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(inverted.d))
