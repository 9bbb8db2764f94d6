"""The quickstart's configuration, unchanged, under torchrun: tensor ranks and stages train as one process does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PROGRAM = str(REPOSITORY / "tools" / "pretrain.py")
LAYOUTS = {
    "tensor": ["--tensor-model-parallel-size", "2"],
    "tensor and sequence": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "pipeline": ["--pipeline-model-parallel-size", "2"],
    "data": ["--use-distributed-optimizer", "--micro-batch-size", "2"],
}


def _run(folder: Path, *words: str) -> None:
    ended = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]


def _verb(folder: Path, *words: str) -> None:
    _run(folder, "-m", "megatron_retro.cli.main", *words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token file, database and neighbours of a small corpus."""
    folder = tmp_path_factory.mktemp("programs")
    sources = sorted((REPOSITORY / "megatron_retro").glob("*/*.py"))[:30]
    lines = [json.dumps({"text": path.read_text(encoding="utf-8")[:4000]}) for path in sources]
    (folder / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = ["--tokenizer-type", "ByteTokenizer"]
    _verb(folder, "preprocess", "--input", "a.jsonl", "--output-prefix", "a", "--append-eod", *tokenizer)
    corpora = ["--retro-database-corpus", "a_text_document", "--retro-query-corpus", "train=a_text_document"]
    _verb(
        folder,
        "build-retrieval",
        "--retro-project-dir",
        "retrieval",
        *corpora,
        *tokenizer,
        "--retro-chunk-length",
        "32",
    )
    return folder


def _losses(folder: Path, name: str, *launch: str, flags: list[str]) -> list[float]:
    data = ["--data-path", "a_text_document", "--database-path", "retrieval/database", "--neighbor-path"]
    fixed = ["--tokenizer-type", "ByteTokenizer", "--train-iters", "4", "--log-interval", "1", "--eval-iters", "0"]
    config = ["--config", str(REPOSITORY / "examples" / "quickstart.toml"), "--retro-add-retriever"]
    _run(folder, *launch, PROGRAM, *config, *data, "retrieval/neighbors/train", *fixed, "--save", name, *flags)
    events = [json.loads(line) for line in (folder / name / "events.jsonl").read_text(encoding="utf-8").splitlines()]
    return [event["loss"] for event in events if event["event"] == "step"]


@pytest.mark.full
def test_quickstart_on_two_ranks(corpus: Path) -> None:
    alone = _losses(corpus, "alone", flags=[])
    assert len(alone) == 4
    for name, flags in LAYOUTS.items():
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
        assert _losses(corpus, name, *launcher, flags=flags) == pytest.approx(alone, rel=2e-5), name


@pytest.mark.full
def test_a_wrong_world_size_is_refused_before_ranks_meet(corpus: Path) -> None:
    words = [sys.executable, PROGRAM, "--data-path", "a_text_document", "--tokenizer-type", "ByteTokenizer"]
    words += ["--train-iters", "1", "--tensor-model-parallel-size", "3", "--pipeline-model-parallel-size", "9"]
    ended = subprocess.run(words, cwd=corpus, capture_output=True, text=True, timeout=100, check=False)
    assert ended.returncode == 2
    for flag in ("--tensor-model-parallel-size", "--num-attention-heads", "--pipeline-model-parallel-size"):
        assert flag in ended.stderr
