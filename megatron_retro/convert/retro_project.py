"""The verb `convert-project`: what of a Megatron core Retro project serves here, and the commands that make the rest.

Such a project holds `config.json`, token files in `data/`, chunks in `db/merged/*.hdf5`, an index, and neighbours in
`query/`. Nothing is written into it, nor anywhere else: a chunk database is arithmetic here, and neighbours belong to
the corpus, while rows there belong to the shuffled samples of one run.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_retro.convert.safetensors_folder import read_json
from megatron_retro.data.token_file import TokenFile, bin_path
from megatron_retro.errors import ArtifactError, ConfigError, EnvironmentProblem
from megatron_retro.runtime.console import render_table, say

_CONFIG = "config.json"
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Finding:
    """A part of the old project, whether it serves here, and why."""

    part: str
    serves: str
    reason: str


def convert_project(paths: Sequence[str]) -> None:
    """Say what of the project OLD serves here, and which commands make the rest."""
    if len(paths) != 1:
        raise ConfigError("convert-project takes one path", got=" ".join(paths) or "none", expected="OLD")
    old = Path(paths[0])
    if not (old / _CONFIG).is_file():
        raise ArtifactError(f"{old} is no Retro project of Megatron core", expected=f"{_CONFIG} in it")
    config = read_json(old / _CONFIG)
    corpora = _corpora(old, config)
    findings = [*_token_files(corpora), *_database(old, corpora, config), *_rest(old)]
    say(render_table(("part of the old project", "here", "why"), [(f.part, f.serves, f.reason) for f in findings]))
    for line in commands(corpora, config):
        print(line)  # to be piped, what is said before goes elsewhere


def _corpora(old: Path, config: Mapping[str, Any]) -> list[Path]:
    """The prefixes of the project's token files, in the order of their numbers in the database."""
    named = config.get("retro_gpt_data_path") or []
    words = named.split() if isinstance(named, str) else [str(each) for each in named]
    # weights stand before paths; a path that is not there as it stands is one in the project's folder
    prefixes = [word for word in words if not _is_number(word)]
    if not prefixes:
        raise ArtifactError(f"{old / _CONFIG} names no token files", got=named, expected="retro_gpt_data_path")
    places = [[Path(prefix), old / "data" / prefix] for prefix in prefixes]
    found = [next((each for each in both if bin_path(each).is_file()), None) for both in places]
    missing = [prefix for prefix, place in zip(prefixes, found, strict=True) if place is None]
    if missing:
        raise ArtifactError(
            f"token files of {old} are not there", got=", ".join(missing), fix="bring them into its folder data"
        )
    return [place for place in found if place is not None]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _token_files(corpora: Sequence[Path]) -> Iterator[Finding]:
    for prefix in corpora:
        corpus = TokenFile(prefix)
        counts = f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens"
        yield Finding(f"{prefix}.bin, .idx", "kept", f"{counts}: read as they are")


def _database(old: Path, corpora: Sequence[Path], config: Mapping[str, Any]) -> Iterator[Finding]:
    """The merged databases, chunk by chunk against the arithmetic of ours."""
    length = int(config.get("retro_gpt_chunk_length", 64))
    files = [TokenFile(prefix) for prefix in corpora]
    for name in ("train", "valid"):
        path = old / "db" / "merged" / f"{name}.hdf5"
        if not path.is_file():
            continue
        total = same = 0
        for chunks in _rows(path, "chunks", 5):
            total += len(chunks)
            same += sum(_same_chunks(chunks, number, file, length) for number, file in enumerate(files))
        reason = f"{same:,} of {total:,} chunks are cut here alike; a database here is arithmetic, made in seconds"
        yield Finding(f"db/merged/{name}.hdf5", "not needed" if same == total else "made again", reason)


