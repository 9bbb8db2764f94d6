"""Recipes on disk: TOML in, and the effective configuration out with the origin of every value.

A file has one table per section (`[model]`, `[parallel]`, ...). It may name a file to build on (`base`, relative to
itself), and hold what differs by preset (`[preset.NAME]`, with the same tables below). A key in the wrong table, a
table that does not exist and a value of the wrong type are all reported together.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from megatron_retro.config.fields import FieldSpec
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
    from tomlkit.exceptions import ParseError, TOMLKitError

    try:
        return tomlkit.parse(text).unwrap()
    except ParseError as error:
        raise ConfigError(
            f"{source}, line {error.line}, column {error.col}: not valid TOML",
            got=str(error).split(" at line")[0],
            fix="correct that line; text is quoted, true and false are lower case",
        ) from None
    except TOMLKitError as error:  # such as a key that is there twice, of which it knows no line
        raise ConfigError(f"{source}: not valid TOML", got=error, fix="give each key and table once") from None


def read_recipe(
    path: Path, sections: Sequence[type], all_sections: Sequence[type], preset: str | None = None
) -> dict[str, Any]:
    """Flat field -> value of a recipe file, over those of the file that it builds on (`base = "OTHER.toml"`).

    A recipe serves several verbs, so a key of a section that this verb does not use is fine; a key of no section is an
    error. One that has `[preset.NAME]` tables serves those presets, and no others.
    """
    files = _with_bases(path)
    sizes = files[0][1].get("preset")
    if isinstance(sizes, dict) and sizes.keys() <= set(preset_names()) and preset not in sizes:
        raise ConfigError(
            f"{path} has no settings for " + (f"--preset {preset}" if preset else "a run without --preset"),
            expected=", ".join(sizes),
            fix="name one of these, or a recipe of your own with this one as its base",
        )
    values: dict[str, Any] = {}
    for source, document in reversed(files):
        values |= flat_values(document, str(source), sections, all_sections, preset)
    return values


def _with_bases(path: Path) -> list[tuple[Path, dict[str, Any]]]:
    """A recipe, the one that it builds on, and so on down."""
    files: list[tuple[Path, dict[str, Any]]] = []
    while True:
        document = _document(path)
        base = document.pop("base", None)
        files.append((path, document))
        if base is None:
            return files
        path = (path.parent / str(base)).resolve()
        if path in [file.resolve() for file, _ in files]:
            raise ConfigError(f"{files[0][0]} builds on itself", got=f"base = {base!r} in {files[-1][0]}")


def _document(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}", got=error, fix="give the path of a TOML file") from None
    return parse_toml(text, str(path))


def flat_values(
    document: Mapping[str, Any],
    source: str,
    sections: Sequence[type],
    all_sections: Sequence[type],
    preset: str | None = None,
) -> dict[str, Any]:
    """The values of `sections` in a parsed recipe, those of `[preset.NAME]` last; every fault of all of it reported."""
    known = specs_by_name(all_sections)
    problems: list[str] = []
    values: dict[str, Any] = {}
    of_preset: dict[str, Any] = {}
    for table, content in document.items():
        if table != "preset" or not isinstance(content, dict):
            values |= _flat_table(table, content, known, problems)
            continue
        for name, tables in content.items():
            if name not in preset_names() or not isinstance(tables, dict):
                problems.append(f"[preset.{name}] is no table of a preset{nearest(name, preset_names())}")
                continue
            for inner, settings in tables.items():
                found = _flat_table(inner, settings, known, problems, f"preset.{name}.")
                of_preset |= found if name == preset else {}
    if problems:
        listed = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(problems, 1))
        raise ConfigError(f"{source} has {len(problems)} problem(s):\n{listed}")
    return {name: value for name, value in (values | of_preset).items() if known[name][0] in sections}


def _flat_table(
    table: str,
    content: Any,
    known: Mapping[str, tuple[type, FieldSpec]],
    problems: list[str],
    under: str = "",
) -> dict[str, Any]:
    """The values of one table; what is wrong with it is added to `problems`."""
    tables = [section_name(section) for section, _ in known.values()]
    if table not in tables or not isinstance(content, dict):
        problems.append(f"[{under}{table}] is no table of a recipe{nearest(table, tables)}")
        return {}
    values = {}
    for key, value in content.items():
        section, spec = known.get(key, (None, None))
        if section is None or spec is None:
            problems.append(f"[{under}{table}] {key} is no setting{nearest(key, known)}")
        elif table not in (section_name(section), spec.former_table):
            problems.append(f"[{under}{table}] {key} belongs in [{section_name(section)}]")
        elif (expected := spec.problem(value)) is not None:
            problems.append(f"[{under}{table}] {key} = {value!r}: expected {expected}")
        else:
            values[key] = value
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
