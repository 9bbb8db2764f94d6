"""A finished project that is searched while text is generated: chunks of tokens in, ids and distances out.

Everything it needs is in the project directory: the index, the database, and the settings of embedder and tokenizer.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.artifacts.manifest import read_manifest, read_sealed_json, require_same, write_sealed_json
from megatron_retro.artifacts.verified import Verification
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.retrieval import EmbedderConfig
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.model_text import FILE_SETTINGS
from megatron_retro.data.tokenizers import build_tokenizer, require_tokenizer
from megatron_retro.errors import ArtifactError
from megatron_retro.retrieval.embedders import build_embedder
from megatron_retro.retrieval.faiss_index import search_one_by_one, set_search_effort
from megatron_retro.retrieval.index_building import KIND, VERSION, list_checks, open_merged
from megatron_retro.retrieval.layout import ProjectLayout
from megatron_retro.retrieval.project import Project

_SETTINGS = ("tokenizer", "embedder", "eod", "nprobe", "ef_search")
_CACHED_CHUNKS = 4096


def write_live_settings(project: Project, nprobe: int, ef_search: int) -> None:
    """Write the settings for live search beside the index; paths of tokenizer files become absolute."""
    tokenizer = asdict(project.settings[TokenizerConfig])
    del tokenizer["allow_tokenizer_mismatch"]  # whoever opens the index decides anew
    for name in FILE_SETTINGS:
        tokenizer[name] = str(Path(tokenizer[name]).resolve()) if tokenizer[name] else None
    settings = {
        "tokenizer": tokenizer,
        "embedder": asdict(project.settings[EmbedderConfig]),
        "eod": project.eod,
        "nprobe": nprobe,
        "ef_search": ef_search,
    }
    write_sealed_json(project.layout.live_settings, settings)


class LiveIndex:
    """An open index. `search` may be called from several threads; results of recent chunks are cached."""

    def __init__(
        self,
        path: str | Path,
        *,
        nprobe: int | None = None,
        cached_chunks: int = _CACHED_CHUNKS,
        allow_tokenizer_mismatch: bool = False,
    ) -> None:
        layout = ProjectLayout(Path(path))
        settings = live_settings(layout)
        manifest = read_manifest(layout.merged, kind=KIND, version=VERSION)
        self.tokenizer = build_tokenizer(TokenizerConfig(**settings["tokenizer"]))
        self.database = ChunkDatabase.open(layout.database)
        require_tokenizer(self.database.files, self.tokenizer, allow_mismatch=allow_tokenizer_mismatch)
        self.embedder = build_embedder(EmbedderConfig(**settings["embedder"]), self.tokenizer)
        again = f"run build-retrieval again with --retro-project-dir {path}"
        require_same(layout.merged, "database", manifest.inputs["database"], self.database.fingerprint, again)
        require_same(layout.merged, "embedder", manifest.inputs["embedder"], self.embedder.fingerprint, again)
        self._eod: int | None = settings["eod"]
        self._index: Any = open_merged(layout.merged)
        self._verification = Verification(list_checks(layout.merged))
        self._verification.start()
        search_one_by_one(self._index)
        set_search_effort(self._index, nprobe or settings["nprobe"], settings["ef_search"])
        self._limit, self._lock, self._embedding = cached_chunks, threading.Lock(), threading.Lock()
        self._cache: OrderedDict[tuple[tuple[int, ...], int], tuple[NDArray[Any], NDArray[Any]]] = OrderedDict()

    def search(
        self, chunks: Sequence[Sequence[int]], num_neighbors: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Ids [n, k], -1 for none, and squared distances of the nearest chunks."""
        self._verification.require_sound()
        keys = [(tuple(int(token) for token in chunk), num_neighbors) for chunk in chunks]
        known = {key: answer for key in keys if (answer := self._cached(key)) is not None}
        asked = [key for key in dict.fromkeys(keys) if key not in known]
        if asked:
            known.update(zip(asked, self._answers([chunk for chunk, _ in asked], num_neighbors), strict=True))
            self._put_in_cache({key: known[key] for key in asked})
        shape = (len(keys), num_neighbors)
        ids, distances = np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32)
        for row, key in enumerate(keys):
            ids[row], distances[row] = known[key]
        return ids, distances

    def embed(self, chunks: Sequence[Sequence[int]]) -> NDArray[np.float32]:
        """The vectors of chunks, as they are searched for; one thread at a time."""
        length = max(1, *(len(chunk) for chunk in chunks))
        tokens, present = np.zeros((len(chunks), length), np.int64), np.zeros((len(chunks), length), np.bool_)
        for row, chunk in enumerate(chunks):
            tokens[row, : len(chunk)] = chunk
            present[row, : len(chunk)] = True
        if self._eod is not None:
            present &= tokens != self._eod
        with self._embedding:
            return self.embedder.embed(tokens, present)

    def _answers(
        self, chunks: Sequence[tuple[int, ...]], num_neighbors: int
    ) -> list[tuple[NDArray[Any], NDArray[Any]]]:
        distances, ids = self._index.search(self.embed(chunks), num_neighbors)
        return list(zip(ids, np.where(ids >= 0, distances, np.inf), strict=True))

    def _cached(self, key: tuple[tuple[int, ...], int]) -> tuple[NDArray[Any], NDArray[Any]] | None:
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
            return self._cache.get(key)

    def _put_in_cache(self, answers: dict[tuple[tuple[int, ...], int], tuple[NDArray[Any], NDArray[Any]]]) -> None:
        with self._lock:
            self._cache.update(answers)
            while len(self._cache) > self._limit:
                self._cache.popitem(last=False)


def live_settings(layout: ProjectLayout) -> dict[str, Any]:
    """The settings for live search: tokenizer, embedder, effort."""
    path = layout.live_settings
    try:
        settings = read_sealed_json(path, _SETTINGS, fix="remove it and run build-retrieval again")
        TokenizerConfig(**settings["tokenizer"]), EmbedderConfig(**settings["embedder"])
        return settings
    except FileNotFoundError:
        raise ArtifactError(
            f"{layout.root} holds no index that can be asked",
            expected=str(path),
            fix="give the --retro-project-dir of a finished build-retrieval",
        ) from None
    except TypeError as error:
        raise ArtifactError(
            f"{path} has settings that this version does not know", got=error, fix="run build-retrieval again"
        ) from None
