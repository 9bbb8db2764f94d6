"""Rotary fields of a Hugging Face `config.json`: which there are, what some kinds may say, and how ours are written."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from megatron_retro.config.model import ModelConfig
from megatron_retro.ops.rotary import YARN_TURNS, yarn_amplitude
from megatron_retro.runtime.console import warn

ROPE_FIELDS = {
    "rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor", "attention_factor", "beta_fast", "beta_slow",
}  # fmt: skip
ROPE_NEEDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "dynamic": ("factor",),
}


def yarn_problems(kind: str, numbers: Mapping[str, Any], outside: Any) -> Iterator[str]:
    """YaRN as it was published; transformers prefers an original length that stands `outside` of rope's fields."""
    wanted: dict[str, float] = {}
    if kind == "yarn":
        wanted = dict(zip(("beta_fast", "beta_slow"), YARN_TURNS, strict=True))
        wanted["attention_factor"] = yarn_amplitude(float(numbers["factor"]))
        if outside not in (None, numbers["original_max_position_embeddings"]):
            yield f"original_max_position_embeddings = {outside!r} beside another in rope's fields"
    for name in ("attention_factor", "beta_fast", "beta_slow"):
        value, only = numbers[name], wanted.get(name)
        if value is not None and (only is None or abs(value - only) > 1e-6):
            yield f"rope: {name} = {value!r}: only {only!r} is understood"


def dynamic_problems(kind: str, originals: Sequence[Any], longest: int) -> Iterator[str]:
    """Dynamic rope is plain up to `longest` positions, where texts end here; from another length it would not be."""
    for original in originals if kind == "dynamic" else ():
        if original not in (None, longest):
            yield f"original_max_position_embeddings = {original!r}: only {longest} is understood in dynamic rope"


def written_rope(model: ModelConfig, *, partial: bool) -> dict[str, Any]:
    """Both spellings: `rope_parameters` is read by transformers 5, the others by 4."""
    scaling: dict[str, Any] = {}
    if model.rope_scaling_type == "interpolated":
        warn_of_rounding(model, "linear", "transformers")
    if model.rope_scaling_type != "none":
        kind = "linear" if model.rope_scaling_type == "interpolated" else model.rope_scaling_type
        scaling = {"rope_type": kind, "factor": model.rope_scaling_factor}
    if model.rope_scaling_type == "llama3":
        scaling |= {
            "low_freq_factor": model.rope_scaling_low_freq_factor,
            "high_freq_factor": model.rope_scaling_high_freq_factor,
        }
    if model.rope_scaling_type in ("llama3", "yarn"):
        scaling["original_max_position_embeddings"] = model.rope_scaling_original_max_positions
    rotated = {"partial_rotary_factor": model.rotary_percent} if partial else {}
    return {
        "rope_theta": model.rotary_base,
        **rotated,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base, **rotated, **scaling},
    } | ({"rope_scaling": scaling} if scaling else {})


def stretching(factor: float) -> str:
    """Megatron divides positions; by a power of two that is the same as dividing frequencies, rounding included."""
    if factor == 1:
        return "none"
    return "linear" if math.frexp(factor)[0] == 0.5 else "interpolated"


def warn_of_rounding(model: ModelConfig, theirs: str, where: str) -> None:
    """A model of one kind of stretching goes where there is the other alone."""
    if stretching(model.rope_scaling_factor) != "linear":
        warn(
            f"positions are {theirs} by {model.rope_scaling_factor:g} in {where}, {model.rope_scaling_type} here: the "
            "same angles, rounded otherwise in float32 (logits differ by some 1e-8 in short texts, more in long ones)"
        )


def written_ropes_by_layer(model: ModelConfig, *, local_base: bool) -> dict[str, Any]:
    """The same of a family whose windowed layers may have a base of their own (for transformers 4: `local_base`)."""
    full = written_rope(model, partial=False)
    plain = model.rotary_base_local if model.rotary_base_local is not None else model.rotary_base
    local = {"rope_type": "default", "rope_theta": plain}
    for_4 = {"rope_local_base_freq": plain} if local_base else {}
    alike = model.rotary_base_local is None and model.rope_scaling_type != "none"
    by_layer = {
        "full_attention": full["rope_parameters"],
        "sliding_attention": full["rope_parameters"] if alike else local,
    }
    if alike or (plain != model.rotary_base and not local_base):
        return {"rope_parameters": by_layer}
    return {**full, "rope_parameters": by_layer, **for_4}
