"""From settings to datasets and loaders; everything that can be refused is refused here, before training starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.data.blends import Blend, WeightedPath, parse_data_path
from megatron_retro.data.chunk_database import ChunkDatabase
from megatron_retro.data.dataset import Boundaries, Dataset, MockSamples, Source
from megatron_retro.data.loader import Loader, Samples
from megatron_retro.data.neighbor_table import NeighborTable, covered
from megatron_retro.data.neighbor_transforms import ThinnedDatabase, TransformSettings
from megatron_retro.data.neighbors import NeighborReader
from megatron_retro.data.order import key_of
from megatron_retro.data.query_chunks import QueryChunks
from megatron_retro.data.samples import SPLITS, CorpusSamples, check_lengths, parse_split, split_documents
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.token_verification import Unverified, start_verification
from megatron_retro.errors import ConfigError, DataError
from megatron_retro.microbatch import Array, Microbatch

if TYPE_CHECKING:
    import torch


def build_loader(
    settings: Settings,
    split: str = "train",
    *,
    eod: int | None,
    samples: Samples | None = None,
    data_rank: int = 0,
    data_size: int = 1,
    global_batch_size: int | Callable[[int], int] | None = None,
    device: torch.device | None = None,
    own_part: Callable[[Microbatch[Array]], Microbatch[Array]] | None = None,
) -> Loader:
    """The loader of a split (`train`, `valid`, `test`), or of other samples, for one data-parallel rank."""
    training = settings[TrainingConfig]
    if samples is None:
        mock = settings[DataConfig].mock_data
        samples = build_mock_samples(settings, split) if mock else build_dataset(settings, split, eod=eod)
    verification = None
    if split == "train" and isinstance(samples, Dataset):
        large = Unverified(samples.token_files, samples.databases)
        verification = start_verification(settings[DataConfig].verify_tokens, large, data_rank, data_size)
    return Loader(
        samples,
        micro_batch_size=training.micro_batch_size,
        global_batch_size=global_batch_size or training.global_batch_size,
        data_rank=data_rank,
        data_size=data_size,
        num_threads=settings[DataConfig].num_workers,
        verification=verification,
        device=device,
        own_part=own_part,
    )


def build_mock_samples(settings: Settings, split: str) -> MockSamples:
    """Random samples in the shape of the run's."""
    data, retro = settings[DataConfig], settings[RetroConfig]
    vocabulary = settings[ModelConfig].vocab_size if ModelConfig in settings else None
    return MockSamples(
        seed=key_of(settings[TrainingConfig].seed, SPLITS.index(split)) >> 1,
        vocab_size=vocabulary or 256,
        seq_length=data.seq_length,
        chunk_length=chunk_length_of(data, retro),
        num_neighbors=retro.retro_num_neighbors if retro.retro_add_retriever else 0,
        retrieved_length=retro.retrieved_length(),
    )


def build_dataset(settings: Settings, split: str, *, eod: int | None) -> Dataset:
    """All samples of a split; an empty one is refused."""
    data, retro, seed = settings[DataConfig], settings[RetroConfig], settings[TrainingConfig].seed
    own_validation = split == "valid" and data.valid_data_path is not None
    words = data.valid_data_path if own_validation else data.data_path
    if words is None:
        raise ConfigError("--data-path is not set", fix="give token file prefixes made by `megatron-retro preprocess`")
    paths = parse_data_path(words, "--valid-data-path" if own_validation else "--data-path")
    tables = _tables(paths, data.valid_neighbor_path if own_validation else data.neighbor_path, retro)
    database = _database(data, retro)
    shares = (0.0, 1.0, 0.0) if own_validation else parse_split(data.split)
    transforms = _transforms(data, split)
    sources = tuple(
        _source(path, table, database, data, retro, seed, shares, split, transforms)
        for path, table in zip(paths, tables, strict=True)
    )
    dataset = Dataset(
        sources,
        Blend(tuple(path.weight for path in paths)),
        seed,
        Boundaries(eod, data.reset_position_ids, data.reset_attention_mask, data.eod_mask_loss),
        transforms,
        settings[ModelConfig].vocab_size if ModelConfig in settings else None,
    )
    if split == "train" and data.max_data_epochs is not None:
        _require_enough(dataset, settings[TrainingConfig], data.max_data_epochs)
    return dataset


