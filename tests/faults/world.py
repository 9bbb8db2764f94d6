"""A folder with every kind of artifact, small, and the consumers that a user runs on them."""

from __future__ import annotations

import io
import json
import shutil
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import torch

from megatron_retro.checkpoint.loading import open_checkpoint, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.sections import TRAINING_SECTIONS
from megatron_retro.config.settings import Settings, build_settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.data.builders import build_dataset
from megatron_retro.data.inspection import inspect
from megatron_retro.data.token_file import TokenFile
from megatron_retro.data.tokenizers import build_tokenizer, require_tokenizer
from megatron_retro.errors import DataError
from megatron_retro.model.retro import Retro
from megatron_retro.retrieval.live_index import LiveIndex
from megatron_retro.retrieval.stages import build_retrieval
from megatron_retro.testing.corpora import small_hugging_face, write_json_lines
from megatron_retro.testing.preprocessing_runs import files, preprocess, records
from megatron_retro.testing.retrieval_projects import CHUNK, echoing_documents, project_settings, write_corpus
from megatron_retro.testing.tiny_corpus import stored_tensors
from tests.faults.injection import Consumer

MODEL = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4}


def write_world(folder: Path) -> None:
    """Tokens with and without a tokenizer, a project, a checkpoint, and preprocessing that was stopped."""
    write_corpus(folder / "corpus", echoing_documents(1, 60))
    build_retrieval(project(folder, "train", "encode", "merge", "query"))
    write_model(folder / "run")
    (folder / "tokenizer").mkdir()
    small_hugging_face(folder / "tokenizer")
    source = write_json_lines(folder / "text.jsonl", records(3, 60))
    flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", str(folder / "tokenizer/tokenizer.json"))
    assert preprocess(folder / "tokenized", [source], *flags) == 0
    stop_before_joining(folder, source)


def project(folder: Path, *stages: str) -> Settings:
    """Settings of the build."""
    changes = {"retro_block_size": 200, "retro_index_str": "IVF4,Flat", "retro_query_nprobe": 2}
    return project_settings(folder / "project", [str(folder / "corpus")], retro_tasks=list(stages), **changes)


def write_model(run: Path) -> None:
    """Step 0 of a Retro."""
    settings = Settings(
        [ModelConfig(vocab_size=257, **MODEL), RetroConfig(retro_add_retriever=True), TokenizerConfig()]
    )
    model, retro = settings[ModelConfig], settings[RetroConfig]
    with torch.random.fork_rng():
        values = dict(Retro(model, retro).named_parameters())
    shapes = parameter_shapes(model, retro)
    write_checkpoint(run, settings, shapes, lambda name: values[name].detach()[: shapes[name][0]], inputs={})


def stop_before_joining(folder: Path, source: Path) -> None:
    """The work directory of a run whose blocks are done and whose output is not."""
    from megatron_retro.data.preprocessing import run

    def stop(*_: object) -> None:
        raise DataError("stopped")

    functions = run.append_blocks, run.join_blocks
    run.append_blocks = run.join_blocks = stop  # type: ignore[assignment]
    try:
        assert preprocess(folder / "stopped", [source], "--append-eod") == 2
    finally:
        run.append_blocks, run.join_blocks = functions


def training_settings(folder: Path) -> Settings:
    """Settings of a run on the corpus and its table."""
    values = {
        **MODEL,
        "seq_length": 4 * CHUNK,
        "retro_chunk_length": CHUNK,
        "data_path": [str(folder / "corpus")],
        "split": "90,10,0",
        "retro_add_retriever": True,
        "retro_layers": [2],
        "neighbor_path": [str(folder / "project/neighbors/corpus")],
        "database_path": str(folder / "project/database"),
    }
    return build_settings(TRAINING_SECTIONS, values, {})


