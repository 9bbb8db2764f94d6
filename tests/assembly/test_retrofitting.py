"""A foreign GPT becomes a Retro: the plan says what comes from where, and step 0 computes what the GPT did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_retro.assembly.retrofitting import inherited_settings, parameter_sources
from megatron_retro.checkpoint.loading import open_checkpoint
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import TrainingConfig
from megatron_retro.convert.checkpoint_files import parameter_shapes, read_parameter, write_checkpoint
from megatron_retro.convert.hugging_face import export_hugging_face, import_hugging_face
from megatron_retro.model.initialization import initialize
from megatron_retro.model.retro import Retro
from megatron_retro.testing.layouts import LIKE_OLMO2
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro

LLAMA = tiny_model(normalization="RMSNorm", swiglu=True, disable_bias_linear=True)
OLMO2 = tiny_model(**LIKE_OLMO2)


@pytest.fixture(params=[LLAMA, OLMO2], ids=["llama", "olmo2"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Retro, Path]:
    """A GPT that went out to Hugging Face's format and came in again."""
    model: ModelConfig = request.param
    gpt = random_model(model, RetroConfig())
    state, shapes = gpt.state_dict(), parameter_shapes(model, RetroConfig())
    settings = Settings([model, RetroConfig(), TokenizerConfig()])
    write_checkpoint(tmp_path / "run", settings, shapes, lambda name: state[name][: shapes[name][0]], {})
    export_hugging_face(tmp_path / "run", tmp_path / "theirs")
    import_hugging_face(tmp_path / "theirs", tmp_path / "imported", TokenizerConfig())
    return gpt, tmp_path / "imported"


@pytest.mark.parametrize("frozen", [False, True])
def test_the_plan_and_step_zero(run: tuple[Retro, Path], frozen: bool) -> None:
    gpt, path = run
    checkpoint = open_checkpoint(path)
    wanted = Settings(
        [
            ModelConfig(),
            tiny_retro(retro_zero_init_output=True),
            TokenizerConfig(),
            TrainingConfig(freeze_decoder=frozen),
        ],
        {"retro_layers": "flag"},
    )
    settings = inherited_settings(wanted, checkpoint)
    plan = {row.parameter: row for row in parameter_sources(settings, checkpoint)}
    decoder = set(gpt.state_dict())
    assert {name for name, row in plan.items() if row.source == "checkpoint"} == decoder
    assert all(row.trains != (frozen and name in decoder) for name, row in plan.items())
    assert any("cross_attention" in name for name in plan) and any(name.startswith("encoder.") for name in plan)

    model = Retro(settings[ModelConfig], settings[RetroConfig]).eval()
    initialize(model, settings[ModelConfig], settings[RetroConfig], seed=1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if plan[name].source == "checkpoint":
                value = read_parameter(checkpoint, name)
                parameter[: len(value)].copy_(value)
        tokens, neighbors = random_tokens(2, 14), random_neighbors(2, 3)
        assert torch.equal(model(tokens, neighbors), model(tokens))
        assert torch.allclose(model(tokens, neighbors), gpt(tokens), atol=1e-6)
