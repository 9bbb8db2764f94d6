"""Samples per second with and without neighbours, time to the first one, start-up at 10M documents.

Equality is asserted first: the C++ gathers against NumPy, the order against itself read alone. The peer is
megatron-core's Retro dataset over the same token file, chunks and neighbours, read in turn with ours; where it is not
installed it is skipped by name (see `benchmarks/peers/peer_packages.py`).
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from megatron_retro.artifacts.object_cache import use_cache
from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.dataset import Dataset
from megatron_retro.data.neighbor_table import NeighborTable, TableLayout, finish_table, write_block
from megatron_retro.data.order import permuted
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.token_writer import TokenFileWriter
from megatron_retro.runtime.console import say
from megatron_retro.testing.benchmarking import LOWER, Figure, benchmark_main, median_ratio

sys.path.insert(0, str(Path(__file__).parent / "peers"))
import core_retro_samples
import peer_packages

EOD, CHUNK, LENGTH, BATCH = 50256, 64, 2048, 8
CORE = "megatron-core"


def write_corpus(prefix: Path, documents: int, mean: int) -> TokenFile:
    """Documents of exponential lengths, ended."""
    generator = np.random.default_rng(0)
    lengths = 1 + generator.exponential(mean, documents).astype(np.int32)
    tokens = generator.integers(0, EOD, int(lengths.sum()), dtype=np.uint16)
    tokens[np.cumsum(lengths) - 1] = EOD
    with TokenFileWriter(prefix, "uint16") as writer:
        writer.add_documents(tokens, lengths, np.ones(documents, np.int64))
        writer.finalize()
    return TokenFile(prefix)


def write_table(path: Path, file: TokenFile, database: ChunkDatabase) -> None:
    """Twenty neighbours per chunk, at random over the whole database: the hardest case for caches."""
    layout = TableLayout(20, ((0, file.num_tokens // CHUNK),))
    generator = np.random.default_rng(1)
    work = path.with_name("work")
    for block in layout.blocks:
        ids = generator.integers(0, database.num_chunks, (block.last - block.first, 20))
        write_block(work, layout, block, ids)
    inputs = {"corpus": file.fingerprint, "database": database.fingerprint}
    finish_table(work, path, layout, inputs=inputs, config={})


def settings(folder: Path | str, retro: bool) -> Settings:
    """A run over the corpus in `folder`, or below a URL."""
    neighbors: dict[str, Any] = {"neighbor_path": (f"{folder}/table",), "database_path": f"{folder}/db"}
    files = {"data_path": (f"{folder}/corpus",), **(neighbors if retro else {})}
    data = DataConfig(**files, split="1", seq_length=LENGTH, num_workers=0)
    return Settings([data, RetroConfig(retro_add_retriever=retro), TrainingConfig()])


def require_equal(dataset: Dataset) -> None:
    """The fast paths give what the plain ones give."""
    source = dataset.sources[0]
    batch = dataset.read(range(BATCH))
    assert source.neighbors is not None and batch.neighbors is not None
    chunks = source.samples.first_chunks(np.arange(BATCH))
    ids = source.neighbors.select(chunks, LENGTH // CHUNK)
    tokens, mask = source.neighbors.database.gather_plainly(ids.reshape(-1), 2 * CHUNK)
    assert source.neighbors.database.native is not None, "csrc/host is not built"
    assert (batch.neighbors.tokens_BCKR.reshape(tokens.shape) == tokens).all()
    assert (batch.neighbors.mask_BCKR.reshape(mask.shape) == mask).all()
    assert all((dataset.read([number]).tokens_BS[0] == batch.tokens_BS[number]).all() for number in range(BATCH))


def rate(dataset: Dataset, batches: int) -> float:
    """Decoder tokens per CPU-second."""
    began = time.process_time()
    for number in range(batches):
        dataset.read(range(number * BATCH, (number + 1) * BATCH))
    return batches * BATCH * LENGTH / (time.process_time() - began)


def core_rate(dataset: Any, first: int, samples: int) -> float:
    """The same of core's dataset, which reads one sample at a time."""
    began = time.process_time()
    for number in range(first, first + samples):
        assert dataset[number]["neighbor_tokens"].shape == (LENGTH // CHUNK, 2, 2 * CHUNK)
    return samples * LENGTH / (time.process_time() - began)


def core_dataset(folder: Path, file: TokenFile, database: ChunkDatabase) -> Any:
    """Core's dataset over the same files; its chunks are the same, and so are a neighbour's own tokens."""
    starts = file.document_starts(np.arange(file.num_documents))
    chunks = core_retro_samples.document_chunks(np.diff(starts, append=file.num_tokens), CHUNK)
    assert len(chunks) == database.num_chunks
    rows = NeighborTable.open(folder / "table").rows(0, file.num_tokens // CHUNK)
    core_retro_samples.write_neighbors(folder / "core_neighbors", rows)
    samples = file.num_tokens // LENGTH - 1
    sizes = {"samples": samples, "length": LENGTH, "chunk": CHUNK, "eod": EOD}
    dataset = core_retro_samples.core_dataset(file.prefix, chunks, folder / "core_neighbors", **sizes)
    found = dataset[0]["neighbor_tokens"].reshape(-1, 2 * CHUNK)[:, :CHUNK]
    tokens, mask = database.gather(rows[: LENGTH // CHUNK, :2].reshape(-1), CHUNK)
    assert (found[mask] == tokens[mask]).all()
    return dataset


def first_sample(folder: Path, retro: bool) -> float:
    """Seconds from nothing open to the first batch."""
    began = time.perf_counter()
    build_dataset(settings(folder, retro), "train", eod=EOD).read(range(BATCH))
    return time.perf_counter() - began


def forget(folder: Path) -> None:
    """Drop every file of the folder from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(folder: Path, retro: bool, batches: int) -> list[Figure]:
    """The same from the disk, by the clock: that is where waiting shows. Nothing is open while files are dropped."""
    kind = "with 2 neighbours" if retro else "without neighbours"
    firsts, rates = [], []
    for _ in range(3):
        forget(folder)
        firsts.append(1e3 * first_sample(folder, retro))
        forget(folder)
        dataset = build_dataset(settings(folder, retro), "train", eod=EOD)
        began = time.perf_counter()
        for number in range(batches):
            dataset.read(range(number * BATCH, (number + 1) * BATCH))
        rates.append(batches * BATCH / (time.perf_counter() - began))
        del dataset
    return [
        Figure(f"cold: first batch {kind}", statistics.median(firsts), "ms"),
        Figure(f"cold: samples {kind}", statistics.median(rates), "samples/s"),
    ]


def stored(folder: Path, retro: bool, batches: int) -> list[Figure]:
    """The same from an object store in this process's memory, by the clock: what the way through the cache costs."""
    fsspec.filesystem("memory").put(f"{folder}/", "/benchmark/", recursive=True)
    use_cache(str(folder / "cache"), 1.0)
    kind = "with 2 neighbours" if retro else "without neighbours"
    figures = []
    for cache in ("empty", "warm"):
        dataset = build_dataset(settings("memory://benchmark", retro), "train", eod=EOD)
        began = time.perf_counter()
        for number in range(batches):
            dataset.read(range(number * BATCH, (number + 1) * BATCH))
        rate = batches * BATCH / (time.perf_counter() - began)
        figures.append(Figure(f"object store, {cache} cache: samples {kind}", rate, "samples/s"))
    say(f"{kind}: {dataset.traffic}")
    shutil.rmtree(folder / "cache")
    return figures


def throughput(folder: Path, quick: bool) -> list[Figure]:
    """Rates with and without neighbours, in turn."""
    file = write_corpus(folder / "corpus", 20_000 if quick else 200_000, 500)
    database = ChunkDatabase.create(folder / "db", [file.prefix], CHUNK, eod=EOD)
    write_table(folder / "table", file, database)
    say(f"{file.num_tokens} tokens, {database.num_chunks} chunks")
    retro, plain = (
        build_dataset(settings(folder, with_neighbors), "train", eod=EOD) for with_neighbors in (True, False)
    )
    require_equal(retro)
    core = None if peer_packages.missing(CORE) else core_dataset(folder, file, database)
    batches, samples, rounds = (40, 20, 3) if quick else (200, 100, 7)
    rate(retro, batches)
    ours, without, theirs = list[float](), list[float](), list[float]()
    for number in range(rounds):
        ours.append(rate(retro, batches))
        without.append(rate(plain, batches))
        if core is not None:
            theirs.append(core_rate(core, number * samples, samples))
    del retro, plain, core, file, database
    return [
        Figure("tokens with 2 neighbours", statistics.median(ours) / 1e6, "M decoder tokens/CPU-s", 15.0),
        *over_core(ours, theirs),
        Figure("tokens without neighbours", statistics.median(without) / 1e6, "M decoder tokens/CPU-s"),
        Figure("first batch with neighbours", 1e3 * first_sample(folder, True), "ms", 200.0, LOWER),
        Figure("first batch without", 1e3 * first_sample(folder, False), "ms", 200.0, LOWER),
        *stored(folder, True, batches),
        *stored(folder, False, batches),
        *cold(folder, True, batches),
        *cold(folder, False, batches),
    ]


def over_core(ours: list[float], theirs: list[float]) -> list[Figure]:
    """Our rate in pairs with core's, or why there is none."""
    if reason := peer_packages.missing(CORE):
        say(reason)
        return []
    return [
        Figure(f"{CORE}: tokens with 2 neighbours", statistics.median(theirs) / 1e6, "M decoder tokens/CPU-s"),
        Figure(f"rate over {CORE}", median_ratio(ours, theirs), "x", 100.0),
    ]


def resident_mb() -> float:
    """Private memory of this process: mapped files do not count."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))


def start_up(folder: Path, quick: bool) -> list[Figure]:
    """Opening very many documents, and the order of 19 billion samples.

    With three tokens a document the file is one of those that are verified whole when they are opened (below 64 MB);
    with eight it is larger, as any real corpus of so many.
    """
    documents = 1_000_000 if quick else 10_000_000
    figures = [figure for length in (3, 8) for figure in _opening(folder, documents, length)]
    positions = np.arange(BATCH)
    began = time.perf_counter()
    permuted(positions, 19_000_000_000, 1)
    ordered = time.perf_counter() - began
    return [*figures, Figure("a batch's places in 19e9 samples", 1e3 * ordered, "ms", 50.0, LOWER)]


def _opening(folder: Path, documents: int, length: int) -> list[Figure]:
    ones, prefix = np.ones(documents, np.int32), folder / f"many-{length}"
    with TokenFileWriter(prefix, "uint16") as writer:
        writer.add_documents(np.zeros(length * documents, np.uint16), length * ones, ones.astype(np.int64))
        writer.finalize()
    del ones
    before, began = resident_mb(), time.perf_counter()
    file = TokenFile(prefix)
    found = file.document_of(file.num_tokens // 2)
    opened = time.perf_counter() - began
    grown = resident_mb() - before
    assert found == documents // 2
    name = f"open {documents} documents of {length} tokens"
    return [Figure(name, 1e3 * opened, "ms", 50.0, LOWER), Figure(f"{name}: memory", grown, "MB", 5.0, LOWER)]


def run(quick: bool) -> list[Figure]:
    """All figures."""
    with tempfile.TemporaryDirectory() as folder:
        return throughput(Path(folder), quick) + start_up(Path(folder), quick)


if __name__ == "__main__":
    benchmark_main(__doc__, run)