def _require_enough(dataset: Dataset, training: TrainingConfig, most: float) -> None:
    """Refuse a run that exhausts a source; a ramp-up is counted as if batches were full from the start."""
    samples = training.train_samples or (training.train_iters or 0) * training.global_batch_size
    for source, epochs in zip(dataset.sources, dataset.epochs(samples), strict=True):
        if epochs > most:
            raise DataError(
                f"{source.samples.file.prefix} is exhausted before the run ends",
                got=f"{epochs:.2f} epochs of {source.samples.num_samples} samples",
                expected=f"at most --max-data-epochs {most:g}",
                fix="train for fewer samples, lower its weight, add text, or allow more epochs",
            )


def _transforms(data: DataConfig, split: str) -> TransformSettings:
    """What worsens the neighbours of a split; whole samples lose or swap theirs in training only."""
    is_training = split == "train"
    return TransformSettings(
        absent_samples=data.retro_no_retrieval_probability if is_training else 0.0,
        random_samples=data.retro_random_retrieval_probability if is_training else 0.0,
        absent_chunks=data.neighbor_absent_share,
        random_chunks=data.neighbor_random_share,
        database=ThinnedDatabase(
            data.database_keep_fraction, data.database_keep_by == "chunk", data.database_corpus_fractions or ()
        ),
    )


def _tables(
    paths: Sequence[WeightedPath], tables: Sequence[str] | None, retro: RetroConfig
) -> Sequence[NeighborTable | None]:
    if not retro.retro_add_retriever or retro.retro_num_neighbors == 0 or tables is None:
        return [None] * len(paths)
    if len(tables) != len(paths):
        raise ConfigError(
            "--neighbor-path must name one table per token file", got=len(tables), expected=f"{len(paths)}, in order"
        )
    return [NeighborTable.open(table) for table in tables]


def _database(data: DataConfig, retro: RetroConfig) -> ChunkDatabase | None:
    if not retro.retro_add_retriever or retro.retro_num_neighbors == 0 or data.database_path is None:
        return None
    database = ChunkDatabase.open(data.database_path)
    for file in database.files:
        file.expect_random_reads()
    return database


def chunk_length_of(data: DataConfig, retro: RetroConfig) -> int:
    """The grid of samples; a GPT whose length is no multiple of m has a grid of its own."""
    if retro.retro_add_retriever:
        check_lengths(data.seq_length, retro.retro_chunk_length)
    whole = data.seq_length % retro.retro_chunk_length == 0
    return retro.retro_chunk_length if whole else data.seq_length


def _source(
    path: WeightedPath,
    table: NeighborTable | None,
    database: ChunkDatabase | None,
    data: DataConfig,
    retro: RetroConfig,
    seed: int,
    shares: Sequence[float],
    split: str,
    transforms: TransformSettings,
) -> Source:
    file = TokenFile(path.path)
    chunk_length = chunk_length_of(data, retro)
    first, last = split_documents(file.num_documents, shares, split)
    stop = int(file.document_bounds(last - 1)[1]) if last > first else 0
    chunks = QueryChunks(file, chunk_length).within_documents(first, last)
    ranges = covered(table.row_ranges, *chunks) if table is not None else (chunks,)
    samples = CorpusSamples(file, chunk_length, data.seq_length, ranges, stop, data.epoch_chunk_offset, seed)
    if samples.num_samples == 0:
        raise DataError(
            f"{path.path} has no {split} sample",
            got=f"documents {first} to {last} of {file.num_documents}, {file.num_tokens} tokens in all",
            expected=f"at least {data.seq_length + 1} tokens in one stretch"
            + ("" if table is None else " that the neighbour table covers"),
            fix="change --split, --seq-length or the corpus",
        )
    if table is None:
        return Source(samples)
    if database is None:
        raise ConfigError("--neighbor-path needs --database-path", fix="add the chunk database of the tables")
    table.expect_random_reads()
    reader = NeighborReader(
        file,
        table,
        database,
        chunk_length,
        retro.retro_num_neighbors,
        retro.retrieved_length(),
        transforms.transforms(samples, table.row_ranges, seed),
    )
    return Source(samples, reader)
