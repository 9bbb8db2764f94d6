"""`config.json` of a Hugging Face decoder -> our settings, nothing understood by half."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_retro.config.model import ModelConfig
from megatron_retro.config.toml_files import nearest
from megatron_retro.convert.families import (
    FAMILIES,
    GPT2,
    OLMO3,
    SMOLLM3,
    WINDOW_FAMILIES,
    Family,
    activation_field,
    rotated_layers,
    with_multipliers,
)
from megatron_retro.convert.harmless_settings import leaves_the_function
from megatron_retro.convert.rope_settings import ROPE_FIELDS, ROPE_NEEDS, dynamic_problems, yarn_problems
from megatron_retro.errors import ConfigError

_FULL, _SLIDING = "full_attention", "sliding_attention"
_OLMO3_BASE = 500000.0
_ORIGINAL = "original_max_position_embeddings"
_EVERY_FOURTH = 4  # SmolLM3's layers without rotary positions, where a file does not say
_BIAS_FIELDS = {"attention_bias", "mlp_bias", "use_qkv_bias"}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that a `config.json` names."""
    model_type = str(config.get("model_type"))
    if model_type not in FAMILIES:
        raise ConfigError(
            f"models of type {model_type!r} cannot be imported{nearest(model_type, FAMILIES)}",
            expected=", ".join(FAMILIES),
        )
    return with_multipliers(FAMILIES[model_type], config)


def model_from_hugging_face(config: Mapping[str, Any]) -> ModelConfig:
    """Our settings of the same function; what is not understood is refused, all of it in one message."""
    family = family_of(config)
    reader = _Reader(family, config)
    model = reader.model()
    if reader.problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(reader.problems, 1))
        raise ConfigError(f"this {family.model_type} model cannot be imported:\n{listed}")
    return model


# Beyond what any model has; a number above it is damage, or meant to fill the memory.
_LARGEST_NUMBER = 1 << 30
_LARGEST = dict.fromkeys(("num_hidden_layers", "n_layer"), 10_000) | dict.fromkeys(("hidden_size", "n_embd"), 1 << 20)


