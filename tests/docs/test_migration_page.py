"""A core GPT on disk, its token files and its launch script become a Retro by the commands of docs/migration.md."""

from __future__ import annotations

import re
import shlex
import tarfile
from pathlib import Path

import numpy as np
import pytest

from megatron_retro.checkpoint.loading import open_checkpoint, stored_settings
from megatron_retro.cli.main import main
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.testing.corpora import write_documents

ROOT = Path(__file__).parents[1]
TEXT = (ROOT.parent / "docs" / "migration.md").read_text(encoding="utf-8")
SCRIPT = """--use-mcore-models --transformer-impl local --num-layers 2 --hidden-size 8 --ffn-hidden-size 12
--num-attention-heads 4 --group-query-attention --num-query-groups 2 --max-position-embeddings 12 --seq-length 12
--position-embedding-type rope --rotary-base 500 --normalization RMSNorm --swiglu --disable-bias-linear --add-qkv-bias
--untie-embeddings-and-output-weights --no-masked-softmax-fusion --attention-softmax-in-fp32 --micro-batch-size 1
--global-batch-size 2 --train-iters 2 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --weight-decay 0.1 --clip-grad 1.0
--adam-beta1 0.9 --adam-beta2 0.95 --attention-dropout 0.0 --hidden-dropout 0.0 --no-rope-fusion --eval-iters 0
--overlap-grad-reduce --use-distributed-optimizer --ckpt-format torch_dist --save-interval 2 --log-interval 1
--calculate-per-token-loss --num-workers 0 --distributed-timeout-minutes 10"""
SMALL = {
    "build-retrieval": "--retro-chunk-length 4 --retro-tasks train encode merge query",
    "retrofit": "--retro-chunk-length 4 --retro-layers 2",
}


def commands() -> list[list[str]]:
    section = TEXT.split("## The same day")[1].split("\n## ")[0]
    block = re.findall(r"```bash\n(.*?)```", section, flags=re.DOTALL)[0]
    return [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Megatron-LM left: nothing of it is ours."""
    from sentencepiece import SentencePieceTrainer

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "OLD"
    with tarfile.open(ROOT / "convert" / "data" / "core_checkpoints.tar.xz") as archive:
        archive.extractall(folder, [each for each in archive if each.name.startswith("qwen_2_1/")])
    (folder / "qwen_2_1").rename(folder / "checkpoints")
    SentencePieceTrainer.train(
        sentence_iterator=iter(["abcdefghij" * 9] * 20),
        model_prefix=str(folder / "tokenizer"),
        model_type="char",
        vocab_size=14,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    random = np.random.default_rng(0)
    write_documents(folder / "corpus_text_document", ([*random.integers(3, 14, 35).tolist(), 2] for _ in range(30)))
    for manifest in folder.glob("corpus_text_document*json*"):
        manifest.unlink()
    return folder


def test_the_page_leads_from_the_old_run_to_a_retrofit(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    flags = shlex.split(SCRIPT)
    for program, verb, *words in commands():
        assert program == "megatron-retro"
        for _ in range(2):  # the first try names every flag that has no meaning here
            given = [each for word in words for each in (flags if word == "$FLAGS" else [word])]
            code = main([verb, *given, *SMALL.get(verb, "").split()])
            error = capsys.readouterr().err
            if code == 0 or "$FLAGS" not in words:
                break
            assert code == 2
            flags = without(flags, set(re.findall(r"(?m)^(?:error: )?(--[a-z0-9_-]+)", error)))
        assert code == 0, f"{verb}: {error}"
    checkpoint = open_checkpoint(Path("runs/retro"))
    settings = stored_settings(checkpoint)
    assert settings[RetroConfig].retro_add_retriever and settings[ModelConfig].add_qkv_bias
    assert checkpoint.manifest.counts["step"] == 2
    assert {path: path.read_bytes() for path in old.rglob("*") if path.is_file()} == before


def without(flags: list[str], refused: set[str]) -> list[str]:
    """The flags less those that were named, and their values."""
    kept: list[str] = []
    dropping = False
    for word in flags:
        dropping = word in refused or (dropping and not word.startswith("--"))
        kept += [] if dropping else [word]
    return kept
