"""The stages that write, each with a folder in which it can start and with what it leaves."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path

from megatron_retro.cli.main import main
from megatron_retro.cli.verbs import VERBS
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.testing.corpora import write_json_lines
from megatron_retro.testing.preprocessing_runs import records
from megatron_retro.testing.processes import exit_code_of
from megatron_retro.testing.retrieval_projects import CHUNK, echoing_documents, write_corpus
from megatron_retro.testing.tiny_corpus import stored_tensors
from megatron_retro.testing.tiny_models import random_model
from tests.faults.kills import Stage

_INDEX = "--retro-embedder-dimension 64 --retro-block-size 97 --retro-index-str IVF8,Flat --retro-query-nprobe 4"
_MODEL = "--num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 64 --split 80,20,0 --num-workers 0"
_STEPS = "--micro-batch-size 2 --global-batch-size 4 --train-iters 6 --save-interval 2 --eval-iters 0 --lr 1e-2"
INDEX_STAGES = {
    "train": ("project/index/trained/*.faiss",),
    "encode": ("project/index/codes/*.codes", "project/index/codes/*.npz", "project/index/codes/*"),
    "merge": ("project/index/merged/index.faiss", "project/index/merged/*.ivfdata"),
    "query": ("project/neighbors/corpus/*.ids",),
}


def write_stages(folder: Path) -> list[Stage]:
    """Every stage, with what the stages before it wrote."""
    import_verbs("preprocess", "build-retrieval", "pretrain", "retrofit", "convert")
    stages = [preprocessing(folder / "preprocess")]
    stages += build(folder / "build")
    stages += training(folder / "training", folder / "build/query/ready")
    return [*stages, *conversions(folder / "convert")]


def import_verbs(*names: str) -> None:
    """Import what these verbs need, so that forks find it."""
    for verb in VERBS:
        if verb.name in names:
            importlib.import_module("megatron_retro." + verb.program.split(":")[0])


def bytes_of(*patterns: str) -> Callable[[Path], bytes]:
    """The content of the files of these patterns; manifests tell the time."""

    def read(folder: Path) -> bytes:
        paths = sorted({path for pattern in patterns for path in folder.glob(pattern) if path.is_file()})
        paths = [path for path in paths if not path.name.endswith(("manifest.json", ".claim", ".lock"))]
        return b"".join(str(path.relative_to(folder)).encode() + path.read_bytes() for path in paths)

    return read


def preprocessing(ready: Path) -> Stage:
    """Text to token files, by two workers."""
    ready.mkdir(parents=True)
    write_json_lines(ready / "in.jsonl", records(3, 2500))

    def words(folder: Path) -> list[str]:
        paths = ["--input", str(folder / "in.jsonl"), "--output-prefix", str(folder / "o"), "--workers", "2"]
        return ["preprocess", *paths, "--tokenizer-type", "ByteTokenizer", "--append-eod"]

    return Stage(
        "preprocess", ready, words, bytes_of("o_text_document.bin", "o_text_document.idx", "o_text_document.blocks*")
    )


def build(folder: Path) -> list[Stage]:
    """The stages of build-retrieval."""
    ready = folder / "train"
    write_corpus(ready / "corpus", echoing_documents(11, 150))
    stages = []
    for name, patterns in INDEX_STAGES.items():

        def words(folder: Path, name: str = name) -> list[str]:
            return build_words(folder, name, project=str(folder / "project"))

        stages.append(Stage(f"build-retrieval: {name}", ready, words, bytes_of(*patterns)))
        following = folder / f"after-{name}"
        shutil.copytree(ready, following)
        ran(words(following))
        ready = following
    shutil.copytree(ready, folder / "query/ready")
    return stages


def build_words(folder: Path, stage: str, *, project: str) -> list[str]:
    """The command of one stage."""
    paths = ["--retro-project-dir", project, "--retro-database-corpus", str(folder / "corpus")]
    length = ["--retro-chunk-length", str(CHUNK), "--retro-query-num-neighbors-save", "5"]
    return ["build-retrieval", *paths, *length, *_INDEX.split(), "--retro-tasks", stage]


def ran(words: list[str]) -> None:
    """A command that ends well."""

    def run() -> None:
        assert main(words) == 0

    assert exit_code_of(run) == 0, words


def state(folder: Path) -> bytes:
    """All tensors of the newest checkpoint: weights, and what the optimizer and the random streams hold."""
    tensors = stored_tensors(folder / "run")
    return b"".join(name.encode() + tensors[name].numpy().tobytes() for name in sorted(tensors))


def training(folder: Path, project: Path) -> list[Stage]:
    """A Retro from the beginning, and a GPT that gets a retriever."""
    folder.mkdir()
    shutil.copytree(project, folder / "pretrain")

    def retrofit(folder: Path) -> list[str]:
        shape = _MODEL.split()[6:]
        return ["retrofit", "--load", str(folder / "gpt"), *_data_words(folder), *shape, *_STEPS.split()]

    shutil.copytree(project, folder / "retrofit")
    write_model(folder / "retrofit/gpt", RetroConfig())
    return [
        Stage("pretrain", folder / "pretrain", training_words, state),
        Stage("retrofit", folder / "retrofit", retrofit, state),
    ]


def training_words(folder: Path) -> list[str]:
    """A Retro on the corpus and the project of a folder."""
    return ["pretrain", *_data_words(folder), *_MODEL.split(), *_STEPS.split(), "--hidden-dropout", "0.1"]


def _data_words(folder: Path) -> list[str]:
    paths = ["--data-path", str(folder / "corpus"), "--neighbor-path", str(folder / "project/neighbors/corpus")]
    paths += ["--database-path", str(folder / "project/database"), "--save", str(folder / "run")]
    return [*paths, "--retro-add-retriever", "--retro-layers", "2", "--retro-chunk-length", str(CHUNK)]


def write_model(run: Path, retro: RetroConfig, **shape: int) -> None:
    """Step 0 of a model, which a Hugging Face family can hold."""
    values = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64, **shape}
    llama = {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True}
    model = ModelConfig(vocab_size=257, position_embedding_type="rope", **values, **llama)  # type: ignore[arg-type]
    settings = Settings([model, retro, TokenizerConfig()])
    parameters = dict(random_model(model, retro).named_parameters())
    shapes = parameter_shapes(model, retro)
    write_checkpoint(run, settings, shapes, lambda name: parameters[name].detach()[: shapes[name][0]], inputs={})


def conversions(folder: Path) -> list[Stage]:
    """A checkpoint out to Hugging Face's format, and back."""
    (folder / "export").mkdir(parents=True)
    write_model(folder / "export/run", RetroConfig(), hidden_size=256, num_layers=4)

    def export(folder: Path) -> list[str]:
        return ["convert", str(folder / "run"), str(folder / "out"), "--convert-to", "huggingface"]

    def convert(folder: Path) -> list[str]:
        return ["convert", str(folder / "theirs"), str(folder / "out"), "--tokenizer-type", "ByteTokenizer"]

    (folder / "convert").mkdir()
    ran(["convert", str(folder / "export/run"), str(folder / "convert/theirs"), "--convert-to", "huggingface"])
    return [
        Stage("convert: from Hugging Face", folder / "convert", convert, bytes_of("out/*/*"), once="out/latest.json"),
        Stage("convert: to Hugging Face", folder / "export", export, bytes_of("out/*"), once="out"),
    ]
