"""Checkpoints that megatron-core 0.15.3 wrote: their function stays, their pickles run nothing, a retro-fit starts."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import open_checkpoint, stored_settings
from megatron_retro.cli.main import main
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.checkpoint_files import read_parameter
from megatron_retro.convert.distributed_checkpoint import DistributedTensors
from megatron_retro.convert.megatron_core import import_core
from megatron_retro.errors import ArtifactError
from megatron_retro.model.retro import Retro

DATA = Path(__file__).parent / "data"


@pytest.fixture
def written(tmp_path: Path) -> Path:
    with tarfile.open(DATA / "core_gpt.tar.xz") as archive:
        archive.extractall(tmp_path)
    return tmp_path


def silent(text: str) -> None:
    del text


@pytest.mark.parametrize("name", ["llama", "gpt"])
@torch.no_grad()
def test_computes_what_core_computes(name: str, written: Path) -> None:
    assert main(["convert", str(written / name), str(written / "run")]) == 0
    checkpoint = open_checkpoint(written / "run")
    settings = stored_settings(checkpoint)
    model = Retro(settings[ModelConfig], settings[RetroConfig]).double().eval()
    for parameter_name, parameter in model.named_parameters():
        parameter.copy_(read_parameter(checkpoint, parameter_name))
    expected: dict[str, Tensor] = torch.load(written / name / "expected.pt", weights_only=True)
    assert (model(expected["tokens"]) - expected["logits"]).abs().max() < 1e-6


def test_a_retrofit_starts_from_it(written: Path) -> None:
    main(["convert", str(written / "llama"), str(written / "run")])
    flags = ["--mock-data", "--seq-length", "8", "--retro-chunk-length", "4", "--retro-layers", "2"]
    flags += ["--train-iters", "1", "--global-batch-size", "1", "--eval-iters", "0", "--num-workers", "0"]
    assert main(["retrofit", "--load", str(written / "run"), "--save", str(written / "retro"), *flags]) == 0
    assert stored_settings(open_checkpoint(written / "retro"))[RetroConfig].retro_add_retriever


class Dangerous:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("run",)


def test_an_index_that_would_run_code_is_refused(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = written / "gpt" / "iter_0000005"
    (folder / ".metadata").write_bytes(pickle.dumps(Dangerous()))
    with pytest.raises(ArtifactError, match="would run code") as raised:
        import_core(folder, written / "run", silent)
    assert "builtins.print" in str(raised.value) and "run" not in capsys.readouterr().out


def test_damage_is_named(written: Path) -> None:
    folder = written / "gpt" / "iter_0000005"
    data = next(folder.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:500])
    with pytest.raises(ArtifactError, match="cannot be read"):
        import_core(folder, written / "run", silent)
    (folder / ".metadata").write_bytes(b"\x80\x04garbage")
    with pytest.raises(ArtifactError, match="cannot be read"):
        DistributedTensors(folder)
    assert not list((written / "run").glob("*"))
