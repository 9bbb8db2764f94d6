"""Flags -> settings. Precedence: preset < TOML < flags; everything wrong is reported at once."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_retro.config.fields import FieldSpec
from megatron_retro.config.megatron_flags import (
    BY_VALUE,
    MEGATRON_DEFAULTS,
    different_defaults,
    instead_of,
    speaks_megatron,
    translated,
)
from megatron_retro.config.model import ModelConfig, RetroConfig
from megatron_retro.config.settings import MEGATRON_ORIGIN, Settings, build_settings, section_name, specs_by_name
from megatron_retro.config.toml_files import preset_names, preset_path, read_recipe
from megatron_retro.errors import ConfigError

# Of a section of which a verb reads only some fields, those; the others are no flags of that verb.
Reads = Mapping[type, Sequence[str]]


UNSET = "none"


@dataclass(frozen=True)
class Positional:
    """Words of a verb that stand without a flag; `count` is argparse's nargs."""

    name: str
    count: str
    help: str


def opposite(flag: str) -> str:
    """What switches off what `flag` switches on: --no-x for --x, and --x for Megatron's flags that begin with --no-."""
    return "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else "--no-" + flag.removeprefix("--")


class Switch(argparse.Action):
    """A flag that takes no value: its own spellings switch on, their opposites off."""

    def __init__(self, option_strings: Sequence[str], dest: str, **more: Any) -> None:
        super().__init__([*option_strings, *map(opposite, option_strings)], dest, nargs=0, **more)
        self._on = tuple(option_strings)

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Set what the spelling says."""
        setattr(namespace, self.dest, option_string in self._on)


class FlagParser(argparse.ArgumentParser):
    """argparse with our kind of error: named, with the nearest flag, raised instead of exiting."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse found."""
        raise ConfigError(message, fix=f"see {self.prog} --help")


def add_section_flags(parser: argparse.ArgumentParser, sections: Sequence[type], reads: Reads) -> None:
    """One flag per field that is read, one help group per section."""
    specs_by_name(sections)
    for section in sections:
        title = (section.__doc__ or section_name(section)).strip().splitlines()[0]
        group = parser.add_argument_group(f"[{section_name(section)}] {title}")
        for name, spec in _flags_of([section], reads).items():
            _add_flag(group, name, spec)


def _flags_of(sections: Sequence[type], reads: Reads) -> dict[str, FieldSpec]:
    """The fields that have a flag here."""
    known = specs_by_name(sections).items()
    return {name: spec for name, (section, spec) in known if section not in reads or name in reads[section]}


def _add_flag(group: argparse._ArgumentGroup, name: str, spec: FieldSpec) -> None:
    notes = "" if spec.default is None else f" [{spec.default}]"
    help_text = (spec.help + notes + (" (ours)" if spec.ours else "")).replace("%", "%%")
    if spec.kind is bool:
        group.add_argument(*spec.spellings, dest=name, action=Switch, default=argparse.SUPPRESS, help=help_text)
        return
    metavar = "{" + ",".join(spec.choices) + "}" if spec.choices else spec.kind.__name__.upper()
    group.add_argument(
        *spec.spellings,
        dest=name,
        type=_converter(spec),
        nargs="+" if spec.repeated else None,
        metavar=metavar,
        default=argparse.SUPPRESS,
        help=help_text,
    )


def _converter(spec: FieldSpec) -> Callable[[str], Any]:
    """Text -> the field's type; a text that does not convert stays text, for the check that names it.

    `none` unsets what a recipe sets, where a field may be unset.
    """

    def convert(text: str) -> Any:
        if text == UNSET and spec.optional:
            return None
        try:
            return spec.kind(text)
        except ValueError:
            return text

    return convert


