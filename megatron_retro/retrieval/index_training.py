"""The train stage: the empty index is trained on a uniform sample of chunks.

A small sample is trained on in the memory of one worker. A larger one is embedded and clustered in parts by all.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.files import new_directory
from megatron_retro.artifacts.manifest import read_manifest, require_same, write_manifest
from megatron_retro.errors import ConfigError
from megatron_retro.retrieval.chunk_encoding import BATCH_CHUNKS
from megatron_retro.retrieval.chunk_vectors import ChunkVectors
from megatron_retro.retrieval.faiss_index import (
    InvertedParts,
    faiss_module,
    inverted_parts,
    new_index,
    read_index,
    reason_of,
)
from megatron_retro.retrieval.gpu_index import num_gpus
from megatron_retro.retrieval.index_choice import chunks_of_part, is_clustered_in_parts
from megatron_retro.retrieval.project import Project
from megatron_retro.retrieval.sample_clustering import SampleClustering
from megatron_retro.retrieval.work_blocks import (
    claim_blocks,
    cut_blocks,
    ignore_failure_if_done,
    key_of,
    uniform_sample,
)
from megatron_retro.runtime.console import Advance, Progress

KIND = "trained-index"
VERSION = 1
TRAINED_FILE = "trained.faiss"
TRANSFORM_CHUNKS = 100_000


def train(project: Project) -> None:
    """Train the index, if it is not trained yet; what one worker does alone the others wait for."""
    if project.layout.trained.exists():
        return
    sample = uniform_sample(project.database.num_chunks, int(project.index_spec["train_chunks"]))
    index = new_index(project.choice.index_str, project.embedder.dimension)
    parts = inverted_parts(index)
    try:
        if parts is not None and is_clustered_in_parts(parts.num_lists, len(sample)):
            with ignore_failure_if_done(project.layout.trained.exists):
                _train_in_parts(project, sample, parts.num_lists)
            return
        for _ in _claimed(project, ["train"], lambda _: False):
            _train_alone(index, project, sample)
            _publish(index, project, len(sample))
    except RuntimeError as error:
        raise ConfigError(
            f"faiss cannot train {project.choice.index_str} on {len(sample)} vectors",
            got=reason_of(error),
            fix="give --retro-index-str auto",
        ) from None


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
    chunk_vectors: ChunkVectors, sample: NDArray[np.int64], transform_for: InvertedParts | None = None
) -> NDArray[np.float32]:
    """Vectors of chosen chunks, transformed as in the lists of an index when one is given."""
    with Progress("vectors of a sample", len(sample), "chunks") as progress:
        return _vectors(chunk_vectors, sample, transform_for, progress.advance)


def _vectors(
    chunk_vectors: ChunkVectors,
    sample: NDArray[np.int64],
    transform_for: InvertedParts | None,
    advance: Advance,
) -> NDArray[np.float32]:
    vectors = np.empty((len(sample), transform_for.dimension if transform_for else chunk_vectors.dimension), np.float32)
    for first in range(0, len(sample), BATCH_CHUNKS):
        ids = sample[first : first + BATCH_CHUNKS]
        batch = chunk_vectors.of(ids, advance)
        vectors[first : first + len(ids)] = transform_for.transformed(batch) if transform_for else batch
    return vectors


def _inputs(project: Project) -> dict[str, str]:
    names = ("database", "embedder", "index_str")
    return {name: project.index_spec[name] for name in names}


def _claimed(project: Project, blocks: Sequence[str], is_done: Callable[[str], bool]) -> Iterator[str]:
    """The blocks that this worker claims; none is left once the trained index is there."""
    trained = project.layout.trained
    return claim_blocks(
        project.layout, "train", blocks, lambda block: trained.exists() or is_done(block), project.worker
    )


def _train_alone(index: Any, project: Project, sample: NDArray[np.int64]) -> None:
    """Train on vectors in memory; where there are transforms, the whole sample is held after their reduction only."""
    parts = inverted_parts(index)
    if parts is None or parts.index is parts.inverted:
        index.train(sampled_vectors(project.chunk_vectors, sample))
        return
    _train_transforms(index, project, sample)
    parts.inverted.train(sampled_vectors(project.chunk_vectors, sample, parts))
    index.is_trained = True


def _train_transforms(index: Any, project: Project, sample: NDArray[np.int64]) -> None:
    """Train the transforms before the lists, on a part of the sample."""
    step = max(1, len(sample) // TRANSFORM_CHUNKS)
    seen = sampled_vectors(project.chunk_vectors, sample[::step])
    for number in range(index.chain.size()):
        transform = faiss_module().downcast_VectorTransform(index.chain.at(number))
        transform.train(seen)
        seen = transform.apply(seen)


def _train_in_parts(project: Project, sample: NDArray[np.int64], num_lists: int) -> None:
    """Train with all workers, none of which holds the sample."""
    facts: dict[str, Any] = {**_inputs(project), "train_chunks": project.index_spec["train_chunks"]}
    folder = project.layout.work(f"train-{key_of(facts)}")
    index = _with_transforms(project, sample, folder / "transforms")
    parts = inverted_parts(index)
    assert parts is not None
    facts["transforms"] = read_manifest(folder / "transforms", kind=KIND, version=VERSION).fingerprint
    clustering = SampleClustering(
        folder,
        facts,
        cut_blocks(len(sample), chunks_of_part(num_lists)),
        num_lists,
        project.config.retro_faiss_device,
        partial(_claimed, project),
    )
    clustering.write_vectors(
        lambda part, advance: _vectors(project.chunk_vectors, sample[part.first : part.last], parts, advance)
    )
    clustering.run()
    for _ in _claimed(project, ["train"], lambda _: False):
        parts.inverted.quantizer.add(clustering.centroids())
        encoded = max(1, min(len(sample), int(parts.inverted.train_encoder_num_vectors())))
        parts.inverted.train(clustering.rows(uniform_sample(len(sample), encoded)))
        index.is_trained = True
        _publish(index, project, len(sample))
    shutil.rmtree(folder, ignore_errors=True)


def _with_transforms(project: Project, sample: NDArray[np.int64], where: Path) -> Any:
    """The index with its transforms trained, by one worker."""
    for _ in _claimed(project, ["transforms"], lambda _: where.exists()):
        index = new_index(project.choice.index_str, project.embedder.dimension)
        if hasattr(index, "chain"):
            _train_transforms(index, project, sample)
        with ignore_failure_if_done(where.exists):
            _write(index, project, where, {})
    manifest = read_manifest(where, kind=KIND, version=VERSION)
    return read_index(where, manifest, TRAINED_FILE, fix=f"remove {where.parent} and build again")


def _publish(index: Any, project: Project, sample: int) -> None:
    with ignore_failure_if_done(project.layout.trained.exists):
        _write(index, project, project.layout.trained, {"sample": sample})


def _write(index: Any, project: Project, where: Path, counts: dict[str, int]) -> None:
    with new_directory(where) as directory:
        faiss_module().write_index(index, str(directory / TRAINED_FILE))
        write_manifest(directory, kind=KIND, version=VERSION, inputs=_inputs(project), counts=counts)


def training_place(project: Project, parts: InvertedParts | None) -> str:
    """Where the lists are trained, for the estimate."""
    if parts is None or not is_clustered_in_parts(parts.num_lists, int(project.index_spec["train_chunks"])):
        return "one worker, in its memory"
    if project.config.retro_faiss_device == "cpu":
        return "all workers, in parts, on CPUs (--retro-faiss-device cpu)"
    return f"all workers, in parts, on {f'{num_gpus()} GPUs each' if num_gpus() else 'CPUs (faiss sees no GPU)'}"
