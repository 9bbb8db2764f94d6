"""The files of a study: each run has a directory with its settings, its log, and its outcome once it ended.

STUDY/study.json                raw results of every run      STUDY/report.html
STUDY/cells/NAME/settings.toml  the run as a recipe           STUDY/cells/NAME/run/      what --save names
STUDY/cells/NAME/output.log     what it printed               STUDY/cells/NAME/outcome.json
STUDY/claims/                   who works on what
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from megatron_retro.ablation.grid import Cell
from megatron_retro.artifacts.files import write_file
from megatron_retro.config.settings import DEFAULT_ORIGIN, Settings, section_name
from megatron_retro.config.toml_files import toml_value
from megatron_retro.errors import ArtifactError
from megatron_retro.runtime.strict_json import json_text


@dataclass(frozen=True)
class Outcome:
    """How a run ended; exit code 0 is finished. `seconds` are of all starts; no neighbours, no `shortage`."""

    exit_code: int
    seconds: float
    ended: float
    message: str = ""
    shortage: float | None = None


@dataclass(frozen=True)
class CellDirectory:
    """The directory of one run."""

    path: Path

    @property
    def run(self) -> Path:
        """What --save names."""
        return self.path / "run"

    @property
    def settings(self) -> Path:
        """The recipe of the run."""
        return self.path / "settings.toml"

    @property
    def output(self) -> Path:
        """What the run printed."""
        return self.path / "output.log"

    def outcome(self) -> Outcome | None:
        """How it ended, or None."""
        path = self.path / "outcome.json"
        if not path.is_file():
            return None
        try:
            return Outcome(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is no outcome of a run", got=error, fix="remove it to run it again") from None

    def end(self, outcome: Outcome) -> None:
        """Write down how it ended."""
        write_file(self.path / "outcome.json", json_text(asdict(outcome), indent=1) + "\n")

    def refuse_other(self, recipe: str) -> None:
        """A directory of other settings is refused, for its results would be mixed up."""
        if self.settings.is_file() and self.settings.read_text() != recipe:
            raise ArtifactError(
                f"{self.path} was run with other settings",
                got=_first_difference(recipe, self.settings.read_text()),
                fix="give another --study-output, or remove that directory",
            )


def cell_directory(study: Path, cell: Cell) -> CellDirectory:
    """Where a run of the study lives."""
    return CellDirectory(study / "cells" / cell.name)


def cell_settings(settings: Settings, cell: Cell, sections: Sequence[type]) -> Settings:
    """The settings of a run, only the sections of its verb."""
    changes = {name: tuple(value) if isinstance(value, list) else value for name, value in cell.changes.items()}
    return Settings([settings[section] for section in sections], settings.origins()).replace(**changes)


def render_recipe(settings: Settings) -> str:
    """All fields that someone set, as a recipe: a value that was set to the default is still no default to a verb that
    inherits settings."""
    lines: list[str] = []
    for section in settings:
        given: dict[str, Any] = {
            field.name: getattr(section, field.name)
            for field in fields(section)
            if settings.origin(field.name) != DEFAULT_ORIGIN
        }
        if given:
            lines.append(f"[{section_name(type(section))}]")
            lines += [f"{name} = {toml_value(value)}" for name, value in given.items() if value is not None]
            lines.append("")
    return "\n".join(lines)


def _first_difference(wanted: str, found: str) -> str:
    ours, theirs = ({line for line in text.splitlines() if "=" in line} for text in (wanted, found))
    now, then = sorted(ours - theirs)[:1], sorted(theirs - ours)[:1]
    return "; ".join([*(f"now {line}" for line in now), *(f"then {line}" for line in then)])