def parse_settings(
    prog: str,
    sections: Sequence[type],
    arguments: Sequence[str],
    *,
    all_sections: Sequence[type],
    description: str = "",
    positional: Positional | None = None,
    reads: Reads | None = None,
) -> tuple[Settings, argparse.Namespace]:
    """The settings of a verb, and what is left of its namespace (`config`, `preset`, `print_config`, `note`)."""
    words = "" if positional is None else f" {positional.name.upper()} ..."
    parser = FlagParser(
        prog=prog,
        usage=f"%(prog)s [--config FILE.toml] [--preset NAME] [flags]{words}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    general = parser.add_argument_group("settings files")
    general.add_argument("--config", type=Path, metavar="FILE", help="a recipe in TOML; flags win over it")
    general.add_argument("--preset", metavar="NAME", help="a published size: " + ", ".join(preset_names()))
    general.add_argument(
        "--print-config", action="store_true", help="print the effective TOML with the origin of each value, and stop"
    )
    general.add_argument(
        "--megatron-defaults", action="store_true", help="Megatron-LM's defaults where ours differ; files and flags win"
    )
    if positional is not None:
        parser.add_argument(positional.name, nargs=positional.count, help=positional.help)
    add_section_flags(parser, sections, reads or {})
    known = _flags_of(sections, reads or {})
    namespace, unknown = parser.parse_known_args(translated(arguments, known))
    given = {name: value for name, value in vars(namespace).items() if name in specs_by_name(sections)}
    flags = {name: None if value == [None] else value for name, value in given.items()}
    namespace.note = "" if namespace.megatron_defaults else _note(arguments, known, flags)
    _refuse([*_unknown(unknown, known, all_sections), *_illegal(flags, sections)], namespace.note)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if namespace.megatron_defaults:
        values.update({name: value for name, value in MEGATRON_DEFAULTS.items() if name in known})
        origins.update(dict.fromkeys(values, MEGATRON_ORIGIN))
    for origin, path in _recipe_files(namespace):
        found = read_recipe(path, sections, all_sections, namespace.preset)
        values.update(found)
        origins.update(dict.fromkeys(found, origin))
    values.update(flags)
    origins.update(dict.fromkeys(flags, "flag"))
    return build_settings(sections, values, origins), namespace


def _note(arguments: Sequence[str], known: Mapping[str, FieldSpec], flags: Mapping[str, Any]) -> str:
    """What a script of Megatron-LM's would get otherwise than there."""
    if not speaks_megatron(arguments):
        return ""
    table = different_defaults({name: spec.default for name, spec in known.items()}, flags)
    return f"defaults that are others here (--megatron-defaults takes Megatron-LM's):\n{table}" if table else ""


def _recipe_files(namespace: argparse.Namespace) -> list[tuple[str, Path]]:
    files = []
    if namespace.preset is not None:
        files.append((f"preset {namespace.preset}", preset_path(namespace.preset)))
    if namespace.config is not None:
        files.append((str(namespace.config), namespace.config))
    return files


def _refuse(problems: Sequence[str], note: str) -> None:
    if problems:
        raise ConfigError("\n".join(problems), fix="--help lists every flag" + (f"\n{note}" if note else ""))


def _unknown(unknown: Sequence[str], known: Mapping[str, FieldSpec], all_sections: Sequence[type]) -> list[str]:
    """Each word that argparse did not know, with what to give in its place."""
    here = [*_spellings(known.values()), "--config", "--preset", "--print-config", "--megatron-defaults"]
    everywhere = specs_by_name(all_sections)
    elsewhere = _spellings(spec for _, spec in everywhere.values())
    of_model = [spec for section, spec in everywhere.values() if section in (ModelConfig, RetroConfig)]
    from_checkpoint = _spellings(of_model) if "load" in known else ()
    problems: list[str] = []
    for word in unknown:
        if word.startswith("-"):
            flag = word.split("=")[0]
            problems.append(f"{flag} is no flag of this command{instead_of(flag, here, elsewhere, from_checkpoint)}")
        elif not problems or "stands alone" in problems[-1]:  # after an unknown flag it is that flag's value
            problems.append(f"{word!r} stands alone; values follow a flag")
    return problems


def _spellings(specs: Iterable[FieldSpec]) -> list[str]:
    """All that the command line takes for these fields."""
    given = [(spelling, spec.kind is bool) for spec in specs for spelling in spec.spellings]
    return [flag for spelling, switch in given for flag in ([spelling, opposite(spelling)] if switch else [spelling])]


def _illegal(values: Mapping[str, Any], sections: Sequence[type]) -> list[str]:
    known = specs_by_name(sections)
    return [
        f"{known[name][1].flag} {value}: expected {expected}{_in_place(value)}"
        for name, value in values.items()
        if (expected := known[name][1].problem(value)) is not None
    ]


def _in_place(value: Any) -> str:
    words = value if isinstance(value, list) else [value]
    return next((f"; {BY_VALUE[word]}" for word in words if isinstance(word, str) and word in BY_VALUE), "")
