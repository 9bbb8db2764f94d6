"""Recipes on disk: TOML in, and the effective configuration out with the origin of every value.

A file has one table per section (`[model]`, `[parallel]`, ...). A key in the wrong table, a table that
does not exist and a value of the wrong type are all reported together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.config.settings import Settings, section_name, specs_by_name
from megatron_retro.errors import ConfigError

PRESETS = Path(__file__).parent / "presets"


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)`, or nothing when no known name is near."""
    matches = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean {matches[0]}?)" if matches else ""


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """The document, or an error with line and column."""
    import tomlkit
    from tomlkit.exceptions import ParseError

    try:
        return tomlkit.parse(text).unwrap()
    except ParseError as error:
        raise ConfigError(
            f"{source}, line {error.line}, column {error.col}: not valid TOML",
            got=str(error).split(" at line")[0],
            fix="correct that line; text is quoted, true and false are lower case",
        ) from None


def read_recipe(path: Path, sections: Sequence[type], all_sections: Sequence[type]) -> dict[str, Any]:
    """Flat field -> value of a recipe file.

    A recipe serves several verbs, so a key of a section that this verb does not use is fine;
    a key of no section is an error.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", got=error, fix="give the path of a TOML file") from None
    return flat_values(parse_toml(text, str(path)), str(path), sections, all_sections)


def flat_values(
    document: Mapping[str, Any], source: str, sections: Sequence[type], all_sections: Sequence[type]
) -> dict[str, Any]:
    """The values of `sections` in a parsed recipe, every fault of the whole document reported."""
    tables = {section_name(section): section for section in all_sections}
    known = specs_by_name(all_sections)
    problems: list[str] = []
    values: dict[str, Any] = {}
    for table, content in document.items():
        if table not in tables or not isinstance(content, dict):
            problems.append(f"[{table}] is no table of a recipe{nearest(table, tables)}")
            continue
        for key, value in content.items():
            section, spec = known.get(key, (None, None))
            if spec is None:
                problems.append(f"[{table}] {key} is no setting{nearest(key, known)}")
            elif section is not tables[table]:
                problems.append(f"[{table}] {key} belongs in [{section_name(section or object)}]")
            elif (expected := spec.problem(value)) is not None:
                problems.append(f"[{table}] {key} = {value!r}: expected {expected}")
            elif section in sections:
                values[key] = value
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"{source} has {len(problems)} problem(s):\n{listed}")
    return values


def preset_names() -> list[str]:
    """The names that `--preset` takes."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def preset_path(name: str) -> Path:
    """The file of a preset."""
    path = PRESETS / f"{name}.toml"
    if not path.is_file():
        raise ConfigError(
            f"there is no preset {name!r}{nearest(name, preset_names())}",
            expected=", ".join(preset_names()),
        )
    return path


def toml_value(value: Any) -> str:
    """A value as TOML writes it (JSON's spelling of text, numbers and lists is TOML's too)."""
    if isinstance(value, tuple):
        return "[" + ", ".join(toml_value(item) for item in value) + "]"
    return json.dumps(value, allow_nan=False)


def render_toml(settings: Settings) -> str:
    """The effective configuration; a field without a value is a comment."""
    lines: list[str] = []
    for section in settings:
        lines.append(f"[{section_name(type(section))}]")
        for name, value in vars(section).items():
            text = f"# {name} is not set" if value is None else f"{name} = {toml_value(value)}"
            lines.append(f"{text:<58} # {settings.origin(name)}")
        lines.append("")
    return "\n".join(lines)
