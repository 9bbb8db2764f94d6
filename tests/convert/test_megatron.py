"""Megatron-LM's Retro checkpoints: shards merge, the function is the one that they were trained to compute."""

from __future__ import annotations

import argparse
import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_retro.checkpoint.loading import open_checkpoint, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.checkpoint_files import read_parameter
from megatron_retro.convert.megatron_arguments import REFUSED, REPRESENTED, argument_problems, is_neutral
from megatron_retro.convert.megatron_import import import_megatron
from megatron_retro.convert.megatron_settings import legacy_settings
from megatron_retro.errors import ArtifactError, MegatronRetroError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.testing.legacy_retro import LegacyRetro

HEADS, HIDDEN, FFN, VOCABULARY, CHUNK = 4, 32, 24, 48, 4
ARGUMENTS = {
    "num_layers": 4,
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "kv_channels": HIDDEN // HEADS,
    "max_position_embeddings": 64,
    "use_rotary_position_embeddings": True,
    "position_embedding_type": "rope",
    "rotary_percent": 0.5,
    "normalization": "LayerNorm",
    "apply_layernorm_1p": True,
    "norm_epsilon": 1e-5,
    "swiglu": True,
    "squared_relu": False,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "retro_gpt_chunk_length": CHUNK,
    "retro_num_neighbors": 2,
    "retro_num_retrieved_chunks": 2,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
}
LAYER = "language_model.encoder.layers"
DATA = Path(__file__).parent / "data"
BYTES = TokenizerConfig()


def whole_tensors() -> dict[str, Tensor]:
    """A 4-layer Retro that reads in layers 2 and 4, as Megatron names it, before the cut."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * 0.2

    tensors = {
        "language_model.embedding.word_embeddings.weight": random(VOCABULARY, HIDDEN),
        "language_model.output_layer.weight": random(VOCABULARY, HIDDEN),
    }

    def norm(name: str) -> None:
        tensors.update({f"{name}.weight": random(HIDDEN), f"{name}.bias": random(HIDDEN)})

    def block(name: str, reads: bool) -> None:
        norm(f"{name}.input_norm")
        norm(f"{name}.post_attention_norm")
        tensors[f"{name}.self_attention.query_key_value.weight"] = random(3 * HIDDEN, HIDDEN)
        tensors[f"{name}.self_attention.dense.weight"] = random(HIDDEN, HIDDEN)
        if reads:
            norm(f"{name}.post_inter_attention_norm")
            tensors[f"{name}.inter_attention.query.weight"] = random(HIDDEN, HIDDEN)
            tensors[f"{name}.inter_attention.key_value.weight"] = random(2 * HIDDEN, HIDDEN)
            tensors[f"{name}.inter_attention.dense.weight"] = random(HIDDEN, HIDDEN)
        tensors[f"{name}.mlp.dense_h_to_4h.weight"] = random(2 * FFN, HIDDEN)
        tensors[f"{name}.mlp.dense_4h_to_h.weight"] = random(HIDDEN, FFN)

    for index in range(4):
        block(f"{LAYER}.{index}", index in (1, 3))
    for index in range(2):
        block(f"{LAYER}.1.retriever.layers.{index}", index == 0)
    norm("language_model.encoder.final_norm")
    return tensors


def cut(name: str, tensor: Tensor, ranks: int) -> list[Tensor]:
    """How Megatron's column and row parallel layers share a tensor."""
    if "dense_h_to_4h" in name:
        gate, up = tensor.chunk(2)
        return [torch.cat(pair) for pair in zip(gate.chunk(ranks), up.chunk(ranks), strict=True)]
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")):
        return list(tensor.chunk(ranks, 1))
    return [tensor] * ranks if "norm" in name else list(tensor.chunk(ranks))


def nested(flat: dict[str, Tensor]) -> dict[str, Any]:
    """As the older code saves: dictionaries down to `encoder`, flat names below."""
    model: dict[str, Any] = {"embedding": {"word_embeddings": {}}, "encoder": {}, "output_layer": {}}
    for name, tensor in flat.items():
        rest = name.removeprefix("language_model.")
        if rest.startswith("encoder."):
            model["encoder"][rest.removeprefix("encoder.")] = tensor.clone()
        elif rest.startswith("embedding."):
            model["embedding"]["word_embeddings"]["weight"] = tensor.clone()
        else:
            model["output_layer"]["weight"] = tensor.clone()
    return {"language_model": model}


