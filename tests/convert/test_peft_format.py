"""What was tuned goes to `peft` and comes from it: over the exported base, both compute the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_retro.assembly.loading import load_model
from megatron_retro.cli.main import main
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import Settings
from megatron_retro.config.training import CheckpointConfig, PeftConfig
from megatron_retro.convert.checkpoint_files import parameter_shapes, write_checkpoint
from megatron_retro.convert.hugging_face import import_hugging_face
from megatron_retro.model.retro import Retro
from megatron_retro.peft.attach import added_parameters, attach, connect, part_modules
from megatron_retro.peft.merging import merge
from megatron_retro.peft.prompts import virtual_tokens_of
from megatron_retro.testing.tiny_models import random_model, random_neighbors, random_tokens, tiny_model, tiny_retro
from tests.convert.foreign_decoders import made

LLAMA = {"normalization": "RMSNorm", "swiglu": True, "disable_bias_linear": True}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LLAMA, "group_query_attention": True, "num_query_groups": 2},
    "qwen3": {**LLAMA, "qk_layernorm": True, "kv_channels": 6},
    "stablelm": {**LLAMA, "normalization": "LayerNorm", "apply_layernorm_1p": True, "rotary_percent": 0.5},
    "nemotron": {"apply_layernorm_1p": True, "squared_relu": True, "rotary_percent": 0.5},
    "gpt2": {"position_embedding_type": "learned_absolute", "gelu_tanh": True},
}
EVERY = ("attention.query_key_value", "attention.output", "mlp.up", "mlp.down")
METHODS = {
    "lora": PeftConfig(peft_method="lora", lora_rank=3, lora_alpha=6.0, lora_targets=EVERY),
    "ia3": PeftConfig(peft_method="ia3"),
    "p-tuning": PeftConfig(peft_method="p-tuning", num_virtual_tokens=5, prompt_encoder_hidden_size=12),
    "adapter": PeftConfig(peft_method="adapter", adapter_size=4),
}


@pytest.fixture(scope="module")
def peft() -> Iterator[Any]:
    import peft
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield peft


def config_of(family: str) -> ModelConfig:
    return tiny_model(untie_embeddings_and_output_weights=family != "gpt2", **FAMILIES[family])


def saved(module: Retro, run: Path, *more: Any, added: bool = False) -> None:
    values = {name: value.detach() for name, value in module.named_parameters()}
    shapes = parameter_shapes(module.model, module.retro)
    if added:
        shapes = {name: tuple(value.shape) for name, value in added_parameters(module).items()}
    settings = Settings([module.model, module.retro, TokenizerConfig(), *more])
    write_checkpoint(run, settings, shapes, lambda name: values[name][: shapes[name][0]].contiguous(), {})


def tuned_run(folder: Path, module: Retro, config: PeftConfig) -> None:
    """`base` and `tuned` in a folder; the module becomes the tuned one."""
    saved(module, folder / "base")
    attach(module, config)
    connect(module)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in added_parameters(module).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    saved(module, folder / "tuned", config, CheckpointConfig(load="base"), added=True)


def converted(*words: object) -> None:
    assert main(["convert", *map(str, words)]) == 0


def require_close(found: Tensor, expected: Tensor) -> None:
    """Equal up to float32's rounding of the largest logit."""
    assert (found - expected).abs().max() < 3e-5 * expected.abs().max()


@torch.no_grad()
def logits_of(module: Retro, tokens: Tensor) -> Tensor:
    """Of the words, behind virtual tokens where the model has them."""
    virtual = virtual_tokens_of(module.embedding)
    lead = torch.tensor([virtual], dtype=torch.long).expand(len(tokens), -1)
    logits: Tensor = module(torch.cat((lead, tokens), 1))[:, len(virtual) :]
    return logits


@torch.no_grad()
def logits_over(base: Path, adapter: Path, peft: Any, tokens: Tensor) -> Tensor:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    tuned = peft.PeftModel.from_pretrained(model, adapter).eval()
    logits: Tensor = tuned(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    return logits[:, -tokens.shape[1] :]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["lora", "ia3", "p-tuning"])
def test_peft_computes_what_ours_does_and_it_comes_back(peft: Any, tmp_path: Path, family: str, method: str) -> None:
    module = random_model(config_of(family), RetroConfig())
    tokens = random_tokens(2, 17)
    plain = logits_of(module, tokens)
    tuned_run(tmp_path, module, METHODS[method])
    expected = logits_of(module, tokens)
    assert (expected - plain).abs().max() > 0.1
    converted(tmp_path / "base", tmp_path / "theirs", "--convert-to", "huggingface")
    converted(tmp_path / "tuned", tmp_path / "adapter", "--convert-to", "peft")
    found = logits_over(tmp_path / "theirs", tmp_path / "adapter", peft, tokens)
    require_close(found, expected)
    converted(tmp_path / "adapter", tmp_path / "again", "--convert-base", tmp_path / "base")
    again = load_model(tmp_path / "again", device="cpu")
    require_close(logits_of(again.module, tokens), expected)
    assert again.settings[PeftConfig].lora_rank == (3 if method == "lora" else PeftConfig().lora_rank)


