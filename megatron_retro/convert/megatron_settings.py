"""The arguments of a Megatron-LM run as our settings, or a refusal that names every argument without one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.convert.megatron_arguments import argument_problems
from megatron_retro.convert.rope_settings import stretching
from megatron_retro.errors import ArtifactError

DECODER = "language_model.encoder.layers."
_RETRIEVER = re.compile(re.escape(DECODER) + r"(\d+)\.retriever\.layers\.(\d+)\.")
_READS = re.compile(re.escape(DECODER) + r"(\d+)\.inter_attention\.")
_ROTARY_BASE = 10000.0  # whatever the arguments say, the older code uses this one
_TRUE_ONLY_IN_CORE = ("rotary_interleaved", "use_rope_scaling", "qk_layernorm")


class Arguments:
    """The arguments of a run: None is not given, a missing one has its default or is an error."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values

    def __call__(self, name: str, *default: Any) -> Any:
        if name not in self.values and not default:
            raise ArtifactError(
                f"the checkpoint's arguments lack {name}", fix="it is no training checkpoint of Megatron-LM"
            )
        value = self.values.get(name)
        return default[0] if value is None and default else value


def require_representable(
    arguments: Mapping[str, Any], more: Iterator[str] | Sequence[str], known_neutral: Collection[str]
) -> None:
    """Refuse a run whose model computes what ours cannot."""
    problems = [*argument_problems(arguments, known_neutral), *more]
    if problems:
        raise ArtifactError(
            "the checkpoint's arguments describe a model that cannot be represented",
            got="; ".join(problems),
            fix="an argument of your own code that leaves the function alone is passed over with "
            "--convert-neutral-arguments NAME ...",
        )


def decoder_settings(given: Arguments, vocabulary: int, *, legacy: bool) -> ModelConfig:
    """The decoder of either code."""
    grouped_queries = bool(given("group_query_attention", False))
    bias = bool(given("add_bias_linear", True))
    stretched = given("rotary_seq_len_interpolation_factor", None)
    scaled = bool(given("use_rope_scaling", False))
    gelu = not given("swiglu", False) and not given("squared_relu", False)
    return ModelConfig(
        num_layers=given("num_layers"),
        hidden_size=given("hidden_size"),
        ffn_hidden_size=given("ffn_hidden_size"),
        num_attention_heads=given("num_attention_heads"),
        group_query_attention=grouped_queries,
        num_query_groups=given("num_query_groups", None) if grouped_queries else None,
        kv_channels=given("kv_channels", None),
        max_position_embeddings=given("max_position_embeddings"),
        position_embedding_type=_positions(given),
        rotary_percent=float(given("rotary_percent", 1.0)),
        rotary_base=_ROTARY_BASE if legacy else float(given("rotary_base", _ROTARY_BASE)),
        rotary_interleaved=bool(given("rotary_interleaved", False)),
        rope_scaling_type="llama3" if scaled else stretching(float(stretched or 1.0)),
        rope_scaling_factor=float(given("rope_scaling_factor", 8.0) if scaled else stretched or 1.0),
        normalization=given("normalization", "LayerNorm"),
        apply_layernorm_1p=bool(given("apply_layernorm_1p", False)),
        norm_epsilon=float(given("norm_epsilon", given("layernorm_epsilon", 1e-5))),
        qk_layernorm=bool(given("qk_layernorm", False)),
        swiglu=bool(given("swiglu", False)),
        squared_relu=bool(given("squared_relu", False)),
        gelu_tanh=gelu and bool(given("openai_gelu", False) or (bias and given("bias_gelu_fusion", True))),
        disable_bias_linear=not bias,
        add_qkv_bias=bool(given("add_qkv_bias", False)),
        untie_embeddings_and_output_weights=bool(given("untie_embeddings_and_output_weights", False)),
        vocab_size=vocabulary,
        make_vocab_size_divisible_by=1,
    )


def _positions(given: Arguments) -> str:
    """Older runs say it with two switches, the oldest of which removes the learned table."""
    if given("use_rotary_position_embeddings", False):
        return "rope"
    named: str = given("position_embedding_type", "learned_absolute")
    return "none" if named == "learned_absolute" and not given("add_position_embedding", True) else named


def legacy_settings(
    arguments: Mapping[str, Any], names: Sequence[str], vocabulary: int, known_neutral: Collection[str] = ()
) -> tuple[ModelConfig, RetroConfig]:
    """Settings of the older code's model; the retrieval layers are those with a cross-attention."""
    given = Arguments(arguments)
    reading = sorted({int(found[1]) for name in names if (found := _READS.match(name))})
    encoder_layers = {int(found[2]) for name in names if (found := _RETRIEVER.match(name))}
    require_representable(arguments, _legacy_problems(given, bool(reading)), known_neutral)
    model = decoder_settings(given, vocabulary, legacy=True)
    if not reading:
        return model, RetroConfig()
    retro = RetroConfig(
        retro_add_retriever=True,
        retro_layers=tuple(index + 1 for index in reading),
        retro_encoder_layers=len(encoder_layers),
        retro_chunk_length=given("retro_gpt_chunk_length", given("retro_chunk_length", 64)),
        retro_num_neighbors=given("retro_num_neighbors", 2),
        retro_num_retrieved_chunks=given("retro_num_retrieved_chunks", 2),
        retro_neighbor_positions="none",
        retro_attention_gate=float(given("retro_attention_gate", 1.0)),
        retro_legacy_checkpoint=True,
    )
    return model, retro


def _legacy_problems(given: Arguments, reads: bool) -> Iterator[str]:
    """What the older code makes of settings in a way that is not ours."""
    yield from common_problems(given)
    for name in _TRUE_ONLY_IN_CORE:
        if given(name, False):
            yield f"{name} = True, which the older code follows in part or not at all (expected False)"
    if given("openai_gelu", False) and (given("swiglu", False) or given("squared_relu", False)):
        yield "openai_gelu = True beside another activation (expected one)"
    if reads and _positions(given) == "learned_absolute":
        yield "position_embedding_type = 'learned_absolute' in a Retro, whose neighbours then have positions too"
    if reads and given("retro_encoder_layers", 2) < 1:
        yield "retro_encoder_layers of less than 1"


def common_problems(given: Arguments) -> Iterator[str]:
    """What neither code's model can be represented with, beyond single values."""
    positions = _positions(given)
    if positions not in ("rope", "learned_absolute", "none"):
        yield f"position_embedding_type = {positions!r} (expected rope, learned_absolute or none)"
    if given("use_rope_scaling", False) and given("rotary_seq_len_interpolation_factor", None) not in (None, 1):
        yield "use_rope_scaling and rotary_seq_len_interpolation_factor together (expected one)"