def written(folder: Path, ranks: int = 2, **changes: Any) -> Path:
    tensors = whole_tensors()
    shards = {name: cut(name, tensor, ranks) for name, tensor in tensors.items()}
    arguments = {**ARGUMENTS, "tensor_model_parallel_size": ranks, **changes}
    for rank in range(ranks):
        content = {
            "args": argparse.Namespace(**arguments),
            "checkpoint_version": 3.0,
            "iteration": 10,
            "model": nested({name: parts[rank] for name, parts in shards.items()}),
            "optimizer": {"state": {0: torch.ones(3)}},
            "rng_state": [{"np_rng_state": np.random.RandomState(1).get_state()}],
        }
        place = folder / "iter_0000010" / f"mp_rank_{rank:02}"
        place.mkdir(parents=True)
        torch.save(content, place / "model_optim_rng.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("10\n")
    return folder


def imported(folder: Path, run: Path, say: Callable[[str], None] = lambda text: None) -> Retro:
    import_megatron(folder, run, BYTES, say)
    checkpoint = open_checkpoint(run)
    settings = stored_settings(checkpoint)
    model = Retro(settings[ModelConfig], settings[RetroConfig]).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_parameter(checkpoint, name))
    return model


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("length", [16, 14, 13, 3])
@torch.no_grad()
def test_computes_what_it_was_trained_to_compute(ranks: int, length: int, tmp_path: Path) -> None:
    model = imported(written(tmp_path / "theirs", ranks), tmp_path / "run")
    assert model.retro.retro_legacy_checkpoint
    assert model.retro.retrieval_layers(4) == (2, 4)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (length,), generator=generator)
    neighbors = torch.randint(0, VOCABULARY, (-(-length // CHUNK), 2, 8), generator=generator)
    slow = LegacyRetro(whole_tensors(), ARGUMENTS)
    # the mask says that half is absent; the published function has no masks
    mask = torch.rand(neighbors.shape, generator=generator) < 0.5
    given = Neighbors(neighbors.where(mask, neighbors)[None], mask[None])
    assert torch.allclose(model(tokens[None], given)[0], slow.logits(tokens, neighbors), atol=1e-6, rtol=1e-6)
    assert torch.allclose(model(tokens[None])[0], slow.logits(tokens, None), atol=1e-6, rtol=1e-6)


def test_says_what_it_skipped(tmp_path: Path) -> None:
    said: list[str] = []
    imported(written(tmp_path / "theirs"), tmp_path / "run", said.append)
    assert "merged: 2 tensor ranks" in said[0]
    assert all(word in said[0] for word in ("optimizer", "rng_state", "iteration"))


class Dangerous:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("pwned",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = written(tmp_path / "theirs")
    path = folder / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt"
    torch.save({**torch.load(path, weights_only=False), "extra": Dangerous()}, path)
    with pytest.raises(ArtifactError, match="would run code") as raised:
        import_megatron(folder, tmp_path / "run", BYTES, lambda text: None)
    assert "mkdir" in str(raised.value)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:2000]), "cannot be read"),
        (lambda path: path.parent.rename(path.parent.with_name("mp_rank_02")), "one tensor-parallel group"),
        (lambda path: edited(path, lambda content: content.update(checkpoint_version=1.0)), "older way"),
        (lambda path: edited(path, lambda content: content.pop("model")), "holds no model"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], Any], named: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs")
    damage(folder / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt")
    with pytest.raises(ArtifactError, match=named):
        import_megatron(folder, tmp_path / "run", BYTES, lambda text: None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_layers": 5}, "is missing"),
        ({"num_layers": 3}, "rising numbers from 1 to 3"),
        ({"add_bias_linear": True}, "bias is missing"),
        ({"ffn_hidden_size": 20}, "another shape"),
        ({"pipeline_model_parallel_size": 2}, "does not match its folders"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "theirs", **changes)
    with pytest.raises(MegatronRetroError, match=named):
        import_megatron(folder, tmp_path / "run", BYTES, lambda text: None)
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def facts() -> dict[str, Any]:
    """Every argument of Megatron-LM's and its default."""
    lines = (DATA / "megatron_arguments.txt").read_text(encoding="utf-8").splitlines()
    return {name: ast.literal_eval(value) for name, value in (line.split(" ", 1) for line in lines if line[0] != "#")}


def test_every_argument_of_megatron_is_represented_neutral_or_refused() -> None:
    assert len(facts()) > 600
    for name in facts():
        lists = [name in REPRESENTED, is_neutral(name), name in REFUSED]
        assert sum(lists) == 1, f"{name} is in {sum(lists)} lists"
    assert not list(argument_problems(facts()))
    for name, neutral in REFUSED.items():
        assert list(argument_problems({name: "another"})), name
        assert all(not list(argument_problems({name: value})) for value in neutral)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm = True"),
        ({"rotary_interleaved": True}, "rotary_interleaved = True"),
        ({"num_experts": 8}, "num_experts = 8"),
        ({"openai_gelu": True}, "openai_gelu = True beside"),
        ({"my_own_bias": 3}, "my_own_bias = 3 is an argument that is not known"),
        ({"use_rotary_position_embeddings": False, "position_embedding_type": "learned_absolute"}, "in a Retro"),
        ({"use_rotary_position_embeddings": False, "position_embedding_type": "relative"}, "'relative'"),
    ],
)
def test_a_setting_that_changes_the_function_is_refused_by_name(
    changes: dict[str, Any], named: str, tmp_path: Path
) -> None:
    folder = written(tmp_path / "theirs", 1, **changes)
    with pytest.raises(ArtifactError, match=named):
        import_megatron(folder, tmp_path / "run", BYTES, lambda text: None)
    assert not (tmp_path / "run").exists()


@torch.no_grad()
def test_positions_are_those_of_the_older_code(tmp_path: Path) -> None:
    """It stretches them, and ignores a base; an argument that is said to be neutral is passed over."""
    folder = written(tmp_path / "a", 1, rotary_base=500, rotary_seq_len_interpolation_factor=4, my_note="x")
    import_megatron(folder, tmp_path / "run", BYTES, lambda text: None, ["my_note"])
    model = stored_settings(open_checkpoint(tmp_path / "run"))[ModelConfig]
    assert (model.rotary_base, model.rope_scaling_type, model.rope_scaling_factor) == (10000.0, "linear", 4.0)


@pytest.mark.parametrize(
    ("changes", "tanh"),
    [({}, True), ({"bias_gelu_fusion": False}, False), ({"bias_gelu_fusion": False, "openai_gelu": True}, True)],
)
def test_which_gelu_a_run_has(changes: dict[str, Any], tanh: bool) -> None:
    arguments = {**ARGUMENTS, "swiglu": False, "add_bias_linear": True, **changes}
    assert legacy_settings(arguments, [], VOCABULARY)[0].gelu_tanh == tanh


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