def test_the_adapter_names_the_model_that_was_imported(peft: Any, tmp_path: Path) -> None:
    """So `peft` finds its base alone; a model of the hub is named with its revision, and a flag names any other."""
    module, config = random_model(config_of("llama"), RetroConfig()), METHODS["lora"]
    saved(module, tmp_path / "ours")
    converted(tmp_path / "ours", tmp_path / "theirs", "--convert-to", "huggingface")
    converted(tmp_path / "theirs", tmp_path / "imported", "--tokenizer-type", "ByteTokenizer")
    tuned_run(tmp_path, module, config)
    values = {name: value.detach() for name, value in added_parameters(module).items()}
    shapes = {name: tuple(value.shape) for name, value in values.items()}

    def named(base: Path | str, *words: object) -> tuple[Path, list[Any]]:
        settings = Settings([module.model, module.retro, TokenizerConfig(), config, CheckpointConfig(load=str(base))])
        out = tmp_path / f"tuned {Path(base).name} {len(words)}"
        write_checkpoint(out, settings, shapes, values.__getitem__, {})
        adapter = tmp_path / f"adapter {out.name}"
        converted(out, adapter, "--convert-to", "peft", *words)
        written = json.loads((adapter / "adapter_config.json").read_text())
        return adapter, [written["base_model_name_or_path"], written["revision"]]

    adapter, found = named(tmp_path / "imported")
    assert found == [str(tmp_path / "theirs"), None]
    tokens = random_tokens(2, 17)
    tuned = peft.AutoPeftModelForCausalLM.from_pretrained(adapter).eval()
    with torch.no_grad():
        require_close(tuned(input_ids=tokens).logits, logits_of(module, tokens))
    import_hugging_face(tmp_path / "theirs", tmp_path / "hub", TokenizerConfig(), origin="team/model@0123abc")
    assert named(tmp_path / "hub")[1] == ["team/model", "0123abc"]
    assert named(tmp_path / "ours")[1] == named(tmp_path / "gone")[1] == [None, None]
    assert named(tmp_path / "ours", "--convert-base", tmp_path / "theirs")[1] == [str(tmp_path / "theirs"), None]


THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora of two, by default": ("LoraConfig", {"r": 2}),
    "lora of all, rank-stabilized": ("LoraConfig", {"r": 3, "use_rslora": True, "target_modules": "all-linear"}),
    "lora of some layers": (
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [1, 4],
            "init_lora_weights": "gaussian",
        },
    ),
    "ia3": ("IA3Config", {}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 4, "encoder_hidden_size": 8}),
}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", THEIRS)
def test_what_peft_made_comes_in(peft: Any, tmp_path: Path, family: str, kind: str) -> None:
    import transformers

    name, arguments = THEIRS[kind]
    if family == "gpt2" and kind in ("lora of some layers", "ia3"):
        pytest.skip("names of Llama's layers, or factors of queries")
    saved(random_model(config_of(family), RetroConfig()), tmp_path / "base")
    converted(tmp_path / "base", tmp_path / "theirs", "--convert-to", "huggingface")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    tuned = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **arguments)).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    tokens = random_tokens(2, 11)
    with torch.no_grad():
        expected = tuned(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits[:, -11:]
    converted(tmp_path / "adapter", tmp_path / "run", "--convert-base", tmp_path / "base")
    ours = load_model(tmp_path / "run", device="cpu").module
    require_close(logits_of(ours, tokens), expected)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"peft_type": "LOHA"}, "adapters of type LOHA"),
    "dora": ({"use_dora": True}, "use_dora = True"),
    "biases": ({"bias": "all"}, "bias = 'all'"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save = ['lm_head']"),
    "a beginning that is cut out of the base": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = 'pissa"),
    "ranks": ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_has_no_counterpart_is_named(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    changes, named = REFUSED[kind]
    tuned_run(tmp_path, random_model(config_of("llama"), RetroConfig()), METHODS["lora"])
    converted(tmp_path / "tuned", tmp_path / "adapter", "--convert-to", "peft")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert main(["convert", str(path.parent), str(tmp_path / "run"), "--convert-base", str(tmp_path / "base")]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("LoraConfig", {"target_modules": ["q_proj", "o_proj"]}),
        ("PromptTuningConfig", {"num_virtual_tokens": 4}),
        ("IA3Config", {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]}),
    ],
)
def test_an_adapter_over_multipliers_that_went_into_the_weights(
    peft: Any, tmp_path: Path, kind: str, arguments: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its scale would be another, also over a run that went on from the import; factors are right as they are."""
    import transformers

    model = made(transformers, "granite", tmp_path / "theirs")
    import_hugging_face(tmp_path / "theirs", tmp_path / "imported", TokenizerConfig())
    tuned = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", **arguments)).eval()
    with torch.no_grad():
        for parameter in (one for one in tuned.parameters() if one.requires_grad):
            parameter.add_(torch.randn_like(parameter) * 0.3)
    tuned.save_pretrained(tmp_path / "adapter")
    base = load_model(tmp_path / "imported", device="cpu")
    saved(base.module, tmp_path / "base", CheckpointConfig(load=str(tmp_path / "imported")))
    for number, path in enumerate((tmp_path / "imported", tmp_path / "base")):
        words = ["convert", str(tmp_path / "adapter"), str(tmp_path / f"run {number}"), "--convert-base", str(path)]
        if kind != "IA3Config":
            assert main(words) == 2
            assert "multipliers of granite" in capsys.readouterr().err
            continue
        assert main(words) == 0
        tokens = random_tokens(2, 11)
        with torch.no_grad():
            expected = tuned(input_ids=tokens).logits
        require_close(logits_of(load_model(tmp_path / f"run {number}", device="cpu").module, tokens), expected)


def test_tensors_of_other_layers_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    tuned_run(tmp_path, random_model(config_of("llama"), RetroConfig()), METHODS["lora"])
    converted(tmp_path / "tuned", tmp_path / "adapter", "--convert-to", "peft")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.lora_A.weight": torch.ones(2, 2)}, path)
    assert main(["convert", str(path.parent), str(tmp_path / "run"), "--convert-base", str(tmp_path / "base")]) == 2
    assert "tunes what has no counterpart here" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "ia3"])
@pytest.mark.parametrize("kind", ["gpt", "retro"])
def test_merged_by_the_verb_is_the_tuned_model(tmp_path: Path, method: str, kind: str) -> None:
    """As a checkpoint of ours, and (where there is a family) as theirs: no weight is off by more than its rounding."""
    import transformers

    parts = ("decoder",) if kind == "gpt" else ("decoder", "encoder", "cross-attention")
    config = PeftConfig(
        **{**vars(METHODS[method]), "peft_parts": parts, "lora_targets": (*EVERY, "query", "key_value")}
    )
    module = random_model(config_of("llama"), RetroConfig() if kind == "gpt" else tiny_retro())
    tuned_run(tmp_path, module, config)
    assert all(any(True for _ in part_modules(module, part)) for part in parts)
    converted(tmp_path / "tuned", tmp_path / "whole", "--convert-merge")
    whole = load_model(tmp_path / "whole", device="cpu").module
    tokens, neighbors = random_tokens(2, 16), None if kind == "gpt" else random_neighbors(2, 4)
    with torch.no_grad():
        expected = module.double()(tokens, neighbors)
        merge(module, config)
        for name, value in whole.named_parameters():
            rows = 61 if "word" in name or name == "output.weight" else None  # the rest is padding
            torch.testing.assert_close(value[:rows].double(), module.get_parameter(name)[:rows], atol=5e-7, rtol=3e-7)
        require_close(whole.double()(tokens, neighbors), expected)
    assert sorted(dict(whole.named_parameters())) == sorted(parameter_shapes(module.model, module.retro))
    if kind == "gpt":
        converted(tmp_path / "tuned", tmp_path / "theirs", "--convert-to", "huggingface", "--convert-merge")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs").double()
        with torch.no_grad():
            require_close(theirs(tokens).logits, expected)


@pytest.mark.parametrize(
    ("method", "flags", "named"),
    [
        ("adapter", ["--convert-merge"], "cannot be merged exactly"),
        ("p-tuning", ["--convert-merge"], "cannot be merged exactly"),
        ("adapter", ["--convert-to", "peft"], "nothing that peft has a form for"),
        ("lora", ["--convert-to", "huggingface"], "give --convert-merge, or --convert-to peft"),
        ("lora", ["--convert-to", "peft", "--convert-merge"], "exclude each other"),
        ("lora", ["--convert-base", "base"], "holds no adapter_config.json"),
        (None, ["--convert-merge"], "nothing to merge"),
        (None, ["--convert-to", "peft"], "nothing that peft has a form for"),
    ],
)
def test_impossible_conversions_are_named(
    tmp_path: Path, method: str | None, flags: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned_run(tmp_path, random_model(config_of("llama"), RetroConfig()), METHODS[method or "lora"])
    source = tmp_path / ("tuned" if method else "base")
    assert main(["convert", str(source), str(tmp_path / "out"), *flags]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_parts_that_no_decoder_of_theirs_has_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = PeftConfig(peft_method="lora", lora_rank=2, peft_parts=("decoder", "encoder"))
    tuned_run(tmp_path, random_model(config_of("llama"), tiny_retro()), config)
    words = ["convert", str(tmp_path / "tuned"), str(tmp_path / "adapter"), "--convert-to", "peft"]
    assert main(words) == 2
    assert "tunes parts that no Hugging Face decoder has" in capsys.readouterr().err
    assert main([*words, "--convert-decoder-only"]) == 0
