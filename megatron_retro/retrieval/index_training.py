"""The train stage: one worker trains the empty index on a uniform sample of chunks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import new_directory
from megatron_retro.artifacts.manifest import read_manifest, require_same, write_manifest
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS
from megatron_retro.retrieval.embedders import Embedder
from megatron_retro.retrieval.faiss_index import (
    InvertedParts,
    faiss_module,
    inverted_parts,
    new_index,
    read_index,
    reason_of,
)
from megatron_retro.retrieval.gpu_index import num_gpus
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.work_blocks import claim_blocks, ignore_failure_if_done, uniform_sample
from megatron_retro.runtime.console import Progress

KIND = "trained-index"
VERSION = 1
TRAINED_FILE = "trained.faiss"
TRANSFORM_CHUNKS = 100_000


def train(project: Project) -> None:
    """Train the index, if it is not trained yet; other workers wait."""
    where = project.layout.trained
    for _ in claim_blocks(project.layout, "train", ["train"], lambda _: where.exists(), project.worker):
        sample = uniform_sample(project.database.num_chunks, int(project.index_spec["train_chunks"]))
        index = new_index(project.choice.index_str, project.embedder.dimension)
        try:
            with _kmeans_on_gpus(index, project.config.retro_faiss_device):
                _train(index, project, sample)
        except RuntimeError as error:
            raise ConfigError(
                f"faiss cannot train {project.choice.index_str} on {len(sample)} vectors",
                got=reason_of(error),
                fix="give --retro-index-str auto",
            ) from None
        with ignore_failure_if_done(where.exists), new_directory(where) as directory:
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
    return read_index(where, manifest, TRAINED_FILE, fix=f"remove {where.parent} and build again")


def trained_fingerprint(project: Project) -> str:
    """Identity of the trained index."""
    return read_manifest(project.layout.trained, kind=KIND, version=VERSION).fingerprint


def sampled_vectors(
    database: ChunkDatabase, embedder: Embedder, sample: NDArray[np.int64], transform_for: InvertedParts | None = None
) -> NDArray[np.float32]:
    """Vectors of chosen chunks, transformed as in the lists of an index when one is given."""
    vectors = np.empty((len(sample), transform_for.dimension if transform_for else embedder.dimension), np.float32)
    with Progress("vectors of a sample", len(sample), "chunks") as progress:
        for first in range(0, len(sample), BATCH_CHUNKS):
            ids = sample[first : first + BATCH_CHUNKS]
            batch = embedder.embed(*database.gather(ids, database.chunk_length), progress.advance)
            vectors[first : first + len(ids)] = transform_for.transformed(batch) if transform_for else batch
    return vectors


def _inputs(project: Project) -> dict[str, str]:
    names = ("database", "embedder", "index_str")
    return {name: project.index_spec[name] for name in names}


def _train(index: Any, project: Project, sample: NDArray[np.int64]) -> None:
    """Train transforms on part of the sample, so that the whole of it is held only after their reduction."""
    parts = inverted_parts(index)
    if parts is None or parts.index is parts.inverted:
        index.train(sampled_vectors(project.database, project.embedder, sample))
        return
    step = max(1, len(sample) // TRANSFORM_CHUNKS)
    seen = sampled_vectors(project.database, project.embedder, sample[::step])
    for number in range(index.chain.size()):
        transform = faiss_module().downcast_VectorTransform(index.chain.at(number))
        transform.train(seen)
        seen = transform.apply(seen)
    parts.inverted.train(sampled_vectors(project.database, project.embedder, sample, parts))
    index.is_trained = True


def training_device(device: str) -> str:
    """The device that the k-means of inverted lists runs on, for the estimate."""
    if device == "cpu":
        return "CPU (--retro-faiss-device cpu)"
    return f"{num_gpus()} GPUs (k-means of the lists)" if num_gpus() else "CPU (faiss sees no GPU)"


@contextmanager
def _kmeans_on_gpus(index: Any, device: str) -> Iterator[None]:
    """Run the k-means of an inverted file on the GPUs, where faiss has any, and free their memory afterwards."""
    faiss = faiss_module()
    inverted = faiss.try_extract_index_ivf(index)
    if device == "cpu" or inverted is None or num_gpus() == 0:
        yield
        return
    assigner = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(inverted.d))
    inverted.clustering_index = assigner
    try:
        yield
    finally:
        inverted.clustering_index = None
        assigner.thisown = True
