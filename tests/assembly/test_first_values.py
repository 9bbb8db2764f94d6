"""First values are drawn for what a rank holds and no checkpoint gives, and are the same bits on every layout."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from megatron_retro.assembly.stage_building import (
    build_stage,
    draw_first_values,
    model_on_meta,
    numbers_drawn_at_start,
)
from megatron_retro.config.data import DataConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.parallel import ParallelConfig
from megatron_retro.model import initialization
from megatron_retro.model.initialization import initial_slice, initial_value
from megatron_retro.parallel.partition import stage_parts
from megatron_retro.planning.fake_device import fake_rank
from megatron_retro.testing.processes import exit_code_of
from megatron_retro.testing.tiny_corpus import TinyCorpus, differences, losses, write_tiny_corpus
from megatron_retro.training.program import pretrain, retrofit

WIDTH = 24
SMALL_BLOCK = 16 * WIDTH


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many numbers each call draws."""
    counts: list[int] = []
    draw = initialization._normals

    def counting(shape: tuple[int, int], *arguments: object) -> torch.Tensor:
        counts.append(math.prod(shape))
        return draw(shape, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(initialization, "_normals", counting)
    return counts


@pytest.mark.parametrize("shape", [(100, WIDTH), (2, 50, WIDTH), (5, 3, 7, WIDTH), (WIDTH,)], ids=str)
def test_a_slice_is_the_slice_of_the_whole_and_draws_its_blocks_alone(
    shape: tuple[int, ...], drawn: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(initialization, "_BLOCK", SMALL_BLOCK)
    model, retro, name = ModelConfig(num_layers=2), RetroConfig(), "layers.0.mlp.up.weight"
    whole = initial_value(name, shape, model, retro, seed=3)
    assert whole.std() == pytest.approx(model.init_method_std, rel=0.4) and len(whole.unique()) > 0.99 * whole.numel()
    for dim in range(len(shape)):
        size = shape[dim] // 3
        offsets = tuple(size if number == dim else 0 for number in range(len(shape)))
        sizes = tuple(size if number == dim else full for number, full in enumerate(shape))
        drawn.clear()
        found = initial_slice(name, shape, offsets, sizes, model, retro, seed=3)
        assert torch.equal(found, whole.narrow(dim, size, size)), dim
        rows = initialization.rows_of_slice(shape, offsets, sizes) // 16
        assert sum(drawn) <= len(rows.unique()) * SMALL_BLOCK


def test_what_one_block_holds_is_what_it_always_was() -> None:
    """Checkpoints and golden losses of parameters up to 16 million numbers stay reproducible."""
    generator = torch.Generator().manual_seed(initialization._seed_of("layers.0.mlp.up.weight", 5))
    expected = torch.randn(96, WIDTH, generator=generator) * 0.02
    found = initial_value("layers.0.mlp.up.weight", (96, WIDTH), ModelConfig(), RetroConfig(), seed=5)
    assert torch.equal(found, expected)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> TinyCorpus:
    return write_tiny_corpus(tmp_path_factory.mktemp("corpus"))


def test_a_resume_draws_nothing_and_a_retrofit_what_no_decoder_gives(
    corpus: TinyCorpus, tmp_path: Path, drawn: list[int]
) -> None:
    def draws(train: object, *, save: str, retro: bool = True, **more: object) -> None:
        settings = corpus.settings(save=str(tmp_path / save), eval_iters=0, retro=retro, **more)
        train(settings)  # type: ignore[operator]
        (tmp_path / f"{save}.drawn").write_text(str(sum(drawn)))

    def count(save: str) -> int:
        return int((tmp_path / f"{save}.drawn").read_text())

    gpt = {"retro": False, "save": "gpt"}
    assert exit_code_of(lambda: draws(pretrain, train_iters=2, **gpt)) == 0
    fresh = count("gpt")
    assert fresh > 0
    assert exit_code_of(lambda: draws(pretrain, train_iters=4, **gpt)) == 0
    assert count("gpt") == 0, "a resume draws nothing"
    load = {"load": str(tmp_path / "gpt"), "train_iters": 1}
    assert exit_code_of(lambda: draws(retrofit, save="noise", **load)) == 0
    assert exit_code_of(lambda: draws(retrofit, save="warm", retro_init="decoder", **load)) == 0
    assert 0 < count("warm") < count("noise"), "what follows from the decoder is not drawn"


def test_a_damaged_checkpoint_leaves_no_trace_in_a_fresh_start(corpus: TinyCorpus, tmp_path: Path) -> None:
    settings = {name: corpus.settings(save=str(tmp_path / name), train_iters=2, eval_iters=0) for name in ("a", "b")}
    for name in settings:
        assert exit_code_of(lambda name=name: pretrain(settings[name])) == 0
    shard = tmp_path / "a/step-00000002/shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    assert exit_code_of(lambda: pretrain(settings["a"])) == 0
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_plan_counts_what_a_start_draws(corpus: TinyCorpus, drawn: list[int]) -> None:
    settings = corpus.settings(vocab_size=300)
    with fake_rank(0, 1, settings[ParallelConfig]) as mesh:
        (part,) = stage_parts(settings, settings[DataConfig].seq_length)
        counted = numbers_drawn_at_start(settings, part, mesh)
        draw_first_values(build_stage(settings, part, mesh), settings, mesh)
        names = {name for name, _ in model_on_meta(settings).named_parameters()}
        assert counted == sum(drawn) > 0
        assert numbers_drawn_at_start(settings, part, mesh, given=names) == 0
