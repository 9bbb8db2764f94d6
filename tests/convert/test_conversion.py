"""The verb: what it says, what it refuses, and that no model is ever whole in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_retro.artifacts.files import this_host
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
SMALL = replace(LLAMA, num_layers=1, hidden_size=8, num_attention_heads=4, vocab_size=11)
MEASURE = """
import sys
from megatron_retro.cli.main import main
import megatron_retro.convert.conversion, safetensors.torch, torch, torch._dynamo  # shapes on meta load the last

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
    written(tmp_path / "run", SMALL)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("x")
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "out"), "--convert-to", "huggingface"]) == 2
    assert (tmp_path / "out" / "precious").read_text() == "x"


def test_an_import_that_was_killed_before_its_pointer_goes_on(tmp_path: Path) -> None:
    """The same command; another model leaves what stands there as it is, its tokenizer too."""
    for name, model in (("theirs", SMALL), ("others", replace(SMALL, hidden_size=16))):
        written(tmp_path / name, model)
        words = [str(tmp_path / name), str(tmp_path / f"{name}-out"), "--convert-to", "huggingface"]
        assert main(["convert", *words]) == 0
    words, out = ["--tokenizer-type", "ByteTokenizer"], tmp_path / "run"
    again = ["convert", str(tmp_path / "theirs-out"), str(out), *words]
    assert main(again) == 0
    wanted = {path.name: path.read_bytes() for path in out.glob("step-00000000/*.safetensors")}
    (out / "latest.json").unlink()
    child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    (out / f"latest.json.partial-{this_host()}-{child}-12345678").write_text("{")
    assert main(["convert", str(tmp_path / "others-out"), str(out), *words]) == 2
    assert main(again) == 0
    assert {path.name: path.read_bytes() for path in out.glob("step-00000000/*.safetensors")} == wanted
    assert sorted(path.name for path in out.iterdir()) == ["latest.json", "step-00000000"]
    assert main(again) == 2


def test_a_run_is_refused_before_its_tokenizer_is_touched(tmp_path: Path) -> None:
    written(tmp_path / "run", SMALL)
    assert main(["convert", str(tmp_path / "run"), str(tmp_path / "theirs"), "--convert-to", "huggingface"]) == 0
    (tmp_path / "run/tokenizer").mkdir()
    (tmp_path / "run/tokenizer/tokenizer.json").write_text("{}")
    (tmp_path / "theirs/tokenizer.json").write_text('{"other": 1}')
    assert main(["convert", str(tmp_path / "theirs"), str(tmp_path / "run")]) == 2
    assert (tmp_path / "run/tokenizer/tokenizer.json").read_text() == "{}"