def _same_chunks(chunks: NDArray[np.int64], number: int, file: TokenFile, length: int) -> int:
    """How many of these chunks of one token file ours has: they begin at a multiple, and end there or with the text."""
    own = chunks[chunks[:, 0] == number]
    own = own[own[:, 1] < file.num_documents]
    if not len(own):
        return 0
    starts = file.document_starts(np.concatenate((own[:, 1], own[:, 1] + 1)))
    sizes = starts[len(own) :] - starts[: len(own)]
    ends = own[:, 3]
    to_the_end = (ends >= sizes - 1) & (ends <= sizes)  # an end-of-document id may be left out
    return int(((own[:, 2] % length == 0) & ((ends - own[:, 2] == length) | to_the_end)).sum())


def _rows(path: Path, name: str, width: int) -> Iterator[NDArray[np.int64]]:
    """The rows of a table in an HDF5 file, some at a time."""
    try:
        import h5py
    except ImportError:
        raise EnvironmentProblem(
            f"{path} is an HDF5 file, which h5py reads", fix="pip install 'megatron-retro[projects]'"
        ) from None
    try:
        with h5py.File(path, "r") as file:
            table = file[name]
            if len(table.shape) != 2 or (width and table.shape[1] != width):
                raise ValueError(f"{name} has the shape {table.shape}")
            for first in range(0, table.shape[0], _BLOCK):
                yield np.asarray(table[first : first + _BLOCK], np.int64)
    except (OSError, KeyError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path} is no chunk database or neighbour file", got=error, fix="copy it again") from error


def _rest(old: Path) -> Iterator[Finding]:
    for folder in sorted((old / "query").glob("*")) if (old / "query").is_dir() else []:
        blocks = sorted(folder.glob("*.hdf5"))
        if not blocks:
            continue
        rows = sum(len(block) for path in blocks for block in _rows(path, "neighbors", 0))
        reason = f"{rows:,} rows of one run's shuffled samples; rows here are chunks of the corpus, for any run"
        yield Finding(f"query/{folder.name}", "made again", reason)
    if (old / "index").is_dir():
        yield Finding("index", "made again", "its vectors are of an embedder of Megatron's; others embed here")


def commands(corpora: Sequence[Path], config: Mapping[str, Any]) -> Iterator[str]:
    """The commands that make what is missing and train on it, with the old project's settings."""
    prefixes = " ".join(shlex.quote(str(prefix)) for prefix in corpora)
    tables = " ".join(f"retrieval/neighbors/{shlex.quote(prefix.name)}" for prefix in corpora)
    chunk = f"--retro-chunk-length {config.get('retro_gpt_chunk_length', 64)}"
    saved = config.get("retro_query_num_neighbors_save", 20)
    tokenizer = _tokenizer(config)
    yield (
        f"megatron-retro build-retrieval --retro-project-dir retrieval --retro-database-corpus {prefixes} {chunk} "
        f"--retro-query-num-neighbors-save {saved} {tokenizer}"
    )
    yield (
        f"megatron-retro pretrain --retro-add-retriever --data-path {prefixes} --database-path retrieval/database "
        f"--neighbor-path {tables} {chunk} --seq-length {config.get('retro_gpt_seq_length', 2048)} "
        f"--global-batch-size {config.get('retro_gpt_global_batch_size', 256)} "
        f"--split {config.get('retro_gpt_split', '98,2,0')} {tokenizer}"
    )


def _tokenizer(config: Mapping[str, Any]) -> str:
    kind = config.get("retro_gpt_tokenizer_type")
    if kind == "SentencePieceTokenizer":
        kind = "MegatronSentencePieceTokenizer"
    flags = {
        "--tokenizer-type": kind,
        "--tokenizer-model": config.get("retro_gpt_tokenizer_model"),
        "--vocab-file": config.get("retro_gpt_vocab_file"),
        "--merge-file": config.get("retro_gpt_merge_file"),
    }
    return " ".join(f"{flag} {shlex.quote(str(value))}" for flag, value in flags.items() if value)
