"""How a configuration field is declared: default, help, choices, and whose flag it is.

Sections are frozen dataclasses whose every field comes from `option`. Supported types: `bool`, `int`,
`float`, `str`, `T | None`, `tuple[T, ...]`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

SectionType = TypeVar("SectionType")


def option(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] | None = None,
    ours: bool = False,
    minimum: float | None = None,
    maximum: float | None = None,
    megatron_name: str | None = None,
    former_table: str | None = None,
) -> Any:
    """A field. `ours` marks a flag that Megatron does not have; one that it spells differently is known by both names.

    Bounds are inclusive. Recipes may still set it in `former_table`, where it was before.
    """
    metadata = {
        "help": help,
        "choices": tuple(choices) if choices else None,
        "ours": ours,
        "minimum": minimum,
        "maximum": maximum,
        "megatron_name": megatron_name,
        "former_table": former_table,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class FieldSpec:
    """One field as the command line and the TOML reader see it."""

    name: str
    kind: type
    repeated: bool
    optional: bool
    default: Any
    help: str
    choices: tuple[str, ...] | None
    ours: bool
    minimum: float | None
    maximum: float | None
    megatron_name: str | None
    former_table: str | None

    @property
    def flag(self) -> str:
        """The spelling on the command line."""
        return "--" + self.name.replace("_", "-")

    @property
    def spellings(self) -> tuple[str, ...]:
        """All that the command line takes for it."""
        others = () if self.megatron_name is None else ("--" + self.megatron_name.replace("_", "-"),)
        return (self.flag, *others)

    def expected(self) -> str:
        """What a legal value looks like, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[self.kind]
        bounds = [
            f"at least {self.minimum:g}" if self.minimum is not None else "",
            f"at most {self.maximum:g}" if self.maximum is not None else "",
        ]
        bound = " and ".join(text for text in bounds if text)
        words = f"{words} of {bound}" if bound else words
        return f"a list, each {words}" if self.repeated else words

    def problem(self, value: Any) -> str | None:
        """Why `value` cannot be this field's value, or None if it can."""
        if value is None:
            return None if self.optional else self.expected()
        values = value if self.repeated else (value,)
        if self.repeated and not isinstance(value, (list, tuple)):
            return self.expected()
        legal = all(self._accepts(item) for item in values)
        return None if legal else self.expected()

    def _accepts(self, item: Any) -> bool:
        number_for_float = self.kind is float and type(item) is int
        if type(item) is not self.kind and not number_for_float:
            return False
        if self.choices and item not in self.choices:
            return False
        if isinstance(item, str):
            return True
        if isinstance(item, float) and not math.isfinite(item):
            return False
        above = self.minimum is None or item >= self.minimum
        return above and (self.maximum is None or item <= self.maximum)

    def converted(self, value: Any) -> Any:
        """`value` in the field's own type (a list becomes a tuple, a whole number a float)."""
        if value is None:
            return None
        if self.repeated:
            return tuple(self.kind(item) for item in value)
        return self.kind(value)


@cache
def field_specs(section: type) -> tuple[FieldSpec, ...]:
    """The fields of a section, in order."""
    hints = typing.get_type_hints(section)
    return tuple(_spec(field, hints[field.name]) for field in dataclasses.fields(section))


def _spec(field: dataclasses.Field[Any], hint: Any) -> FieldSpec:
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    inner = next(member for member in members if member is not type(None))
    repeated = typing.get_origin(inner) is tuple
    kind = typing.get_args(inner)[0] if repeated else inner
    return FieldSpec(
        name=field.name,
        kind=kind,
        repeated=repeated,
        optional=type(None) in members,
        default=field.default,
        **field.metadata,
    )
