"""The verb: what it says, what it refuses, and that no model is ever whole in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_retro.cli.main import main
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint

LLAMA = ModelConfig(
    num_layers=6,
    hidden_size=512,
    num_attention_heads=8,
    normalization="RMSNorm",
    swiglu=True,
    disable_bias_linear=True,
    untie_embeddings_and_output_weights=True,
    vocab_size=8000,
)
MEASURE = """
import sys
from megatron_retro.cli.main import main
import megatron_retro.convert.conversion, safetensors.torch, torch

def kilobytes(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field + ":"))

before = kilobytes("VmRSS")
assert main(sys.argv[1:]) == 0
print(kilobytes("VmHWM") - before)
"""

NO_TEXT = ["--tokenizer-type", "ByteTokenizer"]


def written(run: Path, model: ModelConfig) -> int:
    """A checkpoint of random weights; its size in bytes."""
    shapes = parameter_shapes(model, RetroConfig())
    settings = Settings([model, RetroConfig(), TokenizerConfig()])
    write_checkpoint(run, settings, shapes, lambda name: torch.randn(shapes[name]), {})
    return 4 * sum(torch.Size(shape).numel() for shape in shapes.values())


def peak_bytes(arguments: list[str]) -> int:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return int(done.stdout.split()[-1]) * 1024


def test_peak_memory_is_of_a_shard_not_of_the_model(tmp_path: Path) -> None:
    size = written(tmp_path / "run", LLAMA)
    out = [str(tmp_path / "run"), str(tmp_path / "theirs")]
    exported = peak_bytes(["convert", *out, "--convert-to", "huggingface", "--convert-shard-megabytes", "8"])
    imported = peak_bytes(["convert", str(tmp_path / "theirs"), str(tmp_path / "again"), *NO_TEXT])
    assert size > 100e6
    assert exported < 0.6 * size
    assert imported < 0.6 * size
    index = json.loads((tmp_path / "theirs" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == size
    assert len(set(index["weight_map"].values())) > 8


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["convert"], "takes two paths"),
        (["convert", "nowhere", "out"], "is no directory"),
        (["convert", ".", "out"], "no model that can be imported"),
        (["convert", ".", "out", "--convert-to", "huggingface"], "no complete checkpoint"),
        (["convert", ".", "out", "--convert-to", "onnx"], "one of checkpoint, huggingface"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_existing_destination_is_kept(tmp_path: Path) -> None:
    small = ModelConfig(
        num_layers=1, hidden_size=8, normalization="RMSNorm", swiglu=True, disable_bias_linear=True, vocab_size=11
    )
    written(tmp_path / "run", small)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--convert-to", "huggingface"]) == 2
    assert (tmp_path / "out" / "precious").read_text() == "x"