def train(folder: Path) -> bytes:
    """All samples of the training split, with their neighbours."""
    dataset = build_dataset(training_settings(folder), "train", eod=256)
    batch = dataset.read(range(dataset.num_samples))
    return b"".join(np.ascontiguousarray(array).tobytes() for array in batch.arrays().values())


def load(folder: Path) -> bytes:
    """The settings and all tensors of the newest checkpoint, as evaluate, generate, serve and convert load them."""
    settings = stored_settings(open_checkpoint(folder / "run"))
    tensors = stored_tensors(folder / "run")
    return repr(settings.values()).encode() + b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


def generate(folder: Path) -> bytes:
    """What live retrieval finds for some chunks, and their tokens."""
    index = LiveIndex(folder / "project")
    chunks = index.database.files[0].stream[: 20 * CHUNK].reshape(20, CHUNK)
    ids, distances = index.search(chunks.tolist(), 3)
    tokens, mask = index.database.gather(ids, 2 * CHUNK)
    return ids.tobytes() + distances.tobytes() + tokens.tobytes() + mask.tobytes()


def build(folder: Path) -> bytes:
    """The rest of a build after a kill that followed encoding: merge and query."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = Path(scratch) / "world"
        shutil.copytree(folder / "project", copy / "project")
        for path in folder.glob("corpus.*"):
            shutil.copy(path, copy)
        for done in ("index/merged", "neighbors"):
            shutil.rmtree(copy / "project" / done)
        build_retrieval(project(copy, "merge", "query"))
        made = sorted((copy / "project").glob("neighbors/corpus/*.ids"))
        return b"".join(path.read_bytes() for path in made)


def resume(folder: Path) -> bytes:
    """Token files of a preprocessing run that goes on where it was stopped."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        work = Path(scratch) / "stopped.unfinished"
        shutil.copytree(folder / "stopped.unfinished", work, ignore=shutil.ignore_patterns("claims"))
        flags = ("--append-eod", "--resume")
        said = io.StringIO()
        from contextlib import redirect_stderr

        with redirect_stderr(said):
            code = preprocess(Path(scratch) / "stopped", [folder / "text.jsonl"], *flags)
        if code == 2:
            raise DataError(said.getvalue())
        assert code == 0, said.getvalue()
        return b"".join(files(Path(scratch) / "stopped"))


def tokenize(folder: Path) -> bytes:
    """Tokens of a corpus with the tokenizer that it was made with."""
    config = TokenizerConfig("HuggingFaceTokenizer", tokenizer_model=str(folder / "tokenizer/tokenizer.json"))
    tokenizer, file = build_tokenizer(config), TokenFile(folder / "tokenized_text_document")
    require_tokenizer([file], tokenizer)
    return json.dumps([tokenizer.encode("a text"), tokenizer.eod]).encode() + file.stream.tobytes()


def inspect_all(folder: Path) -> bytes:
    """`inspect` of everything that has a manifest."""
    with redirect_stdout(io.StringIO()):
        inspect(
            [
                str(folder / "project"),
                str(folder / "run"),
                *map(str, (folder / "corpus", folder / "tokenized_text_document")),
            ]
        )
    return b"intact"


_CORPUS = ("corpus.*", "project/database/*")
CONSUMERS = (
    Consumer("train", train, (*_CORPUS, "project/neighbors/corpus/*")),
    Consumer("load", load, ("run/*/*",)),
    Consumer("generate", generate, (*_CORPUS, "project/index/live.json", "project/index/merged/*")),
    Consumer("build", build, (*_CORPUS, "project/index/plan.json", "project/index/trained/*", "project/index/codes/*")),
    Consumer("resume", resume, ("stopped.unfinished/*",)),
    Consumer("tokenize", tokenize, ("tokenizer/tokenizer.json", "tokenized_text_document.*")),
    Consumer(
        "inspect",
        inspect_all,
        (*_CORPUS, "project/neighbors/corpus/*", "project/index/merged/*", "project/index/trained/*", "run/*/*"),
        everything=True,
    ),
)
