"""A run that tuned beside a frozen model is loaded with that model: the function is the tuned one's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from megatron_retro.assembly.loaded_model import load_model
from megatron_retro.config.checkpoint import CheckpointConfig
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.peft import PeftConfig
from megatron_retro.config.settings import Settings
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.errors import ConfigError
from megatron_retro.model.retro import Retro
from megatron_retro.peft.attach import added_parameters, attach, connect


def write(run: Path, settings: Settings, module: nn.Module, shapes: dict[str, tuple[int, ...]]) -> None:
    values = {name: value.detach() for name, value in module.named_parameters()}
    write_checkpoint(
        run, settings, shapes, lambda name: values[name][tuple(map(slice, shapes[name]))].contiguous(), inputs={}
    )


@pytest.mark.parametrize("method", ["lora", "ia3", "adapter"])
def test_tuned_function(
    small_model: Callable[..., Retro], tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = small_model()
    common = [module.model, module.retro, TokenizerConfig()]
    write(tmp_path / "base", Settings(common), module, parameter_shapes(module.model, module.retro))
    tokens = torch.randint(0, 256, (1, 30))
    plain = module(tokens)
    peft = PeftConfig(peft_method=method, lora_rank=4, adapter_size=4)
    attach(module, peft)
    with torch.no_grad():
        for parameter in added_parameters(module).values():
            parameter.copy_(torch.randn(parameter.shape) * 0.3)
    connect(module)
    settings = Settings([*common, peft, CheckpointConfig(load="base")])  # relative: it is found above the run
    shapes = {name: tuple(one.shape) for name, one in added_parameters(module).items()}
    write(tmp_path / "tuned", settings, module, shapes)
    monkeypatch.chdir("/")
    loaded = load_model(tmp_path / "tuned", device="cpu").module
    with torch.inference_mode():
        expected, found = module(tokens), loaded(tokens)
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert bool(added_parameters(loaded)) == (method == "adapter")


def test_virtual_tokens_are_refused(small_model: Callable[..., Retro], tmp_path: Path) -> None:
    module = small_model()
    settings = Settings([module.model, module.retro, TokenizerConfig(), PeftConfig(peft_method="p-tuning")])
    write(tmp_path, settings, module, parameter_shapes(module.model, module.retro))
    with pytest.raises(ConfigError, match="virtual tokens"):
        load_model(tmp_path, device="cpu")
