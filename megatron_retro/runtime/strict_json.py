"""JSON that every reader takes, and frozen dataclasses written to it and read back.

JSON has no NaN and no infinity: a number that is not finite is written as null, and null, where a number belongs, is
read as NaN. All JSON of the package is written through here, or refuses such numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

Kind = TypeVar("Kind")
Decoder = Callable[[Any], Any]


def json_text(value: Any, **style: Any) -> str:
    """`json.dumps` with null for every number that is not finite."""
    try:
        return json.dumps(value, allow_nan=False, **style)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **style)


def number_of(value: float | str | None) -> float:
    """A number that was read from JSON; text is how logs used to spell what is not finite."""
    return math.nan if value is None else float(value)


def to_plain(value: Any) -> Any:
    """Dictionaries, lists and scalars instead of dataclasses; a class with `to_json` decides for itself."""
    if hasattr(value, "to_json"):
        return value.to_json()
    if is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: type[Kind], value: Any) -> Kind:
    """The dataclass that `to_plain` took apart. Unknown fields are passed over, absent ones take their defaults; raises
    `TypeError`, `ValueError`, `KeyError` or `AttributeError` where the value has another form.
    """
    return cast(Kind, _decoder(cast(Any, kind))(value))


@cache
def _decoder(kind: Any) -> Decoder:
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is float:
        return number_of
    if hasattr(kind, "from_json"):
        return cast(Decoder, kind.from_json)
    if is_dataclass(kind):
        return _dataclass_decoder(kind)
    if origin in (Union, UnionType):
        present = _decoder(next(one for one in arguments if one is not NoneType))
        return lambda value: None if value is None else present(value)
    if origin in (tuple, list, Sequence):
        item = _decoder(arguments[0])
        return lambda values: tuple(map(item, values))
    if origin in (dict, Mapping):
        item = _decoder(arguments[1])
        return lambda values: {key: item(value) for key, value in values.items()}
    return lambda value: value


def _dataclass_decoder(kind: Any) -> Decoder:
    hints = get_type_hints(kind)
    decoders = {field.name: _decoder(hints[field.name]) for field in fields(kind)}

    def decode(values: Mapping[str, Any]) -> Any:
        return kind(**{name: decoder(values[name]) for name, decoder in decoders.items() if name in values})

    return decode


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
