"""Megatron-LM's Retro checkpoints: shards merge, the function is the one that they were trained to compute."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_retro.checkpoint.loading import load_tensors, open_checkpoint, stored_settings
from megatron_retro.config.data import TokenizerConfig
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.checkpoint_files import parameter_names, read_parameter
from megatron_retro.convert.megatron_arguments import REFUSED, REPRESENTED, argument_problems, is_neutral
from megatron_retro.convert.megatron_import import import_megatron
from megatron_retro.convert.megatron_settings import legacy_settings
from megatron_retro.errors import ArtifactError, MegatronRetroError
from megatron_retro.microbatch import Neighbors
from megatron_retro.model.retro import Retro
from megatron_retro.testing.legacy_retro import LegacyRetro
from tests.convert.legacy_checkpoints import ARGUMENTS, CHUNK, VOCABULARY, whole_tensors, written

DATA = Path(__file__).parent / "data"
BYTES = TokenizerConfig()
TRAINED: dict[str, Any] = {"iteration": 10, "consumed_train_samples": 60, "seq_length": 16}
BIASED = {"swiglu": False, "add_bias_linear": True}
# configurations of the older code that can be represented: a Retro's layers with a cross-attention, or none; arguments
CONFIGURATIONS: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "published": ((1, 3), {}),
    "plain LayerNorm": ((1, 3), {"apply_layernorm_1p": False}),
    "RMSNorm": ((1, 3), {"normalization": "RMSNorm", "apply_layernorm_1p": False}),
    "epsilon": ((1,), {"norm_epsilon": 1e-3}),
    "GELU": ((1, 3), {"swiglu": False}),
    "squared ReLU": ((0, 2, 3), {"swiglu": False, "squared_relu": True}),
    "rotary on all": ((1, 3), {"rotary_percent": 1.0}),
    "stretched": ((1, 3), {"rotary_seq_len_interpolation_factor": 4}),
    "stretched by no power of two": ((1, 3), {"rotary_seq_len_interpolation_factor": 3}),
    "no positions": ((1, 3), {"use_rotary_position_embeddings": False, "position_embedding_type": "none"}),
    "tied": ((1, 3), {"untie_embeddings_and_output_weights": False}),
    "GPT": ((), {}),
    "GPT, groups": ((), {"group_query_attention": True, "num_query_groups": 2}),
    "GPT, biases": ((), BIASED),
    "GPT, biases, fused GELU": ((), {**BIASED, "bias_gelu_fusion": True}),
    "GPT, biases, OpenAI's GELU": ((), {**BIASED, "openai_gelu": True}),
    "GPT, biases, gated": ((), {"add_bias_linear": True}),
    "GPT, learned positions, tied": (
        (),
        {
            **BIASED,
            "use_rotary_position_embeddings": False,
            "position_embedding_type": "learned_absolute",
            "untie_embeddings_and_output_weights": False,
        },
    ),
}


def imported(folder: Path, run: Path, say: Callable[[str], None] = lambda text: None) -> Retro:
    import_megatron(folder, run, BYTES, say)
    checkpoint = open_checkpoint(run)
    settings = stored_settings(checkpoint)
    model = Retro(settings[ModelConfig], settings[RetroConfig]).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(read_parameter(checkpoint, name))
    return model


@torch.no_grad()
def require_equal(model: Retro, slow: LegacyRetro, length: int) -> None:
    """Logits with neighbours and without, in float64. Fused GELU writes the root of 2 / pi with 8 digits."""
    close = 1e-8 if slow.arguments["bias_gelu_fusion"] else 1e-9
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, VOCABULARY, (length,), generator=generator)
    if model.retro.retro_add_retriever:
        neighbors = torch.randint(0, VOCABULARY, (-(-length // CHUNK), 2, 8), generator=generator)
        # the mask says that half is absent; the published function has no masks
        mask = torch.rand(neighbors.shape, generator=generator) < 0.5
        given = Neighbors(neighbors[None], mask[None])
        assert (model(tokens[None], given)[0] - slow.logits(tokens, neighbors)).abs().max() < close
    assert (model(tokens[None])[0] - slow.logits(tokens, None)).abs().max() < close


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_computes_what_it_was_trained_to_compute(ranks: int, tmp_path: Path) -> None:
    model = imported(written(tmp_path / "theirs", ranks), tmp_path / "run")
    assert model.retro.retro_legacy_checkpoint
    assert model.retro.retrieval_layers(4) == (2, 4)
    slow = LegacyRetro(whole_tensors(), ARGUMENTS)
    for length in (16, 14, 13, 3):
        require_equal(model, slow, length)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_every_configuration_that_comes_in_computes_the_same(name: str, tmp_path: Path) -> None:
    reading, changes = CONFIGURATIONS[name]
    tensors = whole_tensors(reading, **changes)
    model = imported(written(tmp_path / "theirs", 2, tensors=tensors, **changes), tmp_path / "run")
    assert model.retro.retro_add_retriever == bool(reading)
    require_equal(model, LegacyRetro(tensors, {**ARGUMENTS, **changes}), 14)


@pytest.mark.parametrize(
    ("stages", "chunks", "layers", "tied"), [(2, 1, 4, False), (4, 1, 4, True), (2, 2, 4, False), (2, 11, 22, True)]
)
def test_stages_and_virtual_stages_are_joined_in_their_order(
    stages: int, chunks: int, layers: int, tied: bool, tmp_path: Path
) -> None:
    """Of eleven parts `model10` is the last; tied embeddings are repeated in the last stage."""
    changes = {"num_layers": layers, "untie_embeddings_and_output_weights": not tied}
    tensors = whole_tensors((), **changes)
    theirs = written(tmp_path / "theirs", 1, stages, chunks, tensors, **changes)
    require_equal(imported(theirs, tmp_path / "run"), LegacyRetro(tensors, {**ARGUMENTS, **changes}), 6)


def test_a_retro_over_stages_is_joined(tmp_path: Path) -> None:
    model = imported(written(tmp_path / "theirs", 2, 2, 2), tmp_path / "run")
    require_equal(model, LegacyRetro(whole_tensors(), ARGUMENTS), 14)


def test_says_what_it_skipped(tmp_path: Path) -> None:
    said: list[str] = []
    imported(written(tmp_path / "theirs"), tmp_path / "run", said.append)
    assert "merged: 2 tensor ranks" in said[0]
    assert all(word in said[0] for word in ("optimizer", "rng_state", "iteration"))


def test_moments_go_the_way_of_their_weights(tmp_path: Path) -> None:
    """Through parts of tensors and of pipelines; in lists of the older code, as in core's, by the model's order."""
    said: list[str] = []
    import_megatron(
        written(tmp_path / "theirs", 2, 2, 2, trained=True, **TRAINED), tmp_path / "run", BYTES, said.append
    )
    checkpoint = open_checkpoint(tmp_path / "run")
    for name in parameter_names(checkpoint):
        weight = read_parameter(checkpoint, name)
        moments = {moment: torch.empty_like(weight) for moment in ("exp_avg", "exp_avg_sq")}
        load_tensors(checkpoint, {f"optimizer.{name}.{moment}": tensor for moment, tensor in moments.items()})
        assert torch.equal(moments["exp_avg"], weight * 2) and torch.equal(moments["exp_avg_sq"], weight * weight)
    assert (checkpoint.step, checkpoint.manifest.counts["samples"]) == (10, 60)
    assert checkpoint.state["optimizer"] == {"loss_scale": {"scale": 512.0, "good_steps": 0}}
    assert "optimizer" not in said[0] and "iteration 10, 60 samples, step 10 of Adam" in said[1]


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
    unsaid = {name: value for name, value in ARGUMENTS.items() if name != "bias_gelu_fusion"}
    arguments = {**unsaid, **BIASED, **changes}
    assert legacy_settings(arguments, [], VOCABULARY)[0].gelu_tanh == tanh


def edited(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)
