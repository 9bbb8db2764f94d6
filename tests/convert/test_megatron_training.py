"""Runs that megatron-core 0.15.3 began: AdamW goes on where it stood, or the weights come alone and say so."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import load_tensors, open_checkpoint
from megatron_retro.checkpoint.shard_files import DTYPES
from megatron_retro.cli.main import main
from megatron_retro.convert.checkpoint_files import parameter_names, read_parameter
from megatron_retro.testing.corpora import write_reference_token_file

ARCHIVE = Path(__file__).parent / "data" / "core_training.tar.xz"
OF_BYTES = ["--tokenizer-type", "ByteTokenizer"]
LAST, NEXT = "iter_0000002", "iter_0000003"
SHAPE = ["--num-layers", "2", "--hidden-size", "8", "--num-attention-heads", "4", "--vocab-size", "16"]
SHAPE += ["--max-position-embeddings", "12", "--make-vocab-size-divisible-by", "1"]
GPT = ["--ffn-hidden-size", "16", "--position-embedding-type", "learned_absolute", "--gelu-tanh"]
LLAMA = ["--ffn-hidden-size", "12", "--rotary-base", "500", "--normalization", "RMSNorm", "--swiglu", "--qk-layernorm"]
LLAMA += ["--disable-bias-linear", "--untie-embeddings-and-output-weights", "--group-query-attention"]
LLAMA += ["--num-query-groups", "2"]
RATES = ["--lr", "0.01", "--lr-decay-style", "constant", "--weight-decay", "0.1", "--adam-beta2", "0.98"]
RATES += ["--clip-grad", "0", "--seq-length", "12", "--global-batch-size", "2", "--micro-batch-size", "2"]
SAME_AS = {
    "gpt_2_2": "gpt",
    "gpt_2_2_torch": "gpt",
    "llama_flat": "llama",
    "llama_flat_2_1": "llama",
    "qwen_2_1": "qwen",
    "qwen_2_1_torch": "qwen",
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("core_training")
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder)
    return folder


def converted(source: Path, run: Path, *flags: str) -> int:
    return main(["convert", str(source), str(run), *OF_BYTES, *flags])


def weights(run: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(run)
    return {name: read_parameter(checkpoint, name) for name in parameter_names(checkpoint)}


def everything(run: Path) -> dict[str, Tensor]:
    """Weights, moments and counts."""
    checkpoint = open_checkpoint(run)
    index = checkpoint.index
    found = {name: torch.empty(shape, dtype=DTYPES[index.dtypes[name]]) for name, shape in index.sizes.items()}
    load_tensors(checkpoint, found)
    return found


def largest_difference(run: Path, expected: Path) -> float:
    ours, theirs = weights(run), weights(expected)
    assert ours.keys() == theirs.keys()
    for name in ours:
        if name.endswith("query_key_value.bias"):  # a key's bias moves no loss: its gradient is rounding alone
            ours[name][:, 2:4] = theirs[name][:, 2:4]
    return max(float((ours[name] - theirs[name]).abs().max()) for name in ours)


@pytest.mark.parametrize(("name", "shape"), [("gpt", GPT), ("llama", LLAMA)])
def test_the_next_step_is_the_one_that_core_takes(name: str, shape: list[str], stored: Path, tmp_path: Path) -> None:
    """Whatever sample is drawn, it is the batch of core's third step; without the moments it is another step."""
    assert converted(stored / name / LAST, tmp_path / "run", "--convert-optimizer", "required") == 0
    assert converted(stored / name / NEXT, tmp_path / "expected") == 0
    write_reference_token_file(tmp_path / "corpus", [[[3, 4, 5, 6] * 100]], "uint16")
    flags = ["--data-path", str(tmp_path / "corpus"), "--split", "1,0,0", "--eval-iters", "0", *OF_BYTES]
    flags += ["--train-iters", "3", "--num-workers", "0", "--load", str(tmp_path / "run"), *SHAPE, *shape, *RATES]
    assert main(["pretrain", *flags, "--save", str(tmp_path / "next")]) == 0
    checkpoint = open_checkpoint(tmp_path / "next")
    assert (checkpoint.step, checkpoint.manifest.counts["samples"]) == (3, 6)
    assert largest_difference(tmp_path / "next", tmp_path / "expected") < 1e-6
    if name == "gpt":
        assert main(["pretrain", *flags, "--save", str(tmp_path / "fresh"), "--no-load-optim"]) == 0
        assert largest_difference(tmp_path / "fresh", tmp_path / "expected") > 1e-3


@pytest.mark.parametrize("name", SAME_AS)
def test_every_layout_gives_the_same_state(name: str, stored: Path, tmp_path: Path) -> None:
    """Cut or whole, by parameter, in flat pieces or in lists: what comes in has the same bits."""
    for number, each in enumerate((name, SAME_AS[name])):
        converted(stored / each / LAST, tmp_path / str(number), "--convert-optimizer", "required")
    found, expected = everything(tmp_path / "0"), everything(tmp_path / "1")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert sum(key.endswith(".step") for key in found) * 4 == len(found)


def test_a_model_of_16_bits_comes_with_what_it_updates(stored: Path, tmp_path: Path) -> None:
    converted(stored / "qwen" / LAST, tmp_path / "run", "--convert-vocab-size", "13")
    converted(stored / "qwen" / LAST, tmp_path / "weights", "--convert-vocab-size", "13", "--convert-optimizer", "none")
    ours, alone = everything(tmp_path / "run"), weights(tmp_path / "weights")
    for name, weight in alone.items():
        assert torch.equal(ours[f"model.{name}"].bfloat16().float(), weight)
    assert any(not torch.equal(ours[f"model.{name}"], weight) for name, weight in alone.items())
    assert ours["optimizer.output.weight.exp_avg_sq"].shape == ours["model.output.weight"].shape == (13, 8)
    assert not any(name.startswith("optimizer.") for name in everything(tmp_path / "weights"))


@pytest.mark.parametrize(
    ("name", "named"), [("gpt_gathered", "--dist-ckpt-optim-fully-reshardable"), ("another", "it is sgd's")]
)
def test_what_cannot_come_is_named_and_weights_come_alone(
    name: str, named: str, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = stored / name / LAST
    if name == "another":
        source = shutil.copytree(stored / "gpt" / LAST, tmp_path / "another")
        content = torch.load(source / "common.pt", weights_only=False)
        content["args"].optimizer = "sgd"
        torch.save(content, source / "common.pt")
    assert converted(source, tmp_path / "run") == 0
    said = capsys.readouterr().err
    assert "the optimizer's state stays behind" in said and named in said
    assert open_checkpoint(tmp_path / "run").step == 0
    assert converted(source, tmp_path / "refused", "--convert-optimizer", "required") == 2
    assert named in capsys.readouterr().err and not (tmp_path / "refused").exists()


def test_lists_of_another_order_are_not_guessed(
    stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = shutil.copytree(stored / "qwen_2_1_torch" / LAST, tmp_path / "run")
    path = source / "mp_rank_00" / "model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer"]["optimizer"]["param_groups"][0]["params"].reverse()
    torch.save(content, path)
    assert converted(source, tmp_path / "refused", "--convert-optimizer", "required") == 2
    assert "exp_avg of " in capsys.readouterr().err
