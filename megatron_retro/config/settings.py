"""The sections of one run, with where each value came from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

from megatron_retro.config.fields import FieldSpec, field_specs

Section = TypeVar("Section")
DEFAULT_ORIGIN = "default"
MEGATRON_ORIGIN = "Megatron-LM's default"


class Settings:
    """`settings[ModelConfig]` is that section; `settings.origin("num_layers")` says who set the field."""

    def __init__(self, sections: Sequence[Any], origins: Mapping[str, str] | None = None) -> None:
        self._sections = {type(section): section for section in sections}
        self._origins = dict(origins or {})

    def __getitem__(self, section: type[Section]) -> Section:
        value: Section = self._sections[section]
        return value

    def __contains__(self, section: type) -> bool:
        return section in self._sections

    def has(self, *sections: type) -> bool:
        """Whether all of these sections are there."""
        return all(section in self._sections for section in sections)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._sections.values())

    def origin(self, field: str) -> str:
        """`default`, a preset, a file, or `flag`."""
        return self._origins.get(field, DEFAULT_ORIGIN)

    def origins(self) -> dict[str, str]:
        """Where every field that is not a default came from."""
        return dict(self._origins)

    def replace(self, **changes: Any) -> Settings:
        """The same settings with some fields changed, whatever section they are in."""
        sections = []
        left = dict(changes)
        for section in self:
            names = {field.name for field in dataclasses.fields(section)} & set(left)
            own = {name: left.pop(name) for name in names}
            sections.append(dataclasses.replace(section, **own) if own else section)
        if left:
            raise KeyError(f"no section here has {sorted(left)}")
        return Settings(sections, {**self._origins, **dict.fromkeys(changes, "code")})

    def values(self) -> dict[str, dict[str, Any]]:
        """Plain nested values: section name -> field -> value."""
        return {section_name(type(section)): dataclasses.asdict(section) for section in self}


def section_name(section: type) -> str:
    """`ParallelConfig` -> `parallel`, the heading in TOML files and in the help."""
    words = section.__name__.removesuffix("Config")
    return "".join("_" + letter.lower() if letter.isupper() else letter for letter in words).lstrip("_")


def specs_by_name(sections: Sequence[type]) -> dict[str, tuple[type, FieldSpec]]:
    """Every field of the given sections; a name used twice is a fault of ours."""
    found: dict[str, tuple[type, FieldSpec]] = {}
    for section in sections:
        for spec in field_specs(section):
            if spec.name in found:
                raise ValueError(f"{spec.name} is in {section.__name__} and {found[spec.name][0].__name__}")
            found[spec.name] = (section, spec)
    return found


def build_settings(sections: Sequence[type], values: Mapping[str, Any], origins: Mapping[str, str]) -> Settings:
    """Sections filled with `values` (flat: field -> value), defaults elsewhere."""
    by_section: dict[type, dict[str, Any]] = {section: {} for section in sections}
    for name, (section, spec) in specs_by_name(sections).items():
        if name in values:
            by_section[section][name] = spec.converted(values[name])
    return Settings([section(**given) for section, given in by_section.items()], origins)