class _Reader:
    """Reads fields of one file and remembers which were never asked for."""

    def __init__(self, family: Family, config: Mapping[str, Any]) -> None:
        self.family, self.config = family, config
        self.problems: list[str] = []
        self._asked: set[str] = set()

    def field(self, name: str, default: Any = None) -> Any:
        """A field, or what the family has where the file leaves it out."""
        self._asked.add(name)
        return self.config.get(name, self.family.defaults.get(name, default))

    def model(self) -> ModelConfig:
        """Everything; problems are collected."""
        values: dict[str, Any] = {**self.family.fixed}
        for ours, theirs in self.family.names.items():
            values[ours] = self._number(theirs, self.field(theirs), whole=ours != "norm_epsilon")
            if values[ours] is None and theirs != "n_inner":
                self.problems.append(f"{theirs} is missing")
        for name, default in self.family.multipliers.items():
            self._number(name, self.field(name, default))
        heads = {} if self.problems else self._heads(values)
        if self.problems:
            return ModelConfig()
        values |= heads | self._activation() | self._rope() | self._unrotated(values) | self._window(values)
        values |= self._biases()
        tied = self.field("tie_word_embeddings", False)
        values["untie_embeddings_and_output_weights"] = not tied or bool(self.family.multipliers)
        self._check_rotated(ModelConfig(**values))
        for name, only in self.family.must_be.items():
            if self.field(name, only) != only:
                self.problems.append(f"{name} = {self.config[name]!r}: only {only!r} is understood")
        for name in sorted(set(self.config) - self._asked):
            if not leaves_the_function(name, self.config[name]):
                self.problems.append(f"{name} = {self.config[name]!r} is not understood")
        return ModelConfig(**values)

    def _number(self, name: str, value: Any, *, whole: bool = False) -> Any:
        """A number above zero, or None where there is none; anything else is a problem."""
        kinds = (int,) if whole else (int, float)
        if value is None or (isinstance(value, kinds) and not isinstance(value, bool) and value > 0):
            if value is None or not whole or value <= _LARGEST.get(name, _LARGEST_NUMBER):
                return value
            self.problems.append(f"{name} = {value}: expected at most {_LARGEST.get(name, _LARGEST_NUMBER):,}")
            return 1
        self.problems.append(f"{name} = {value!r}: expected a {'whole ' if whole else ''}number above 0")
        return 1

    def _table(self, name: str) -> dict[str, Any]:
        """A field that holds fields of its own."""
        value = self.field(name) or {}
        if isinstance(value, Mapping):
            return dict(value)
        self.problems.append(f"{name} = {value!r}: expected an object")
        return {}

    def _heads(self, values: Mapping[str, Any]) -> dict[str, Any]:
        heads, width = values["num_attention_heads"], values["hidden_size"]
        if "query_pre_attn_scalar" in self.family.defaults:  # which the tensors' rules read
            self._number("query_pre_attn_scalar", self.field("query_pre_attn_scalar"))
        names = ("head_dim", "num_key_value_heads") if self.family is not GPT2 else ()
        size, groups = [self._number(name, self.field(name), whole=True) for name in names] or (None, None)
        groups = heads if groups is None else groups
        return {
            "kv_channels": None if size in (None, width // heads) and width % heads == 0 else size,
            "group_query_attention": groups != heads,
            "num_query_groups": groups if groups != heads else None,
        }

    def _activation(self) -> dict[str, Any]:
        field = activation_field(self.family)
        default = next(iter(self.family.activations))
        name = self.field(field, default)
        if name not in self.family.activations:
            self.problems.append(f"{field} = {name!r}: expected {' or '.join(self.family.activations)}")
            return {}
        return dict(self.family.activations[name])

    def _rope(self) -> dict[str, Any]:
        if self.family is GPT2:
            return {}
        old, new = self._table("rope_scaling"), self._table("rope_parameters")
        if self.family.full_every is not None:
            return self._ropes_by_layer(old, new)
        if old and new and old != new:
            self.problems.append(f"rope_scaling = {old!r} beside rope_parameters = {new!r}: give one of them")
        return self._rope_of({"rope_theta": self.field("rope_theta", 10000.0), **old, **new})

    def _ropes_by_layer(self, old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        """Full layers have the rescaled positions; the base of windowed ones is another, or the same as it is."""
        theta = self.field("rope_theta")
        local_theta = self.field("rope_local_base_freq") if "rope_local_base_freq" in self.family.defaults else theta
        wrong = sorted(kind for kind in new if kind not in (_FULL, _SLIDING) or not isinstance(new[kind], Mapping))
        if wrong:
            self.problems.append(f"rope_parameters: {', '.join(wrong)}: expected objects {_FULL} and {_SLIDING}")
            return {}
        given = [dict(new.get(kind, {})) for kind in (_FULL, _SLIDING)]
        full, local = {"rope_theta": theta, **given[0], **old}, {"rope_theta": local_theta, **given[1]}
        if self.family is OLMO3 and theta != _OLMO3_BASE and not all("rope_theta" in rope for rope in given):
            self.problems.append(
                f"rope_theta = {theta!r}: which base windowed layers get depends on transformers' version unless it is "
                f"{_OLMO3_BASE}; give rope_parameters for {_FULL} and {_SLIDING}"
            )
        values, others = self._rope_of(full), self._rope_of(local)
        if others == values or self.problems:
            return values
        if others["rope_scaling_type"] != "none":
            self.problems.append(f"rope: {_SLIDING} is rescaled otherwise than {_FULL}: only as it is, or alike")
        return {**values, "rotary_base_local": others["rotary_base"]}

    def _rope_of(self, rope: dict[str, Any]) -> dict[str, Any]:
        rope.setdefault("partial_rotary_factor", self.field("partial_rotary_factor", 1.0))
        kind = rope.get("rope_type", rope.get("type", "default"))
        unknown = sorted(set(rope) - ROPE_FIELDS)
        self.problems += [f"rope: {name} = {rope[name]!r} is not understood" for name in unknown]
        if kind not in ROPE_NEEDS:
            self.problems.append(f"rope type {kind!r}: expected {', '.join(ROPE_NEEDS)}")
            return {}
        numbers = {name: self._number(f"rope: {name}", rope.get(name)) for name in ROPE_FIELDS - {"rope_type", "type"}}
        missing = [name for name in ("rope_theta", *ROPE_NEEDS[kind]) if numbers[name] is None]
        self.problems += [f"rope: {name} is missing, which {kind} needs" for name in missing]
        if missing:
            return {}
        values = {
            "rotary_base": float(numbers["rope_theta"]),
            "rotary_percent": float(numbers["partial_rotary_factor"] or 1.0),
            "rope_scaling_type": "none" if kind == "default" else kind,
            "rope_scaling_factor": float(numbers["factor"] or 1.0),
        }
        if kind == "llama3":
            values |= {
                "rope_scaling_low_freq_factor": float(numbers["low_freq_factor"]),
                "rope_scaling_high_freq_factor": float(numbers["high_freq_factor"]),
            }
        if kind in ("llama3", "yarn"):
            values["rope_scaling_original_max_positions"] = int(numbers[_ORIGINAL])
        inside, outside = (table.get(_ORIGINAL) for table in (numbers, self.config))
        self.problems += yarn_problems(kind, numbers, outside)
        self.problems += dynamic_problems(kind, (inside, outside), self.field("max_position_embeddings"))
        return values

    def _unrotated(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """SmolLM3's layers without rotary positions: every N-th, or none."""
        if self.family is not SMOLLM3:
            return {}
        layers = values["num_layers"]
        interval = self._number(
            "no_rope_layer_interval", self.field("no_rope_layer_interval", _EVERY_FOURTH), whole=True
        )
        kinds = self.field("no_rope_layers") or rotated_layers(layers, interval)
        freq = kinds.index(0) + 1 if 0 in kinds else None
        if kinds != rotated_layers(layers, freq) or freq == 1:
            self.problems.append(f"no_rope_layers = {kinds!r}: only every N-th layer (N of at least 2) is understood")
            return {}
        return {"no_rope_freq": freq}

    def _check_rotated(self, model: ModelConfig) -> None:
        rotated = int(model.head_size() * model.rotary_percent)
        if rotated % 2:
            self.problems.append(f"partial_rotary_factor turns {rotated} dimensions of a head: expected an even number")

    def _window(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if self.family is SMOLLM3:
            kinds, _ = self.field("layer_types") or [], self.field("sliding_window")  # which nothing reads alone
            if set(kinds) - {"full_attention"}:
                self.problems.append(f"layer_types = {kinds!r}: only full_attention is understood in this family")
            return {}
        if self.family.model_type not in WINDOW_FAMILIES:
            if self.field("sliding_window") is not None:
                self.problems.append("sliding_window: transformers passes it over in this family; remove it")
            return {}
        layers, used = values["num_layers"], self.field("use_sliding_window") is not False
        window = self._number("sliding_window", self.field("sliding_window"), whole=True)
        kinds = self._kinds_of_layers(layers)
        if any(kind not in (_FULL, _SLIDING) for kind in kinds) or len(kinds) != layers:
            self.problems.append(f"layer_types = {kinds!r}: expected {_FULL} or {_SLIDING} for each of {layers} layers")
        full = tuple(number for number, kind in enumerate(kinds, 1) if kind == _FULL)
        if len(full) < layers and self.family.full_every is not None and window is None:
            self.problems.append("sliding_window is missing, which layers have")
        if window is None or not used or len(full) == layers:
            return {"sliding_window": None, "rotary_base_local": None}
        return {"sliding_window": window, "full_attention_layers": full or None}

    def _kinds_of_layers(self, layers: int) -> list[Any]:
        """As the file lists them, or as its family has them."""
        listed, first, every = self.field("layer_types"), self.field("max_window_layers"), self.family.full_every
        if "sliding_window_pattern" in self.family.defaults:
            every = self._number("sliding_window_pattern", self.field("sliding_window_pattern"), whole=True)
        if isinstance(listed, list):
            return listed
        if every is not None:
            return [_SLIDING if number % every else _FULL for number in range(1, layers + 1)]
        if first is not None and (not isinstance(first, int) or first < 0):
            self.problems.append(f"max_window_layers = {first!r}: expected a whole number")
            return [_FULL] * layers
        num_full = min(first or 0, layers)
        return [_FULL] * num_full + [_SLIDING] * (layers - num_full)

    def _biases(self) -> dict[str, Any]:
        if self.family is GPT2:
            return {}
        biases = {name: bool(self.field(name, False)) for name in _BIAS_FIELDS if name not in self.family.must_be}
        attention, mlp = biases.get("attention_bias", False), biases.get("mlp_bias", False)
        if attention != mlp:
            self.problems.append(f"attention_bias = {attention} with mlp_bias = {mlp}: only both or none is understood")
        values: dict[str, Any] = {"disable_bias_linear": not attention}
        if biases.get("use_qkv_bias"):
            values["add_qkv_bias"] = True
        return values
